"""Runs of a model's sampling: the pipeline's own, consistent with themselves, and only for the model that made them."""

from dataclasses import replace

import pytest
import torch

from tests.students import save, student, trained
from vidaccel.cache.trunk import Cached, Trunk
from vidaccel.collect.encode import batch, encode_texts
from vidaccel.collect.features import open_features
from vidaccel.collect.job import collect
from vidaccel.collect.kinds import job_of
from vidaccel.collect.trajectories import TrajectorySampler
from vidaccel.config.collect import CollectConfig
from vidaccel.errors import UserError
from vidaccel.models.calling import call_arguments, set_guidance
from vidaccel.models.grid import GridScheduler, step_grid
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.models.weight_hashes import encoder_hashes, student_hash

CAPTIONS, SEEDS = ["a red circle moving right", "a blue square on white"], [5, 6]


class Captions:
    """A source of which only the captions are asked for."""

    fingerprint = {"data": "captions"}

    def __len__(self):
        return len(CAPTIONS)

    def record(self, index):
        return {"caption": CAPTIONS[index]}


@pytest.fixture(autouse=True)
def _captions(monkeypatch):
    monkeypatch.setattr("vidaccel.collect.kinds.open_source", lambda loaded, config: Captions())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student of two families and a teacher of each, on disk."""
    root = tmp_path_factory.mktemp("models")
    return {family: student(root / family, family).parent for family in ("hunyuan_video", "wan")}


@pytest.fixture(scope="module")
def students(folders) -> dict[str, LoadedPipeline]:
    return {family: load_pipeline(folder / "student") for family, folder in folders.items()}


@pytest.fixture(scope="module")
def teachers(folders) -> dict[str, LoadedPipeline]:
    """Sampled by flow-match Euler, as our loop does."""
    loaded = {family: load_pipeline(folder / "teacher") for family, folder in folders.items()}
    for model in loaded.values():
        model.pipe.scheduler = GridScheduler(shift=2.0)
    return loaded


def config(**changes) -> CollectConfig:
    return CollectConfig(kind="trajectory", store="float32", seed=SEEDS[0], **changes)


def pipeline_latents(loaded: LoadedPipeline, **settings) -> torch.Tensor:
    """What the pipeline makes of these captions and seeds."""
    guidance = {name: settings[name] for name in ("guidance",) if name in settings}
    set_guidance(loaded, **guidance)
    arguments = call_arguments(loaded, **settings)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [""] * len(CAPTIONS)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return loaded.pipe(CAPTIONS, generator=generators, output_type="latent", **arguments).frames


def test_the_negative_prompt_is_the_pipelines(teachers):
    """Of the settings, else of the model's own call; another than the empty one is another velocity."""
    loaded, grid = teachers["wan"], step_grid(4, 2.0)
    own = replace(loaded, call=loaded.call | {"negative_prompt": "a green square"})
    runs = {}
    for name, model, said in (("", loaded, None), ("said", loaded, "a green square"), ("own", own, None)):
        runs[name] = TrajectorySampler(model, config(steps=4, negative_prompt=said))(CAPTIONS, SEEDS)
    assert torch.equal(runs["said"]["velocity"], runs["own"]["velocity"])
    assert not torch.equal(runs["said"]["velocity"], runs[""]["velocity"])
    arguments = call_arguments(own, steps=4)
    assert arguments["negative_prompt"] == "a green square"
    set_guidance(own)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    made = own.pipe(CAPTIONS, generator=generators, output_type="latent", **arguments).frames
    torch.testing.assert_close(end(runs["own"], grid), made, rtol=1e-4, atol=1e-4)


def end(run: dict[str, torch.Tensor], grid: torch.Tensor) -> torch.Tensor:
    """Where runs [B, S, ...] arrive after their last step."""
    return run["x"][:, -1] - (grid[-2] - grid[-1]) * run["velocity"][:, -1]


@pytest.mark.parametrize("family", ["hunyuan_video", "wan"])
@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0, "steps": 3}], ids=str)
def test_a_students_run_is_its_pipelines(students, family, settings):
    loaded = students[family]
    runs = TrajectorySampler(loaded, config(**settings))
    assert (runs.steps, runs.shift, runs.guidance) == (settings.get("steps", 4), 2.0, settings.get("guidance", 4.0))
    assert torch.equal(end(runs(CAPTIONS, SEEDS), runs.grid.tensor), pipeline_latents(loaded, **settings))


@pytest.mark.parametrize("family", ["hunyuan_video", "wan"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_teachers_run_takes_guidance_in_two_passes(teachers, family, guidance):
    loaded = teachers[family]
    runs = TrajectorySampler(loaded, config(guidance=guidance, steps=2))
    assert torch.equal(
        end(runs(CAPTIONS, SEEDS), runs.grid.tensor), pipeline_latents(loaded, guidance=guidance, steps=2)
    )


def test_two_passes_in_bfloat16(folders):
    """Scales are in float32, and what the next step begins with in the model's dtype nevertheless."""
    loaded = load_pipeline(folders["wan"] / "teacher", dtype="bfloat16")
    runs = TrajectorySampler(loaded, config(guidance=3.0, steps=2))
    made = runs(CAPTIONS, SEEDS)
    assert runs.empty and made["x"].dtype == made["velocity"].dtype == torch.bfloat16


def test_steps_follow_from_one_another(students):
    runs = TrajectorySampler(students["hunyuan_video"], config(shift=5.0))
    made = runs(CAPTIONS, SEEDS)
    assert torch.equal(runs.grid.tensor, step_grid(4, 5.0))
    assert torch.equal(made["x"][:, 0], runs.noise(SEEDS)) and not torch.equal(made["x"][0, 0], made["x"][1, 0])
    spans = (runs.grid.tensor[:-1] - runs.grid.tensor[1:]).double().view(1, -1, 1, 1, 1, 1)
    expected = made["x"].double() - spans * made["velocity"].double()
    torch.testing.assert_close(made["x"][:, 1:].double(), expected[:, :-1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["hunyuan_video", "wan"])
def test_velocities_are_the_models_at_the_stored_states(students, family):
    loaded = students[family]
    runs = TrajectorySampler(loaded, config())
    made, g = runs(CAPTIONS, SEEDS), torch.full([2], 4.0)
    text = encode_texts(loaded, CAPTIONS)
    for k in range(runs.steps):
        t, r = (runs.grid.tensor[i].expand(2) for i in (k, k + 1))
        assert torch.equal(runs.velocity(made["x"][:, k], t, text, r=r, g=g), made["velocity"][:, k])


@torch.no_grad()
@pytest.mark.parametrize(("family", "names"), [("hunyuan_video", {"cache", "cache_text"}), ("wan", {"cache"})])
def test_the_head_makes_the_velocity_of_the_stored_cache(students, family, names):
    """The trunk's stored tokens, put in the blocks' place, give the stored velocity again."""
    loaded = students[family]
    runs = TrajectorySampler(loaded, config(cache=True))
    made, plain = runs(CAPTIONS, SEEDS), TrajectorySampler(loaded, config())(CAPTIONS, SEEDS)
    assert made.keys() - plain.keys() == names
    assert all(torch.equal(made[name], plain[name]) for name in plain)
    text, g, k = encode_texts(loaded, CAPTIONS), torch.full([2], 4.0), 2
    tokens = {"hidden_states": made["cache"][:, k]}
    tokens |= {"encoder_hidden_states": made["cache_text"][:, k]} if "cache_text" in made else {}
    t, r = (runs.grid.tensor[i].expand(2) for i in (k, k + 1))
    with (
        Trunk(loaded.pipe.transformer, loaded.family) as trunk,
        trunk.predicted(lambda arguments, memory, t: memory[0].tokens, memory=(Cached(tokens, None),)),
    ):
        velocity = runs.velocity(made["x"][:, k], t, text, r=r, g=g)
    assert torch.equal(velocity, made["velocity"][:, k])


def test_a_cache_of_two_passes_is_refused(teachers):
    with pytest.raises(UserError, match="makes two"):
        TrajectorySampler(teachers["wan"], config(cache=True))
    assert TrajectorySampler(teachers["wan"], config(cache=True, guidance=1.0)).empty is None


def test_a_folder_of_runs(students, tmp_path):
    loaded = students["hunyuan_video"]
    collect(job_of(loaded, config()), tmp_path / "runs")
    read = open_features(tmp_path / "runs", "trajectory", loaded.hashes)
    samples = [read[i] for i in range(len(read))]
    sampled = {"guidance": 4.0, "steps": 4, "shift": 2.0, "student": student_hash(loaded)}
    assert [record for _, record in samples] == [
        {"caption": caption, "seed": seed} | sampled for caption, seed in zip(CAPTIONS, SEEDS, strict=True)
    ]
    stored = batch([tensors for tensors, _ in samples], torch.device("cpu"), torch.float32)
    assert stored.keys() == {"x", "velocity", "times", *encode_texts(loaded, CAPTIONS)}
    for i, (caption, seed) in enumerate(zip(CAPTIONS, SEEDS, strict=True)):
        alone = TrajectorySampler(loaded, config())([caption], [seed])
        assert all(torch.equal(stored[name][i], tensor[0]) for name, tensor in alone.items())
    assert torch.equal(stored["times"], step_grid(4, 2.0).expand(2, -1))


def test_times_keep_their_precision(students):
    loaded = students["hunyuan_video"]
    ((tensors, _),) = job_of(loaded, replace(config(), store="bfloat16")).compute([0])
    assert torch.equal(tensors["times"], step_grid(4, 2.0))
    assert tensors["x"].dtype == tensors["velocity"].dtype == torch.bfloat16


def test_runs_of_another_student_are_refused(students, teachers, folders, tmp_path):
    loaded = students["hunyuan_video"]
    collect(job_of(loaded, config()), tmp_path / "runs")
    for other in (teachers["hunyuan_video"].hashes, loaded.hashes | {"lora/pytorch_lora_weights.safetensors": "0"}):
        with pytest.raises(UserError, match="was made with another model: its "):
            open_features(tmp_path / "runs", "trajectory", other)
    conditioning = trained(teachers["hunyuan_video"], ("g",))
    sibling = load_pipeline(save(tmp_path / "sibling", teachers["hunyuan_video"], conditioning))
    with pytest.raises(UserError, match=r"conditioning/model\.safetensors"):
        open_features(tmp_path / "runs", "trajectory", sibling.hashes)
    with pytest.raises(UserError, match="begun with other settings"):
        collect(job_of(sibling, config()), tmp_path / "runs")
    assert student_hash(sibling) != student_hash(loaded) != student_hash(teachers["hunyuan_video"])
    assert encoder_hashes(sibling) == encoder_hashes(loaded) == encoder_hashes(teachers["hunyuan_video"])


@pytest.mark.parametrize(
    "changes", [{"steps": 3}, {"guidance": 2.0}, {"shift": 3.0}, {"cache": True}, {"num_frames": 1}]
)
def test_other_ways_of_sampling_are_not_mixed(students, tmp_path, changes):
    loaded = students["hunyuan_video"]
    collect(job_of(loaded, config()), tmp_path)
    with pytest.raises(UserError, match="begun with other settings"):
        collect(job_of(loaded, config(**changes)), tmp_path)


def test_other_listed_times_are_not_mixed(students, tmp_path):
    loaded = students["hunyuan_video"]
    collect(job_of(loaded, config(sigmas=[1.0, 0.7])), tmp_path)
    assert collect(job_of(loaded, config(timesteps=[1000.0, 700.0])), tmp_path)  # the same, in other units
    with pytest.raises(UserError, match="begun with other settings .times was"):
        collect(job_of(loaded, config(sigmas=[1.0, 0.6])), tmp_path)
