"""The trunk hook on doubling blocks (full gives 16 (3 x + 1), predicted what the forecaster says)."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.cache.toy import BESIDE, BY_KEYWORD, TOY, Double, Hinted, Plus, Toy
from vidaccel.cache.trunk import Mode, Trunk
from vidaccel.errors import UserError
from vidaccel.families.walk import as_output, call_block, named_outputs


def x(value: float = 1.0) -> torch.Tensor:
    return torch.full((1, 2, 3), float(value))


def value(output: tuple) -> float:
    assert (output[0] == output[0].flatten()[0]).all()
    return output[0].flatten()[0].item()


def test_a_full_pass_runs_the_blocks_and_a_predicted_one_the_forecaster():
    toy, plus = Toy(), Plus()
    with Trunk(toy, TOY) as trunk:
        with trunk.full():
            assert value(toy(x(1))) == 64
        with trunk.predicted(plus):
            assert value(toy(x(2), temb=0.5)) == 64 + 7 - 0.5
            assert value(toy(x(3))) == 64 + 10
        with trunk.full():
            assert value(toy(x(2))) == 112
        with trunk.predicted(plus):
            assert value(toy(x(1))) == 112 + 4
    assert toy.runs == [2, 2, 2, 2]


def test_what_blocks_beside_the_trunk_add_is_no_part_of_an_answer():
    hinted, plus = Hinted(), Plus()
    with Trunk(hinted, BESIDE) as trunk:
        assert value(hinted(x(1))) == 184
        with trunk.full():
            assert value(hinted(x(1))) == 184
        with trunk.predicted(plus):
            assert value(hinted(x(2))) == 184 + 7
        assert torch.equal(plus.calls[0][0]["hidden_states"], x(7))
    assert [side.runs for side in hinted.sides] == [2, 2] and hinted.runs == [2, 2, 2, 2]
    assert value(hinted(x(1))) == 184
    assert not any("forward" in vars(module) for module in hinted.modules())


def test_tokens_added_after_the_last_block_are_refused():
    hinted = Hinted((1, 3))
    with pytest.raises(UserError, match="adds tokens of its sides after its last block, 3"):
        Trunk(hinted, BESIDE).attach()
    assert not any("forward" in vars(module) for module in hinted.modules())


def test_the_forecaster_gets_the_first_blocks_arguments_by_name_and_what_the_last_one_returned():
    toy, plus = Toy(), Plus()
    with Trunk(toy, TOY) as trunk:
        with trunk.full(t=0.75):
            toy(x(1))
        with trunk.predicted(plus, t=torch.tensor([0.5])):
            toy(x(2), temb=0.25)
    (arguments, memory, t), *_ = plus.calls
    assert list(arguments) == ["hidden_states", "encoder_hidden_states", "temb", "freqs"]
    assert torch.equal(arguments["hidden_states"], x(7))
    assert torch.equal(arguments["encoder_hidden_states"], x(0))
    assert (arguments["temb"], arguments["freqs"]) == (0.25, "rotary")
    assert [cached.t.item() for cached in memory] == [0.75] and t.item() == 0.5
    assert torch.equal(memory[0].tokens["hidden_states"], x(64))
    assert torch.equal(memory[0].tokens["encoder_hidden_states"], x(4))


def test_blocks_that_are_called_by_keyword_are_as_those_called_by_place():
    toy, plus = Toy(keywords=True), Plus()
    with Trunk(toy, BY_KEYWORD) as trunk:
        with trunk.full(t=0.75):
            assert value(toy(x(1))) == 64
        with trunk.predicted(plus, t=0.5):
            assert value(toy(x(2), temb=0.25)) == 64 + 7 - 0.25
    (arguments, memory, _), *_ = plus.calls
    assert list(arguments) == ["hidden_states", "encoder_hidden_states", "temb", "rotary"]
    assert torch.equal(arguments["hidden_states"], x(7)) and arguments["temb"] == 0.25
    assert torch.equal(memory[0].tokens["hidden_states"], x(64))
    assert torch.equal(memory[0].tokens["encoder_hidden_states"], x(4))
    assert toy.runs == [1, 1, 1, 1] and value(toy(x(1))) == 64


def test_blocks_called_by_keyword_may_be_checkpointed_by_place():
    toy, plus = Toy(keywords=True), Plus()
    toy.gradient_checkpointing, toy._gradient_checkpointing_func = True, partial(checkpoint, use_reentrant=False)
    leaf = x(1).requires_grad_()
    with Trunk(toy, BY_KEYWORD) as trunk:
        with trunk.full():
            output = toy(leaf)
        assert value(output) == 64
        output[0].sum().backward()
        assert (leaf.grad == 3 * 2**4).all()
        with trunk.predicted(plus):
            assert value(toy(x(2))) == 64 + 7


def test_a_block_is_called_as_its_record_says():
    block, values = Double(), {"rotary": "rotary", "temb": 0.0, "encoder_hidden_states": x(0), "hidden_states": x(5)}
    seen = []
    block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((len(args), list(kwargs))), with_kwargs=True)
    for family in (TOY, BY_KEYWORD):
        kind = family.block_lists[0]
        named = values | {"freqs": "rotary"}
        left = named_outputs(kind, call_block(kind, block, named | {"more": 1}))
        assert list(left) == list(kind.returns) and torch.equal(left["hidden_states"], x(10))
        assert named_outputs(kind, as_output(kind, left)) == left
    assert seen == [(4, []), (0, list(BY_KEYWORD.block_lists[0].arguments))]


def test_a_predicted_pass_takes_what_the_newest_full_one_had_of_embedders_that_are_held():
    """Each context its own; a pass with a memory that has none of it runs them, and so does one that is left alone."""
    toy, plus = Toy(), Plus()
    embedder = toy.texts["embedder"]

    def text() -> float:
        return plus.calls[-1][0]["encoder_hidden_states"].max().item()

    with Trunk(toy, TOY, history=2) as trunk:
        for number, name in enumerate(("cond", "uncond", "cond", "uncond"), start=1):
            embedder.number = number
            with toy.cache_context(name), trunk.full():
                toy(x())
        embedder.number = 9.0
        for name, expected in (("uncond", 4), ("cond", 3)):
            with toy.cache_context(name), trunk.predicted(plus):
                toy(x())
            assert text() == expected
        assert embedder.runs == 4
        newest, older = trunk.memory("cond")
        assert newest.held["texts.embedder"].max() == 3 and not older.held
        with trunk.predicted(plus, memory=(older,)):
            toy(x())
        assert text() == 9 and embedder.runs == 5
        toy(x())
        assert embedder.runs == 6
    assert embedder._compiled_call_impl is None


@pytest.mark.parametrize("when", ["before", "while attached"])
def test_a_held_embedder_that_is_compiled_stays_so(when):
    toy, plus = Toy(), Plus()
    embedder = toy.texts["embedder"]
    if when == "before":
        embedder.compile(backend="eager")
    compiled = embedder._compiled_call_impl
    with Trunk(toy, TOY) as trunk:
        if when != "before":
            embedder.compile(backend="eager")
            compiled = embedder._compiled_call_impl
        with trunk.full():
            toy(x())
        with trunk.predicted(plus):
            toy(x())
    assert embedder._compiled_call_impl is compiled and compiled is not None


def test_text_that_the_forecaster_leaves_alone_and_text_that_it_makes_reach_the_last_block():
    toy, seen = Toy(), []
    with Trunk(toy, TOY) as trunk:
        toy.singles[-1].register_forward_hook(lambda block, inputs, output: seen.append(output))
        with trunk.full():
            toy(x())
        with trunk.predicted(Plus()):
            toy(x())
        with trunk.predicted(lambda arguments, memory, t: memory[0].tokens):
            toy(x())
    assert [text.max().item() for _, text in seen] == [4, 0, 4]


@pytest.mark.parametrize(("doubles", "singles"), [(1, 0), (2, 0), (0, 1), (1, 1)])
def test_any_number_of_blocks(doubles, singles):
    toy = Toy(doubles, singles)
    with Trunk(toy, TOY) as trunk:
        with trunk.full():
            full = value(toy(x()))
        with trunk.predicted(Plus()):
            assert value(toy(x())) == full + 4
    assert full == 4 * 2 ** (doubles + singles) and set(toy.runs) == {1}


def test_as_many_full_passes_are_remembered_as_asked_for_newest_first():
    toy = Toy()
    with Trunk(toy, TOY, history=2) as trunk:
        for value in (0, 1, 2):
            with trunk.full(t=value):
                toy(x(value))
        assert [cached.t.item() for cached in trunk.memory()] == [2, 1]
        assert [cached.tokens["hidden_states"].max() for cached in trunk.memory()] == [112, 64]


def test_a_passes_own_memory_goes_before_the_trunks():
    toy = Toy()
    with Trunk(toy, TOY) as trunk:
        with trunk.full():
            toy(x(1))
            kept = trunk.memory()
            toy(x(2))
        with trunk.predicted(Plus(), memory=kept):
            assert value(toy(x(0))) == 65
        with trunk.predicted(Plus()):
            assert value(toy(x(0))) == 113


def test_without_a_mode_a_pass_is_left_alone_and_not_remembered():
    toy = Toy()
    with Trunk(toy, TOY) as trunk:
        assert value(toy(x())) == 64
        assert trunk.memory() == ()
        with pytest.raises(RuntimeError, match="before any full pass"), trunk.predicted(Plus()):
            toy(x())
        assert value(toy(x())) == 64


def test_contexts_never_mix():
    toy, plus = Toy(), Plus()
    with Trunk(toy, TOY) as trunk:
        for name, start in (("cond", 1), ("uncond", 2)):
            with toy.cache_context(name), trunk.full():
                toy(x(start))
        with trunk.full():
            toy(x(3))
        results = []
        for name in ("uncond", "cond"):
            with toy.cache_context(name), trunk.predicted(plus):
                results.append(value(toy(x(0))))
        with trunk.predicted(plus):
            results.append(value(toy(x(0))))
        assert results == [113, 65, 161]
        assert len(trunk.memory("cond")) == len(trunk.memory("uncond")) == len(trunk.memory()) == 1
        with pytest.raises(RuntimeError, match='in context "third"'), toy.cache_context("third"), trunk.predicted(plus):
            toy(x(0))


def test_choose_decides_where_nothing_else_does_and_names_the_context():
    toy, modes = (
        Toy(),
        iter([Mode(context="a"), Mode(context="b"), Mode(Plus(), context="a"), Mode(Plus(), context="b")]),
    )
    with Trunk(toy, TOY) as trunk:
        trunk.choose = lambda: next(modes)
        assert [value(toy(x(start))) for start in (1, 2, 0, 0)] == [64, 112, 65, 113]
        with trunk.full():
            assert value(toy(x())) == 64


def test_a_final_pass_frees_its_context():
    toy = Toy()
    with Trunk(toy, TOY) as trunk:
        modes = iter([Mode(), Mode(Plus(), final=True), Mode(), Mode(final=True), Mode(final=True)])
        trunk.choose = lambda: next(modes)
        kept = []
        for _ in range(5):
            toy(x())
            kept.append(len(trunk.memory()))
        assert kept == [1, 0, 1, 0, 0]


def test_an_exception_forgets_everything():
    toy = Toy()
    with Trunk(toy, TOY) as trunk:
        with toy.cache_context("cond"), trunk.full():
            toy(x())
        with pytest.raises(ArithmeticError), trunk.full():
            toy(x(), fail=True)
        assert trunk.memory("cond") == trunk.memory() == () and trunk.current_pass is None
        with trunk.full():
            assert value(toy(x())) == 64


def test_an_interrupt_forgets_everything_at_the_next_pass():
    toy = Toy()

    def interrupt(block, inputs):
        raise KeyboardInterrupt

    with Trunk(toy, TOY) as trunk:
        with toy.cache_context("cond"), trunk.full():
            toy(x())
        handle = toy.singles[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), trunk.full():
            toy(x())
        handle.remove()
        assert value(toy(x())) == 64
        assert trunk.memory("cond") == ()


def test_detaching_leaves_the_modules_as_they_were():
    toy = Toy()
    toy.cache_context("cond").__enter__()  # diffusers leaves a registry on the transformer itself
    before = {name: dict(vars(module)) for name, module in toy.named_modules()}
    trunk = Trunk(toy, TOY).attach()
    assert {name: dict(vars(module)) for name, module in toy.named_modules()} != before
    trunk.detach()
    trunk.detach()
    after = {name: dict(vars(module)) for name, module in toy.named_modules()}
    for name in before:
        assert after[name].keys() == before[name].keys()
    assert not toy._forward_hooks and not toy._forward_pre_hooks
    with Trunk(toy, TOY) as trunk, trunk.full():
        assert value(toy(x())) == 64


def test_attaching_twice_and_beside_a_cache_of_diffusers_is_refused():
    toy = Toy()
    with Trunk(toy, TOY), pytest.raises(UserError, match="attached already"):
        Trunk(toy, TOY).attach()
    toy._cache_config = object()
    with pytest.raises(UserError, match="a cache of diffusers"):
        Trunk(toy, TOY).attach()


class Scale(torch.nn.Module):
    """A forecaster with one weight: weight x cached + what enters."""

    history = 1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.runs = 0

    def forward(self, arguments, memory, t):
        self.runs += 1
        return {"hidden_states": self.weight * memory[0].tokens["hidden_states"] + arguments["hidden_states"]}


def plain_checkpoint(block, *arguments):
    return checkpoint(block.__call__, *arguments, use_reentrant=False)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_reach_the_forecaster_and_the_input_but_not_past_the_cache(checkpointed):
    toy, scale = Toy(), Scale()
    toy.gradient_checkpointing, toy._gradient_checkpointing_func = checkpointed, plain_checkpoint
    first, second = x(1).requires_grad_(), x(2).requires_grad_()
    with Trunk(toy, TOY) as trunk:
        with trunk.full():
            toy(first)
        with trunk.predicted(scale):
            toy(second)[0].sum().backward()
    assert scale.weight.grad == 64 * 6
    assert torch.equal(second.grad, x(3)) and first.grad is None
    assert scale.runs == 1 + checkpointed
    assert toy._gradient_checkpointing_func is plain_checkpoint


def test_checkpointed_blocks_are_recomputed_as_they_ran_whatever_is_in_force_at_backward():
    toy, scale = Toy(), Scale()
    toy.gradient_checkpointing, toy._gradient_checkpointing_func = True, plain_checkpoint
    start = x(1).requires_grad_()
    with Trunk(toy, TOY) as trunk:
        with trunk.full():
            full = toy(start)[0].sum()  # d/dx = 3 * 16
        with trunk.predicted(scale):
            predicted = toy(start)[0].sum()  # d/dx = 3
        kept = trunk.memory()
        with trunk.predicted(Plus()):
            (full + predicted).backward()
        assert trunk.memory() is kept
    assert torch.equal(start.grad, x(51))
    assert scale.weight.grad == 64 * 6
