"""The learned predictor: built from the family's own blocks, reuse before training, saved and loaded whole."""

import json
from dataclasses import replace

import pytest
import torch

from tests.tiny import TEXT_TO_VIDEO, tiny_pipeline
from vidaccel.cache.trunk import Trunk
from vidaccel.errors import UserError
from vidaccel.families.fused import FusedBlock
from vidaccel.families.registry import family_of_pipeline
from vidaccel.families.walk import latent_channels
from vidaccel.forecasters.base import Cached
from vidaccel.forecasters.checkpoint import ARCHITECTURES
from vidaccel.forecasters.learned import LAG, SMALLEST, Fusion, Predictor, Statistics, new_predictor
from vidaccel.models.grid import step_grid
from vidaccel.models.velocity import Velocity
from vidaccel.runtime.fuse import fuse

FAMILIES = [*TEXT_TO_VIDEO, "mochi"]  # whose texts are narrower than its videos


def student(name, **options):
    pipe = tiny_pipeline(name, **options)
    return pipe.transformer, family_of_pipeline(type(pipe).__name__)


def inputs(transformer, family, batch=2, lengths=(5, 3)):
    """Arguments of `Velocity`, texts of two lengths."""
    draw = torch.Generator().manual_seed(1)
    text = {}
    for tensor in family.text_tensors:
        if "mask" in tensor.stored:
            text[tensor.stored] = torch.arange(6) < torch.tensor(lengths[:batch])[:, None]
        else:
            shape = (batch, 32) if tensor.stored == "pooled" else (batch, 6, 32)
            text[tensor.stored] = torch.randn(shape, generator=draw)
    x = torch.randn(batch, latent_channels(transformer), 2, 4, 4, generator=draw)
    return x, torch.linspace(0.5, 0.7, batch), text


@torch.no_grad()
def predicted(transformer, family, predictor, x, t, text, full_from=None):
    """u of a predicted step behind a full one, and that of reusing what it left."""
    velocity = Velocity(transformer, family)
    with Trunk(transformer, family) as trunk:
        with trunk.full(t + LAG):
            velocity(x if full_from is None else full_from, t + LAG, text)
        with trunk.predicted(predictor, t):
            u = velocity(x, t, text)
        with trunk.predicted(lambda arguments, memory, t: memory[0].tokens):
            return u, velocity(x, t, text)


def cached(transformer, family):
    with torch.no_grad(), Trunk(transformer, family) as trunk, trunk.full():
        Velocity(transformer, family)(*inputs(transformer, family))
        return trunk.memory()[0].tokens


def made(name, **made_for):
    transformer, family = student(name)
    tokens = cached(transformer, family)
    return transformer, family, new_predictor(transformer, family, tokens, tokens, **made_for)


def statistics_of(tokens, cache):
    statistics = Statistics(tokens.shape[-1])
    statistics.measure(tokens, cache)
    return statistics


def randomised(fusion):
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return fusion


def of_many_scales(seed):
    """[2, 200, 16] with deviations from 0.1 to 30."""
    scale = torch.logspace(-1, 1.5, 16)
    return torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(seed)) * scale + 5 * scale


@torch.no_grad()
def test_a_new_fusion_gives_the_cache_back():
    tokens, cache = of_many_scales(0), of_many_scales(1)
    assert torch.equal(Fusion(16)(tokens, cache, statistics_of(tokens, cache)), cache)


@torch.no_grad()
def test_a_fusion_is_the_same_whatever_the_units_of_a_channel():
    """It sees standardised tokens, and corrects in the cache's own units: a float64 reference of the formula."""
    tokens, cache, fusion = of_many_scales(0), of_many_scales(1), randomised(Fusion(16))
    out = fusion(tokens, cache, statistics_of(tokens, cache))
    standard = [(each.double() - each.double().mean((0, 1))) / each.double().std((0, 1)) for each in (tokens, cache)]
    inner, outer = ([p.double() for p in (layer.weight, layer.bias)] for layer in (fusion.inner, fusion.outer))
    hidden = torch.nn.functional.silu(torch.cat(standard, -1) @ inner[0].T + inner[1])
    correction = (hidden @ outer[0].T + outer[1]) * cache.double().std((0, 1))
    torch.testing.assert_close(out.double(), cache.double() + correction, rtol=1e-4, atol=1e-5)
    units = torch.logspace(0.5, -0.5, 16)
    other = fusion(tokens / units, cache * units, statistics_of(tokens / units, cache * units))
    torch.testing.assert_close(other / units, out, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_a_channel_that_never_changes_does_no_harm():
    cache = torch.tensor([[[1.0, 7.0, -1.0], [2.0, 7.0, 4.0], [3.0, 7.0, 0.0]]])
    statistics = statistics_of(torch.zeros(1, 3, 3), cache)
    assert statistics.deviation[1, 1] == pytest.approx(SMALLEST * float(cache.flatten(0, 1).std(0).mean()))
    assert statistics.deviation[0].min() > 0
    out = randomised(Fusion(3))(torch.zeros(1, 3, 3), cache, statistics)
    assert out.isfinite().all() and (out[..., 1] - 7).abs().max() < 0.01


def test_statistics_stay_in_float32():
    assert Statistics(4).bfloat16().deviation.dtype == torch.float32


@torch.no_grad()
def test_under_autocast_tokens_and_weights_may_have_types_of_their_own():
    fusion, tokens, cache = randomised(Fusion(8)), torch.randn(1, 5, 8), torch.randn(1, 5, 8).bfloat16()
    statistics = statistics_of(tokens, cache)
    expected = fusion(tokens, cache.float(), statistics)
    with torch.autocast("cpu", torch.bfloat16):
        out = fusion(tokens, cache, statistics)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_starts_as_reuse_and_every_weight_learns(name):
    transformer, family, predictor = made(name)
    x, t, text = inputs(transformer, family)
    before = inputs(transformer, family)[0] + 0.5
    u, reused = predicted(transformer, family, predictor, x, t, text, full_from=before)
    assert torch.equal(u, reused)
    transformer.requires_grad_(False)
    optimizer = torch.optim.SGD(predictor.parameters(), lr=1e-2)
    velocity, touched = Velocity(transformer, family), set()
    with Trunk(transformer, family) as trunk:
        for _ in range(3):  # layers behind a zero one see a gradient once it has moved
            with torch.no_grad(), trunk.full(t + LAG):
                velocity(before, t, text)
            with trunk.predicted(predictor, t):
                velocity(x, t, text).square().mean().backward()
            touched |= {n for n, p in predictor.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
            optimizer.step()
            optimizer.zero_grad()
    silent = {n for n, _ in predictor.named_parameters()} - touched
    # What only makes the text that leaves the last block, which no head reads.
    text_only = ("context", "to_add_out", "add_q_proj", "norm_added_q")
    assert {n for n in silent if not (n.startswith("blocks.1.") and any(part in n for part in text_only))} == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_its_blocks_are_the_trunks_own_and_hold_nothing_of_it(name):
    transformer, family, predictor = made(name, blocks=1)
    kind = family.block_lists[-1]
    original = getattr(transformer, kind.name)[-1]
    (block,) = predictor.blocks
    assert type(block) is type(original)
    same = {key for key, weight in block.state_dict().items() if torch.equal(weight, original.state_dict()[key])}
    zero = {key for key, weight in block.state_dict().items() if not weight.any()}
    assert same | zero == set(block.state_dict()) and len(same) > len(zero) > 0
    pointers = {weight.data_ptr() for weight in transformer.state_dict().values()}
    assert pointers.isdisjoint(weight.data_ptr() for weight in predictor.state_dict().values())
    assert all("forward" not in vars(module) for module in predictor.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_with_zeroed_outputs_are_the_identity(name):
    transformer, family, predictor = made(name, blocks=1)
    tokens = cached(transformer, family)
    seen = []
    with Trunk(transformer, family) as trunk:
        velocity = Velocity(transformer, family)
        with trunk.full():
            velocity(*inputs(transformer, family))
        with trunk.predicted(lambda arguments, memory, t: seen.append(arguments) or memory[0].tokens):
            velocity(*inputs(transformer, family))
    out = predictor.blocks[0](*(seen[0] | tokens).values())
    for name_, value in zip(family.block_lists[-1].returns, out if isinstance(out, tuple) else (out,), strict=True):
        assert torch.equal(value, tokens[name_])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_formula_of_the_method(name):
    transformer, family, predictor = made(name, blocks=2)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    x, t, text = inputs(transformer, family)
    seen = []

    def spy(arguments, memory, time):
        seen.append((arguments, memory[0].tokens, predictor(arguments, memory, time)))
        return seen[0][2]

    predicted(transformer, family, spy, x, t, text)
    arguments, tokens, out = seen[0]
    values = dict(arguments)
    for key in tokens:
        fusion = predictor.fusions["tokens" if family.block_lists[-1].joint else key]
        mean, deviation = predictor.statistics[key].mean, predictor.statistics[key].deviation
        standard = [(each[key] - mean[i]) / deviation[i] for i, each in enumerate((arguments, tokens))]
        both = torch.cat(standard, dim=-1)
        values[key] = tokens[key] + deviation[1] * fusion.outer(torch.nn.functional.silu(fusion.inner(both)))
    for block in predictor.blocks:
        left = block(*values.values())
        values |= zip(tokens, left if isinstance(left, tuple) else (left,), strict=True)
    assert len(predictor.fusions) == (1 if family.block_lists[-1].joint else len(tokens))
    for key in tokens:
        scale = (((t + LAG) - t) / LAG).view(-1, 1, 1)  # once, but for what t + LAG was rounded by
        torch.testing.assert_close(out[key], tokens[key] + scale * (values[key] - tokens[key]))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_published_one_is_the_papers_formula(name):
    """Tokens and cache side by side through two layers, then copies of the trunk's last blocks, whatever the time."""
    transformer, family, predictor = made(name, architecture="published")
    joint, fresh = family.block_lists[-1].joint, [layer.outer.weight for layer in predictor.fusions.values()]
    assert len(fresh) == (1 if joint else len(predictor.config.cached)) and all(weight.any() for weight in fresh)
    assert not predictor.statistics
    trunk = getattr(transformer, family.block_lists[-1].name)
    for block, original in zip(predictor.blocks, trunk[-2:], strict=True):
        assert all(torch.equal(w, original.state_dict()[key]) for key, w in block.state_dict().items())
    tokens, seen = cached(transformer, family), []
    predicted(transformer, family, lambda arguments, *_: seen.append(arguments) or tokens, *inputs(transformer, family))
    values = dict(seen[0])
    for key in tokens:
        fusion = predictor.fusions["tokens" if joint else key]
        both = torch.cat([seen[0][key], tokens[key]], dim=-1)
        values[key] = fusion.outer(torch.nn.functional.silu(fusion.inner(both)))
    for block in predictor.blocks:
        left = block(*values.values())
        values |= zip(tokens, left if isinstance(left, tuple) else (left,), strict=True)
    for times in ((torch.tensor(0.9), torch.tensor(0.2)), (None, None)):
        out = predictor(seen[0], (Cached(tokens, times[0]),), times[1])
        for key in tokens:
            torch.testing.assert_close(out[key], values[key], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "runs"), [("published", 2), ("correction", 1)])
def test_the_published_one_has_the_text_refined_on_its_steps_too(architecture, runs):
    transformer, family, predictor = made("hunyuan_video", architecture=architecture)
    times = []
    transformer.context_embedder.time_text_embed.register_forward_pre_hook(lambda module, given: times.append(given[0]))
    x, t, text = inputs(transformer, family)
    velocity = Velocity(transformer, family)
    with Trunk(transformer, family) as trunk:
        with trunk.full(t + LAG):
            velocity(x, t + LAG, text)
        with trunk.predicted(predictor, t):
            velocity(x, t, text)
    assert [float(time[0]) for time in times] == pytest.approx([600.0, 500.0][:runs])


def test_kinds_of_networks_that_do_not_exist_are_refused():
    _, _, predictor = made("wan")
    with pytest.raises(UserError, match="of the kind 'other'\nhint: this vidaccel knows correction and published"):
        replace(predictor.config, architecture="other")
    with pytest.raises(UserError, match="looks back on one full step, not 2"):
        replace(predictor.config, architecture="published", history=2)


@torch.no_grad()
@pytest.mark.parametrize("shift", [None, 5.0])
def test_what_it_adds_grows_with_the_steps_since_the_full_one(shift):
    """Exactly: with one state and cache, twice the steps are twice the addition, and none is none."""
    transformer, family, predictor = made("wan", steps=shift and 10, shift=shift)
    randomised(predictor.fusions["hidden_states"])  # its blocks are the identity still
    tokens, seen, added = cached(transformer, family), [], []
    predicted(transformer, family, lambda arguments, *_: seen.append(arguments) or tokens, *inputs(transformer, family))
    grid = step_grid(10, shift or 1.0)
    for first in (4, 3, 2):
        left = predictor(seen[0], (Cached(tokens, grid[first]),), grid[4])
        added.append(left["hidden_states"] - tokens["hidden_states"])
    assert not added[0].any() and added[1].abs().max() > 0.1
    torch.testing.assert_close(added[2], 2 * added[1])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_one_of_two_full_steps_follows_their_line_and_never_far(name):
    """From full steps 2 and 5 of a grid of 20: one step on 1 / 3.5 of their difference, ten on 10 / 8."""
    transformer, family, predictor = made(name, history=2, steps=20, shift=3.0)
    before, latest = cached(transformer, family), cached(transformer, family)
    latest = {key: tokens + 1 + tokens.square() for key, tokens in latest.items()}
    grid, seen = step_grid(20, 3.0), []
    predicted(transformer, family, lambda arguments, *_: seen.append(arguments) or before, *inputs(transformer, family))
    memory = Cached(latest, grid[5]), Cached(before, grid[2])
    for later, share in ((6, 1 / 3.5), (15, 10 / 8)):
        left = predictor(seen[0], memory, grid[later])
        for key, tokens in latest.items():
            torch.testing.assert_close(left[key], tokens + share * (tokens - before[key]), rtol=1e-4, atol=1e-5)
    alone = predictor(seen[0], memory[:1], grid[6])
    assert all(torch.equal(alone[key], tokens) for key, tokens in latest.items())
    same = predictor(seen[0], (memory[0], memory[0]), grid[6])
    assert all(torch.equal(same[key], tokens) for key, tokens in latest.items())


def test_without_the_times_of_both_passes_it_cannot_tell():
    transformer, family, predictor = made("wan")
    for full, later in ((None, 0.5), (0.5, None)):
        with pytest.raises(ValueError, match="the time of each pass"), Trunk(transformer, family) as trunk:
            with torch.no_grad(), trunk.full(full):
                Velocity(transformer, family)(*inputs(transformer, family))
            with trunk.predicted(predictor, later):
                Velocity(transformer, family)(*inputs(transformer, family))


def test_a_predictor_is_made_under_a_hook_too():
    transformer, family = student("wan")
    tokens = cached(transformer, family)
    torch.manual_seed(0)
    plain = new_predictor(transformer, family, tokens, tokens)
    torch.manual_seed(0)
    with Trunk(transformer, family):
        hooked = new_predictor(transformer, family, tokens, tokens)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), hooked.parameters(), strict=True))
    assert all("forward" not in vars(module) for module in hooked.modules())


def test_more_blocks_than_the_trunk_has_are_refused():
    transformer, family = student("wan")
    tokens = cached(transformer, family)
    for blocks in (0, 3):
        with pytest.raises(UserError, match=f"predictor of {blocks} blocks\nhint: the trunk's last list has 2"):
            new_predictor(transformer, family, tokens, tokens, blocks=blocks)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_it_gives_the_same(name, architecture, tmp_path):
    made_for = {"steps": 20, "shift": 5.0, "student": "ab" * 32, "architecture": architecture}
    transformer, family, predictor = made(name, **made_for)
    predictor.save_pretrained(tmp_path)
    loaded = Predictor.from_pretrained(tmp_path)
    assert loaded.config == predictor.config and not loaded.training
    x, t, text = inputs(transformer, family)
    expected, _ = predicted(transformer, family, predictor.eval(), x, t, text)
    got, _ = predicted(transformer, family, loaded, x, t, text)
    assert torch.equal(got, expected)
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["family"], record["blocks"], record["steps"], record["shift"]) == (name, 2, 20, 5.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"family": "wan"}'),
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"blocks": 2', '"blocks": 1')
        ),
        lambda folder: (folder / "run.json").write_text('{"format": "predictor/1", "files": {"config.json": "00"}}'),
        lambda folder: (folder / "run.json").write_text('{"format": "model/1", "files": {}}'),
    ],
)
def test_a_damaged_folder_is_refused(damage, tmp_path):
    made("wan")[2].save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        Predictor.from_pretrained(tmp_path)


def test_another_family_width_or_student_is_refused():
    transformer, family, predictor = made("wan", student="ab" * 32)
    other, other_family = student("hunyuan_video")
    predictor.check_fits(transformer, family, "ab" * 32)
    with pytest.raises(UserError, match="is for wan of width 24, and this is hunyuan_video of width 24"):
        predictor.check_fits(other, other_family, "ab" * 32, force=True)
    predictor.config = replace(predictor.config, width=48)
    with pytest.raises(UserError, match="is for wan of width 48, and this is wan of width 24"):
        predictor.check_fits(transformer, family, "ab" * 32, force=True)
    predictor.config = replace(predictor.config, width=24)
    with pytest.raises(UserError, match="student abababababab, and this is another\nhint: .*force=true"):
        predictor.check_fits(transformer, family, "cd" * 32)
    with pytest.raises(UserError, match="whose weight files are not known"):
        predictor.check_fits(transformer, family)
    predictor.check_fits(transformer, family, "cd" * 32, force=True)
    with pytest.raises(UserError, match="for the family 'moon'"):
        replace(predictor.config, family="moon")


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_runs_as_the_trunk_is_run(name, architecture):
    transformer, family, predictor = made(name, architecture=architecture)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    x, t, text = inputs(transformer, family)
    expected, _ = predicted(transformer, family, predictor, x, t, text)
    with fuse(transformer, "reference"):
        predictor.run_like(transformer)
        assert all(isinstance(block, FusedBlock) == bool(family.fused) for block in predictor.blocks)
        got, _ = predicted(transformer, family, predictor, x, t, text)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    transformer.to(torch.bfloat16)
    types = {parameter.dtype for parameter in predictor.run_like(transformer).parameters()}
    assert types == {torch.bfloat16}
