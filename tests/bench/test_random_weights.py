"""Full-size models with random weights, at a size that a CPU runs: whole, and from their parts."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import tiny_pipeline
from vidaccel.bench import random_weights
from vidaccel.bench.plan import size_costs
from vidaccel.bench.random_weights import Model, time_random_weights
from vidaccel.bench.sizes import meta_transformer, planned_family
from vidaccel.cli.main import app
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import named_outputs
from vidaccel.models.calling import compression_of

TEXTS = {
    "ltx2": {"prompt": 16, "audio": 5},
    "hunyuan_video_15": {"prompt": 12, "glyphs": 8, "image": 729},
    "hunyuan_video_15_i2v": {"prompt": 12, "glyphs": 8, "image": 4},
}
"""Lengths of texts, where there are more than these."""
PROMPT = {"prompt": 16}
PROMPT_AND_IMAGE = {"prompt": 512, "image": 5}
"""Wan's blocks take 512 of them for the text's."""
METHODS = {
    "cfg": MethodConfig(weights="teacher", steps=4, two_pass=True),
    "student": MethodConfig(steps=2),
    "predictor": MethodConfig(steps=4, full_steps=[0, 2]),
    "reuse": MethodConfig(steps=4, full_steps=[0], on_skipped="reuse"),
    "fora": MethodConfig(steps=4, every=2, on_skipped="branches", cache="fora", settings={"every": 2}),
    "teacache": MethodConfig(steps=4, cache="teacache", settings={"threshold": 1}),
}


def config_of(family: str, **changes) -> BenchmarkConfig:
    """The tiny pipeline's transformer."""
    pipe = tiny_pipeline(family)
    settings = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    compression = list(compression_of(pipe, FAMILIES[family]))
    usual = PROMPT_AND_IMAGE if FAMILIES[family].costs.texts == {"prompt", "image"} else PROMPT
    fixed = {
        "text_tokens": TEXTS.get(family, usual),
        "sizes": [[5, 32, 32]],
        "compression": compression,
        "dtype": "float32",
    }
    options = {"predictor_blocks": 1, "rounds": 2, "methods": METHODS, "baseline": "cfg"} | changes
    return BenchmarkConfig(family=family, transformer=settings, **fixed | options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_timed_whole_and_in_parts(family, dtype, schema):
    for whole in (True, False):
        results = time_random_weights(config_of(family, dtype=dtype, whole=whole), "cpu")
        schema.validate(results)
        runs = {run["method"]: run for run in results["runs"]}
        assert {run["settings"]["random_weights"] for run in runs.values()} == {"whole" if whole else "blocks"}
        timed = ["cfg", "student", "predictor", "reuse"]
        assert [name for name, run in runs.items() if run["denoise_seconds"]] == timed
        assert all(runs[name]["denoise_seconds"]["rounds"] == 2 for name in timed)
        assert "random weights do not tell" in runs["fora"]["error"] and runs["teacache"]["passes"] is None


def test_rows_are_put_together_from_passes(monkeypatch):
    """Passes of 8 s, of 2 s with a predictor, and of 1 s."""
    config = config_of("hunyuan_video", whole=True)
    monkeypatch.setattr(random_weights, "_time", lambda call, device: 8.0 if call.__name__ == "full" else _short(call))
    runs = {run["method"]: run for run in time_random_weights(config, "cpu")["runs"]}
    seconds = {name: run["denoise_seconds"] and run["denoise_seconds"]["median"] for name, run in runs.items()}
    expected = {"cfg": 64, "student": 16, "predictor": 2 * 8 + 2 * 2, "reuse": 8 + 3, "fora": None, "teacache": None}
    assert seconds == expected
    assert runs["predictor"]["speedup"]["measured"] == 64 / 20
    assert runs["cfg"]["speedup"] == {"measured": 1, "ideal": 1, "measured_over_ideal": 1, "end_to_end": None}


def _short(call) -> float:
    return 1.0 if call.__name__ == "without_trunk" else 2.0


def test_a_full_pass_is_made_of_its_parts():
    config = config_of("hunyuan_video")
    costs = size_costs(config, planned_family(config), meta_transformer(config), (5, 32, 32))
    model = Model(config, costs, torch.device("cpu"), depth=1)
    calls, kinds = model.parts()
    assert len(model.transformer.transformer_blocks) == len(model.transformer.single_transformer_blocks) == 1
    # one double and two single blocks in the whole model
    assert kinds["full"] == {"outside": 1, "transformer_blocks": 1, "single_transformer_blocks": 2}
    assert kinds["predictor"] == {"outside": 1, "network": 1}
    with torch.no_grad():
        video, _ = calls["single_transformer_blocks"]()
        predicted = calls["network"]()["hidden_states"]
        assert video.shape == predicted.shape == (1, model.streams["video"], 24)
        # the blocks one after the other are what the trunk leaves
        double = named_outputs(model.family.block_lists[0], calls["transformer_blocks"]())
        single = model.arguments["single_transformer_blocks"]
        assert all(torch.equal(left, single[name]) for name, left in double.items())
        assert torch.equal(video, model.trunk.memory()[0].tokens["hidden_states"])


def test_it_fits_or_it_does_not(monkeypatch):
    config = config_of("hunyuan_video")
    costs = size_costs(config, planned_family(config), meta_transformer(config), (5, 32, 32))
    cpu = torch.device("cpu")
    assert random_weights._fits(config, costs, cpu)
    monkeypatch.setattr(random_weights, "free_bytes", lambda device: 2**10)
    assert not random_weights._fits(config, costs, cpu)
    runs = time_random_weights(config, "cpu")["runs"]
    assert runs[0]["settings"]["random_weights"] == "blocks"


def test_the_command(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults: [wan_1.3b, _self_]\ntransformer: {num_attention_heads: 2, num_layers: 2, ffn_dim: 32}\n"
        "text_tokens: {prompt: 16}\nsizes: [[5, 32, 32]]\nrounds: 2\nonly: [student-8, predictor-4-of-8, seacache]\n"
    )
    result = CliRunner().invoke(
        app, ["benchmark", "--random-weights", "--conf", str(file), "--device", "cpu", "--json"]
    )
    assert result.exit_code == 0, result.output
    methods = {run["method"]: run["error"] for run in json.loads(result.stdout)["runs"]}
    assert list(methods) == ["cfg-50", "student-8", "predictor-4-of-8", "seacache"]
    assert methods["seacache"] and not methods["student-8"]
