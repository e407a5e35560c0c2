"""Tables at the width of a terminal."""

from rich.console import Console

from tests.bench.reports.test_contrasts import contrasted
from vidaccel.bench.reports.tables import speed_tables

LONG = "student-taylorseer-3 of-mine"


def test_comparisons_are_broken_between_words():
    found = contrasted()
    found["runs"][0] = found["runs"][0] | {"method": LONG}
    for each in found["runs"][0]["contrasts"][0]["deltas"].values():
        each["verdict"] = "too few prompts to tell"
    console = Console(width=80, record=True)
    for part in speed_tables(found):
        console.print(part, markup=False)
    text = console.export_text()
    assert LONG in text and {"error", "own", "few", "prompts", "student-7"} <= set(text.split())
