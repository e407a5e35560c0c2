"""Students through real files: what is saved, that it comes back whole or not at all, and how it is then sampled."""

import copy
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file

import vidaccel.students
from tests.students import STARTED, contents, for_diffusers, refused, save, save_teacher, trained, vouch
from tests.tiny import HUNYUAN_CALL, SIZE, tiny_pipeline
from vidaccel.artefacts import RUN_FILE, read_run, sha256_file, write_run
from vidaccel.errors import UserError
from vidaccel.models.conditioning import Conditioning
from vidaccel.models.files import read_model
from vidaccel.models.folder import safetensors_header
from vidaccel.models.grid import Grid, running_grid
from vidaccel.models.loading import load_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def students(teachers, tmp_path_factory) -> dict[str, Path]:
    """A student of each teacher, not to be written to."""
    root = tmp_path_factory.mktemp("students")
    return {name: save(root / name, loaded, trained(loaded, steps=4)) for name, loaded in teachers.items()}


@pytest.mark.parametrize("family", ["hunyuan_video", "wan"])
def test_a_student_is_a_diffusers_folder_with_the_teachers_other_parts(family, teachers, students):
    teacher, folder = teachers[family], students[family]
    mine, theirs = contents(folder), contents(Path(teacher.source))
    own = ("transformer/", "scheduler/", "conditioning/", RUN_FILE, "model_index.json", "README.md")
    assert {name for name, digest in mine.items() if theirs.get(name) != digest} <= {
        n for n in mine if n.startswith(own)
    }
    assert {name.split("/")[0] for name in theirs} | {"conditioning", "README.md"} == {
        name.split("/")[0] for name in mine
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]  # Wan's own is UniPC
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["shift"] == 2.0
    assert not {"_name_or_path"} & json.loads((folder / "transformer/config.json").read_text()).keys()
    run = read_run(folder, "model/1")
    assert run["parents"] == {"teacher": sha256_file(Path(teacher.source) / RUN_FILE)}
    assert run["call"] == teacher.call | {"steps": 4, "guidance": 4.0, "shift": 2.0, "two_pass": False}
    assert run["files"].keys() == mine.keys() - {RUN_FILE}


@pytest.mark.parametrize("family", ["hunyuan_video", "wan"])
def test_weights_are_stored_in_half_precision_where_the_class_allows(family, teachers, students):
    transformer, folder = teachers[family].pipe.transformer, students[family]
    kept = set(transformer._keep_in_fp32_modules or ())
    stored = load_file(folder / WEIGHTS)
    for name, tensor in transformer.state_dict().items():
        half = tensor if kept & set(name.split(".")) else tensor.half()
        assert stored[name].dtype == half.dtype and torch.equal(stored[name], half)
    assert {tensor.dtype for tensor in transformer.state_dict().values()} == {torch.float32}
    loaded = load_pipeline(folder)
    assert loaded.pipe.transformer.dtype == torch.float32
    assert torch.equal(loaded.pipe.transformer.proj_out.weight, transformer.proj_out.weight.half().float())
    assert {WEIGHTS, "conditioning/model.safetensors"} <= loaded.hashes.keys()
    assert loaded.conditioning.config.steps == 4 and loaded.hook.guidance == 4.0
    numbers = {"r": torch.tensor([0.3]), "g": torch.tensor([4.0])}
    assert torch.equal(loaded.conditioning(**numbers), trained(teachers[family])(**numbers))
    assert loaded.conditioning(**numbers).abs().max() > 0


@pytest.mark.parametrize("family", ["hunyuan_video", "wan"])
def test_diffusers_alone_refuses_a_student(family, students):
    for cls in (DiffusionPipeline, type(load_pipeline(students[family]).pipe).__mro__[1]):
        with pytest.raises(UserError, match="which diffusers would load without its conditioning") as caught:
            cls.from_pretrained(students[family])
        assert "vidaccel.load_pipeline" in caught.value.hint
    index = json.loads((students[family] / "model_index.json").read_text())
    assert index["transformer"][0] == "vidaccel.students"
    with pytest.raises(AttributeError, match="no attribute 'NoSuchModel'"):
        vidaccel.students.NoSuchModel  # noqa: B018


def test_a_student_of_an_earlier_version_loads(students, tmp_path):
    """Whose index names diffusers' own class, by which diffusers loads it too."""
    old = for_diffusers(Path(shutil.copytree(students["wan"], tmp_path / "old")))
    pipe = WanPipeline.from_pretrained(old)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and pipe.scheduler.shift == 2.0
    same = load_pipeline(students["wan"])
    weights = load_pipeline(old).pipe.transformer.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in same.pipe.transformer.state_dict().items())


@pytest.mark.parametrize("family", ["hunyuan_video", "wan"])
def test_the_card_says_how_to_call_it(family, students):
    card = (students[family] / "README.md").read_text()
    assert "distilled to 4 steps of one pass each" in card and "5 frames of 32 x 32 in 4 steps" in card
    assert "a scale of 4." in card and "diffusers alone does not load this folder" in card
    (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    made: dict = {}
    exec(python.replace("path/to/this/folder", str(students[family])).replace("cuda", "cpu"), made)
    assert len(made["video"]) == 5
    assert "README.md" in json.loads((students[family] / "run.json").read_text())["files"]


def test_the_users_own_call_is_one_pass_a_step(tmp_path):
    teacher = load_pipeline(save_teacher(tmp_path / "teacher", "hunyuan_video_15"))
    loaded = load_pipeline(save(tmp_path / "student", teacher, trained(teacher, ("g",))))
    seen = []
    loaded.conditioning.register_forward_pre_hook(
        lambda m, a, numbers: seen.append(numbers["g"].item()), with_kwargs=True
    )
    loaded.pipe("a red circle", num_inference_steps=1, output_type="latent", **SIZE)  # its guider comes switched on
    loaded.hook.guidance = 7.0
    loaded.pipe("a red circle", num_inference_steps=1, output_type="latent", **SIZE)
    assert seen == [4.0, 7.0]


def test_the_transformer_is_told_the_grid(students):
    loaded = load_pipeline(students["hunyuan_video"])
    seen = []
    loaded.conditioning.register_forward_pre_hook(lambda m, a, numbers: seen.append(numbers), with_kwargs=True)
    for instantaneous in (False, True):
        loaded.hook.instantaneous = instantaneous
        arguments = {"num_inference_steps": 2, "output_type": "latent"} | SIZE | HUNYUAN_CALL
        loaded.pipe(["a red circle", "a green square"], **arguments)
    # s k / (1 + (s - 1) k) at s = 2: 1, 2/3, 0.
    r = torch.stack([numbers["r"] for numbers in seen])
    torch.testing.assert_close(r, torch.tensor([[2 / 3] * 2, [0.0] * 2, [1.0] * 2, [2 / 3] * 2]))
    assert all(numbers["g"].tolist() == [4.0, 4.0] for numbers in seen)


def test_a_student_of_a_model_with_listed_times_is_on_the_grid_it_was_made_for(tmp_path):
    folder = save_teacher(tmp_path / "teacher", "wan")
    run = json.loads((folder / RUN_FILE).read_text())
    run["call"] |= {"timesteps": [1000, 757, 522]}
    (folder / RUN_FILE).write_text(json.dumps(run))
    teacher = load_pipeline(folder)
    assert teacher.default("steps") == 3
    loaded = load_pipeline(save(tmp_path / "student", teacher, trained(teacher)))
    loaded.pipe.scheduler.set_timesteps(loaded.default("steps"))
    assert running_grid(loaded.pipe.scheduler, loaded.family) == Grid.shifted(4, 2.0)


def test_a_hooked_transformer_is_not_copied_unawares(students):
    transformer = (loaded := load_pipeline(students["wan"])).pipe.transformer
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(transformer)
    loaded.hook.remove()
    double = copy.deepcopy(transformer)
    torch.nn.init.zeros_(double.proj_out.weight)
    torch.nn.init.zeros_(double.proj_out.bias)
    text = torch.zeros(1, 3, 32)
    (hook,) = double.condition_embedder.time_embedder._forward_hooks.values()
    theirs = hook.__self__
    assert theirs is not loaded.conditioning
    with torch.no_grad(), theirs.given(r=torch.zeros(1), g=torch.ones(1)):
        assert double(torch.ones(1, 4, 1, 4, 4), torch.ones(1), text, return_dict=False)[0].abs().max() == 0


def test_a_run_folder_keeps_its_checkpoints_and_loses_the_old_student(teachers, tmp_path):
    teacher, folder = teachers["wan"], tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "state.json").write_text("{}")
    (folder / ".draft.0123").mkdir()  # a killed run's
    save(folder, teacher, trained(teacher), documents={"NOTES.md": "a note"})
    assert {"NOTES.md", "README.md"} <= read_run(folder, "model/1")["files"].keys()
    assert not list(folder.glob("*draft*")) and not list(folder.glob(".*"))
    save(folder, teacher, None)
    assert (folder / "checkpoints" / "state.json").exists()
    assert not (folder / "conditioning").exists() and not (folder / "NOTES.md").exists()
    assert read_model(folder).contents.conditioning is None


def test_a_disk_that_fills_leaves_what_was_there(teachers, tmp_path, monkeypatch):
    teacher = teachers["wan"]
    old = save(tmp_path / "old", teacher, trained(teacher))
    before = contents(old)

    def full(self, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Conditioning, "save_pretrained", full)
    for folder in (old, tmp_path / "new" / "student"):
        with pytest.raises(UserError, match="no space left"):
            save(folder, teacher, trained(teacher))
    assert contents(old) == before and not (tmp_path / "new").exists()


def test_a_kill_while_it_is_put_in_place_leaves_nothing_that_loads(teachers, students, tmp_path, monkeypatch):
    teacher, stop, real = teachers["wan"], {}, Path.rename

    def rename(self, target):
        if self.parent.name == "draft":
            stop["after"] -= 1
            if stop["after"] < 0:
                raise KeyboardInterrupt
        return real(self, target)

    folder = shutil.copytree(students["wan"], tmp_path / "student")
    parts = len(list(students["wan"].iterdir()))
    monkeypatch.setattr(Path, "rename", rename)
    for stop["after"] in (0, 1, parts - 3, parts - 2):
        with pytest.raises(KeyboardInterrupt):
            save(folder, teacher, trained(teacher))
        with pytest.raises(UserError):
            read_model(folder)
    stop["after"] = parts
    save(folder, teacher, trained(teacher))
    assert not (folder / "draft").exists() and read_model(folder).contents.conditioning


def test_a_folder_of_something_else_is_not_taken(teachers, tmp_path):
    write_run(tmp_path, format="features/1", command="test", config={}, seed=0, started=STARTED)
    with pytest.raises(UserError, match="features/1"):
        save(tmp_path, teachers["wan"], None)
    assert contents(tmp_path).keys() == {RUN_FILE}


@pytest.mark.parametrize(("value", "hint"), [(1e6, "bfloat16"), (float("nan"), "diverged")])
def test_weights_that_are_not_finite_are_not_saved(value, hint, tmp_path):
    pipe = tiny_pipeline("wan")
    pipe.save_pretrained(tmp_path / "teacher")
    teacher = load_pipeline(tmp_path / "teacher")
    teacher.pipe.transformer.proj_out.bias.data[0] = value
    with pytest.raises(UserError, match="proj_out.bias is not finite") as caught:
        save(tmp_path / "student", teacher, None)
    assert hint in caught.value.hint and not (tmp_path / "student").exists()


def edit_config(folder: Path, **entries: object) -> None:
    path = folder / "conditioning/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    vouch(folder)


def conditioning_config_missing(folder: Path) -> str:
    (folder / "conditioning/config.json").unlink()
    vouch(folder)
    return "conditioning does not load"


def conditioning_weights_missing(folder: Path) -> str:
    (folder / "conditioning/model.safetensors").unlink()
    vouch(folder)
    return "conditioning/model.safetensors is missing"


def conditioning_truncated(folder: Path) -> str:
    path = folder / "conditioning/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    vouch(folder)
    return "conditioning/model.safetensors"


def conditioning_gone(folder: Path) -> str:
    shutil.rmtree(folder / "conditioning")
    return "conditioning/model.safetensors missing"


def conditioning_changed(folder: Path) -> str:
    path = folder / "conditioning/config.json"
    path.write_text(path.read_text().replace('"steps": 4', '"steps": 5'))
    return "conditioning/config.json changed"


def conditioning_of_another_family(folder: Path) -> str:
    edit_config(folder, family="hunyuan_video")
    return "is for hunyuan_video of width 24, and this transformer is wan of width 24"


def conditioning_of_another_width(folder: Path) -> str:
    edit_config(folder, width=48)
    return "conditioning does not load"


def conditioning_of_another_rule(folder: Path) -> str:
    edit_config(folder, rule="mean")
    return "combines by 'mean'"


def multistep_scheduler(folder: Path) -> str:
    UniPCMultistepScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"scheduler": ["diffusers", "UniPCMultistepScheduler"]})
    )
    vouch(folder)
    return "conditioning is a UniPCMultistepScheduler"


def run_json_missing(folder: Path) -> str:
    (folder / RUN_FILE).unlink()
    return "has no run.json"


@pytest.mark.parametrize(
    "damage",
    [
        conditioning_config_missing,
        conditioning_weights_missing,
        conditioning_truncated,
        conditioning_gone,
        conditioning_changed,
        conditioning_of_another_family,
        conditioning_of_another_width,
        conditioning_of_another_rule,
        multistep_scheduler,
        run_json_missing,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_broken_student_is_refused_by_name(damage, students, tmp_path):
    folder = shutil.copytree(students["wan"], tmp_path / "student")
    assert damage(folder) in refused(folder).message


def test_a_transformer_folder_brings_its_conditioning_and_scheduler(students, teachers, tmp_path):
    whole, alone = students["wan"], tmp_path / "alone"
    shutil.copytree(whole / "transformer", alone)
    for part in ("conditioning", "scheduler"):
        shutil.copytree(whole / part, alone / part)
    pipeline = teachers["wan"].source
    write_run(alone, format="model/1", command="test", config={}, seed=0, started=STARTED, pipeline=pipeline)
    files = read_model(alone)
    assert files.contents.conditioning == alone / "conditioning"
    assert files.contents.components["scheduler"].folder == alone / "scheduler"
    assert files.contents.components["transformer"].folder == alone
    assert safetensors_header(alone / "diffusion_pytorch_model.safetensors")
    assert load_pipeline(alone).pipe.scheduler.shift == 2.0
