"""Weights by their original names are those that diffusers makes the same weights of again."""

import pytest
import torch
from safetensors.torch import save_file

from tests.published import hunyuan_video_student
from tests.tiny import tiny_pipeline
from vidaccel.errors import UserError
from vidaccel.families.original import ORIGINALS
from vidaccel.families.registry import FAMILIES
from vidaccel.models.original import as_diffusers, as_original

D = 24


@pytest.mark.parametrize("family", ORIGINALS)
def test_the_way_there_and_back_is_the_same_bit_for_bit(family):
    weights = tiny_pipeline(family).transformer.state_dict()
    original = as_original(weights, FAMILIES[family], D)
    back = as_diffusers(original, FAMILIES[family], D)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_names_and_shapes_of_hunyuan_video_are_those_of_released_files():
    released = {name: w.shape for name, w in hunyuan_video_student().items() if not name.startswith("time_r_in.")}
    made = as_original(tiny_pipeline("hunyuan_video").transformer.state_dict(), FAMILIES["hunyuan_video"], D)
    assert {name: weight.shape for name, weight in made.items()} == released


@pytest.mark.parametrize("family", ["wan", "wan_vace", "skyreels_v2", "hunyuan_video"])
def test_diffusers_loads_such_a_file(family, tmp_path):
    """Of HunyuanVideo without blocks of a single stream, which diffusers takes apart at its full width alone."""
    transformer = tiny_pipeline(family).transformer
    if family == "hunyuan_video":
        transformer = type(transformer).from_config(dict(transformer.config) | {"num_single_layers": 0})
    transformer.save_config(tmp_path / "transformer")
    weights = transformer.state_dict()
    save_file(as_original(weights, FAMILIES[family], D), tmp_path / "model.safetensors")
    how = {"config": str(tmp_path), "subfolder": "transformer", "local_files_only": True}
    loaded = type(transformer).from_single_file(str(tmp_path / "model.safetensors"), **how).state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_what_has_no_original_name_is_refused():
    weights = tiny_pipeline("wan").transformer.state_dict()
    ends = {"condition_embedder.image_embedder.pos_embed": torch.ones(1)}  # of a first and a last frame
    with pytest.raises(UserError, match="1 weights of this WanTransformer3DModel have no original name, .*pos_embed"):
        as_original(weights | ends, FAMILIES["wan"], D)
    with pytest.raises(UserError, match="what the authors of Mochi call its weights is not known here"):
        as_original(weights, FAMILIES["mochi"], D)
