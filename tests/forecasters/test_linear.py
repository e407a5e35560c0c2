"""The linear map of the zoo on tiny pipelines: what it is fitted to, and that it is better than reuse there."""

from datetime import UTC, datetime

import pytest
import torch

import vidaccel
from tests.cache.test_attach import call
from tests.tiny import TEXT_TO_VIDEO, tiny_pipeline
from vidaccel.artefacts import write_run
from vidaccel.errors import UserError
from vidaccel.families.registry import family_of_pipeline
from vidaccel.forecasters.base import Cached
from vidaccel.forecasters.checkpoint import SCHEDULES
from vidaccel.forecasters.linear import (
    LinearMap,
    LinearMaps,
    fit_linear,
    fitted,
    predicted_passes,
    save_map,
    saved_maps,
)
from vidaccel.models.grid import Grid


@pytest.mark.parametrize("name", TEXT_TO_VIDEO)
def test_it_is_fitted_to_the_steps_between_the_full_ones(name):
    pipe = tiny_pipeline(name)
    family, left = family_of_pipeline(type(pipe).__name__), []

    def note(block, inputs, output):
        left.append(output[0] if isinstance(output, tuple) else output)

    handle = getattr(pipe.transformer, family.block_lists[-1].name)[-1].register_forward_hook(note)
    samples = predicted_passes(pipe, family, {0, 2}, lambda: call(pipe, guidance=1.0))
    handle.remove()
    assert len(left) == 4 and len(samples) == 2
    for (entering, cached, leaving), full, predicted in zip(samples, (0, 2), (1, 3), strict=True):
        assert torch.equal(cached["hidden_states"], left[full])
        assert torch.equal(leaving["hidden_states"], left[predicted])
        assert entering.keys() == leaving.keys() and not torch.equal(entering["hidden_states"], left[predicted])
    linear = fit_linear(samples)
    ours = reused = 0.0
    for entering, cached, leaving in samples:
        made = linear(entering, (Cached(cached, None),))
        ours += sum(float((made[n] - leaving[n]).square().sum()) for n in leaving)
        reused += sum(float((cached[n] - leaving[n]).square().sum()) for n in leaving)
    assert ours < reused


def test_it_serves_and_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipeline("wan")
    plain = call(pipe, guidance=1.0)
    linear = fitted(pipe, family_of_pipeline("WanPipeline"), {0, 2}, lambda: call(pipe, guidance=1.0))
    assert torch.equal(call(pipe, guidance=1.0), plain)
    with vidaccel.attach(pipe, predictor=linear, steps=4, full_steps=[0, 2]) as attachment:
        assert not torch.equal(call(pipe, guidance=1.0), plain)
    assert attachment.predicted_passes == 2


def test_a_folder_has_a_map_for_each_number_of_steps(tmp_path):
    pipe, family = tiny_pipeline("wan"), family_of_pipeline("WanPipeline")
    D = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim

    def finish():
        write_run(tmp_path, format=SCHEDULES, command="", config={}, seed=0, started=datetime.now(UTC))

    finish()
    with pytest.raises(UserError, match="has schedules of a linear map, and no map"):
        saved_maps(tmp_path, pipe, family)
    made = {steps: LinearMap({"hidden_states": torch.randn(D, 2 * D + 1)}) for steps in (4, 20)}
    for steps, linear in made.items():
        save_map(linear, steps, tmp_path)
    finish()
    maps = saved_maps(tmp_path, pipe, family)
    tokens = {"hidden_states": torch.randn(1, 3, D)}
    for steps in (20, 4, 20):
        maps.follow(Grid.shifted(steps, 2.0))
        out = maps(tokens, (Cached(tokens, None),))["hidden_states"]
        expected = made[steps](tokens, (Cached(tokens, None),))["hidden_states"]
        torch.testing.assert_close(out, expected)
    with pytest.raises(UserError, match="for 4 and 20 steps, and the pipeline takes 5"):
        maps.follow(Grid.shifted(5, 2.0))
    with pytest.raises(ValueError, match="has to know the grid"):
        LinearMaps(made)(tokens, (Cached(tokens, None),))
    with pytest.raises(UserError, match="tokens of other widths"):
        saved_maps(tmp_path, tiny_pipeline("hunyuan_video"), family_of_pipeline("HunyuanVideoPipeline"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors changed"):
        saved_maps(tmp_path, pipe, family)
