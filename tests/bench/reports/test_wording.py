"""Rows said in words."""

import pytest

from tests.bench.test_results import RUN
from vidaccel.bench.reports.wording import CACHES as NAMES
from vidaccel.bench.reports.wording import STAND_INS, in_words
from vidaccel.config.benchmark import CACHES, LEFT_OUT
from vidaccel.forecasters.registry import FORECASTERS

FULL = {"full": 8, "predicted": 0, "skipped": 0}
ROWS = {
    "teacher, 50 steps of two passes": {"on": "teacher", "settings": {"two_pass": True}, "passes": FULL, "steps": 50},
    "teacher, guided in one pass, 8 steps": {"on": "teacher", "settings": {}, "passes": FULL, "steps": 8},
    "teacher, 8 steps": {"on": "teacher", "settings": {"as_called": True}, "passes": FULL, "steps": 8},
    "student, 1 step, shift 3": {"settings": {"shift": 3.0}, "passes": FULL, "steps": 1},
    "student, 20 steps, 8 in full, else a learned network": {"settings": {"on_skipped": "predictor"}},
    "student, 20 steps, 8 in full (searched), else fitted scalars": {
        "settings": {"on_skipped": "multistep", "budget": 8}
    },
    "student, 20 steps, with sharp.safetensors, decoded by narrow": {
        "settings": {"lora": ["runs/sharp.safetensors"], "decoder": "runs/narrow/"},
        "passes": FULL,
    },
    "mine, 20 steps, TeaCache (threshold 0.15)": {
        "settings": {
            "model": "runs/mine/",
            "cache": "teacache",
            "settings": {"threshold": 0.15, "coefficients": [1, 2]},
        }
    },
    "student, 20 steps, cache-dit's DBCache (computed blocks 1, mask 1001, TaylorSeer order 1)": {
        "settings": {
            "cache": "cache_dit",
            "settings": {
                "Fn_compute_blocks": 1,
                "steps_computation_policy": "static",
                "steps_computation_mask": "1001",
                "taylorseer_order": 1,
            },
        }
    },
}


@pytest.mark.parametrize("words", ROWS)
def test_a_row(words):
    assert in_words(RUN | ROWS[words]) == words


def test_whatever_can_stand_in_has_words():
    assert set(STAND_INS) == {*FORECASTERS, *LEFT_OUT} and set(NAMES) >= set(CACHES)
