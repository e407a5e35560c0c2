"""Bars on a terminal."""

import io
import sys

from vidaccel.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    """Of stderr, for the time of a test; pytest puts its own in place after a fixture."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def test_what_is_printed_to_a_file_gets_there_while_a_bar_is_shown(monkeypatch):
    shown = terminal(monkeypatch)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with Progress("videos", total=1) as bar:
        print("0000.mp4: 5 frames")
        bar.advance()
    assert file.getvalue() == "0000.mp4: 5 frames\n"
    assert "videos" in shown.getvalue() and "5 frames" not in shown.getvalue()


def test_a_bar_within_another_is_a_line_of_it(monkeypatch):
    shown = terminal(monkeypatch)
    with Progress("videos", total=2, live=False) as outer:
        with Progress("denoising", total=4) as inner:
            inner.advance(3)
            outer.advance()
        last = shown.getvalue()[shown.getvalue().rindex("videos") :]
        assert "1/2" in last and "denoising" in last and "3/4" in last
        outer.advance()
    assert "denoising" not in shown.getvalue()[shown.getvalue().rindex("videos") :]
    with Progress("alone", total=1) as bar:
        bar.advance()
    assert "1/1" in shown.getvalue()[shown.getvalue().rindex("alone") :]


def test_of_many_processes_a_bar_within_another_is_not_shown(monkeypatch):
    shown = terminal(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Progress("videos", total=2), Progress("denoising", total=4) as inner:
        inner.advance()
    assert "videos" in shown.getvalue() and "denoising" not in shown.getvalue()
