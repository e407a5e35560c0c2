"""LoRA files: added as written out by hand, wholly or not at all."""

import re

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_pipeline
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.loader import load
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models import adapters
from vidaccel.models.adapters import Adapter, add_adapters
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import student_hash, student_hashes

D, RANK, ALPHA = 24, 2, 4.0
NORM = "diffusion_model.blocks.1.norm3.diff"
QUERY_NORM = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff"


def comfyui() -> dict[str, torch.Tensor]:
    """A LoRA of the tiny Wan as LightX2V's are: ComfyUI's names, biases as `.diff_b`, zeros for norms."""
    generator = torch.Generator().manual_seed(0)
    weights = {NORM: torch.zeros(D)}
    for block in range(2):
        for layer in ("self_attn.q", "self_attn.o", "cross_attn.v"):
            name = f"diffusion_model.blocks.{block}.{layer}"
            weights[f"{name}.lora_down.weight"] = torch.randn(RANK, D, generator=generator)
            weights[f"{name}.lora_up.weight"] = torch.randn(D, RANK, generator=generator)
            weights[f"{name}.diff_b"] = torch.randn(D, generator=generator)
            weights[f"{name}.alpha"] = torch.tensor(ALPHA)
    return weights


def hunyuan(fused: bool = True) -> dict[str, torch.Tensor]:
    """A LoRA of the tiny HunyuanVideo-1.5 in ComfyUI's names, or in the original ones with q, k and v apart."""
    generator, layers = torch.Generator().manual_seed(1), {}
    refiner = "txt_in.individual_token_refiner.blocks.0"
    for layer, gives, takes in (
        ("double_blocks.0.img_attn.qkv" if fused else "double_blocks.0.img_attn_q", 3 * D if fused else D, D),
        ("double_blocks.1.txt_attn.proj", D, D),
        ("double_blocks.1.img_mlp.0" if fused else "double_blocks.1.img_mlp.fc1", 2 * D, D),
        (f"{refiner}.mlp.2" if fused else f"{refiner}.mlp.fc2", D, 4 * D),
        ("time_in.out_layer" if fused else "time_in.mlp.2", D, D),
        ("final_layer.adaLN_modulation.1", 2 * D, D),
    ):
        name = f"diffusion_model.{layer}" if fused else layer
        layers[f"{name}.lora_down.weight"] = torch.randn(RANK, takes, generator=generator)
        layers[f"{name}.lora_up.weight"] = torch.randn(gives, RANK, generator=generator)
        layers[f"{name}.diff_b"] = torch.randn(gives, generator=generator)
        layers[f"{name}.alpha"] = torch.tensor(ALPHA)
    return layers | ({QUERY_NORM: torch.zeros(D)} if fused else {})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file as above, and one of a HunyuanVideo-1.5 in diffusers' layout, which says its own scale."""
    folder = tmp_path_factory.mktemp("loras")
    save_file(comfyui(), folder / "wan.safetensors")
    other = tiny_pipeline("hunyuan_video_15").transformer
    other.add_adapter(LoraConfig(r=RANK, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    other.save_lora_adapter(folder / "hunyuan")
    return {"wan": folder / "wan.safetensors", "hunyuan_video_15": folder / "hunyuan"}


def add(pipe, family, *files):
    add_adapters(pipe, FAMILIES[family], [Adapter.parsed(str(each)) for each in files])


def test_a_file_in_comfyuis_layout_is_added_by_its_scale(files):
    pipe = tiny_pipeline("wan")
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    add(pipe, "wan", f"{files['wan']}:0.5")
    after, lora = pipe.transformer.state_dict(), comfyui()
    assert after.keys() == before.keys()
    own = {"self_attn.q": "attn1.to_q", "self_attn.o": "attn1.to_out.0", "cross_attn.v": "attn2.to_v"}
    expected = dict(before)
    for block in range(2):
        for theirs, ours in own.items():
            name, to = f"diffusion_model.blocks.{block}.{theirs}", f"blocks.{block}.{ours}"
            up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
            expected[f"{to}.weight"] = before[f"{to}.weight"] + 0.5 * ALPHA / RANK * up @ down
            expected[f"{to}.bias"] = before[f"{to}.bias"] + 0.5 * lora[f"{name}.diff_b"]
    for name, weight in expected.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-5)
    assert not torch.equal(after["blocks.0.attn1.to_q.weight"], before["blocks.0.attn1.to_q.weight"])


def test_a_pipeline_whose_class_has_no_loader_takes_diffusers_own_layout(files):
    pipe = tiny_pipeline("hunyuan_video_15")
    before = pipe.transformer.transformer_blocks[0].attn.to_q.weight.clone()
    lora = load_file(files["hunyuan_video_15"] / "pytorch_lora_weights.safetensors")
    add(pipe, "hunyuan_video_15", files["hunyuan_video_15"])
    a, b = (lora[f"transformer_blocks.0.attn.to_q.lora_{part}.weight"] for part in "AB")
    expected = before + 6 / RANK * b @ a
    torch.testing.assert_close(pipe.transformer.transformer_blocks[0].attn.to_q.weight, expected)


@pytest.mark.parametrize("fused", [True, False], ids=["ComfyUI's", "the original"])
def test_names_of_hunyuan_video_15_are_converted_here(fused, tmp_path):
    """Whose pipeline has no loader."""
    pipe, lora = tiny_pipeline("hunyuan_video_15"), hunyuan(fused)
    expected = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    save_file(lora, tmp_path / "lora.safetensors")
    add(pipe, "hunyuan_video_15", f"{tmp_path / 'lora.safetensors'}:0.5")

    def add_rows(ours: str, theirs: str, rows: slice = slice(None), swapped: bool = False) -> None:
        name = next(name.removesuffix(".alpha") for name in lora if name.endswith(f"{theirs}.alpha"))
        down, up = (lora[f"{name}.lora_{way}.weight"] for way in ("down", "up"))
        change, bias = 0.5 * ALPHA / RANK * up @ down, 0.5 * lora[f"{name}.diff_b"]
        if swapped:  # diffusers has the scale before the shift
            change, bias = torch.cat(change.chunk(2)[::-1]), torch.cat(bias.chunk(2)[::-1])
        expected[f"{ours}.weight"] += change[rows]
        expected[f"{ours}.bias"] += bias[rows]

    block = "transformer_blocks"
    if fused:
        for i, letter in enumerate("qkv"):
            add_rows(f"{block}.0.attn.to_{letter}", "img_attn.qkv", slice(i * D, (i + 1) * D))
    else:
        add_rows(f"{block}.0.attn.to_q", "img_attn_q")
    add_rows(f"{block}.1.attn.to_add_out", "txt_attn.proj")
    add_rows(f"{block}.1.ff.net.0.proj", "img_mlp.0" if fused else "img_mlp.fc1")
    add_rows("context_embedder.token_refiner.refiner_blocks.0.ff.net.2", "mlp.2" if fused else "mlp.fc2")
    add_rows("time_embed.timestep_embedder.linear_2", "time_in.out_layer" if fused else "time_in.mlp.2")
    add_rows("norm_out.linear", "adaLN_modulation.1", swapped=True)
    after = pipe.transformer.state_dict()
    assert after.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-5, msg=name)


def without(name):
    weights = comfyui()
    del weights[name]
    return weights


FIRST = "diffusion_model.blocks.0.self_attn.q"
WRONG = {
    "has 1 weights that diffusers leaves out, and which are not zero, such as .*blocks.1.norm3.diff\n": (
        "wan",
        comfyui() | {NORM: torch.ones(D)},
    ),
    "has 2 weights that this WanTransformer3DModel has no layer for, such as blocks.2.attn1.to_q.lora_A": (
        "wan",
        {
            f"transformer.blocks.{block}.attn1.to_q.lora_{part}.weight": torch.ones(
                (RANK, D) if part == "A" else (D, RANK)
            )
            for block in range(3)
            for part in "AB"
        },
    ),
    "has 1 weights that do not have the size of their layer, such as blocks.0.attn1.to_q.lora_A": (
        "wan",
        comfyui() | {f"{FIRST}.lora_down.weight": torch.ones(RANK, D + 1)},
    ),
    "has 1 weights that are half of a pair, .*, such as .*blocks.0.self_attn.q.lora_down.weight\n": (
        "wan",
        without(f"{FIRST}.lora_up.weight"),
    ),
    "has 1 weights that are half of a pair, .*, such as double_blocks.1.txt_attn.proj.lora_up.weight\n": (
        "hunyuan_video_15",
        {
            name: each
            for name, each in hunyuan(False).items()
            if name != "double_blocks.1.txt_attn.proj.lora_down.weight"
        },
    ),
    "has no layer for": ("hunyuan_video", comfyui()),
    "has .* weights that this HunyuanVideo15Transformer3DModel has no layer for": ("hunyuan_video_15", comfyui()),
    "has 1 weights that diffusers leaves out, and which are not zero, such as .*img_attn.norm.query_norm.diff\n": (
        "hunyuan_video_15",
        hunyuan() | {QUERY_NORM: torch.ones(D)},
    ),
    "does not load: ": ("wan", comfyui() | {f"{FIRST}.lora_up.weight": torch.full((D, RANK), torch.inf)}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_file_of_another_model_or_that_would_not_be_added_wholly_is_refused(message, tmp_path, unchanged_pipes):
    family, weights = WRONG[message]
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=message):
        add(unchanged_pipes[family], family, tmp_path / "wrong.safetensors")


def test_what_has_no_place_is_left_out_where_that_is_asked_for(tmp_path, unchanged_pipes, caplog):
    """Of a file that is refused otherwise: weights of norms, and of a layer that the model does not have."""
    beyond = {name.replace("blocks.0.", "blocks.2."): each for name, each in comfyui().items() if FIRST in name}
    save_file(comfyui(), tmp_path / "whole.safetensors")
    save_file(comfyui() | beyond | {NORM: torch.ones(D)}, tmp_path / "more.safetensors")
    whole, more = tiny_pipeline("wan"), tiny_pipeline("wan")
    add(whole, "wan", tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match=r"leaves out.*\nhint: .*or add the rest alone: lora=\[.*more.*:1:partly\]"):
        add(more, "wan", tmp_path / "more.safetensors")
    add(more, "wan", f"{tmp_path / 'more.safetensors'}:1:partly")
    after = more.transformer.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in whole.transformer.state_dict().items())
    left = [record.getMessage().partition(".safetensors ")[2] for record in caplog.records]
    assert left == [
        f"is added without 1 weights that diffusers leaves out, and which are not zero, such as {NORM}",
        "is added without 3 weights that this WanTransformer3DModel has no layer for, "
        "such as blocks.2.attn1.to_q.lora_A.weight",
    ]
    with pytest.raises(UserError, match="holds no weights for this HunyuanVideoTransformer3DModel"):
        add(unchanged_pipes["hunyuan_video"], "hunyuan_video", f"{tmp_path / 'whole.safetensors'}:1:partly")
    assert str(Adapter.parsed(f"{tmp_path / 'more.safetensors'}:partly")).endswith(".safetensors:1:partly")


@pytest.mark.parametrize("message", [message for message in WRONG if "half of a pair" in message or "size" in message])
def test_what_is_broken_is_refused_all_the_same(message, tmp_path):
    family, weights = WRONG[message]
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=message):
        add(tiny_pipeline(family), family, f"{tmp_path / 'wrong.safetensors'}:1:partly")


def test_names_that_nobody_knows_are_refused(tmp_path, unchanged_pipes, monkeypatch):
    monkeypatch.setattr(adapters, "original_name", lambda name, family: None)
    save_file(hunyuan(), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="in a layout that is not known: diffusion_model."):
        add(unchanged_pipes["hunyuan_video_15"], "hunyuan_video_15", tmp_path / "lora.safetensors")


@pytest.fixture(scope="module")
def unchanged_pipes():
    return {family: tiny_pipeline(family) for family in FAMILIES}


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_scale_that_is_not_finite_is_refused(files, scale):
    with pytest.raises(UserError, match=f"has the scale {scale}"):
        Adapter.parsed(f"{files['wan']}:{scale}")


def test_what_is_no_file_of_safetensors_is_refused(tmp_path, files):
    (tmp_path / "old.pt").write_bytes(b"")
    for name, message in (
        (tmp_path / "none.safetensors", "there is no LoRA file"),
        (tmp_path, "holds 0 safetensors files"),
        (tmp_path / "old.pt", "is a pickle"),
    ):
        with pytest.raises(UserError, match=message):
            Adapter.parsed(str(name))
    assert Adapter.parsed(f"{files['wan']}:-1e-1") == Adapter(files["wan"], -0.1)


def test_adapters_are_part_of_what_a_model_is_known_by(saved, files):
    plain = load_pipeline(saved("wan"))
    known = {student_hash(plain)}
    for lora in ([f"{files['wan']}:1"], [f"{files['wan']}:0.5"], [f"{files['wan']}:1", f"{files['wan']}:0.5"]):
        loaded = load_pipeline(saved("wan"), lora=lora)
        assert student_hashes(loaded) == {student_hash(loaded)}
        known.add(student_hash(loaded))
    assert len(known) == 4
    for lora in (str(files["wan"]), f"transformer:{files['wan']}"):
        again = load_pipeline(saved("wan"), lora=[lora])
        assert student_hash(again) in known
    q = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(again.pipe.transformer.state_dict()[q], plain.pipe.transformer.state_dict()[q])
    with pytest.raises(UserError, match=re.escape("there is no LoRA file nowhere")):
        load_pipeline(saved("wan"), lora=["nowhere"])


def test_a_file_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "f.safetensors").touch()
    for text in ("~/f.safetensors:0.5", "transformer_2:~/f.safetensors"):
        assert Adapter.parsed(text).file == tmp_path / "f.safetensors"


def test_of_two_transformers_each_file_names_its_own(tmp_path):
    file, model = tmp_path / "wan.safetensors", tmp_path / "model"
    save_file(comfyui(), file)
    tiny_pipeline("wan22").save_pretrained(model)
    plain, low = load_pipeline(model), load_pipeline(model, lora=[f"transformer_2:{file}:0.5"])
    expected = tiny_pipeline("wan22")
    expected.transformer = expected.transformer_2
    add_adapters(expected, FAMILIES["wan"], [Adapter(file, 0.5)])
    for made, stated in (
        (low.pipe.transformer_2, expected.transformer),
        (low.pipe.transformer, plain.pipe.transformer),
    ):
        own = made.state_dict()
        assert all(torch.equal(weight, own[name]) for name, weight in stated.state_dict().items())
    high = load_pipeline(model, lora=[f"transformer:{file}:0.5"])
    assert len({student_hash(each) for each in (plain, low, high)}) == 3
    with pytest.raises(UserError, match=r"does not say which of the 2 .*\nhint: .*lora=\[transformer_2:"):
        load_pipeline(model, lora=[str(file)])
    with pytest.raises(UserError, match="has no transformer_3"):
        load_pipeline(model, lora=[f"transformer_3:{file}"])
    words = [f"transformer:{file}:0.5", f"transformer_2:{file}"]
    assert load("generate", GenerateConfig, "teacher", [f"lora=[{','.join(words)}]"]).lora == words
