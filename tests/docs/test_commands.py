"""Command lines of the documentation are ones that run: commands, flags, configurations, settings, make targets."""

import contextlib
import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from tests.docs.pages import EXTENDING, PAGES, ROOT, blocks, commands, name
from tests.docs.placing import place
from vidaccel.cli.common import is_setting
from vidaccel.cli.main import app as vidaccel_app
from vidaccel.config import explained, loader
from vidaccel.config.distill import DistillConfig, with_method_groups
from vidaccel.worlds.sprites.__main__ import app as sprites_app

PROGRAMS = {
    "vidaccel": vidaccel_app,
    "python -m vidaccel.sprites": sprites_app,
}
CHANGED = [ROOT / page for page in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
"""Pages whose commands are today's; a card or a results file says what was run when it was made."""
ADDED = {"family": "chronoedit", "forecaster": "average", "method": "halving", "target": "midpoint", "world": "bar"}
"""Examples of docs/extending*.md whose names are in commands there: what they add, which has to be in place."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Iterator[None]:
    """The working directory of a reader: the YAML files that the pages show, each by the comment in its first line."""
    folder = tmp_path_factory.mktemp("workplace")
    for page in CHANGED:
        for block in blocks(page):
            if block.language == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", block.text)):
                file = folder / named[1]
                file.parent.mkdir(exist_ok=True, parents=True)
                file.write_text(block.text)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(explained, "commented", lambda config: "")
        yield


@functools.cache
def refusal(line: str) -> str:
    """What is wrong with a command line, as its program says it; "" if nothing is.

    Its settings are composed from the configuration, with the values checked; nothing is loaded or run.
    """
    program = next(program for program in PROGRAMS if line.startswith(program))
    words = [word for word in shlex.split(line.removeprefix(program)) if word != "..."]
    stop = "--print-conf" if words and words[0] in loader.SCHEMAS else "--help"
    result = CliRunner().invoke(PROGRAMS[program], [*words, *[stop] * (stop not in words)])
    misspelt = [
        word
        for word in words[1:]
        if re.match(r"\w+=", word) and words[0] == "generate" and not is_setting(word, loader.SCHEMAS["generate"])
    ]
    return result.stderr or ("" if result.exit_code == 0 else result.output) or ", ".join(misspelt)


@pytest.mark.parametrize("page", CHANGED, ids=name)
def test_commands_parse_and_their_settings_fit(page, workplace):
    lines = [line for line in commands(page, *PROGRAMS) if not named(line, *ADDED.values())]
    assert {line: said for line in lines if (said := refusal(line))} == {}


def named(line: str, *names: str) -> bool:
    return re.search(rf"\b({'|'.join(names)})\b", line) is not None


@pytest.mark.parametrize("example", ADDED)
def test_commands_with_what_an_example_adds(example, workplace, tmp_path):
    for placed in place(example, tmp_path):
        placed.patch.setitem(loader.SCHEMAS, "distill", with_method_groups(DistillConfig))
        lines = [line for page in EXTENDING for line in commands(page, "vidaccel") if named(line, ADDED[example])]
        assert lines and {line: said for line in lines if (said := refusal(line))} == {}
    if example != "forecaster":  # whose name might be a folder's
        assert any(refusal.__wrapped__(line) for line in lines)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_make_targets_modules_and_scripts_exist(page):
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()
    for line in commands(page, "make"):
        words = [word for word in shlex.split(line)[1:] if "=" not in word]
        assert set(words) <= set(targets), line
    for line in commands(page, "python"):
        words = shlex.split(line)[1:]
        if words[:1] == ["-m"]:
            assert importlib.util.find_spec(words[1]), line
        elif words:
            assert (ROOT / words[0]).is_file(), line


def test_commands_are_found_wherever_they_stand():
    found = {page: list(commands(ROOT / page, "vidaccel")) for page in ("README.md", "docs/accelerate-your-model.md")}
    assert len(found["README.md"]) >= 10 and len(found["docs/accelerate-your-model.md"]) >= 20
    joined = next(line for line in found["docs/accelerate-your-model.md"] if "faster.mp4" in line)
    assert joined.startswith("vidaccel generate") and "compile=true" in joined and "\\" not in joined
    assert any("--nproc" not in line and "distill --conf mine/cfg.yaml" in line for line in sum(found.values(), []))


@pytest.mark.parametrize(
    "line",
    [
        "vidaccel generat 'a cat'",
        "vidaccel generate 'a cat' --fast",
        "vidaccel generate 'a cat' evry=3",
        "vidaccel generate 'a cat' every=0.5",
        "vidaccel benchmark --plan --conf wan_2b",
        "vidaccel benchmark --plan methods.student-8.between=reuse",
        "vidaccel distill --conf mine/nothing.yaml",
        "python -m vidaccel.sprites shipped",
    ],
)
def test_the_check_itself(line, workplace):
    assert refusal(line)
