"""`python -m vidaccel.sprites` in miniature: every stage for a few steps, through real files."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.students import contents
from vidaccel.data.shards import ShardFolder
from vidaccel.models.calling import unknown_words
from vidaccel.models.loading import load_pipeline
from vidaccel.worlds.sprites import score_model
from vidaccel.worlds.sprites.__main__ import app
from vidaccel.worlds.sprites.make import excerpt
from vidaccel.worlds.sprites.settings import AutoencoderTraining
from vidaccel.worlds.sprites.source import LAMPS_SHARE, lamps_share

MICRO = [
    *("text.train.steps=2", "text.train.batch_size=4", "text.width=16"),
    *("autoencoder.images.steps=2", "autoencoder.images.batch_size=4", "autoencoder.block_out_channels=[4,4,4,4]"),
    *("autoencoder.clips.steps=2", "autoencoder.clips.batch_size=4"),
    *("autoencoder.decoder.steps=2", "autoencoder.decoder.batch_size=4"),
    *("teacher.train.steps=2", "teacher.train.batch_size=2", "teacher.heads=2", "teacher.head_dim=16"),
    *("teacher.shallow.steps=2", "teacher.shallow.batch_size=2", "teacher.growth=2"),
    *("teacher.double_blocks=2", "teacher.single_blocks=2", "clips=6", "score_prompts=3", "steps=2"),
]
LEFT = [
    *("text.train.steps=0", "autoencoder.images.steps=0", "autoencoder.clips.steps=0", "autoencoder.decoder.steps=0"),
    "teacher.shallow.steps=0",
]
"""All that comes before the transformer at full depth left as it is."""

WEIGHTS = [
    *("text_encoder/model.safetensors", "text_encoder_2/model.safetensors"),
    *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", "transformer")),
]


def run(*args) -> str:
    result = CliRunner().invoke(app, list(map(str, args)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sprites")
    run("make", "-o", folder, *MICRO)
    return folder


def test_the_result_is_a_model_that_generates(made):
    loaded = load_pipeline(made / "model")
    assert loaded.family.name == "hunyuan_video"
    assert (loaded.default("steps"), loaded.default("num_frames"), loaded.default("fps")) == (2, 17, 8)
    assert loaded.pipe.transformer.dtype == torch.float32
    card, score = (made / "model" / "README.md").read_text(), json.loads((made / "model" / "score.json").read_text())
    assert f"| total | {score['total']['mean']:.1f} |" in card
    assert not (made / "draft").exists()


def test_latents_have_unit_scale(made):
    features = ShardFolder(made / "features", kind="encoded")
    latents = torch.stack([features[i][0]["latent"].float() for i in range(len(features))])
    assert latents.shape == (6, 16, 5, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.02)


def test_words_that_a_scored_model_lacks_are_named(made, tmp_path):
    words = ["score", made / "model", "--prompts", 2, "steps=1"]
    assert "does not know" not in run(*words, "-o", tmp_path / "plain")
    told = run(*words, "--lamps", "-o", tmp_path / "lamps")
    assert 'the model does not know "' in told and '"lamps"' in told


def test_a_second_run_trains_nothing(made):
    before = {p: p.read_text() for p in made.rglob("metrics.jsonl")}
    scores = (made / "scores" / "marks.jsonl").read_text()
    run("make", "-o", made, *MICRO)
    assert before == {p: p.read_text() for p in made.rglob("metrics.jsonl")}
    assert len(before) == 6
    assert (made / "scores" / "marks.jsonl").read_text() == scores


def test_a_model_goes_on_from_its_weights(made, tmp_path):
    """Parts with 0 steps stay as they are; the card tells what came before as well."""
    run("make", "-o", tmp_path, *MICRO, *LEFT, f"start={made / 'model'}", "teacher.train.steps=1")
    old, new = ({n: load_pipeline(f / "model").hashes[n] for n in WEIGHTS} for f in (made, tmp_path))
    assert [old[name] == new[name] for name in WEIGHTS] == [True, True, True, False]
    stages = json.loads((tmp_path / "model" / "stages.json").read_text())
    titles = ["text encoders", "autoencoder on images", "autoencoder on clips", "decoder", "transformer, shallow"]
    assert [stage["stage"] for stage in stages] == [*titles, *2 * ["transformer, full depth"]]
    assert stages[-1]["step"] == 1


def test_a_new_transformer_owes_nothing_to_the_one_before(made, tmp_path):
    run("make", "-o", tmp_path, *MICRO, *LEFT, f"start={made / 'model'}", "teacher.shallow.steps=1")
    stages = json.loads((tmp_path / "model" / "stages.json").read_text())
    ends = [(stage["stage"], stage["step"]) for stage in stages if stage["stage"].startswith("transformer")]
    assert ends == [("transformer, shallow", 1), ("transformer, full depth", 2)]


def test_the_decoder_alone_goes_on(made, tmp_path):
    """On other scenes, too; latents keep the scale in which the transformer knows them."""
    more = ["autoencoder.decoder.steps=2", "teacher.train.steps=0", "odds={gray:8}", "pair_share=1"]
    run("make", "-o", tmp_path, *MICRO, *LEFT, f"start={made / 'model'}", *more)
    old, new = (load_pipeline(f / "model") for f in (made, tmp_path))
    weights = new.pipe.vae.state_dict()
    changed = {name for name, weight in old.pipe.vae.state_dict().items() if not torch.equal(weights[name], weight)}
    assert changed
    assert all(name.startswith(("decoder", "post_quant_conv")) for name in changed)
    assert old.hashes[WEIGHTS[-1]] == new.hashes[WEIGHTS[-1]]
    assert old.pipe.vae.config.scaling_factor == new.pipe.vae.config.scaling_factor


def test_other_widths_cannot_go_on(made, tmp_path):
    other = ["teacher.head_dim=32", f"start={made / 'model'}"]
    result = CliRunner().invoke(app, ["make", "-o", str(tmp_path), *MICRO, *LEFT, *other])
    assert result.exit_code == 2
    assert "cannot be gone on from" in result.output


def test_what_tokens_show_is_learnt_where_scenes_are_known(made):
    lines = (made / "teacher" / "deep" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["loss"] == pytest.approx(last["flow_matching"] + 0.5 * last["alignment"], rel=1e-5)


def test_it_trains_on_a_folder_of_clips(tmp_path):
    run("render", "-o", tmp_path / "clips", "--clips", 4, "--held-out")
    lines = [json.loads(line) for line in (tmp_path / "clips" / "captions.jsonl").read_text().splitlines()]
    run("make", "-o", tmp_path / "made", *MICRO, f"data={tmp_path / 'clips'}")
    features = ShardFolder(tmp_path / "made" / "features", kind="encoded")
    assert [features[i][1]["caption"] for i in range(len(features))] == [line["caption"] for line in lines]
    assert "alignment" not in (tmp_path / "made" / "teacher" / "deep" / "metrics.jsonl").read_text()


def test_the_teacher_trains_from_memory(made, tmp_path):
    """From scenes rendered anew, no folder of them; a second run trains nothing."""
    more = [*MICRO, *LEFT, f"start={made / 'model'}", "captions=3", "teacher.train.steps=2", "tf32=true"]
    run("make", "-o", tmp_path, *more)
    assert not (tmp_path / "features").exists()
    assert json.loads((tmp_path / "model" / "run.json").read_text())["parents"] == {}
    metrics = (tmp_path / "teacher" / "deep" / "metrics.jsonl").read_text()
    last = json.loads(metrics.splitlines()[-1])
    assert last["loss"] == pytest.approx(last["flow_matching"] + 0.5 * last["alignment"], rel=1e-5)
    run("make", "-o", tmp_path, *more)
    assert (tmp_path / "teacher" / "deep" / "metrics.jsonl").read_text() == metrics
    assert not torch.backends.cuda.matmul.allow_tf32
    result = CliRunner().invoke(app, ["make", "-o", str(tmp_path), *more, "captions=2"])
    assert result.exit_code == 2
    assert "captions" in result.output


def test_the_conf_for_a_gpu_goes_on_from_a_model_for_minutes(made, tmp_path):
    sizes = [word for word in MICRO if ".steps=" not in word]
    minutes = ["autoencoder.decoder.minutes=0.001", "teacher.train.minutes=0.001"]
    run("make", "--conf", "gpu", "-o", tmp_path, *sizes, *minutes, "device=cpu", f"start={made / 'model'}")
    stages = json.loads((tmp_path / "model" / "stages.json").read_text())[-2:]
    assert [(stage["stage"], stage["step"] >= 1) for stage in stages] == [
        ("decoder", True),
        ("transformer, full depth", True),
    ]


def test_lamps_are_learnt_by_a_model_that_lacks_them(made, tmp_path):
    """Its words keep their tokens and embeddings; everything behind them goes on."""
    trained = ("text.train", "autoencoder.clips", "autoencoder.decoder", "teacher.train")
    few = [word for stage in trained for word in (f"{stage}.minutes=null", f"{stage}.steps=2", f"{stage}.batch_size=4")]
    small = [word for word in MICRO if not word.startswith(tuple(f"{stage}." for stage in trained))]
    off = ["teacher.shallow.steps=0", "autoencoder.images.steps=0", "autoencoder.excerpts=[[17,32]]"]
    words = ["make", "--conf", "lamps", "-o", tmp_path, *small, *off, *few, "device=cpu", f"start={made / 'model'}"]
    run(*words)
    old, new = (load_pipeline(folder / "model") for folder in (made, tmp_path))
    count = len(old.pipe.tokenizer)
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        before, after = (getattr(model.pipe, encoder).get_input_embeddings().weight for model in (old, new))
        assert torch.equal(before, after[:count]) and len(after) == len(getattr(new.pipe, tokenizer)) > count
    plain, lit = "a red circle moving right on black", "a red circle with flickering lamps moving right on black"
    assert old.pipe.tokenizer(plain).input_ids == new.pipe.tokenizer(plain).input_ids
    assert unknown_words(old.pipe, lit) == ["flickering", "lamps"] and unknown_words(new.pipe, lit) == []
    assert (lamps_share(old), lamps_share(new)) == (0, LAMPS_SHARE)
    assert not torch.equal(*(next(model.pipe.vae.encoder.parameters()) for model in (old, new)))
    scores = json.loads((tmp_path / "model" / "score-lamps.json").read_text())
    assert {"lamps", "total"} <= set(scores)
    metrics = {path: path.read_text() for path in tmp_path.rglob("metrics.jsonl")}
    assert len(metrics) == 4
    run(*words)
    assert metrics == {path: path.read_text() for path in tmp_path.rglob("metrics.jsonl")}


def test_clips_of_a_folder_have_one_caption(made, tmp_path):
    run("render", "-o", tmp_path / "clips", "--clips", 4)
    more = [*MICRO, *LEFT, f"start={made / 'model'}", f"data={tmp_path / 'clips'}"]
    run("make", "-o", tmp_path / "made", *more, "captions=1")
    assert len(ShardFolder(tmp_path / "made" / "features", kind="encoded")) == 4
    result = CliRunner().invoke(app, ["make", "-o", str(tmp_path / "other"), *more, "captions=2"])
    assert result.exit_code == 2
    assert "captions must be 0 or 1: a clip of a folder has one" in result.output


def test_score_prints_a_line_a_dimension(made, tmp_path):
    output = run("score", made / "model", "--prompts", 2, "-o", tmp_path / "score")
    assert output.splitlines()[-1].startswith("total ")
    assert len((tmp_path / "score" / "marks.jsonl").read_text().splitlines()) == 2


def test_score_scores_what_a_predictor_makes_of_it(tmp_path):
    """Steps left to it change the videos, and so the scores; a schedule without one is refused, and no line is lost."""
    words = ["score", "sprites/student", "--prompts", 2]
    run(*words, "steps=4", "-o", tmp_path / "full")
    run(*words, "steps=4", "predictor=reuse", "full_steps=[0]", "-o", tmp_path / "reused")
    full, reused = (json.loads((tmp_path / name / "score.json").read_text()) for name in ("full", "reused"))
    assert full != reused
    scores = (tmp_path / "full" / "marks.jsonl").read_text()
    refused = CliRunner().invoke(app, list(map(str, [*words, "full_steps=[0]", "-o", tmp_path / "full"])))
    assert refused.exit_code == 2 and "without a predictor" in refused.output
    assert (tmp_path / "full" / "marks.jsonl").read_text() == scores


def refused(*args) -> str:
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_finished_features_of_other_settings_are_refused(tmp_path):
    """Of fewer clips, where no stage before them has seen any and so refuses to go on."""
    words = ["make", "-o", tmp_path, *MICRO, *LEFT, "teacher.train.steps=0", "score_prompts=1"]
    run(*words)
    before = contents(tmp_path)
    message = refused(*words, "clips=5")
    assert "features was begun with other settings (count was 6, now 5)" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("changed", [["seed=1"], ["steps=1"], ["--prompts", 1]])
def test_score_does_not_write_over_the_scores_of_other_settings(made, tmp_path, changed):
    words = ["score", made / "model", "--prompts", 2, "-o", tmp_path / "score"]
    run(*words)
    before = contents(tmp_path)
    message = refused(*words, *changed)
    assert "score holds scores of other settings (" in message and "give another folder with -o" in message
    assert contents(tmp_path) == before


def test_score_goes_on_with_what_an_earlier_version_began(made, tmp_path, monkeypatch):
    """Which knew fewer settings; and the model may have moved, if it is the same. What is scored makes no video again,
    be the last batch whole or not."""
    words = ["score", made / "model", "--prompts", 2, "-o", tmp_path]
    run(*words)
    record, scores = tmp_path / "settings.json", tmp_path / "marks.jsonl"
    settings = json.loads(record.read_text())
    del settings["config"]["trim_text"]
    record.write_text(json.dumps(settings | {"config": settings["config"] | {"model": "elsewhere"}}))
    before = scores.read_text()
    monkeypatch.setattr(score_model, "generate", None)
    run(*words)
    assert scores.read_text() == before
    record.unlink()
    assert "hashes" in refused(*words)  # scores of nobody knows what
    assert scores.read_text() == before


@given(st.integers(0, 99), st.integers(1, 200_000))
def test_excerpts_cost_about_the_same(index, area):
    excerpts = AutoencoderTraining().excerpts
    count, frames, pixels = excerpt(excerpts, area, index)
    assert [frames, pixels] in excerpts
    assert count == 1 or count * frames * pixels**2 <= area
