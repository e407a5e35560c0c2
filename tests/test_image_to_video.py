"""Image to video from end to end, on tiny pipelines: from a file, collected, distilled, predicted, timed."""

import functools
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vidaccel
from tests.students import save_teacher
from tests.tiny import CALLS, IMAGE, ONE_DENOISER, SIZE, TEXT_TO_VIDEO, tiny_pipeline
from vidaccel.cli.main import app
from vidaccel.collect.bank import cut_texts
from vidaccel.collect.encode import as_array, batch, encode_prompts, encode_texts
from vidaccel.collect.features import check_conditions
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.collect import CollectConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.data.clips import write_clips
from vidaccel.data.shards import ShardFolder, write_shards
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES as RECORDS
from vidaccel.models.calling import call_arguments
from vidaccel.models.grid import own_grid
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.models.velocity import GuidedVelocity, guided_velocity, lengthened, velocity_of
from vidaccel.sampling import generate, run_pipeline, sample
from vidaccel.train.distill import student_of

FAMILIES = sorted(set(ONE_DENOISER) - set(TEXT_TO_VIDEO))
CAPTIONS = ["a red circle", "a blue square", "a green circle on white"]
TRAIN = TrainConfig(steps=2, batch_size=2, learning_rate=1e-3, warmup=0, ema_decay=0.0, log_every=1)


@pytest.fixture(scope="module", params=FAMILIES)
def chain(request, tmp_path_factory) -> Path:
    """A folder with a teacher, clips, features made of both, and a student of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    save_teacher(folder / "teacher", request.param)
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 8, 3), dtype=np.uint8).repeat(6, 2).repeat(8, 3)
    write_clips(folder / "clips", zip(frames, CAPTIONS, strict=True), fps=8)
    said = CollectConfig(model=str(folder / "teacher"), data=str(folder / "clips"), store="float32", batch_size=2)
    vidaccel.collect_features(said, folder / "features", device="cpu")
    config = DistillConfig(
        teacher=str(folder / "teacher"), features=str(folder / "features"), sample_steps=4, train=TRAIN
    )
    vidaccel.distill(config, folder / "cfg", device="cpu")
    config = replace(config, method="mean_velocity", teacher=str(folder / "cfg"))
    vidaccel.distill(config, folder / "student", device="cpu")
    (folder / "images").mkdir()
    for i, name in enumerate("ab"):
        Image.fromarray(frames[i, 0]).save(folder / "images" / f"{name}.png")
    return folder


def run(*words: str | Path):
    return CliRunner().invoke(app, ["generate", *map(str, words)])


def note(given: list[dict], module, args, kwargs) -> None:
    given.append(kwargs)


def test_what_is_collected_is_what_the_pipeline_feeds_its_transformer(chain):
    loaded, features = load_pipeline(chain / "teacher"), ShardFolder(chain / "features", "encoded")
    assert len(features) == 3
    for index in range(2):
        tensors, record = features[index]
        image = Image.fromarray(as_array(tensors["image"]))
        assert image.size == (32, 32)
        given: list[dict] = []
        hook = loaded.pipe.transformer.register_forward_pre_hook(functools.partial(note, given), with_kwargs=True)
        loaded.pipe(prompt=record["caption"], image=image, output_type="latent", **call_arguments(loaded, steps=1))
        hook.remove()
        assert len(given) == 2
        for condition in loaded.family.conditions:
            for each in given:  # with and without the prompt
                taken = each[condition.argument or "hidden_states"][0]
                taken = taken if condition.argument else taken[loaded.pipe.transformer.config.out_channels :]
                assert torch.equal(tensors[condition.stored], taken)
    other = features[1][0]
    assert not torch.equal(other["image_latents"], features[0][0]["image_latents"])


@torch.no_grad()
def test_students_start_equal_to_their_teachers(chain):
    features = ShardFolder(chain / "features", "encoded")
    text = batch([features[0][0]], torch.device("cpu"), torch.float32)
    x, t, r, g = text.pop("latent"), torch.tensor([0.7]), torch.tensor([0.2]), torch.tensor([3.0])
    for teacher, method in (("teacher", "cfg"), ("cfg", "mean_velocity")):
        loaded = load_pipeline(chain / teacher, dtype="float32")
        config = DistillConfig(teacher=str(chain / teacher), features=str(chain / "features"), method=method)
        student, own = velocity_of(student_of(loaded, config)), velocity_of(loaded)
        expected = own(x, t, text, g=g if own.embeds("g") else None)
        assert torch.equal(student(x, t, text, r=r, g=g), expected)
        for condition in loaded.family.conditions:  # and each of them matters
            other = text | {condition.stored: text[condition.stored] + 1}
            assert not torch.equal(student(x, t, other, r=r, g=g), expected)


def test_sheets_and_students_begin_with_images(chain):
    for stage in ("cfg", "student"):
        assert (chain / stage / "samples" / "00000002.png").exists()
        assert load_pipeline(chain / stage).call["two_pass"] is False
    image = chain / "images" / "a.png"
    made = vidaccel.generate("a red circle", model=str(chain / "student"), image=image, device="cpu")
    assert made.shape == (5, 32, 32, 3)
    other = vidaccel.generate("a red circle", model=str(chain / "student"), image=chain / "images" / "b.png")
    assert (made != other).any()


def test_predictors_learn_and_are_searched_and_served(chain, tmp_path):
    settings = {"student": str(chain / "student"), "features": str(chain / "features"), "search_prompts": 1}
    settings |= {"mse": TRAIN, "adversarial": replace(TRAIN, steps=0), "checked_prompts": 1}
    small = PredictorConfig(**settings, clips=2, blocks=1, pairs="trajectory", runs=5, tried=1)
    vidaccel.train_predictor(small, tmp_path / "trajectory", device="cpu")
    assert "image" in ShardFolder(tmp_path / "trajectory" / "trajectories", "trajectory")[0][0]
    vidaccel.train_predictor(replace(small, pairs="served"), tmp_path / "served", device="cpu")
    linear = replace(small, forecaster="linear", stage="search", budgets=[2])
    vidaccel.train_predictor(linear, tmp_path / "linear", device="cpu")
    fitted = PredictorConfig(**settings, forecaster="multistep", runs=5)
    vidaccel.train_predictor(fitted, tmp_path / "scalars", device="cpu")
    image = ["--image", chain / "images" / "a.png"]
    for predictor in ("trajectory", "served", "scalars"):
        words = [f"model={chain / 'student'}", f"predictor={tmp_path / predictor}", "budget=2"]
        result = run("a red circle", *image, *words, "-o", tmp_path / "out.mp4")
        assert result.exit_code == 0, result.output
        assert "2 full + 2 predicted passes" in result.stdout


def test_a_file_is_fitted_and_that_is_said(chain, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.jpg")
    words = [f"model={chain / 'teacher'}", "steps=2", "predictor=reuse", "full_steps=[0]", "--compare"]
    result = run("a red circle", "--image", tmp_path / "wide.jpg", *words, "-o", tmp_path / "out.mp4")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'wide.jpg'}: 80x40, 50% cropped away, scaled to 32x32\n" in result.stdout
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    many = ["--prompts", tmp_path / "prompts.txt", "--images", chain / "images", "--json"]
    result = run(*many, f"model={chain / 'teacher'}", "steps=1", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [line.rsplit("/", 1)[-1] for line in json.loads(result.stdout)["images"]] == [
        "a.png: 64x48, 25% cropped away, scaled to 32x32",
        "b.png: 64x48, 25% cropped away, scaled to 32x32",
    ]


def test_the_benchmark_measures_it(chain, tmp_path):
    rows = {
        "full": MethodConfig(weights="teacher", as_called=True, two_pass=True),
        "taylor": MethodConfig(weights="teacher", as_called=True, two_pass=True, every=3, on_skipped="taylor"),
        "linear": MethodConfig(weights="student", steps=4, full_steps=[0, 2], on_skipped="linear"),
    }
    config = BenchmarkConfig(
        model=str(chain / "teacher"), student=str(chain / "student"), methods=rows, baseline="full", sizes=None,
        images=str(chain / "images"), prompts=CAPTIONS[:2], timed_prompts=2, timed_seconds=0, rounds=2, dtype="float32",
    )  # fmt: skip
    results = vidaccel.benchmark(config, tmp_path / "bench", device="cpu")
    found = {run["method"]: (run["error"], run["passes"]["full"]) for run in results["runs"]}
    assert found == {"full": (None, 12), "taylor": (None, 4), "linear": (None, 2)}
    with pytest.raises(UserError, match="begins its videos with an image, and none was given"):
        vidaccel.benchmark(replace(config, images=None), tmp_path / "other", device="cpu")
    with pytest.raises(UserError, match="2 images .* there are 3 prompts"):
        vidaccel.benchmark(replace(config, prompts=CAPTIONS), tmp_path / "other", device="cpu")


def test_no_image_and_one_too_many_are_refused_before_anything_is_loaded(chain, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("vidaccel.session.load_pipeline", fail)
    model, image = f"model={chain / 'teacher'}", ["--image", chain / "images" / "a.png"]
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "tiny.png")
    folder = ["--images", chain / "images"]
    for words, said in (
        (["a", model], "begins its videos with an image, and none was given"),
        (["a", *image], "makes videos of text alone"),  # the shipped student
        (["a", model, "--image", tmp_path / "none.png"], "No such file"),
        (["a", model, "--image", tmp_path / "tiny.png"], "too few for a video of 32x32"),
        (["a", model, *folder], "came with one prompt"),
        (["--prompts", tmp_path / "prompts.txt", model, *folder], "2 images"),
        (["--prompts", tmp_path / "prompts.txt", model, *folder, *image], "came with --image as well"),
    ):
        result = run(*words, "-o", tmp_path / "out")
        assert result.exit_code == 2 and said in result.stderr, result.output
        assert "hint:" in result.stderr and "Traceback" not in result.stderr
    with pytest.raises(UserError, match="none was given"):
        vidaccel.generate("a", model=str(chain / "teacher"))


def test_features_and_models_have_the_same_conditions(chain, tmp_path):
    loaded, features = load_pipeline(chain / "teacher"), ShardFolder(chain / "features", "encoded")
    check_conditions(features, loaded)
    for name, without in (("one", {"image_embeds"}), ("all", {"image", "image_latents", "image_embeds"})):
        samples = [({n: t for n, t in features[i][0].items() if n not in without}, features[i][1]) for i in range(3)]
        write_shards(
            tmp_path / name, lambda indices, s=samples: [s[i] for i in indices], count=3, kind="encoded", settings={}
        )
        with pytest.raises(UserError, match=f"has no {', '.join(sorted(without))}, which .* needs"):
            check_conditions(ShardFolder(tmp_path / name, "encoded"), loaded)
    plain = replace(loaded, family=replace(loaded.family, conditions=()))
    check_conditions(ShardFolder(tmp_path / "all", "encoded"), plain)
    with pytest.raises(UserError, match=r"has image, image_embeds, image_latents, which .* does not take"):
        check_conditions(features, plain)


def test_an_image_kept_in_the_first_frame_is_attached_to_and_not_trained_on():
    """As by Wan 2.2 TI2V-5B, which has neither channels nor tokens for it, but a time for each token."""
    parts = tiny_pipeline("wan_i2v").components
    config, channels = parts["transformer"].config, parts["vae"].config.z_dim
    parts["transformer"] = type(parts["transformer"]).from_config(
        config, in_channels=channels, image_dim=None, added_kv_proj_dim=None
    )
    pipe = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    loaded = LoadedPipeline(pipe, RECORDS["wan_i2v"], "mine", SIZE, {})
    config = GenerateConfig(steps=2, guidance=1.0)
    plain = generate(loaded, ["a red circle"], config, [0], image=IMAGE).latents
    with vidaccel.attach(pipe, predictor="reuse", steps=2, full_steps=[0, 1]):
        assert torch.equal(generate(loaded, ["a red circle"], config, [0], image=IMAGE).latents, plain)
    with pytest.raises(UserError, match="mine keeps its image in the first frame"):
        encode_prompts(loaded, ["a red circle"], [IMAGE], SIZE["num_frames"])


def test_a_size_that_the_pipeline_would_not_choose_is_refused():
    """HunyuanVideo-1.5 takes a size from its image: 64 x 32 pixels lie nearest to its own 32 x 16."""
    name = "hunyuan_video_15_i2v"
    loaded = LoadedPipeline(tiny_pipeline(name), RECORDS[name], "here", SIZE, {})
    assert {"height", "width"}.isdisjoint(call_arguments(loaded))
    with pytest.raises(UserError, match="chooses its size by its image") as caught:
        call_arguments(loaded, height=64, width=64)
    assert "height=32 width=32" in caught.value.hint
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(UserError, match="chooses its size"):
        run_pipeline(loaded, ["a"], [0], GenerateConfig(height=64, width=64), None, image=image)


@torch.no_grad()
def test_a_frame_stays_clean_and_texts_see_it():
    """As in the pipeline: what its passes are given, and where our loop ends from the same noise."""
    family = RECORDS["hunyuan_video_i2v"]
    pipe = tiny_pipeline(family.name)
    loaded = LoadedPipeline(pipe, family, "here", SIZE | CALLS[family.name], {})
    text, empty = encode_prompts(loaded, ["a red circle"], [IMAGE], SIZE["num_frames"]), encode_texts(loaded, [""])
    image = text["image_latents"]
    given: list[dict] = []
    hook = pipe.transformer.register_forward_pre_hook(functools.partial(note, given), with_kwargs=True)
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = call_arguments(loaded, steps=3, guidance=3.0, two_pass=True)
    arguments |= {"prompt": "a red circle", "image": Image.fromarray(IMAGE), "latents": noise}
    ended = pipe(output_type="latent", **arguments).frames
    hook.remove()
    for condition, passed in zip((text, empty), given, strict=False):
        for each in family.text_tensors:
            assert torch.equal(condition[each.stored], passed[each.argument])
        assert torch.equal(passed["hidden_states"][:, :, :1], image)
    assert text["prompt_embeds"].shape != empty["prompt_embeds"].shape  # of black images the pipeline keeps more tokens
    grid, start = own_grid(pipe.scheduler, family, 3).tensor, 0.999 * noise + 0.001 * image  # as the pipeline begins
    velocity = velocity_of(loaded)

    def twice(x, t, text, r, g):
        return guided_velocity(velocity, x, t, text, empty, torch.full_like(t, 3.0))

    for guided in (GuidedVelocity(velocity, empty, 3.0), twice):
        torch.testing.assert_close(sample(guided, start, text, grid), ended, atol=1e-4, rtol=1e-4)
    beside = encode_texts(loaded, ["a " * 20])
    assert torch.equal(cut_texts(text, family, beside)["prompt_mask"], lengthened(text["prompt_mask"], 14))


def test_further_channels_in_the_place_of_a_clean_frame_are_run_and_not_collected():
    family = RECORDS["hunyuan_video_i2v"]
    pipe = tiny_pipeline(family.name, kind="latent_concat")
    loaded = LoadedPipeline(pipe, family, "here", SIZE | CALLS[family.name], {})
    made = [run_pipeline(loaded, ["a"], [0], GenerateConfig(steps=3), nullcontext(), "latent", IMAGE)[0]]
    for full in ([0, 1, 2], [0, 1]):
        with vidaccel.attach(loaded, predictor="taylor", steps=3, full_steps=full):
            made.append(run_pipeline(loaded, ["a"], [0], GenerateConfig(steps=3), nullcontext(), "latent", IMAGE)[0])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    with pytest.raises(UserError, match="here has further channels for its image"):
        encode_prompts(loaded, ["a"], [IMAGE], SIZE["num_frames"])
