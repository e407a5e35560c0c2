"""A predictor knows its model by what is in memory, and not by its files alone."""

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig

import vidaccel
from tests.models.test_weight_hashes import ATTACHED, predictor_of
from tests.tiny import SIZE, guided, tiny_pipeline
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.learned import Predictor
from vidaccel.models.loading import load_pipeline
from vidaccel.models.unchanged import active_adapters, changed, pipeline_sample, trunk_sample
from vidaccel.models.weight_hashes import student_hash

LORA = LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)


@pytest.fixture
def loaded(saved):
    return load_pipeline(saved("wan"))


@pytest.fixture
def predictor(loaded):
    return predictor_of(loaded, student=student_hash(loaded))


def attach(of, predictor, **more):
    vidaccel.attach(of, predictor=predictor, **ATTACHED, **more).detach()


@pytest.mark.parametrize("by", ["vidaccel", "diffusers"])
def test_a_fused_adapter_makes_another_model(by, saved, loaded, predictor):
    other = loaded if by == "vidaccel" else WanPipeline.from_pretrained(saved("wan"))
    attach(other, predictor)
    transformer = (loaded.pipe if by == "vidaccel" else other).transformer
    transformer.add_adapter(LORA)
    transformer.fuse_lora()
    for unloaded in (False, True):
        if unloaded:
            transformer.unload_lora()
        with pytest.raises(UserError, match="weights in memory are not those of .*: blocks.0.attn1.to_v.weight was"):
            attach(other, predictor)
        attach(other, predictor, force=True)


def test_an_active_adapter_makes_another_model_and_an_inactive_one_does_not(loaded, predictor):
    transformer, family = loaded.pipe.transformer, loaded.family
    assert active_adapters(transformer, family) is None
    torch.manual_seed(0)
    transformer.add_adapter(LORA, adapter_name="one")
    with pytest.raises(UserError, match="trained for the student .*, and this is .*wan"):
        attach(loaded, predictor)
    attach(loaded, predictor, force=True)
    known = {student_hash(loaded)}
    attach(loaded, predictor_of(loaded, student=student_hash(loaded)))
    transformer.set_adapters("one", 0.5)
    known.add(student_hash(loaded))
    transformer.add_adapter(LORA, adapter_name="two")
    transformer.set_adapters(["one", "two"], [0.5, 1.0])
    known.add(student_hash(loaded))
    assert len(known) == 3
    transformer.disable_adapters()
    attach(loaded, predictor)
    transformer.enable_adapters()
    transformer.delete_adapters(["one", "two"])
    attach(loaded, predictor)


def test_blocks_beside_the_trunk_count_as_well():
    """VACE's, which take the control."""
    pipe = tiny_pipeline("wan_vace")
    family, before = FAMILIES["wan_vace"], pipeline_sample(pipe, FAMILIES["wan_vace"])
    weight = pipe.transformer.vace_blocks[0].attn1.to_v.weight
    with torch.no_grad():
        weight += 0.1
    assert changed(before, pipeline_sample(pipe, family)) == "vace_blocks.0.attn1.to_v.weight"
    only = LoraConfig(r=2, target_modules=r"vace_blocks\.0\.attn1\.to_v", init_lora_weights=False)
    assert active_adapters(pipe.transformer, family) is None
    pipe.transformer.add_adapter(only)
    assert active_adapters(pipe.transformer, family) is not None


def test_a_predictor_runs_beside_active_adapters(loaded, predictor, tmp_path):
    """In its own folder's types and attention, which are asked of the trunk's wrapped layers."""
    loaded.pipe.transformer.add_adapter(LORA)
    predictor.save_pretrained(tmp_path)
    loaded.pipe.set_progress_bar_config(disable=True)
    with vidaccel.attach(loaded, predictor=tmp_path, **ATTACHED, force=True) as attachment:
        loaded.pipe("a red circle", num_inference_steps=4, output_type="latent", **SIZE, **guided(loaded.pipe, 1.0))
    assert attachment.predicted_passes == 2


def test_casts_between_types_are_no_change(loaded):
    before = trunk_sample(loaded.pipe.transformer, loaded.family)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        loaded.pipe.transformer.to(dtype)
        assert changed(before, trunk_sample(loaded.pipe.transformer, loaded.family)) is None
    loaded.pipe.transformer.blocks[1].ffn.net[2].weight.data[0, 3] += 0.1
    assert changed(before, trunk_sample(loaded.pipe.transformer, loaded.family)) == "blocks.1.ffn.net.2.weight"


def test_weights_of_a_second_transformer_are_looked_at_too():
    pipe, family = tiny_pipeline("wan22"), FAMILIES["wan22"]
    before = pipeline_sample(pipe, family)
    assert len(before) == 2 * len(trunk_sample(pipe.transformer, family))
    pipe.transformer_2.blocks[1].ffn.net[2].weight.data[0, 3] += 0.1
    assert changed(before, pipeline_sample(pipe, family)) == "transformer_2.blocks.1.ffn.net.2.weight"


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.uint8])
def test_a_predictor_runs_in_the_type_that_a_model_of_stored_bytes_computes_in(loaded, predictor, tmp_path, stored):
    """Weights of one byte, cast by diffusers at each layer; or packed, as of bitsandbytes and GGUF."""
    transformer = loaded.pipe.transformer
    if stored is torch.uint8:
        for block in transformer.blocks:
            packed = block.ffn.net[2].weight.data.flatten()[::2].to(stored)
            block.ffn.net[2].weight = torch.nn.Parameter(packed, requires_grad=False)
    else:
        transformer.enable_layerwise_casting(storage_dtype=stored, compute_dtype=torch.float32)
    assert {weight.dtype for weight in transformer.blocks[0].ffn.parameters()} & {stored}
    predictor.save_pretrained(tmp_path)
    made = Predictor.from_pretrained(tmp_path).run_like(transformer)
    assert {weight.dtype for weight in made.blocks.parameters()} == {torch.float32}
    if stored is torch.uint8:
        with pytest.raises(UserError, match="are packed, and a predictor begins with whole ones"):
            predictor_of(loaded)
        return
    assert {weight.dtype for weight in predictor_of(loaded).blocks.parameters()} == {torch.float32}
    loaded.pipe.set_progress_bar_config(disable=True)
    with vidaccel.attach(loaded, predictor=tmp_path, **ATTACHED, force=True) as attachment:
        call = {"num_inference_steps": 4, "output_type": "latent", **SIZE, **guided(loaded.pipe, 1.0)}
        assert loaded.pipe("a red circle", **call).frames.isfinite().all()
    assert attachment.predicted_passes == 2
