"""Every name in a family's record is the name of something in the real classes."""

import copy
import importlib
import subprocess
import sys
from functools import partial
from inspect import signature

import diffusers
import pytest
import torch

from tests.tiny import BUILDERS, called, tiny_pipeline
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.fused import FusedBlock
from vidaccel.families.registry import FAMILIES, PIPELINES, UNSUPPORTED, family_of_pipeline
from vidaccel.families.walk import boundaries_of, named_arguments, named_outputs

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@pytest.fixture(scope="module")
def pipes() -> dict[str, diffusers.DiffusionPipeline]:
    return {name: tiny_pipeline(name) for name in BUILDERS}


def generate(pipe: diffusers.DiffusionPipeline, family: DiTFamily, **arguments: object) -> None:
    """One denoising step, not decoded; guided unless the passes with and without a prompt are one."""
    if family.guidance.doubled:
        arguments = {family.guidance.cfg_argument: 1.0} | dict(family.call) | arguments
    pipe(prompt="a red circle", num_inference_steps=1, output_type="latent", **called(pipe), **arguments)


def test_every_family_has_a_tiny_pipeline():
    assert FAMILIES.keys() == BUILDERS.keys()
    assert all(name == family.name for name, family in FAMILIES.items())


@EVERY_FAMILY
def test_classes_are_those_of_the_pipeline(family, pipes):
    pipe = pipes[family.name]
    assert type(pipe).__name__ in family.pipelines
    assert all(hasattr(diffusers, name) for name in (*family.pipelines, family.transformer))
    for denoiser in family.denoisers:
        assert type(getattr(pipe, denoiser.attribute)).__name__ == family.transformer
    assert [denoiser.until for denoiser in family.denoisers][-1] == 0
    assert {denoiser.until_config for denoiser in family.denoisers} - {None} <= pipe.config.keys()
    assert len(boundaries_of(pipe, family)) == len(family.denoisers) - 1
    assert family.chunked_autoencoder in (None, type(pipe.vae).__name__)


@EVERY_FAMILY
def test_blocks_are_called_and_answer_as_recorded(family, pipes):
    transformer = pipes[family.name].transformer
    for block_list in family.block_lists:
        blocks = transformer.get_submodule(block_list.name)
        assert isinstance(blocks, torch.nn.ModuleList)
        parameters = list(signature(blocks[0].forward).parameters)
        assert tuple(parameters[: len(block_list.arguments)]) == block_list.arguments

    calls = []
    lists = [(block_list, transformer.get_submodule(block_list.name)) for block_list in family.block_lists]
    hooks = [
        block.register_forward_hook(lambda *call, kind=block_list: calls.append((kind, *call[1:])), with_kwargs=True)
        for block_list, blocks in lists
        for block in blocks
    ]
    generate(pipes[family.name], family)
    for hook in hooks:
        hook.remove()

    order = [call[0].name for call in calls[: sum(len(blocks) for _, blocks in lists)]]
    assert order == [block_list.name for block_list, blocks in lists for _ in blocks]
    for block_list, positional, keywords, output in calls:
        used, unused = (keywords, positional) if block_list.keywords else (positional, keywords)
        assert not unused and len(used) >= len(block_list.arguments)
        given = named_arguments(block_list, positional, keywords)
        assert given.keys() >= set(block_list.arguments)
        for name, tensor in named_outputs(block_list, output).items():
            assert tensor.shape == given[name].shape
        video = given["hidden_states"]
        config = transformer.config
        assert video.shape[-1] == config.num_attention_heads * config.attention_head_dim


@EVERY_FAMILY
def test_blocks_beside_the_trunk_run_before_it_and_give_what_is_recorded(family, pipes):
    transformer, order = pipes[family.name].transformer, []
    if not family.side_lists:
        return

    def note(kind, block, args, kwargs, output):
        order.append(kind)
        assert tuple(signature(block.forward).parameters)[: len(kind.arguments)] == kind.arguments
        assert named_arguments(kind, args, kwargs).keys() == set(kind.arguments)
        assert all(each.ndim == 3 for each in named_outputs(kind, output).values())

    for kind in family.all_lists:
        assert kind.added_after is None or max(transformer.config[kind.added_after]) < len(transformer.blocks) - 1
        for block in transformer.get_submodule(kind.name):
            block.register_forward_hook(partial(note, kind), with_kwargs=True)
    generate(pipes[family.name], family, guidance_scale=1.0)
    expected = [kind for kind in (*family.side_lists, *family.block_lists) for _ in getattr(transformer, kind.name)]
    assert order == expected


@EVERY_FAMILY
def test_a_block_whose_residual_layers_are_zero_is_the_identity_and_none_is_named_in_vain(family, pipes):
    transformer = copy.deepcopy(pipes[family.name].transformer)
    firsts = [(kind, transformer.get_submodule(kind.name)[0]) for kind in family.block_lists]
    calls = {}

    def note(kind, block, args, kwargs):
        calls.setdefault(kind.name, (args, kwargs))

    for kind, block in firsts:
        assert kind.residual_layers
        block.register_forward_pre_hook(partial(note, kind), with_kwargs=True)
    pipe = copy.copy(pipes[family.name])
    pipe.transformer = transformer
    generate(pipe, family)
    for kind, block in firsts:
        args, kwargs = calls[kind.name]
        entering = named_arguments(kind, args, kwargs)
        layers = {name: block.get_submodule(name) for name in kind.residual_layers}
        weights = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
        for skipped in (None, *layers):  # all are zero, then all but one
            for name, layer in layers.items():
                layer.load_state_dict(weights[name])
                if name != skipped:
                    for parameter in layer.parameters():
                        torch.nn.init.zeros_(parameter)
            with torch.no_grad():
                left = named_outputs(kind, block(*args, **kwargs))
            unchanged = all(torch.equal(left[name], entering[name]) for name in kind.returns)
            assert unchanged == (skipped is None), skipped


@EVERY_FAMILY
def test_branches_are_all_that_is_added_to_the_tokens(family, pipes):
    """What `residual_layers` write goes through `branches`, and what feeds those is nothing else of theirs."""
    transformer = pipes[family.name].transformer
    for kind in family.block_lists:
        block = transformer.get_submodule(kind.name)[0]
        for name in (*kind.branches, *kind.feeding):
            block.get_submodule(name)
        within = [layer.split(".")[0] for layer in kind.residual_layers]
        gated = all(name.startswith("norm") for name in within)  # as diffusers calls what makes gates
        assert (gated or set(within) == set(kind.branches)) and not set(kind.branches) & set(kind.feeding)


@EVERY_FAMILY
def test_masks_of_texts_are_texts_themselves_and_reach_the_blocks(family, pipes):
    arguments = {text.argument for text in family.text_tensors}
    masks = {text.mask for text in family.text_tensors} - {None}
    assert masks <= arguments
    assert all((kind.mask in kind.arguments) if masks else kind.mask is None for kind in family.block_lists)
    forward = signature(pipes[family.name].transformer.forward).parameters
    needed = {name for name, taken in forward.items() if taken.default is not None}  # of others none is given
    assert masks <= forward.keys() and {name for name in needed if "mask" in name} <= masks
    given: list[dict] = []
    transformer = pipes[family.name].transformer
    hook = transformer.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    generate(pipes[family.name], family)
    hook.remove()
    assert {name for name, value in given[0].items() if "mask" in name and value is not None} == masks
    assert {blank.argument for blank in family.blank_inputs} <= forward.keys()


@EVERY_FAMILY
def test_shapes_of_texts_are_streams_and_keys_of_the_config(family, pipes):
    pipe = pipes[family.name]
    given = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    generate(pipe, family)
    hook.remove()
    streams = {stream for _, stream in family.costs.layers}
    for text in family.text_tensors:
        tensor = given[0][text.argument]
        assert tensor.ndim == 1 + len(text.shape)
        for size, extent in zip(text.shape, tensor.shape[1:], strict=True):
            assert size in streams or pipe.transformer.config[size] == extent


@EVERY_FAMILY
def test_fused_forms_are_subclasses_of_the_stock_blocks(family, pipes):
    if family.fused is None:
        return
    module = importlib.import_module(family.fused)
    transformer = pipes[family.name].transformer
    blocks = [transformer.get_submodule(kind.name)[0] for kind in family.block_lists]
    assert {type(block) for block in blocks} == module.FUSED_BLOCKS.keys()
    assert all(
        issubclass(fused, FusedBlock) and issubclass(fused, stock) for stock, fused in module.FUSED_BLOCKS.items()
    )
    processors = {type(m.processor) for block in blocks for m in block.children() if hasattr(m, "processor")}
    assert processors == module.FUSED_PROCESSORS.keys()


@EVERY_FAMILY
def test_what_is_held_runs_once_a_pass_before_the_blocks_and_nothing_writes_into_it(family, pipes):
    transformer, order, kept = pipes[family.name].transformer, [], []

    def note(path):
        def hook(module, inputs, output):
            order.append(path)
            parts = output if isinstance(output, tuple) else (output,)
            kept.extend((part, part.clone()) for part in parts)

        return hook

    first = transformer.get_submodule(family.block_lists[0].name)[0]
    hooks = [transformer.get_submodule(path).register_forward_hook(note(path)) for path in family.static_embedders]
    hooks.append(first.register_forward_hook(lambda *_: order.append("blocks")))
    generate(pipes[family.name], family)
    for hook in hooks:
        hook.remove()
    passes, width = order.count("blocks"), len(family.static_embedders) + 1
    assert passes >= 1 and len(order) == passes * width
    for start in range(0, len(order), width):
        assert sorted(order[start : start + width - 1]) == sorted(family.static_embedders)
        assert order[start + width - 1] == "blocks"
    assert all(torch.equal(now, then) for now, then in kept)


@EVERY_FAMILY
def test_everything_between_embedders_and_head_is_in_the_block_lists(family, pipes):
    recorded = {block_list.name for block_list in family.all_lists}
    children = pipes[family.name].transformer.named_children()
    assert {name for name, child in children if isinstance(child, torch.nn.ModuleList)} == recorded


@EVERY_FAMILY
def test_the_timestep_embedder_sees_the_time_and_nothing_else(family, pipes):
    transformer = pipes[family.name].transformer
    seen = []
    embedder = transformer.get_submodule(family.timestep_embedder)
    hook = embedder.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    generate(pipes[family.name], family)
    generate(pipes[family.name], family, generator=torch.Generator().manual_seed(7))
    hook.remove()
    width = embedder.linear_2.out_features
    rows = 2 if family.times_per_frame else 1
    assert {tuple(output.shape) for _, output in seen} == {(rows, width)}
    times = 2 if any(each.first_frame for each in family.conditions) else 1  # a clean frame has its own
    assert all(torch.equal(output, seen[i % times][1]) for i, (_, output) in enumerate(seen))


@EVERY_FAMILY
def test_text_tensors_are_what_encode_prompt_gives_and_the_transformer_takes(family, pipes):
    pipe = pipes[family.name]
    given = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    # Wan's encode_prompt has another default length than its call
    length: dict = (
        {"max_sequence_length": 16} if "max_sequence_length" in signature(pipe.encode_prompt).parameters else {}
    )
    if "complex_human_instruction" in signature(pipe.encode_prompt).parameters:  # which the call alone has by default
        length["complex_human_instruction"] = ["a circle and"]
    generate(pipe, family, **length)
    hook.remove()
    if family.texts_see_image:  # a pass with the prompt takes every fourth token of it
        length |= {"image": called(pipe)["image"], "image_embed_interleave": 4}
    with torch.no_grad():
        encoded = pipe.encode_prompt(prompt="a red circle", device=torch.device("cpu"), **length)
    encoded = [tensor for tensor in encoded if tensor is not None]
    calls = signature(type(pipe).__call__).parameters
    if made := [text.argument for text in family.text_tensors if text.name is None]:
        assert set(made) <= signature(pipe.transformer.forward).parameters.keys() & given[0].keys()
        return
    for text, tensor in zip(family.text_tensors, encoded, strict=False):
        assert text.name in calls and text.argument in signature(pipe.transformer.forward).parameters
        taken = given[0][text.argument]  # the first pass is the one with the prompt
        assert torch.equal(taken, tensor.to(taken.dtype))
    texts = {text.name for text in family.text_tensors}
    assert texts == {name for name in calls if "prompt_" in name and "negative" not in name} - {
        "prompt_2",
        "prompt_template",
        "num_videos_per_prompt",
    }


@EVERY_FAMILY
def test_guidance_names_what_the_pipeline_has(family, pipes):
    pipe = pipes[family.name]
    calls = signature(type(pipe).__call__).parameters
    rule = family.guidance
    assert {rule.cfg_argument, rule.embedded_argument, rule.second_argument} - {None} <= calls.keys()
    assert (rule.second_argument is None) == (family.defaults.guidance_2 is None)
    assert (rule.cfg_argument is None) != (rule.guider is None)
    assert "negative_prompt" in calls
    assert rule.guider is None or "guidance_scale" in getattr(pipe, rule.guider).config


def test_native_embeddings_are_built_when_their_config_key_is_true():
    for name, family in FAMILIES.items():
        for key, embedder in ((family.r_config, "timestep_embedder_r"), (family.g_config, "guidance_embedder")):
            if key is not None:
                for asked in (False, True):
                    transformer = tiny_pipeline(name, **{key: asked}).transformer
                    assert transformer.config[key] is asked
                    modules = [path.rpartition(".")[2] for path, _ in transformer.named_modules()]
                    assert (embedder in modules) is asked


@EVERY_FAMILY
def test_defaults_are_the_pipelines_own_where_it_has_some(family, pipes):
    if len(family.denoisers) > 1:
        return  # its class has those of the models with one
    calls = signature(type(pipes[family.name]).__call__).parameters
    sizes = {"num_frames": family.frames_argument}
    if not family.sized_by_image:
        sizes |= {"height": "height", "width": "width"}
    own = {name: calls[said].default for name, said in sizes.items() if calls[said].default is not None}
    own["steps"] = calls["num_inference_steps"].default
    if "guidance_scale" in calls and calls["guidance_scale"].default != 1:  # which is none
        own["guidance"] = calls["guidance_scale"].default
    assert own == {name: getattr(family.defaults, name) for name in own}


def test_unknown_pipeline_names_the_supported_ones():
    assert all(family_of_pipeline(name) is family for name, family in PIPELINES.items())
    for family in FAMILIES.values():
        parts = [denoiser.attribute for denoiser in family.denoisers]
        assert all(family_of_pipeline(name, parts) is family for name in family.pipelines)
    with pytest.raises(UserError) as caught:
        family_of_pipeline("StableDiffusionPipeline")
    assert "StableDiffusionPipeline" in caught.value.message
    assert all(name in caught.value.hint for name in PIPELINES)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_pipeline_that_predicted_steps_would_get_wrong_is_refused_with_the_reason(name):
    assert hasattr(diffusers, name) and name not in PIPELINES
    with pytest.raises(UserError) as caught:
        family_of_pipeline(name)
    assert caught.value.message == f"{name} {UNSUPPORTED[name]}" and "WanPipeline" in caught.value.hint


def test_reading_the_registry_imports_no_torch():
    code = "import sys, vidaccel.families.registry; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
