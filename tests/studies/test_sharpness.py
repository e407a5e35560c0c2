"""How many prompts a score needs, from differences that are worked out by hand."""

import json

import pytest
from typer.testing import CliRunner

from studies.sharpness import MEASURES, app, sharpness
from vidaccel.errors import UserError
from vidaccel.worlds import scorer_named

EACH = ("shape", "colour", "motion", "background", "all_right", "pair", "frames_right", "margin") + (
    "background_consistency",
    "temporal_flicker",
    "subject_consistency",
    "motion_smoothness",
    "imaging_quality",
    "dynamic_degree",
)
COUNT = 400


def scored(method: str, **ours: list[float]) -> dict:
    scores = {name: [100.0] * COUNT for name in EACH} | ours
    return {"method": method, "per_prompt": {"scores": scores}}


RESULTS = {
    "prompts": [str(i) for i in range(COUNT)],
    "meanings": [str(i) for i in range(COUNT)],
    "runs": [
        scored("full"),
        scored("few", margin=[98.0 if i % 2 else 100.0 for i in range(COUNT)]),
        {"method": "not run", "per_prompt": None},
    ],
}


def test_a_difference_of_one_whose_pairs_spread_by_one():
    """z is its root of the number of prompts, 20; a single one is seen on 2.8^2 prompts."""
    found = sharpness(RESULTS, "full", "few")
    assert set(found) == set(MEASURES) and set(MEASURES) <= {
        *EACH,
        *scorer_named("sprites").totals(dict.fromkeys(EACH, 0)),
    }
    assert found["margin"].delta == pytest.approx(1.0)
    assert found["margin"].z == pytest.approx(20, rel=0.1) and found["margin"].prompts == pytest.approx(7.84, rel=0.2)
    assert sharpness(RESULTS, "few", "full")["margin"].z == pytest.approx(-found["margin"].z)
    assert found["frames_right"] == (0.0, 0.0, float("inf"))


CHAIN = {
    "prompts": 100,
    "rows": {"teacher": {}, "few": {"paired": {n: {"mean": -2.0, "low": -3.96, "high": -0.04} for n in MEASURES}}},
}


def test_a_chains_scores_have_their_differences():
    assert sharpness(CHAIN, "teacher", "few")["total"] == (2.0, pytest.approx(2.0), pytest.approx(100 * 1.4**2))


@pytest.mark.parametrize(
    ("found", "row", "other"),
    [(RESULTS, "full", "not run"), (RESULTS, "lost", "few"), (CHAIN, "few", "teacher"), (CHAIN, "teacher", "teacher")],
)
def test_rows_that_were_not_compared(found, row, other):
    with pytest.raises(UserError, match=f'"{other}"|"{row}"'):
        sharpness(found, row, other)


def test_the_command_prints_a_line_for_each_score(tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(CHAIN))
    result = CliRunner().invoke(app, [str(file), "teacher", "few"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "| score | less few: points, z, prompts |"
    assert "| all right | +2.00, 2.0, 196 |" in result.stdout
