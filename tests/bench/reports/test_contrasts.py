"""Verdicts in words, and the tables that show them."""

from rich.console import Console

from tests.bench.test_results import RUN, results
from vidaccel.bench.reports.contrasts import orders, tables_of
from vidaccel.bench.reports.html import report
from vidaccel.bench.reports.tables import speed_tables

ERROR, MOTION = "own_fidelity.latent_relative_l2", "own_fidelity.dynamic_degree"


def difference(delta: float, verdict: str | None) -> dict:
    return {"delta": delta, "low": delta - 0.5, "high": delta + 0.5, "p": 0.01, "p_holm": 0.02, "verdict": verdict}


def contrasted() -> dict:
    """Two rows that were compared, and one of a file of before."""
    asked = {
        "six": {"total": difference(0.861, "better"), ERROR: difference(-1.0, "better"), "shape": difference(3, None)},
        "four": {
            "total": difference(0.2, "not told apart"),
            ERROR: difference(2.0, "worse"),
            MOTION: difference(-1, None),
        },
    }
    runs = [
        RUN | {"method": name, "contrasts": [{"question": "equal compute", "with": "student-7", "deltas": deltas}]}
        for name, deltas in asked.items()
    ]
    found = results() | {"command": "vidaccel benchmark", "endpoints": ["total", ERROR]}
    return found | {"runs": [*runs, RUN]}


def test_a_sentence_for_each_measure():
    said = list(orders(contrasted(), contrasted()["runs"]))
    asked = "Against the same model in as many full passes, by FLOPs, "
    assert said == [
        f"{asked}total: better: six than student-7; not told apart: 1 row.",
        f"{asked}latent error to its own full run: better: six than student-7; worse: four than student-7.",
    ]
    assert list(orders(results(), results()["runs"])) == []
    few = contrasted()
    few["runs"][1]["contrasts"][0]["deltas"] = {"total": difference(0.2, "too few prompts to tell")}
    told = "better: six than student-7; too few prompts to tell: 1 row."
    assert next(orders(few, few["runs"])) == f"{asked}total: {told}"


def test_tables_have_the_difference_its_interval_and_the_verdict(schema, tmp_path):
    found = contrasted()
    schema.validate(found)
    ((_, headings, lines),) = tables_of(found, found["runs"])
    measures = ["total", "latent error to its own full run", "motion to its own full run"]
    assert headings == ["method", "against", *measures]
    assert lines[0] == ["six", "student-7", "+0.861 [+0.361, +1.36] better", "-1 [-1.5, -0.5] better", ""]
    assert lines[1][-1] == "-1 [-1.5, -0.5]"  # less motion is neither better nor worse
    console = Console(width=80, record=True)
    for part in speed_tables(found):
        console.print(part)
    text = console.export_text()
    assert "+0.2 [-0.3, +0.7] not told apart" in text and "+2 [+1.5, +2.5] worse" in text
    assert "latent error " in text and "to its own " in text  # broken between words
    page = report(found, tmp_path)
    assert "<td>+0.861 [+0.361, +1.36] better</td>" in page and "better: six than student-7" in page
    assert "<h3>Which is better</h3>" not in report(results() | {"command": "vidaccel"}, tmp_path)


def test_a_dimension_of_which_vbench_has_no_mean_leaves_its_cell_empty(tmp_path):
    """As where it failed on one video of many: the others have an interval."""
    run = RUN | {
        "intervals": {"total": [80, 90], "vbench.motion_smoothness": [10.0, 20.0]},
        "total": 85.0,
        "vbench": None,
    }
    found = results() | {"command": "vidaccel benchmark", "runs": [run]}
    assert "85 [80, 90]" in report(found, tmp_path)
