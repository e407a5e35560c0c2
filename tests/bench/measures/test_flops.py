"""FLOPs by formula: by hand, and against PyTorch's counter on real forward passes, to the last FLOP."""

import math
from dataclasses import replace
from inspect import signature

import diffusers
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import CALLS, called, tiny_pipeline
from vidaccel.bench.measures.counting import FORMULAS
from vidaccel.bench.measures.flops import (
    attention_flops,
    blocks_flops,
    layer_flops,
    parameters,
    pass_flops,
    planned_trunk,
    width,
)
from vidaccel.bench.measures.memory import block_arguments
from vidaccel.bench.sizes import meta_transformer, planned_family
from vidaccel.compat.torch import CPU_ATTENTION
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.families.base import DiTFamily
from vidaccel.families.costs import BlockCosts
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import call_block, widths
from vidaccel.forecasters.learned import Fusion, Predictor, Statistics, new_predictor
from vidaccel.models.live_bytes import NothingMasked

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
ATTENTION = (torch.ops.aten.bmm, torch.ops.aten.baddbmm, CPU_ATTENTION)
"""What attention, and nothing else in these models, is made of."""


def counted(call) -> FlopCounterMode:
    """FLOPs as PyTorch counts them, with what it has no formula for."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter


def of_block_parts(counter: FlopCounterMode, family: DiTFamily, part: str) -> int:
    """FLOPs counted in those modules directly inside the trunk's blocks that have `part` in their names."""
    lists = {block_list.name for block_list in family.block_lists}
    parts = {tuple(name.split(".")): sum(count.values()) for name, count in counter.get_flop_counts().items()}
    return sum(n for name, n in parts.items() if len(name) == 4 and name[1] in lists and part in name[3])


def _of_trunk(family: DiTFamily) -> dict[str, BlockCosts]:
    return {block_list.name: family.costs.blocks[block_list.name] for block_list in family.block_lists}


def attention_of(counts: dict) -> int:
    return sum(counts.get(op, 0) for op in ATTENTION)


def test_every_family_has_its_work_described():
    for family in FAMILIES.values():
        assert tuple(family.costs.blocks) == tuple(block_list.name for block_list in family.all_lists)


# By hand


def test_an_attention():
    # scores: 3 queries x 5 keys x 2 x 8; values: the same again
    assert attention_flops((("video", "text"),), {"video": 3, "text": 5}, width=8) == 2 * (3 * 5 * 2 * 8)


def test_layers():
    module = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Conv3d(4, 5, (1, 2, 2)), "c": nn.ReLU()})
    found = layer_flops(module, (("a", "one"), ("*", "video")), {"one": 1, "video": 7})
    assert found == [("a", "one", 2 * 2 * 3), ("b", "video", 2 * 4 * 5 * 4 * 7)]


def first_blocks(model, family, rows):
    """What the first block of each list takes, by the list's name."""
    return {name: next(blocks_flops(model, family, rows, name, [0])) for name in family.costs.blocks}


def test_blocks_of_hunyuan_video():
    config = BenchmarkConfig(transformer={"num_layers": 1, "num_single_layers": 1})
    rows = {"one": 1, "video": 1000, "text": 100, "all": 1100, "prompt": 100}
    found = first_blocks(meta_transformer(config), planned_family(config), rows)
    D = 3072
    attention = 4 * 1100**2 * D
    # q, k, v and output projection 4 D^2, MLP 8 D^2, of every token; modulation 6 D^2 for video and for text
    double = 2 * 12 * D**2 * 1100 + 2 * 2 * 6 * D**2
    # q, k, v 3 D^2, MLP in 4 D^2, out of both together 5 D^2, of every token; modulation 3 D^2
    single = 2 * 12 * D**2 * 1100 + 2 * 3 * D**2
    blocks = {name: (sum(layer.flops for layer in block.layers), block.attention) for name, block in found.items()}
    assert blocks == {"transformer_blocks": (double, attention), "single_transformer_blocks": (single, attention)}


def test_a_block_of_wan():
    config = BenchmarkConfig(family="wan", transformer={"num_layers": 1})
    rows = {"one": 1, "video": 1000, "text": 100, "all": 1100, "prompt": 100}
    (block,) = first_blocks(meta_transformer(config), planned_family(config), rows).values()
    D, F = 5120, 13824
    # self-attention 4 D^2, cross-attention's q and output 2 D^2, MLP 2 D F of the video; k and v 2 D^2 of the text
    assert sum(layer.flops for layer in block.layers) == 2 * 1000 * (6 * D**2 + 2 * D * F) + 2 * 100 * 2 * D**2
    assert block.attention == 4 * 1000 * 1000 * D + 4 * 1000 * 100 * D


# Against PyTorch's counter


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def one_pass(request):
    """(transformer, family, rows, counter) of one pass of a tiny pipeline."""
    family = request.param
    pipe = tiny_pipeline(family.name)
    extra = dict(CALLS.get(family.name, {})) | dict(family.call)
    if family.guidance.guider:
        pipe.guider = pipe.guider.new(guidance_scale=1.0, enabled=False)
    elif not family.guidance.embedded_argument:
        extra = extra | {"guidance_scale": 1.0}
    given, tokens = {}, {}
    transformer = pipe.transformer
    transformer.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    names = family.block_lists[0].arguments
    first = transformer.get_submodule(family.block_lists[0].name)[0]
    # A block may be given its last arguments by name, or not at all.
    first.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.update(dict(zip(names, args, strict=False)) | kwargs), with_kwargs=True
    )
    extra |= called(pipe)
    counter = counted(lambda: pipe(prompt="a red circle", num_inference_steps=1, output_type="latent", **extra))
    video, text = (tokens[name].shape[1] for name in ("hidden_states", "encoder_hidden_states"))
    texts = {"prompt": "encoder_hidden_states", "glyphs": "encoder_hidden_states_2", "image": "image_embeds"}
    texts |= {each.tokens: each.argument for each in family.conditions if each.tokens}
    lengths = {name: given[argument].shape[1] for name, argument in texts.items() if argument in given}
    apart = {each.tokens for each in family.conditions if each.counted}
    assert sum(count for name, count in lengths.items() if name not in apart) == text
    rows = {"one": 1, "frames": 2, "video": video, "text": text, "all": video + text}
    return transformer, family, rows | lengths, counter


def test_a_whole_pass_is_what_pytorch_counts(one_pass):
    transformer, family, rows, counter = one_pass
    flops, counts = pass_flops(transformer, family, rows)["full"], counter.get_flop_counts()
    name = type(transformer).__name__
    in_blocks = [
        counts[f"{name}.{block_list.name}.{i}"]
        for block_list in family.all_lists
        for i in range(len(transformer.get_submodule(block_list.name)))
    ]
    attention = sum(map(attention_of, in_blocks))
    blocks = sum(sum(count.values()) for count in in_blocks) - attention
    whole = sum(counts[name].values())
    assert (flops.embedders, flops.blocks, flops.attention) == (whole - blocks - attention, blocks, attention)
    assert flops.total == whole > 0


@EVERY_FAMILY
def test_a_full_size_block_is_what_pytorch_counts(family):
    streams = family.costs.texts
    texts = {
        "prompt": 512 if "image" in streams else 77,
        "glyphs": 13,
        "image": 29,
        "audio": 31,
    }  # Wan's blocks count 512 as text
    texts = {stream: texts[stream] for stream in streams}
    known = signature(getattr(diffusers, family.transformer).__init__).parameters
    own = math.prod(known[name].default for name in ("num_attention_heads", "attention_head_dim"))
    image = {"image_dim": 1280, "added_kv_proj_dim": own} if "image" in streams and "image_dim" in known else {}
    image |= {"image_condition_type": "token_replace"} if any(each.first_frame for each in family.conditions) else {}
    model = meta_transformer(BenchmarkConfig(family=family.name, text_tokens=texts, transformer=image))
    text = sum(count for name, count in texts.items() if name != "audio")
    rows = {"one": 1, "frame": 500, "frames": 3, "video": 1500, "text": text, "all": 1500 + text, **texts}
    found = first_blocks(model, family, rows)
    for block_list in family.all_lists:
        block = model.get_submodule(block_list.name)[0]
        with NothingMasked():
            counter = counted(
                lambda block=block, kind=block_list: call_block(kind, block, block_arguments(model, family, kind, rows))
            )
        counts = counter.get_flop_counts()["Global"]
        attention = attention_of(counts)
        assert found[block_list.name].attention == attention
        assert sum(layer.flops for layer in found[block_list.name].layers) == sum(counts.values()) - attention


# What runs in a full pass's place


def test_a_predicted_pass_is_the_predictor_and_what_is_outside(one_pass):
    transformer, family, rows, _ = one_pass
    one, two = (pass_flops(transformer, family, rows, predictor_blocks=k) for k in (1, 2))
    kind = family.block_lists[-1]
    before, last = (
        sum(each.flops for each in layer_flops(block, family.costs.blocks[kind.name].layers, rows))
        for block in getattr(transformer, kind.name)[-2:]
    )
    attention = first_blocks(transformer, family, rows)[kind.name].attention
    assert two["predictor"].blocks - one["predictor"].blocks == before
    assert two["predictor"].attention == 2 * attention
    own = [width(transformer)] if kind.joint else widths(transformer.config, kind).values()
    fused = 0
    for D, stream in zip(own, family.costs.fusions, strict=True):
        mlp, tokens, statistics = Fusion(D), torch.zeros(1, rows[stream], D), Statistics(D)
        fused += counted(lambda mlp=mlp, given=(tokens, tokens, statistics): mlp(*given)).get_total_flops()
    assert one["predictor"].blocks == last + fused
    assert one["predictor"].embedders == one["reuse"].total


def test_predictor_parameters_are_those_of_a_predictor(one_pass):
    transformer, family, rows, _ = one_pass
    own = widths(transformer.config, family.block_lists[-1])
    tokens = {name: torch.randn(1, 4, D) for name, D in own.items()}
    for blocks in (1, 2):
        predictor = new_predictor(transformer, family, tokens, tokens, blocks)
        assert Predictor.costs(planned_trunk(transformer, family, rows, blocks=blocks)).parameters == parameters(
            predictor
        )


def test_what_caches_leave_out(one_pass):
    transformer, family, rows, counter = one_pass
    found, attention_modules = pass_flops(transformer, family, rows), of_block_parts(counter, family, "attn")
    counts, name = counter.get_flop_counts(), type(transformer).__name__
    # Rotary embeddings are no FLOPs, and the counter has no line for what is none.
    held = sum(sum(counts.get(f"{name}.{path}", {}).values()) for path in family.static_embedders)
    assert found["reuse"].total == found["full"].embedders - held < found["full"].embedders
    assert found["attention"].total == found["full"].total - attention_modules
    assert attention_modules > found["full"].attention


def test_a_cache_of_branches_still_computes_modulation(one_pass):
    transformer, family, rows, counter = one_pass
    family = replace(family, side_lists=())  # they are computed as ever
    family = replace(family, costs=replace(family.costs, blocks=_of_trunk(family)))
    more = rows | {name: 2 * count for name, count in rows.items() if name != "one"}
    blocks = pass_flops(transformer, family, rows)["branches"].blocks
    assert blocks == pass_flops(transformer, family, more)["branches"].blocks  # as many for any number of tokens
    assert blocks == of_block_parts(counter, family, "norm")
