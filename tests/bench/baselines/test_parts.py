"""FORA, Delta-DiT and TeaCache: on doubling blocks worked out by hand, and on pipelines against caches written out."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from tests.cache.toy import TOY, Toy
from tests.tiny import SIZE, TEXT_TO_VIDEO, calls_of_a_step, guided, tiny_pipeline
from vidaccel.bench.baselines.delta_dit import DeltaDiT
from vidaccel.bench.baselines.fora import Fora
from vidaccel.bench.baselines.teacache import Calibration, TeaCache, relative_change
from vidaccel.cache.trunk import Trunk
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES, family_of_pipeline
from vidaccel.families.walk import blocks_of


class Pipe:
    """Runs a toy transformer on given inputs, one a step, as a pipeline would."""

    def __init__(self, steps: int):
        self.transformer, self.scheduler = Toy(), FlowMatchEulerDiscreteScheduler()
        self.steps = steps

    def __call__(self, *inputs: float, contexts: tuple[str, ...] = ("cond",), fail_at: int | None = None) -> list:
        self.scheduler.set_timesteps(self.steps)
        out = []
        for index, x in enumerate(inputs):
            for context in contexts:
                with self.transformer.cache_context(context):
                    video = self.transformer(torch.full((1, 2, 3), float(x)), fail=index == fail_at)[0]
                out.append(video.flatten()[0].item())
            self.scheduler._step_index = index + 1
        self.transformer._reset_stateful_cache()
        return out


def entering(block: nn.Module, arguments: dict) -> torch.Tensor:
    return arguments["hidden_states"]


# Delta-DiT. The toy's tokens enter as 3 x + 1, and each of four blocks doubles them.


def test_delta_dit_leaves_out_rear_blocks_early_and_front_blocks_late():
    pipe = Pipe(steps=4)
    with DeltaDiT(pipe, every=2, share=0.5, family=TOY) as cache:
        # x = 1: 4 -> 16 -> 64, the rear half adds 48. x = 2: 7 -> 28, + 48.
        # x = 3, now late: 10 -> 40 -> 160, the front half adds 30. x = 4: 13 + 30 = 43 -> 172.
        assert pipe(1, 2, 3, 4) == [64, 76, 160, 172]
    assert (cache.full_passes, cache.skipped_passes) == (2, 2)
    assert pipe.transformer.runs == [3, 3, 3, 3]


def test_delta_dit_keeps_the_range_of_the_full_step():
    pipe = Pipe(steps=4)
    with DeltaDiT(pipe, every=4, share=0.5, family=TOY):
        # all steps after the first skip the rear half, though the last two are late
        assert pipe(1, 2, 3, 4) == [64, 76, 88, 100]
    assert pipe.transformer.runs == [4, 4, 1, 1]


def test_skipped_text_gets_what_was_added_as_well():
    pipe, seen = Pipe(steps=2), []
    with DeltaDiT(pipe, every=2, share=0.5, boundary=0, family=TOY):
        pipe.transformer.singles[-1].register_forward_hook(lambda block, inputs, out: seen.append(out[1].mean().item()))
        pipe(1, 2)
    assert seen == [4, 4]  # + 1 a block, two of them skipped


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": 2, "share": 0}, {"every": 2, "boundary": 1.5}], ids=str)
def test_settings_of_delta_dit(wrong):
    with pytest.raises(UserError, match="Delta-DiT with"):
        DeltaDiT(Pipe(2), family=TOY, **wrong)


# TeaCache, watching the tokens that enter.


def test_teacache_computes_where_the_accumulated_change_reaches_the_threshold():
    pipe = Pipe(steps=5)
    with TeaCache(pipe, threshold=1.0, family=TOY, indicator=entering) as cache:
        # x = 1: 4 -> 64, adds 60. x = 2: 7, change 3/4: 7 + 60. x = 3: 10, change 3/7, in all 1.18: 160, adds 150.
        # x = 4: 13, change 3/10: 13 + 150. The last step is computed.
        assert pipe(1, 2, 3, 4, 4) == [64, 67, 160, 163, 208]
    assert (cache.full_passes, cache.skipped_passes) == (3, 2)


def test_teacache_rescales_changes_by_its_polynomial():
    pipe = Pipe(steps=4)
    with TeaCache(pipe, threshold=1.0, coefficients=(2.0, 0.0, 0.0), family=TOY, indicator=entering):
        assert pipe(1, 2, 2, 2) == [64, 112, 112, 112]  # 2 (3/4)^2 = 1.125, then no change, then the last
    assert pipe.transformer.runs == [3, 3, 3, 3]


def test_a_threshold_of_zero_computes_every_step():
    pipe = Pipe(steps=4)
    with TeaCache(pipe, threshold=0.0, family=TOY, indicator=entering):
        assert pipe(1, 1, 1, 1) == [64] * 4
    with pytest.raises(UserError, match="threshold=-1"):
        TeaCache(pipe, threshold=-1, family=TOY)


def test_calibration_sees_changes_of_input_and_output():
    pipe = Pipe(steps=3)
    with Calibration(pipe, TOY, indicator=entering) as seen:
        assert pipe(1, 2, 5) == [64, 112, 256]
    assert seen.changes == [pytest.approx((3 / 4, 48 / 64)), pytest.approx((9 / 7, 144 / 112))]
    assert seen.coefficients() == pytest.approx([1.0, 0.0])  # the toy's output changes as its input does
    assert relative_change(torch.tensor([1.0, -5.0]), torch.tensor([2.0, -2.0])) == pytest.approx(4 / 4)


# What all of them share


def test_contexts_are_kept_apart():
    pipe = Pipe(steps=2)
    inputs = iter([1, 2, 3, 4])
    with DeltaDiT(pipe, every=2, share=1, family=TOY):
        pipe.transformer.register_forward_pre_hook(lambda _, args: (torch.full((1, 2, 3), float(next(inputs))),))
        # cond: 4 -> 64, adds 60; uncond: 7 -> 112, adds 105; then 10 + 60 and 13 + 105
        assert pipe(0, 0, contexts=("cond", "uncond")) == [64, 112, 70, 118]


def test_generations_know_nothing_of_each_other_nor_of_a_failed_one():
    pipe = Pipe(steps=2)
    with DeltaDiT(pipe, every=2, share=1, family=TOY) as cache:
        first = pipe(1, 2)
        with pytest.raises(ArithmeticError):
            pipe(5, 6, fail_at=1)
        assert not cache._memory
        assert pipe(1, 2) == first == [64, 67]


def test_nothing_is_kept_after_the_last_step():
    pipe = Pipe(steps=2)
    with TeaCache(pipe, threshold=1.0, family=TOY, indicator=entering) as cache:
        pipe.scheduler.set_timesteps(2)
        for index in range(2):
            pipe.transformer(torch.ones(1, 2, 3))
            assert bool(cache._memory) == (index == 0)
            pipe.scheduler._step_index = index + 1


def test_detached_the_modules_are_as_before():
    pipe = Pipe(steps=2)
    before = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules() if name}
    with DeltaDiT(pipe, every=2, family=TOY):
        pipe(1, 2)
    after = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules() if name}
    ran = {name: values | {"runs": 0} for name, values in after.items()}
    assert ran == {name: values | {"runs": 0} for name, values in before.items()}
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks


def test_another_cache_beneath_is_refused():
    pipe = tiny_pipeline("hunyuan_video")
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(UserError, match="a cache of diffusers is enabled"), Fora(pipe, every=2):
        pass


# Real pipelines


def call(pipe, steps: int = 4) -> torch.Tensor:
    arguments = {"num_inference_steps": steps, "output_type": "latent", **SIZE, **guided(pipe, 3.0)}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **arguments).frames


@pytest.fixture(scope="module", params=TEXT_TO_VIDEO)
def pipe(request):
    return tiny_pipeline(request.param)


class OwnFora:
    """FORA written out: outputs of the branches are replaced by those that the same pass of guidance gave before."""

    def __init__(self, pipe, full_steps):
        blocks = blocks_of(pipe.transformer, family_of_pipeline(type(pipe).__name__))
        modules = [block.get_submodule(name) for kind, block in blocks for name in kind.branches]
        self.handles = [module.register_forward_hook(self.replace) for module in modules]
        self.full_steps, self.calls, self.stored = full_steps, dict.fromkeys(modules, 0), {}
        self.each = calls_of_a_step(pipe)

    def replace(self, module, inputs, output):
        step, side = divmod(self.calls[module], self.each)
        self.calls[module] += 1
        if step in self.full_steps:
            self.stored[module, side] = output
        return self.stored[module, side]


def test_fora_is_as_written_out_by_hand(pipe):
    plain, own = call(pipe), OwnFora(pipe, full_steps={0, 2})
    expected = call(pipe)
    for handle in own.handles:
        handle.remove()
    with Fora(pipe, every=2) as cache:
        assert torch.equal(call(pipe), expected)
    assert cache.full_passes == cache.skipped_passes == 2 * calls_of_a_step(pipe)
    assert not torch.equal(expected, plain)
    assert torch.equal(call(pipe), plain)


def test_full_at_every_step_is_the_pipeline_itself(pipe):
    plain = call(pipe)
    for cache in (Fora(pipe, every=1), DeltaDiT(pipe, every=1), TeaCache(pipe, threshold=0.0)):
        with cache:
            assert torch.equal(call(pipe), plain)


def test_teacache_with_nothing_to_stop_it_adds_the_first_steps_difference(pipe):
    plain = call(pipe)
    with TeaCache(pipe, threshold=1e9) as cache:
        skipping = call(pipe)
    assert cache.full_passes == cache.skipped_passes == 2 * calls_of_a_step(pipe)
    assert not torch.equal(skipping, plain) and skipping.isfinite().all()


def test_a_trunk_fits_on_after_them(pipe):
    with Fora(pipe, every=2):
        call(pipe)
    family = SimpleNamespace(**vars(next(f for f in FAMILIES.values() if type(pipe).__name__ in f.pipelines)))
    with Trunk(pipe.transformer, family):
        assert call(pipe).isfinite().all()


def test_fora_refuses_no_steps():
    with pytest.raises(UserError, match="every 0 steps"):
        Fora(Pipe(2), every=0, family=TOY)
