"""Links of the documentation lead somewhere, and README stays a front door."""

import re

import pytest

from tests.docs.pages import CARDS, PAGES, ROOT, name, prose, spans
from tests.test_layering import LAYERS, PACKAGE

LINK = re.compile(r"!?\[[^\]]*\]\(\s*([^)\s]+)\s*\)")


def anchors(page) -> set[str]:
    """Those of the headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if i == 0 else f"{slug}-{i}" for slug, count in found.items() for i in range(count + 1)}


def broken(page) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or anchor and anchor not in anchors(file):
            found.append(target)
    return found


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/extending.md"} <= {name(page) for page in PAGES}
    assert len(CARDS) == 8


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_lead_somewhere(page):
    assert broken(page) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Two words, `code` & more\n[a](#two-words-code--more) [b](#two-words)", ["#two-words"]),
        ("# A\n# A\n[a](#a-1) [b](#a-2)\n\n    [c](#nothing)\n", ["#a-2"]),
        ("[a](other.md) [b](other.md#there) [c](\nother.md#gone) ![d](lost.png) [e](https://x.org/#y)",
         ["other.md#gone", "lost.png"]),
    ],
)  # fmt: skip
def test_the_check_itself(tmp_path, text, expected):
    (tmp_path / "other.md").write_text("## There\n")
    (tmp_path / "page.md").write_text(text)
    assert broken(tmp_path / "page.md") == expected


def test_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_rooms_of_the_design_are_the_layers():
    """Every layer stands in the table, in the order in which files may import."""
    table = (ROOT / "docs" / "design.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    rooms = [room for row in table.split("\n| ")[1:] for room in re.findall(r"`([\w./]+)`", row.split(" | ")[0])]
    layers = [layer.removeprefix("vidaccel.").replace(".", "/") for layer in LAYERS]
    assert [room.removesuffix("/").removesuffix(".py") for room in rooms] == layers


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_modules_that_the_text_names_exist(page):
    """`folder/file.py`, in the repository or in the package; what a reader would add has NAME or <name> in it."""
    named = {span for span in spans(page) if re.fullmatch(r"[\w./]+/[\w.]+\.py|conf/[\w./]+\.yaml", span)}
    own = {span for span in named if "NAME" in span or "FAMILY" in span}
    assert {span for span in named - own if not any((place / span).exists() for place in (ROOT, PACKAGE))} == set()
