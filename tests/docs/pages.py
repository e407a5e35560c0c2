"""What the documentation holds, as the tests read it: pages, their code, and the words in backticks."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import vidaccel
from vidaccel.worlds import WORLDS, world

ROOT = Path(vidaccel.__file__).parents[1]
CARDS = sorted(card for name in WORLDS for card in world(name).SHIPPED.rglob("README.md"))
"""Of models that ship."""
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "studies").rglob("*.md"))]
PAGES += CARDS
EXTENDING = sorted((ROOT / "docs").glob("extending*.md"))


class Code(NamedTuple):
    """A block of code."""

    page: Path
    line: int
    """Of the page, from 1: where the code begins."""
    language: str
    """As the fence names it; "" for a block that is indented."""
    text: str
    example: str | None
    """Name in the last `<!-- example: NAME -->` of its section."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Code]:
    """The fenced and indented code of a page."""
    found, example, lines = [], None, page.read_text(encoding="utf-8").split("\n")
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("#"):
            example = None
        elif mark := re.fullmatch(r"<!-- example: (\S+) -->", line):
            example = mark[1]
        elif line.startswith("```"):
            end = lines.index("```", at + 1)
            text = "\n".join(lines[at + 1 : end]) + "\n"
            found.append(Code(page, at + 2, line.removeprefix("```"), text, example))
            at = end
        elif line.startswith("    ") and not lines[at - 1].strip():
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(each.removeprefix("    ") for each in lines[at:end]).rstrip("\n") + "\n"
            found.append(Code(page, at + 1, "", text, None))
            at = end - 1
        at += 1
    return found


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    lines = page.read_text(encoding="utf-8").split("\n")
    for block in blocks(page):
        for at in range(block.line - 1, block.line - 1 + block.text.count("\n")):
            lines[at] = ""
    return "\n".join(line for line in lines if not line.startswith("```"))


def spans(page: Path) -> list[str]:
    """What stands in backticks in the text, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path, *programs: str) -> Iterator[str]:
    """Command lines that begin with one of these programs (or with environment variables or torchrun before it),
    without comments and joined where a backslash ends a line."""
    lines = []
    for block in blocks(page):
        if block.language in ("", "sh", "bash", "console"):
            lines += block.text.replace("\\\n", " ").split("\n")
    for line in [*lines, *spans(page)]:
        line = re.sub(r"\s+#.*", "", line).strip()
        started = re.match(
            rf"(?:\w+=\S+ )*(?:torchrun .*?-m )?((?:{'|'.join(map(re.escape, programs))})(?: .*)?)$", line
        )
        if started:
            yield started[1]
