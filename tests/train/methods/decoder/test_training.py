"""`vidaccel distill method=decoder` through real files: it learns, goes on, says what it costs, and refuses."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.models.test_decoder import save_decoder
from tests.students import contents, save_teacher
from tests.test_earlier_versions import EARLIER
from tests.train.test_distill import logged
from vidaccel.artefacts import read_run, sha256_file, write_run
from vidaccel.cli.main import app
from vidaccel.collect.encode import encode_texts, rows
from vidaccel.config.distill import DistillConfig
from vidaccel.data.shards import ShardFolder, write_shards
from vidaccel.models.decoder import FORMAT, WEIGHTS_FILE
from vidaccel.models.files import read_model
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import encoder_hashes
from vidaccel.models.weights import load_module
from vidaccel.train.methods.decoder import DecoderTraining
from vidaccel.train.methods.decoder.data import Lessons, StoredLatents, excerpt
from vidaccel.train.methods.decoder.method import _latents

STEPS = 24
SMALL = [
    "train.batch_size=4",
    "train.accumulate=2",
    "train.learning_rate=0.003",
    "train.warmup=0",
    "train.ema_decay=0",
    "train.log_every=1",
]
SMALL += ["train.evaluate_every=12", "train.sample_every=24", "train.save_every=12", "decoder.width=0.5"]


def write_latents(folder: Path, teacher: Path, kind: str = "encoded", channels: int = 4) -> Path:
    loaded = load_pipeline(teacher)
    generator = torch.Generator().manual_seed(0)
    captions = [f"clip {i}" for i in range(10)]
    samples = rows(loaded, encode_texts(loaded, captions), [{"caption": c, "fps": 8} for c in captions], "float32")
    for tensors, _ in samples:
        latent = torch.randn(channels, 2, 4, 4, generator=generator)
        if kind == "encoded":
            tensors["latent"] = latent
        else:
            x, velocity = torch.randn(2, 2, channels, 2, 4, 4, generator=generator)
            tensors |= {"x": x, "velocity": velocity, "times": torch.tensor([1.0, 0.25, 0.0])}
    write_shards(folder, lambda indices: [samples[i] for i in indices], count=10, kind=kind, settings={})
    made_with = encoder_hashes(loaded) if kind == "encoded" else dict(loaded.hashes)
    common = {"command": "test", "config": {}, "seed": 0, "started": datetime.now(UTC)}
    write_run(folder, format="features/1", **common, made_with=made_with, kind=kind)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path]:
    """A teacher, and latents to learn from."""
    root = tmp_path_factory.mktemp("world")
    teacher = save_teacher(root / "teacher", "hunyuan_video")
    return teacher, write_latents(root / "features", teacher)


def run(*words: object, fails: bool = False) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == (2 if fails else 0), result.output
    return result.output


def distill(teacher: Path, features: Path, output: Path, *more: str, fails: bool = False, steps: int = STEPS) -> str:
    named = ["method=decoder", f"teacher={teacher}", f"features={features}", f"train.steps={steps}"]
    return run("distill", "--conf", "cfg", *named, *SMALL, *more, "-o", output, fails=fails)


@pytest.fixture(scope="module")
def made(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("made") / "decoder"
    assert f"`vidaccel generate PROMPT decoder={output}`" in distill(*world, output)
    return output


def test_it_learns_the_teachers_frames(world, made):
    losses, evaluations = logged(made, "loss"), (made / "metrics.jsonl").read_text().splitlines()
    assert losses[-1] < 0.75 * losses[0]
    found = [json.loads(line)["evaluation"] for line in evaluations if "evaluation" in line]
    assert len(found) == 2 and found[1] < found[0]
    recorded = read_run(made, FORMAT)
    assert (recorded["family"], recorded["command"]) == ("hunyuan_video", "vidaccel distill")
    assert recorded["measured"]["clips"] == 2 and recorded["measured"]["psnr_db"] > 0
    assert recorded["parents"]["features"] == sha256_file(world[1] / "run.json")
    assert recorded["files"].keys() == {"config.json", WEIGHTS_FILE}
    assert list((made / "samples").iterdir()) and not (made / "draft").exists()


def test_a_run_that_was_stopped_ends_in_the_same_weights(world, made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Lessons, "draw", _stopping_after(2 * 13, Lessons.draw))  # one step after a checkpoint
        CliRunner().invoke(app, [*_words(world, tmp_path / "again")])
    assert not (tmp_path / "again" / WEIGHTS_FILE).exists()
    distill(*world, tmp_path / "again")
    assert sha256_file(tmp_path / "again" / WEIGHTS_FILE) == sha256_file(made / WEIGHTS_FILE)
    before = contents(made)
    distill(*world, made)  # done already
    assert contents(made) == before
    assert "decoder.width was 0.5, now 1.0" in distill(*world, made, "decoder.width=1.0", fails=True)


def _words(world, output: Path) -> list[str]:
    named = ["method=decoder", f"teacher={world[0]}", f"features={world[1]}", f"train.steps={STEPS}"]
    return ["distill", "--conf", "cfg", *named, *SMALL, "-o", str(output)]


def _stopping_after(passes: int, draw):
    def drawn(self, index, count, generator):
        if index >= passes:
            raise RuntimeError("killed")
        return draw(self, index, count, generator)

    return drawn


def test_videos_are_decoded_with_it(world, made, tmp_path):
    words = ["generate", "a red circle", f"model={world[0]}", "steps=2", "-o", tmp_path / "out.mp4"]
    assert run(*words, f"decoder={made}").rstrip().endswith(f" s by {made}")
    report = json.loads(CliRunner().invoke(app, [*map(str, words), f"decoder={made}", "--json"]).stdout)
    assert report["decoder"] == str(made)
    assert report["hashes"][f"decoder/{WEIGHTS_FILE}"] == sha256_file(made / WEIGHTS_FILE)
    assert " by " not in run(*words)


def test_videos_of_many_prompts_are_made_anew_with_another_decoder(world, made, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    words = ["generate", "--prompts", tmp_path / "prompts.txt", f"model={world[0]}", "steps=1", "-o", tmp_path / "out"]
    run(*words)
    video = tmp_path / "out" / "0000.mp4"
    own = sha256_file(video)
    assert "2 of 2 videos are there already" in run(*words)
    assert "are there already" not in run(*words, f"decoder={made}")
    assert sha256_file(video) != own and "2 of 2 videos are there already" in run(*words, f"decoder={made}")


def test_one_goes_on_from_another(world, made, tmp_path):
    distill(*world, tmp_path / "more", f"start={made}", steps=1)
    first = logged(tmp_path / "more", "loss")[0]
    assert first < 0.8 * logged(made, "loss")[0]
    assert read_run(tmp_path / "more", FORMAT)["parents"]["start"] == sha256_file(made / "run.json")
    wide = save_decoder(tmp_path / "wide", world[0], width=1.0)
    refused = distill(*world, tmp_path / "other", f"start={wide}", fails=True)
    assert "is a decoder of block_out_channels=" in refused and "and these settings ask for" in refused


def test_the_ends_of_a_models_own_runs_do_as_well(world, tmp_path):
    features = write_latents(tmp_path / "runs", world[0], "trajectory")
    distill(world[0], features, tmp_path / "decoder", steps=1)
    stored = ShardFolder(features)
    latent, tensors = StoredLatents(stored).read([3])[0], stored[3][0]
    torch.testing.assert_close(latent, tensors["x"][1] - 0.25 * tensors["velocity"][1])


def test_clips_are_encoded_beside_a_student_that_is_an_adapter():
    """Whose transformer has no weights here, and so takes none of the adapter's."""
    files = read_model(str(EARLIER / "lora"))
    assert files.contents.lora is not None
    vae = load_module(files.contents.components["vae"], torch.float32)
    latents, _ = _latents(DistillConfig(teacher=str(EARLIER / "lora"), data=str(EARLIER / "clips")), files, vae)
    assert len(latents) == 3 and latents.read([0]).shape[1] == 4


def test_latents_of_another_model_are_refused(world, tmp_path):
    other = save_teacher(tmp_path / "other", "wan")
    assert "was made with another" in distill(other, world[1], tmp_path / "no", fails=True)
    runs = write_latents(tmp_path / "runs", world[0], "trajectory")
    assert "made with another autoencoder" in distill(other, runs, tmp_path / "no", fails=True)
    assert not (tmp_path / "no" / WEIGHTS_FILE).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["decoder.width=2"], "width=2.0 is not possible"),
        (["train.lora_rank=2"], "a decoder is trained whole"),
        (["denoiser=transformer"], "means nothing to method=decoder: a decoder has no part"),
        (["lora=[a.safetensors]"], "means nothing to method=decoder: a decoder has no part"),
        (["train.gates_every=1"], "train.gates_every=1 means nothing to method=decoder"),
        (["decoder.widths=[4,4]"], "4 levels"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(world, tmp_path, words, said):
    output = distill(*world, tmp_path / "no", *words, fails=True)
    assert said in output and "hint: " in output
    assert not (tmp_path / "no" / "metrics.jsonl").exists()


class Counting:
    """Latents, and how often each was read."""

    def __init__(self):
        self.seen: list[int] = []

    def __len__(self) -> int:
        return 4

    def read(self, indices):
        self.seen += indices
        return torch.stack([torch.full((4, 2, 4, 4), float(i)) for i in indices])

    def caption(self, index):
        return ""


def test_frames_are_made_once_where_memory_is_granted(world):
    vae, generator = load_pipeline(world[0]).pipe.vae, torch.Generator()
    kept, none = (Lessons(Counting(), vae, DecoderTraining(kept=room), 0) for room in (1.0, 0.0))
    for lessons in (kept, none):
        pairs = [lessons.draw(index, 2, generator) for index in range(4)]
        assert all(z.shape[0] == frames.shape[0] == 2 for z, frames in pairs)
    assert sorted(kept.latents.seen) == [0, 1, 2, 3] and len(none.latents.seen) == 8
    for one, other in ((kept.of([2, 0]), none.of([2, 0])),):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_noise_and_excerpts_are_the_same_of_latent_and_frames(world):
    vae = load_pipeline(world[0]).pipe.vae
    noisy = Lessons(Counting(), vae, DecoderTraining(noise=0.5, crop=[1, 2, 4]), 0)
    (z, frames), (again, _) = (noisy.draw(1, 2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert z.shape == (2, 4, 1, 2, 4) and frames.shape == (2, 3, 1, 16, 32) and torch.equal(z, again)
    assert float((z - z.round()).abs().mean()) > 0.1
    assert excerpt(torch.zeros(1, 1, 2, 3, 4), [5, 3, 2], torch.Generator()).shape == (1, 1, 2, 3, 2)


def test_a_plan_counts_both_decoders(world):
    said = " ".join(run("distill", "--conf", "sprites/decoder", "--plan").split())
    assert "1,419,459 trained, 1,488,355 of the teacher's decoder" in said
    assert "the teacher decodes 800 of 15,000 samples" in said
