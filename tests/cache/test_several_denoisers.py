"""Predicted steps of a model that is denoised by two transformers, one after the other."""

import logging
from contextlib import ExitStack

import pytest
import torch

import vidaccel
from tests.tiny import called, guided, tiny_pipeline
from vidaccel.errors import UserError
from vidaccel.families.registry import family_of
from vidaccel.families.walk import blocks_of, boundaries_of, denoisers_of
from vidaccel.forecasters.learned import new_predictor
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.grid import current_step

STEPS = 4
"""Of which the first two are the first transformer's."""


@pytest.fixture(scope="module", params=["wan22", "wan22_i2v"])
def pipe(request):
    return tiny_pipeline(request.param)


def call(pipe, **more):
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", **called(pipe), **guided(pipe, 4.0), **more}
    return pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), **arguments).frames


def by_hand(pipe, full_steps):
    """Latents of reuse written out: on other steps the last block of each transformer gives again what it gave on the
    last full step with the same prompt."""

    def hook(block, inputs, output):
        stored, calls = kept.setdefault(block, ({}, []))
        side = len(calls) % 2
        calls.append(1)
        if current_step(pipe.scheduler).index in full_steps:
            stored[side] = output
        return stored[side]

    kept, family = {}, family_of(pipe)
    with ExitStack() as stack:
        for transformer in denoisers_of(pipe, family):
            stack.callback(blocks_of(transformer, family)[-1][1].register_forward_hook(hook).remove)
        return call(pipe)


def test_reuse_is_as_written_out_by_hand_and_all_full_is_the_pipeline(pipe):
    plain, expected = call(pipe), by_hand(pipe, {0, 2})
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=list(range(STEPS))):
        assert torch.equal(call(pipe), plain)
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]) as attachment:
        assert torch.equal(call(pipe), expected) and not torch.equal(expected, plain)
        assert torch.equal(call(pipe), expected)  # nothing is left of the generation before
    assert (attachment.full_passes, attachment.predicted_passes) == (8, 8)
    assert torch.equal(call(pipe), plain)


@pytest.mark.parametrize("full_steps", [[0], [0, 1, 3]])
def test_the_first_step_of_the_second_is_full_whether_listed_or_not(pipe, full_steps, caplog):
    expected = by_hand(pipe, {2, *full_steps})
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=full_steps), caplog.at_level(logging.WARNING):
        assert torch.equal(call(pipe), expected)
        call(pipe)
    assert [record.message for record in caplog.records] == [
        "step 2 runs in full as well: it is the first of transformer_2"
    ]


def test_what_the_first_has_left_is_freed_at_the_switch(pipe):
    seen = []

    def count(module, inputs, output):
        seen.append([len(trunk.remembered) for trunk in attachment._trunks])

    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 2]) as attachment:
        hooks = [each.register_forward_hook(count) for each in (pipe.transformer, pipe.transformer_2)]
        call(pipe)
        for each in hooks:
            each.remove()
    assert seen == [[1, 0], [2, 0], [2, 0], [2, 0], [0, 1], [0, 2], [0, 1], [0, 0]]


def test_the_pipeline_says_where_it_switches(pipe):
    assert boundaries_of(pipe, family_of(pipe)) == (0.8,)
    pipe.register_to_config(boundary_ratio=0.95)  # the first transformer has the first step alone
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, full_steps=[0, 1]) as attachment:
        call(pipe)
    pipe.register_to_config(boundary_ratio=0.8)
    assert [trunk.predicted_passes for trunk in attachment._trunks] == [0, 4]


def test_a_network_for_one_transformer_or_for_another_switch_is_refused(pipe, tmp_path):
    family = family_of(pipe)
    made = new_predictor(pipe.transformer, family, {}, {}, 1)
    made.save_pretrained(tmp_path)
    for predictor in (made, str(tmp_path)):
        with pytest.raises(UserError, match=r"predictor is for one transformer, and the pipeline has a second .* 0.8"):
            vidaccel.attach(pipe, predictor=predictor, steps=STEPS, full_steps=[0, 2])
    second = new_predictor(pipe.transformer_2, family, {}, {}, 1)
    made = new_predictor(pipe.transformer, family, {}, {}, 1, [second], boundary=0.9)
    with pytest.raises(UserError, match=r"below t = 0.9, and the pipeline has 0.8\nhint: train"):
        vidaccel.attach(pipe, predictor=made, steps=STEPS, full_steps=[0, 2])


class Noted(Reuse):
    """Notes the times at which it is asked, and of which pass what it looks back on is."""

    def __init__(self):
        self.asked = []

    def __call__(self, arguments, memory, t):
        self.asked.append((round(float(t), 4), round(float(memory[0].t), 4)))
        return super().__call__(arguments, memory, t)


def test_each_transformer_is_predicted_by_its_own_part_of_a_forecaster(pipe):
    both = Noted()
    both.parts = [Noted(), Noted()]
    expected = by_hand(pipe, {0, 2})
    with vidaccel.attach(pipe, predictor=both, steps=STEPS, full_steps=[0, 2]):
        assert torch.equal(call(pipe), expected)
    t_0, t_1, t_2, t_3, _ = (round(t, 4) for t in pipe.scheduler.sigmas.tolist())
    assert [each.asked for each in (both, *both.parts)] == [[], 2 * [(t_1, t_0)], 2 * [(t_3, t_2)]]
