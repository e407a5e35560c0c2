"""The linear map of the zoo on tiny pipelines: what it is fitted to, and that it is better than reuse there."""

import pytest
import torch

import vidaccel
from tests.cache.test_attach import call
from tests.tiny import TEXT_TO_VIDEO, tiny_pipeline
from vidaccel.families.registry import family_of_pipeline
from vidaccel.forecasters.base import Cached
from vidaccel.forecasters.linear import fit_linear, fitted, predicted_passes


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
