"""The pipeline driven as a user's own would be, and what is counted on the way."""

import numpy as np
import pytest

from tests.tiny import HUNYUAN_CALL, SIZE, tiny_pipeline
from vidaccel.config import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.models.catalog import FAMILIES
from vidaccel.models.loading import LoadedPipeline
from vidaccel.sampling import generate


def loaded(family: str = "hunyuan_video") -> LoadedPipeline:
    call = SIZE | (HUNYUAN_CALL if family == "hunyuan_video" else {})
    return LoadedPipeline(tiny_pipeline(family), FAMILIES[family], "here", call, {})


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 3), (4.0, 6)])
def test_guidance_costs_a_second_pass(family, guidance, passes):
    made = generate(loaded(family), ["a red circle"], GenerateConfig(steps=3, guidance=guidance), [0])
    assert (made.passes, made.steps, made.guidance) == (passes, 3, guidance)
    assert made.frames.shape == (1, 5, 32, 32, 3) and made.frames.dtype == np.uint8
    assert all(seconds > 0 for seconds in made.seconds.values())


def test_hooks_are_gone_afterwards():
    model = loaded()
    generate(model, ["a"], GenerateConfig(steps=1), [0])
    assert not model.pipe.transformer._forward_hooks and not model.pipe.transformer._forward_pre_hooks


def test_a_batch_makes_what_its_members_make_alone():
    model, config = loaded(), GenerateConfig(steps=2, guidance=3.0)
    prompts, seeds = ["a red circle", "a green square on black"], [3, 4]
    together = generate(model, prompts, config, seeds).frames
    alone = [generate(model, [p], config, [s]).frames[0] for p, s in zip(prompts, seeds, strict=True)]
    # One level of 255 for sums that a larger batch takes in another order.
    assert np.abs(together.astype(int) - np.stack(alone)).max() <= 1


def test_a_video_that_is_not_finite_is_refused():
    model = loaded()
    model.pipe.transformer.proj_out.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        generate(model, ["a"], GenerateConfig(steps=1), [0])
