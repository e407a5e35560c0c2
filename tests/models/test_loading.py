"""What loads, and that everything that must not load says which file is to blame."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.students import save, save_teacher, trained
from tests.tiny import HUNYUAN_CALL, SIZE, TEXT_TO_VIDEO, called, tiny_pipeline
from vidaccel.artefacts import sha256_file, write_run
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.models import loading
from vidaccel.models.calling import call_arguments, set_guidance
from vidaccel.models.files import read_model
from vidaccel.models.folder import read_pipeline_folder, safetensors_header
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.models.weight_hashes import encoder_hashes, student_hash
from vidaccel.sampling import generate
from vidaccel.session import said_sampling
from vidaccel.worlds import sprites

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def make_run(folder: Path, kind: str = "model/1", **extra: object) -> None:
    write_run(folder, format=kind, command="test", config={}, seed=0, started=datetime.now(UTC), **extra)


def refused(model: str | Path, **options: str) -> UserError:
    """The error that loading ends in, after checking that it is one line with a hint."""
    with pytest.raises(UserError) as caught:
        load_pipeline(model, **options)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


def video(loaded: LoadedPipeline) -> np.ndarray:
    """[T, H, W, 3] in [0, 1], two steps with guidance."""
    if loaded.family.name == "hunyuan_video":
        loaded.call.update(HUNYUAN_CALL)
    loaded.pipe.set_progress_bar_config(disable=True)
    set_guidance(loaded)
    arguments = called(loaded.pipe) | call_arguments(loaded, steps=2, **SIZE)
    generator = torch.Generator().manual_seed(0)
    return loaded.pipe(prompt="a red circle moving right", generator=generator, output_type="np", **arguments).frames[0]


@pytest.mark.parametrize("family", [*TEXT_TO_VIDEO, "wan_i2v"])
def test_a_saved_pipeline_loads_and_makes_the_same_video(family, saved):
    loaded = load_pipeline(saved(family))
    assert loaded.family.name == family and loaded.source == str(saved(family)) and loaded.call == {}
    assert loaded.hashes[WEIGHTS] == sha256_file(saved(family) / WEIGHTS)
    assert {Path(name).parent.name for name in loaded.hashes} >= {"transformer", "vae", "text_encoder"}
    frames = video(loaded)
    assert frames.shape == (SIZE["num_frames"], SIZE["height"], SIZE["width"], 3)
    assert np.isfinite(frames).all() and frames.std() > 0
    original = LoadedPipeline(tiny_pipeline(family), loaded.family, "", {}, {})
    weights = loaded.pipe.transformer.state_dict()
    for name, weight in original.pipe.transformer.state_dict().items():
        assert torch.equal(weight, weights[name])
    # Not bit for bit: weights mapped from a file lie at odd addresses, for which a CPU may choose another kernel.
    np.testing.assert_allclose(frames, video(original), atol=1e-5)


def test_shipped_names_resolve_to_the_package(saved, monkeypatch, tmp_path):
    shutil.copytree(saved("hunyuan_video"), tmp_path / "tiny")
    monkeypatch.setattr(sprites, "SHIPPED", tmp_path)
    assert load_pipeline("sprites/tiny").source == str(tmp_path / "tiny")
    error = refused("sprites/tinny")
    assert "sprites/tinny" in error.message and "sprites/tiny" in error.hint


def test_a_folder_that_is_called_like_a_shipped_model_is_not_shadowed(saved, monkeypatch, tmp_path):
    (tmp_path / "shipped").mkdir()
    shutil.copytree(saved("hunyuan_video"), tmp_path / "shipped" / "tiny")
    monkeypatch.setattr("vidaccel.worlds.sprites.SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    own = Path(shutil.copytree(saved("wan"), tmp_path / "sprites" / "tiny"))
    shutil.copytree(saved("wan"), tmp_path / "sprites" / "mine")
    error = refused("sprites/tiny")
    assert "is a shipped model, and a folder here has that name too" in error.message
    assert error.hint == "write ./sprites/tiny for it"
    for name in ("./sprites/tiny", Path("sprites/tiny"), own, str(own)):
        loaded = load_pipeline(name)
        assert loaded.family.name == "wan"
        assert read_model(loaded.source).contents.path.resolve() == own  # and stays itself when it is read again
    for name in ("sprites/mine", Path("sprites/mine")):
        assert load_pipeline(name).family.name == "wan"
    alone = Path(shutil.copytree(saved("hunyuan_video") / "transformer", tmp_path / "alone"))
    make_run(alone, pipeline="sprites/tiny")  # by which a run.json can only mean the shipped one
    assert load_pipeline(alone).family.name == "hunyuan_video"
    error = refused("sprites/mnie")
    assert "no model is shipped as sprites/mnie" in error.message and "sprites/tiny" in error.hint


def test_a_student_of_a_folder_that_is_called_like_a_shipped_model_is_its_own(saved, monkeypatch, tmp_path):
    (tmp_path / "shipped").mkdir()
    shutil.copytree(saved("hunyuan_video"), tmp_path / "shipped" / "tiny")
    monkeypatch.setattr("vidaccel.worlds.sprites.SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    save_teacher(tmp_path / "sprites" / "tiny", "wan")
    for name in ("./sprites/tiny", Path("sprites/tiny")):
        loaded = load_pipeline(name)
        save(tmp_path / "student", loaded, trained(loaded, ("r",)))
        student = load_pipeline(tmp_path / "student")
        assert student.family.name == "wan"
        encoders = {name: digest for name, digest in loaded.hashes.items() if not name.startswith("transformer/")}
        assert encoders.items() <= dict(student.hashes).items()


def test_a_models_own_settings_and_hashes_come_from_run_json(broken):
    make_run(broken, call={"steps": 7, "fps": 8, **HUNYUAN_CALL})
    loaded = load_pipeline(broken)
    assert loaded.call == {"steps": 7, "fps": 8, **HUNYUAN_CALL}
    assert (loaded.default("steps"), loaded.default("fps"), loaded.default("guidance")) == (7, 8, 6.0)
    assert loaded.hashes[WEIGHTS] == sha256_file(broken / WEIGHTS)


@pytest.mark.parametrize("where", ["relative", "absolute"])
def test_a_transformer_folder_loads_the_pipeline_it_names(where, saved, broken, tmp_path):
    make_run(broken, call={"steps": 7, "fps": 8})
    student = tmp_path / "student"
    tiny_pipeline("hunyuan_video", seed=1).transformer.save_pretrained(student)
    make_run(student, pipeline="../model" if where == "relative" else str(broken), call={"steps": 3})
    loaded = load_pipeline(student)
    assert loaded.call == {"steps": 3, "fps": 8}
    assert loaded.hashes[WEIGHTS] == sha256_file(student / "diffusion_pytorch_model.safetensors")
    expected = load_file(student / "diffusion_pytorch_model.safetensors")
    for name, weight in loaded.pipe.transformer.state_dict().items():
        assert torch.equal(weight, expected[name])
    (student / "run.json").unlink()
    assert "pipeline" in refused(student).hint


@pytest.mark.parametrize(("asked", "got"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(asked, got, saved):
    loaded = load_pipeline(saved("hunyuan_video"), dtype=asked)
    assert loaded.pipe.transformer.dtype == got and loaded.pipe.text_encoder.dtype == got


def test_auto_dtype_on_cuda_is_the_stored_one(saved, tmp_path):
    pipe = tiny_pipeline("hunyuan_video")
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "mixed")
    components = read_pipeline_folder(tmp_path / "mixed").components
    assert loading.stored_dtype(components["transformer"].weight_files, "auto", torch.device("cuda")) == torch.bfloat16
    assert loading.stored_dtype(components["vae"].weight_files, "auto", torch.device("cuda")) == torch.float32


def test_denoisers_may_have_a_dtype_of_their_own(saved):
    pipe = load_pipeline(saved("hunyuan_video"), dtype="bfloat16", denoiser_dtype="float32").pipe
    assert pipe.transformer.dtype == torch.float32
    assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16


def test_what_is_not_placed_stays_on_the_cpu_as_the_device_wants_it(tmp_path, monkeypatch):
    pipe = tiny_pipeline("hunyuan_video")
    pipe.text_encoder.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "mixed")
    monkeypatch.setattr(loading, "resolve_device", lambda name: torch.device("cuda"))
    pipe = load_pipeline(tmp_path / "mixed", device="cuda", denoiser_dtype="float32", placed=False).pipe
    assert pipe.device.type == "cpu" and pipe.transformer.dtype == torch.float32
    assert pipe.text_encoder.dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(saved):
    assert "CUDA" in refused(saved("hunyuan_video"), device="cuda").message
    assert load_pipeline(saved("hunyuan_video"), device="auto").pipe.device.type == "cpu"


def test_unknown_device_and_dtype(saved):
    assert '"cuda"' in refused(saved("hunyuan_video"), device="cudaa").hint
    assert '"float16"' in refused(saved("hunyuan_video"), dtype="float6").hint


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "runs/my/student", "~/nowhere"])
def test_a_path_that_no_hub_id_can_be_is_a_missing_folder(name):
    with pytest.raises(UserError, match="there is no folder .*nowhere|there is no folder runs/my/student"):
        load_pipeline(name)


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no-such-org/no-such-model" in refused("no-such-org/no-such-model").message
    assert "runs/a/student" in refused("runs/a/student").message


# Each breaks the folder and returns what the message must name.
def no_index(folder: Path) -> str:
    (folder / "model_index.json").unlink()
    return "model_index.json"


def index_not_json(folder: Path) -> str:
    (folder / "model_index.json").write_text("{")
    return "model_index.json"


def edit_index(folder: Path, **entries: object) -> str:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return "model_index.json"


def foreign_pipeline(folder: Path) -> str:
    edit_index(folder, _class_name="StableDiffusionPipeline")
    return "StableDiffusionPipeline"


def component_not_listed(folder: Path) -> str:
    edit_index(folder, vae=[None, None])
    return "vae"


def component_of_a_foreign_library(folder: Path) -> str:
    edit_index(folder, vae=["os", "system"])
    return "['os', 'system']"


def component_that_is_no_class(folder: Path) -> str:
    edit_index(folder, vae=["transformers", "pipeline"])
    return "['transformers', 'pipeline']"


def malformed_component(folder: Path) -> str:
    edit_index(folder, vae=["diffusers"])
    return "model_index.json"


def foreign_transformer_class(folder: Path) -> str:
    edit_index(folder, transformer=["diffusers", "WanTransformer3DModel"])
    return "WanTransformer3DModel"


def second_transformer(folder: Path) -> str:
    edit_index(folder, transformer_2=["diffusers", "HunyuanVideoTransformer3DModel"])
    return "transformer_2"


def component_missing(folder: Path) -> str:
    shutil.rmtree(folder / "text_encoder_2")
    return "text_encoder_2"


def config_missing(folder: Path) -> str:
    (folder / "vae/config.json").unlink()
    return "vae/config.json"


def scheduler_config_not_json(folder: Path) -> str:
    (folder / "scheduler/scheduler_config.json").write_text("not json")
    return "scheduler/scheduler_config.json"


def config_of_another_class(folder: Path) -> str:
    tiny_pipeline("wan").transformer.save_pretrained(folder / "transformer")
    return "transformer/config.json"


def config_value_of_a_wrong_type(folder: Path) -> str:
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))
    return "text_encoder does not load"


def tokenizer_without_a_model(folder: Path) -> str:
    path = folder / "tokenizer/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {}}))
    return f"{folder} does not load"


def tokenizer_truncated(folder: Path) -> str:
    path = folder / "tokenizer/tokenizer.json"
    path.write_bytes(path.read_bytes()[:100])
    return "tokenizer/tokenizer.json"


def tokenizer_missing(folder: Path) -> str:
    (folder / "tokenizer/tokenizer.json").unlink()
    return str(folder)


def weights_missing(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    return WEIGHTS


def weights_truncated(folder: Path) -> str:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    return WEIGHTS


def weights_empty(folder: Path) -> str:
    (folder / WEIGHTS).write_bytes(b"")
    return WEIGHTS


def weights_pickled(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "transformer/diffusion_pytorch_model.bin")
    return "diffusion_pytorch_model.bin is a pickle"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def key_missing(folder: Path) -> str:
    edit_weights(folder, lambda weights: weights.pop("proj_out.bias"))
    return f"{WEIGHTS} has 1 missing weights, such as proj_out.bias"


def key_unexpected(folder: Path) -> str:
    edit_weights(folder, lambda weights: weights.update(other=torch.zeros(1)))
    return f"{WEIGHTS} has 1 unexpected weights, such as other"


def shape_mismatched(folder: Path) -> str:
    edit_weights(folder, lambda weights: weights.update({"proj_out.bias": torch.zeros(3)}))
    return f"{WEIGHTS} has 1 mismatched weights, such as proj_out.bias"


def text_encoder_key_missing(folder: Path) -> str:
    weights = load_file(folder / "text_encoder/model.safetensors")
    del weights["norm.weight"]
    save_file(weights, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
    return "text_encoder/model.safetensors has 1 missing weights, such as norm.weight"


def text_encoder_shape_mismatched(folder: Path) -> str:
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 5}))
    return "text_encoder/model.safetensors has 1 mismatched weights, such as embed_tokens.weight"


def shard_missing(folder: Path) -> str:
    tiny_pipeline("hunyuan_video").transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    shard = sorted((folder / "transformer").glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    return shard.name


def sha_mismatch(folder: Path) -> str:
    make_run(folder)
    edit_weights(folder, lambda weights: weights["proj_out.bias"].add_(1))
    return f"{WEIGHTS} changed"


def listed_file_missing(folder: Path) -> str:
    (folder / "card.md").write_text("a card")
    make_run(folder)
    (folder / "card.md").unlink()
    return "card.md missing"


def not_a_model(folder: Path) -> str:
    make_run(folder, kind="predictor/1")
    return "predictor/1"


def student_without_run_json(folder: Path) -> str:
    (folder / "conditioning").mkdir()
    return "has no run.json"


BREAKS = [
    no_index,
    index_not_json,
    foreign_pipeline,
    component_not_listed,
    component_of_a_foreign_library,
    component_that_is_no_class,
    malformed_component,
    foreign_transformer_class,
    second_transformer,
    component_missing,
    config_missing,
    scheduler_config_not_json,
    config_of_another_class,
    config_value_of_a_wrong_type,
    tokenizer_without_a_model,
    tokenizer_truncated,
    tokenizer_missing,
    weights_missing,
    weights_truncated,
    weights_empty,
    weights_pickled,
    key_missing,
    key_unexpected,
    shape_mismatched,
    text_encoder_key_missing,
    text_encoder_shape_mismatched,
    shard_missing,
    sha_mismatch,
    listed_file_missing,
    not_a_model,
    student_without_run_json,
]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_a_broken_folder_is_refused_by_name(damage, broken):
    named = damage(broken)
    assert named in refused(broken).message


def test_sharded_weights_load(broken):
    tiny_pipeline("hunyuan_video").transformer.save_pretrained(broken / "transformer", max_shard_size="100KB")
    (broken / WEIGHTS).unlink(missing_ok=True)
    assert len(load_pipeline(broken).hashes) > 4


def test_what_systems_leave_in_a_model_folder_is_no_part_of_it(broken):
    before = dict(read_model(broken).hashes)
    for name in ("._diffusion_pytorch_model.safetensors", "._config.json", "._a.bin", "Thumbs.db", ".DS_Store"):
        (broken / "transformer" / name).write_bytes(b"\0\5\x16\7")
    (broken / "transformer" / "@eaDir").mkdir()
    assert load_pipeline(broken).family.name == "hunyuan_video"
    assert dict(read_model(broken).hashes) == before


def test_a_file_is_not_a_folder(saved):
    assert "is a file" in refused(saved("hunyuan_video") / WEIGHTS).message


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    return path.read_bytes()


@given(cut=st.integers(0, 10_000), tail=st.binary(max_size=4))
def test_a_cut_or_padded_safetensors_file_is_never_whole(cut, tail, whole, tmp_path_factory):
    damaged = whole[: cut % len(whole)] + tail
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(damaged)
    if len(damaged) == len(whole):  # other values in the last four bytes, which only a hash would tell
        assert safetensors_header(path).keys() == {"a", "b"}
    else:
        with pytest.raises(UserError):
            safetensors_header(path)


@given(
    header=st.binary(max_size=40)
    | st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4).map(
        lambda value: json.dumps({"a": {"data_offsets": value}}).encode()
    )
)
def test_a_header_of_nonsense_is_a_user_error(header, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "nonsense.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        safetensors_header(path)
    except UserError as error:
        assert path.name in error.message


@pytest.mark.parametrize(("options", "scale"), [({"guidance_scale": 1.0}, 1.0), ({"enabled": False}, 1.0), ({}, 3.5)])
def test_the_scale_of_a_checkpoints_guider_is_its_own(tmp_path, options, scale):
    """A HunyuanVideo-1.5 whose guidance was distilled says 1, and is not sampled at its family's 6 in two passes."""
    pipe = tiny_pipeline("hunyuan_video_15")
    pipe.guider = ClassifierFreeGuidance(**{"guidance_scale": 3.5} | options)
    pipe.save_pretrained(tmp_path / "model")
    loaded = load_pipeline(tmp_path / "model")
    assert loaded.default("guidance") == loaded.guidance == scale and loaded.says("guidance") == "the model's guider"
    assert loaded.says("steps") == "HunyuanVideo-1.5's defaults" and loaded.call == {}
    made = generate(loaded, ["a red circle"], GenerateConfig(steps=1, **SIZE), [0])
    assert (made.passes, made.guidance) == (1 + (scale > 1), scale)
    said = said_sampling(loaded, GenerateConfig(steps=1))
    assert said == (
        f"steps=1 (of the settings), guidance={scale:g} (of the model's guider), "
        "shift=5 (of the model's FlowMatchEulerDiscreteScheduler)"
    )
    assert generate(loaded, ["a red circle"], GenerateConfig(steps=1, guidance=2.0, **SIZE), [0]).passes == 2


def test_two_transformers_are_loaded_and_need_a_time_to_switch(tmp_path):
    tiny_pipeline("wan22").save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert loaded.family.name == "wan22" and loaded.pipe.config["boundary_ratio"] == 0.8
    second = "transformer_2/diffusion_pytorch_model.safetensors"
    assert loaded.hashes[second] == sha256_file(tmp_path / second)
    before = student_hash(loaded)
    assert student_hash(replace(loaded, hashes=dict(loaded.hashes) | {second: "another"})) != before
    assert set(encoder_hashes(loaded)) == {n for n in loaded.hashes if not n.startswith("transformer")}
    edit_index(tmp_path, boundary_ratio=None)
    with pytest.raises(UserError, match="no boundary_ratio, below which the transformer_2 runs"):
        load_pipeline(tmp_path)
