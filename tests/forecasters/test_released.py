"""Predictors in files that others have released."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vidaccel
from tests import published
from tests.models.test_released import STUDENTS, agree, inputs, rendered
from tests.published import write
from tests.students import save_teacher
from tests.tiny import SIZE, called, tiny_pipeline
from vidaccel.bench.models import Models
from vidaccel.cache.trunk import Trunk
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.errors import UserError
from vidaccel.forecasters.checkpoint import PUBLISHED, predictor_hashes
from vidaccel.forecasters.learned import Predictor
from vidaccel.models.loading import load_named
from vidaccel.models.velocity import Velocity

PREDICTORS = {
    "hunyuan_video": published.hunyuan_video_predictor,
    "hunyuan_video_15_i2v": published.hunyuan_video_15_predictor,
}
FAMILIES = sorted(PREDICTORS)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_predicted_pass_is_the_published_formulas(family, tmp_path):
    weights, theirs = STUDENTS[family](), PREDICTORS[family]()
    loaded = vidaccel.load_student(write(tmp_path / "student.safetensors", weights), tiny_pipeline(family))
    predictor = vidaccel.load_predictor(write(tmp_path / "p.safetensors", theirs, outer="predictor."), loaded)
    assert (predictor.config.architecture, predictor.history) == (PUBLISHED, 1)
    assert predictor.recomputes
    transformer, answered = loaded.pipe.transformer, []
    predictor.register_forward_hook(lambda _, given, answer: answered.append(answer))
    velocity = Velocity(transformer, loaded.family, loaded.conditioning)
    x, t, r, text = inputs(family)
    later, t_later, r_later, _ = inputs(family, seed=1)
    with Trunk(transformer, loaded.family) as trunk:
        with trunk.full(t):
            velocity(x, t, text, r=r)
        with trunk.predicted(predictor, t_later):
            found = velocity(later, t_later, text, r=r_later)
    before = rendered(family, weights, x, t, r, text)
    expected = rendered(family, weights, later, t_later, r_later, text, theirs=theirs, before=before)
    agree(found, expected, answered[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_attached_with_the_published_full_steps(family, tmp_path):
    base = vidaccel.load_pipeline(save_teacher(tmp_path / "base", family))
    loaded = vidaccel.load_student(write(tmp_path / "student.safetensors", STUDENTS[family]()), base)
    file = write(tmp_path / "p.safetensors", PREDICTORS[family]())
    steps, budget = (20, 8) if family == "hunyuan_video" else (8, 4)
    with vidaccel.attach(loaded, predictor=file, budget=budget) as attachment:
        video = loaded.pipe(prompt="a red circle", output_type="latent", **called(loaded.pipe)).frames
    assert video.isfinite().all()
    assert (attachment.full_passes, attachment.predicted_passes) == (budget, steps - budget)
    with vidaccel.attach(
        loaded.pipe, predictor=vidaccel.load_predictor(file, loaded.pipe), steps=steps, every=2
    ) as own:
        loaded.pipe(prompt="a red circle", output_type="latent", **called(loaded.pipe))
    assert own.predicted_passes == steps // 2


def test_generate_takes_both_files(tmp_path):
    base = save_teacher(tmp_path / "base", "hunyuan_video")
    files = {
        "student": str(write(tmp_path / "student.safetensors", STUDENTS["hunyuan_video"]())),
        "predictor": str(write(tmp_path / "p.safetensors", PREDICTORS["hunyuan_video"]())),
    }
    full, fast = (
        vidaccel.generate("a red circle", model=str(base), device="cpu", student=files["student"], **more)
        for more in ({}, {"predictor": files["predictor"], "budget": 10})
    )
    assert full.shape == fast.shape == (SIZE["num_frames"], 32, 32, 3)
    assert (full != fast).any()
    assert list(predictor_hashes(files["predictor"])) == ["predictor/p.safetensors"]
    with pytest.raises(UserError, match=r"2 schedules for steps=20[\s\S]*budget=8 or 10 with steps=20"):
        vidaccel.generate("a red circle", model=str(base), device="cpu", **files)


def test_benchmarks_and_trainings_take_both_files(tmp_path):
    base = str(save_teacher(tmp_path / "base", "hunyuan_video"))
    student = str(write(tmp_path / "student.safetensors", STUDENTS["hunyuan_video"]()))
    predictor = str(write(tmp_path / "p.safetensors", PREDICTORS["hunyuan_video"]()))
    config = BenchmarkConfig(family="hunyuan_video", model=base, student=student, predictor=predictor)
    models = Models(config, "cpu")
    row = MethodConfig(steps=20, budget=8, on_skipped="predictor")
    loaded = models.pipeline(row)
    assert loaded.released is not None and models.predictor(row, loaded).config.architecture == PUBLISHED
    assert models.searched(row).full_steps == (0, 1, 2, 5, 9, 13, 17, 19)
    assert load_named(student, base).call == loaded.call
    with pytest.raises(UserError, match="is a file\nhint: name the model"):
        vidaccel.train_predictor("trajectories", tmp_path / "out", device="cpu", forecaster="reuse", student=student)


def test_it_is_saved_as_a_folder_of_ours(tmp_path):
    pipe = tiny_pipeline("hunyuan_video")
    predictor = vidaccel.load_predictor(write(tmp_path / "p.safetensors", PREDICTORS["hunyuan_video"]()), pipe)
    (tmp_path / "own").mkdir()
    predictor.save_pretrained(tmp_path / "own")
    again = vidaccel.load_predictor(tmp_path / "own", pipe)
    assert again.config == predictor.config
    kept = again.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in predictor.state_dict().items())


class Allocated(TorchDispatchMode):
    """Counts the bytes of new memory that operations take; a tensor that is set on what is mapped takes none."""

    def __init__(self):
        super().__init__()
        self.bytes, self._seen = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [arg for arg in args if isinstance(arg, torch.Tensor)]
        self._seen |= {arg.untyped_storage().data_ptr() for arg in given if arg.device.type != "meta"}
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, list | tuple) else [made]:
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                storage = each.untyped_storage()
                if storage.data_ptr() not in self._seen and function is not torch.ops.aten.set_.source_Storage:
                    self.bytes += storage.nbytes()
                self._seen.add(storage.data_ptr())
        return made


def test_loading_makes_no_second_copy(tmp_path):
    """None where the types agree; where they do not, that of the other type alone."""
    sizes = published.Sizes(width=384, heads=32, mlp=768)
    weights = PREDICTORS["hunyuan_video"](sizes)
    stored = sum(weight.numel() for weight in weights.values())
    pipe = tiny_pipeline("hunyuan_video")
    config = dict(pipe.transformer.config) | {"num_attention_heads": 32}
    for type_, most in ((torch.float32, 0.0), (torch.bfloat16, 1.0)):
        file = write(tmp_path / "p.safetensors", {name: weight.to(type_) for name, weight in weights.items()})
        pipe.transformer = type(pipe.transformer).from_config(config)
        with Allocated() as allocated:
            predictor = vidaccel.load_predictor(file, pipe)
        assert sum(weight.numel() for weight in predictor.parameters()) == stored
        assert {weight.dtype for weight in predictor.parameters()} == {torch.float32}
        assert allocated.bytes <= most * 4 * stored + 2**16


# What is refused


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_that_is_missing_extra_or_transposed_is_named(family, tmp_path):
    weights, pipe = PREDICTORS[family](), tiny_pipeline(family)
    for name in [name for name in weights if ".1." in name or "fusion" in name]:
        others = {other: weight for other, weight in weights.items() if other != name}
        with pytest.raises(UserError, match=f"width 24; of its weights 1 missing: {name}\n"):
            vidaccel.load_predictor(write(tmp_path / "p.safetensors", others), pipe)
        if weights[name].ndim == 2 and weights[name].shape[0] != weights[name].shape[1]:
            with pytest.raises(UserError, match=f"weights 1 of another shape: {name} "):
                vidaccel.load_predictor(write(tmp_path / "p.safetensors", others | {name: weights[name].T}), pipe)
    more = weights | {"double_blocks.2.img_mod.linear.bias": torch.zeros(144)}
    with pytest.raises(UserError, match="1 that it has no place for: double_blocks.2.img_mod.linear.bias\n"):
        vidaccel.load_predictor(write(tmp_path / "p.safetensors", more), pipe)


def test_a_file_for_another_model_or_purpose_is_refused(tmp_path):
    file = write(tmp_path / "p.safetensors", PREDICTORS["hunyuan_video"]())
    for family in ("wan", "hunyuan_video_15_i2v"):
        with pytest.raises(UserError, match="is DisCa's predictor for HunyuanVideo, and this is"):
            vidaccel.load_predictor(file, tiny_pipeline(family))
    wider = write(tmp_path / "wider.safetensors", PREDICTORS["hunyuan_video"](published.Sizes(width=36, heads=3)))
    pipe = tiny_pipeline("hunyuan_video")
    with pytest.raises(UserError, match="of width 24; .* of another shape: fusion_mlp.0"):
        vidaccel.attach(pipe, predictor=wider, steps=4, every=2)
    student = write(tmp_path / "student.safetensors", STUDENTS["hunyuan_video"]())
    with pytest.raises(UserError, match=r"and a predictor is asked for\n.*student="):
        vidaccel.attach(pipe, predictor=student, steps=4, every=2)
    with pytest.raises(UserError, match="there is no folder tencent/DisCa"):
        vidaccel.attach(pipe, predictor="tencent/DisCa", steps=4, every=2)
    for predictor in (file, vidaccel.load_predictor(file, pipe)):
        with pytest.raises(UserError, match="is told no r"):
            vidaccel.attach(pipe, predictor=predictor, steps=4, every=2)
    vidaccel.attach(pipe, predictor=file, steps=4, every=2, force=True).detach()
    told = tiny_pipeline("hunyuan_video_15_i2v", use_meanflow=True)
    theirs = write(tmp_path / "15.safetensors", PREDICTORS["hunyuan_video_15_i2v"]())
    vidaccel.attach(told, predictor=theirs, steps=4, every=2).detach()
    torch.save({}, tmp_path / "p.bin")
    with pytest.raises(UserError, match="is a pickle"):
        vidaccel.attach(pipe, predictor=tmp_path / "p.bin", steps=4, every=2)
    assert isinstance(vidaccel.load_predictor(file, pipe), Predictor)
