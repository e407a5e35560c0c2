"""Training in two processes over gloo, started as torchrun starts them, by its environment.

What they assert is asserted in both of them.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from tests.tiny import called, guided, tiny_pipeline
from tests.train.test_metrics import Notebook
from tests.train.test_trainer import interrupting_at, metrics, small_disk
from tests.train.torchrun import in_four, in_two, start
from vidaccel.cache.trunk import Trunk
from vidaccel.config.training import TrainConfig
from vidaccel.errors import TrainingFailed, UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import blocks_of
from vidaccel.processes import on_all, on_first, processes, rank, world
from vidaccel.train.lora import add_lora
from vidaccel.train.parallel import full_state, load_sharded, mean, reshard, save_sharded, shard, shared_folder
from vidaccel.train.trainer import train

CONFIG = TrainConfig(steps=5, learning_rate=0.01, warmup=2, ema_decay=0.9, save_every=2, log_every=1)


class Blocks(nn.Module):
    """Three residual blocks between two linears; widths that two processes cannot halve."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.inner, self.outer = nn.Linear(3, 5), nn.Linear(5, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.25)) for _ in range(3))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)

    def forward(self, x):
        x = self.inner(x)
        for block in self.blocks:
            x = x + block(x)
        return self.outer(self.frozen(x))


def regression(model, index, generator):
    x = torch.randn(4, 3, generator=generator)
    loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
    return loss, {"largest": float(x.max())}


def run(folder, loss=regression, config=CONFIG, **more):
    model = Blocks()
    shard(model, model.blocks)
    return train(model, loss, config, folder, seed=3, title="blocks", settings={"loss": {"p": 2}}, **more)


def outcome(folder: Path) -> dict:
    """The tensors of each file of every checkpoint, its state, and the metrics. The files' own bytes may differ: the
    order of the strings in their headers is chance."""
    result = {"metrics": metrics(folder)}
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        state = json.loads((checkpoint / "state.json").read_text())
        del state["seconds"]
        shards = sorted(checkpoint.glob("*.safetensors"))
        assert len(shards) == 2
        result[checkpoint.name] = [state, *map(content, shards)]
    return result


def content(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


# Mathematics


def train_and_compare(folder: Path, config: TrainConfig) -> None:
    model = Blocks()
    shard(model, model.blocks)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert all(p.to_local().numel() < p.numel() for p in model.parameters() if len(p) > 1)
    before = full_state(model)
    assert before.keys() == (Blocks().state_dict().keys() if rank() == 0 else set())
    assert all(torch.equal(before[name], tensor) for name, tensor in Blocks().state_dict().items() if rank() == 0)

    seen = []

    def loss(model, index, generator):
        seen.append(index)
        return regression(model, index, generator)

    trained = train(model, loss, config, folder, seed=3, title="blocks", settings={})
    assert seen == [2 * step + rank() for step in range(5)]
    torch.save(full_state(trained), folder / f"trained-{rank()}.pt")


# Muon's iteration is in bfloat16, which rounds the sums of shards otherwise than whole ones, to 2^-8 of an update.
@pytest.mark.parametrize(("optimizer", "rtol", "atol"), [("adamw", 1e-5, 1e-6), ("muon", 1e-2, 2e-3)])
def test_two_processes_equal_two_passes_of_one(tmp_path, optimizer, rtol, atol):
    config = replace(CONFIG, optimizer=optimizer)
    in_two(train_and_compare, tmp_path / "two", config)
    alone = train(
        Blocks(), regression, replace(config, accumulate=2), tmp_path / "one", seed=3, title="blocks", settings={}
    )
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5]
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=rtol)
    together, moved = torch.load(tmp_path / "two" / "trained-0.pt"), alone.state_dict()
    torch.testing.assert_close(together, moved, rtol=rtol, atol=atol)
    steps = [moved[name] - start for name, start in Blocks().state_dict().items() if "blocks" in name]
    assert min(step.abs().max() for step in steps) > 10 * atol


LORA = replace(CONFIG, steps=3, checkpointing=True, lora_rank=2)


def train_adapters(folder: Path, config: TrainConfig) -> None:
    model = tiny_pipeline("wan").transformer
    add_lora(model, model.blocks, config.lora_rank, seed=1)
    shard(model, model.blocks)

    def loss(model, index, generator):
        x, text = torch.randn(1, 4, 2, 4, 4, generator=generator), torch.randn(1, 6, 32, generator=generator)
        return model(x, torch.full((1,), 500.0), text, return_dict=False)[0].square().mean(), {}

    train(model, loss, config, folder, seed=3, title="adapters", settings={})
    whole = full_state(model) if world() > 1 else model.state_dict()
    if rank() == 0:
        save_file({name: p.contiguous() for name, p in whole.items() if "lora_" in name}, folder / "lora.safetensors")


def test_adapters_and_recomputed_activations_are_sharded_too(tmp_path):
    in_two(train_adapters, tmp_path / "two", LORA)
    train_adapters(tmp_path / "one", replace(LORA, accumulate=2, checkpointing=False))
    two, one = (load_file(tmp_path / name / "lora.safetensors") for name in ("two", "one"))
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


class Scaled(nn.Module):
    """A forecaster with a gradient: what is remembered, times a number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, tokens, memory, t):
        return {name: self.scale * left for name, left in memory[0].tokens.items()}


def three_passes(transformer, family, inputs, before) -> list[torch.Tensor]:
    """What a full, a predicted and a full pass give, and the gradient of the forecaster of the second."""
    made, forecaster = [], Scaled()
    with Trunk(transformer, family) as trunk:
        for way in (trunk.full(t=0.9), trunk.predicted(forecaster, t=0.8), trunk.full(t=0.7)):
            before()
            with way:
                made.append(transformer(**inputs)[0])
        made[1].square().mean().backward()
    return [*made, forecaster.scale.grad]


def gather(name: str) -> None:
    """A full pass gathers all weights, a predicted one those outside the blocks; both give what whole weights give."""
    pipe, family, given = tiny_pipeline(name), FAMILIES[name], []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    pipe("a", num_inference_steps=1, output_type="latent", **called(pipe) | guided(pipe, 1.0))
    hook.remove()
    alone = three_passes(pipe.transformer, family, given[0], before=lambda: None)

    model = tiny_pipeline(name).transformer
    blocks = [block for _, block in blocks_of(model, family)]
    every, of_blocks = gathered_bytes([model]), gathered_bytes(blocks)
    shard(model, blocks)
    gathered, op = [], "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather_op = getattr(dist, op)

    def gathering(output_tensor, *args, **kwargs):
        gathered[-1] += output_tensor.nbytes
        return gather_op(output_tensor, *args, **kwargs)

    def before() -> None:
        reshard(model)
        gathered.append(0)

    with patch.object(dist, op, gathering):
        sharded = three_passes(model, family, given[0], before)
        before()
        model(**given[0])[0].square().mean().backward()
    assert gathered[:2] == [every, every - of_blocks], name
    assert gathered[-1] == every + of_blocks, name  # once more for the gradients, but for what the outermost keeps
    torch.testing.assert_close(sharded, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone[0], alone[1]) and alone[3]
    assert [block for _, block in blocks_of(model, family)] == blocks


def gathered_bytes(modules: list[nn.Module]) -> int:
    """Of their weights, each padded until its rows divide between two."""
    parameters = [p for module in modules for p in module.parameters()]
    return sum(2 * -(-len(p) // 2) * p[0].numel() * p.element_size() for p in parameters)


def gather_in_both(names: list[str]) -> None:
    for name in names:
        gather(name)


def test_a_predicted_pass_gathers_no_weights_of_blocks():
    in_two(gather_in_both, ["wan", "hunyuan_video"])


def collectives(folder: Path) -> None:
    assert mean([float(rank()), 4.0]) == [0.5, 4.0]
    assert math.isnan(mean([math.nan if rank() == 1 else 1.0])[0])
    assert on_first(lambda: (rank(), folder)) == (0, folder)
    with pytest.raises(UserError) as error:
        on_first(lambda: refuse(rank()))
    assert (error.value.message, error.value.hint) == ("no, 0", "go")
    assert on_all(rank) == rank()
    for agree in (on_first, on_all):
        with pytest.raises(RuntimeError, match="Unsendable: two words"):
            agree(unsendable)
    with pytest.raises(UserError, match="no, 1"):
        on_all(lambda: refuse(1) if rank() == 1 else None)
    with shared_folder(folder / "shared") as temporary:
        (temporary / str(rank())).write_text("here")
        assert not (folder / "shared").exists()
    assert sorted(path.name for path in (folder / "shared").iterdir()) == ["0", "1"]
    with pytest.raises(RuntimeError), shared_folder(folder / "not"):
        raise RuntimeError
    assert not (folder / "not").exists()


class Unsendable(Exception):
    """One that pickle writes and cannot read."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def unsendable():
    raise Unsendable("two", "words")


def refuse(number: int):
    raise UserError(f"no, {number}", "go")


def test_what_processes_agree_on(tmp_path):
    in_two(collectives, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_without_torchrun_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes():
        assert (rank(), world()) == (0, 1)
    model = nn.Linear(2, 1)
    shard(model, [])
    assert not isinstance(model.weight, DTensor)
    assert mean([math.nan, 1.0])[1] == 1.0
    assert torch.equal(full_state(model)["weight"], model.weight)


def tracked(folder: Path) -> None:
    LOGGER_TYPE_TO_CLASS["notebook"] = Notebook

    def second_fails(step: int = 0) -> dict[str, float]:
        return {"share": 1 / (1 - rank())}

    config = replace(CONFIG, trackers=["notebook"], sample_every=3, gates_every=4)
    run(folder, config=config, sample=second_fails, measure=second_fails)
    assert len(Notebook.pages) == (2 + CONFIG.steps + 1 if rank() == 0 else 0)


def test_one_process_writes_what_is_measured_in_all(tmp_path):
    in_two(tracked, tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert not any("share" in line for line in metrics(tmp_path))  # which one of them could not measure


# Averaged weights in place


def evaluated_and_sampled(folder: Path) -> None:
    model, plain, seen = Blocks(), [], []
    shard(model, model.blocks)
    x = torch.ones(2, 3)

    def loss(model, index, generator):
        plain.append(full_state(model))
        return regression(model, index, generator)

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append((full_state(model), model(x)))
        return float(rank() + len(seen))

    def sample(step):
        assert torch.equal(model(x), seen[-1][1])

    config = replace(CONFIG, evaluate_every=2, sample_every=2)
    train(model, loss, config, folder, seed=3, title="blocks", settings={}, evaluate=evaluate, sample=sample)
    alone = Blocks().eval()
    for state, output in seen:
        for at in on_every(state):
            alone.load_state_dict(at)
            torch.testing.assert_close(output, alone(x))
    if rank() == 0:
        assert len(seen) == 3
        assert not torch.equal(plain[2]["inner.weight"], seen[0][0]["inner.weight"])
        torch.save(plain, folder / "plain.pt")


def on_every(state):
    return [state] if rank() == 0 else []


def without(folder: Path) -> None:
    model, plain = Blocks(), []
    shard(model, model.blocks)

    def loss(model, index, generator):
        plain.append(full_state(model))
        return regression(model, index, generator)

    train(model, loss, CONFIG, folder, seed=3, title="blocks", settings={})
    if rank() == 0:
        torch.save(plain, folder / "plain.pt")


def test_averaged_weights_come_and_go_without_a_trace(tmp_path):
    """Weights before every step are those of a training that evaluates nothing, to the bit."""
    in_two(evaluated_and_sampled, tmp_path / "with")
    in_two(without, tmp_path / "without")
    a, b = (torch.load(tmp_path / name / "plain.pt") for name in ("with", "without"))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [line.get("evaluation") for line in metrics(tmp_path / "with")] == [None, 1.5, None, 2.5, 3.5]


# Resume


def interrupted_everywhere(folder: Path, stop: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, interrupting_at(stop, interrupting_at(stop + 1, regression)))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    in_two(run, folder)
    return folder, outcome(folder)


def test_a_checkpoint_is_two_files_of_shards_and_a_state(straight):
    folder, result = straight
    assert list(result) == ["metrics", "step-00000004", "step-00000005"]
    names = sorted(path.name for path in (folder / "checkpoints" / "step-00000005").iterdir())
    assert names == [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)] + ["state.json"]
    identity = result["step-00000005"][0]["identity"]
    assert (identity["processes"], identity["settings.loss.p"]) == (2, 2)


def test_interrupted_and_resumed_equals_straight_bit_for_bit(tmp_path, straight):
    for stop in (2, 6):
        in_two(interrupted_everywhere, tmp_path, stop)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    in_two(run, tmp_path)
    assert outcome(tmp_path) == straight[1]


SLOW = replace(CONFIG, steps=24, save_every=3)


def run_slow(folder: Path) -> None:
    run(folder, config=SLOW)


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    in_two(run_slow, tmp_path / "straight")
    rng = random.Random(0)
    for _ in range(2):
        world_of_two = start(run_slow, tmp_path / "killed")
        while not (tmp_path / "killed" / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.1))
        for process in world_of_two.processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in world_of_two.processes:
            process.join()
        assert all(process.exitcode == -signal.SIGKILL for process in world_of_two.processes)
    in_two(run_slow, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "straight")


# Faults


def bad_in_one(folder: Path, first: int, last: int) -> None:
    """Only the second process meets NaN."""

    def loss(model, index, generator):
        value, measured = regression(model, index, generator)
        return value * (math.nan if rank() == 1 and first <= index // 2 <= last else 1), measured

    if last - first >= 9:
        with pytest.raises(TrainingFailed, match="10 steps in a row"):
            run(folder, loss, replace(CONFIG, steps=20))
    else:
        run(folder, loss)


def test_a_bad_batch_in_one_process_is_skipped_by_all(tmp_path):
    in_two(bad_in_one, tmp_path, 2, 2)
    lines = metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert lines[2]["loss"] is None and lines[3]["loss"] is not None


def test_ten_bad_steps_stop_all(tmp_path):
    in_two(bad_in_one, tmp_path, 3, 12)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def damaged(folder: Path) -> None:
    newest = folder / "checkpoints" / "step-00000005"
    first = min(newest.glob("*.safetensors"))
    content = first.read_bytes()
    for damage in (content[:-7], b"", b"\x80\x04\x95pickle"):
        on_first(partial(first.write_bytes, damage))
        with pytest.raises(UserError, match=f"cannot continue from {re.escape(str(first))}: "):
            run(folder)
    on_first(first.unlink)
    with pytest.raises(UserError, match=f"cannot continue from {re.escape(str(newest))}.*: parts of .* are missing"):
        run(folder)
    on_first(partial(first.write_bytes, content))
    run(folder)


def test_a_damaged_shard_is_named(tmp_path, straight):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    in_two(damaged, tmp_path)
    assert outcome(tmp_path) == straight[1]


def unfit_in_one(folder: Path) -> None:
    """What only the second process cannot load, neither does: it would wait for the other for ever."""
    save_sharded({"weight": torch.zeros(4)}, folder)
    with pytest.raises(ValueError, match=r"weight is \[4\] float32 there and \[5\] float32 here"):
        load_sharded({"weight": torch.zeros(4 + rank())}, folder)


def test_what_does_not_fit_in_one_process_stops_both(tmp_path):
    in_two(unfit_in_one, tmp_path)


def test_other_passes_a_step_do_not_continue(straight):
    with pytest.raises(UserError, match="accumulate x processes was 2, now 1"):
        run(straight[0])


def go_on(folder: Path, config: TrainConfig) -> None:
    run(folder, config=config)


def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path, straight):
    """From shards of two in one, and from what one wrote in two; the loss is that of a run that was not interrupted."""
    alone = replace(CONFIG, accumulate=2)
    shutil.copytree(straight[0], tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000005")
    run(tmp_path / "two", config=alone)
    run(tmp_path / "one", config=alone)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "step-00000005")
    in_two(go_on, tmp_path / "other", CONFIG)
    for folder in (straight[0], tmp_path / "two", tmp_path / "other"):
        for line, expected in zip(metrics(folder), metrics(tmp_path / "one"), strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_what_four_wrote_goes_on_in_one_and_in_two(tmp_path):
    """Muon's moments too; AdamW's are those of the biases."""
    config = replace(CONFIG, optimizer="muon", save_every=3)  # two steps are left: the second tells of the moments
    in_four(go_on, tmp_path / "four", config)
    assert len(list((tmp_path / "four" / "checkpoints" / "step-00000003").glob("shard-*"))) == 4
    for name in ("one", "two"):
        shutil.copytree(tmp_path / "four", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000005")
    run(tmp_path / "one", config=replace(config, accumulate=4))
    in_two(go_on, tmp_path / "two", replace(config, accumulate=2))
    for name in ("one", "two"):
        *_, last = metrics(tmp_path / name)
        assert last["loss"] == pytest.approx(metrics(tmp_path / "four")[-1]["loss"], rel=1e-3), name


def full_disk(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        run(folder)
    assert "no space left on device; the checkpoint of step 2 is kept" in error.value.message


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, straight):
    with small_disk(tmp_path / "disk", "256k") as disk:
        in_two(interrupted_everywhere, disk, 4)
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, ballast.stat().st_size - 8192)  # room for metrics, not for a checkpoint
        in_two(full_disk, disk)
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step-00000002"]
        ballast.unlink()
        in_two(run, disk)
        assert outcome(disk) == straight[1]


def unsharded(folder: Path) -> None:
    with pytest.raises(ValueError, match="shard\\(model, blocks\\) comes first"):
        train(Blocks(), regression, CONFIG, folder, seed=0, title="blocks", settings={})


def test_whole_weights_are_not_trained_apart(tmp_path):
    in_two(unsharded, tmp_path)


UNDER_TORCHRUN = """
import sys
from pathlib import Path
from tests.train.test_parallel import *

if __name__ == "__main__":
    with processes():
        run(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_torchrun_itself(tmp_path, straight):
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run([*command, str(tmp_path / "run")], env=environment, check=True, timeout=300)
    assert outcome(tmp_path / "run") == straight[1]
