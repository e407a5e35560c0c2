"""`vidaccel distill` from end to end: a teacher and data in, a student's model folder out.

Both methods train a copy of the teacher's transformer, with embeddings added for the numbers it does not know, against
the frozen teacher. The folder holds the run's checkpoints and metrics beside the model they end in.

B batch, C channels, T frames, H and W latent pixels
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from vidaccel import config as configuration
from vidaccel.artefacts import RUN_FILE, check_writable, sha256_file
from vidaccel.collect.encode import LATENT, batch, encode_texts
from vidaccel.collect.folder import open_features
from vidaccel.collect.source import EncodedSource, open_source
from vidaccel.config import CollectConfig, DistillConfig, GenerateConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.data.video import contact_sheet
from vidaccel.errors import UserError
from vidaccel.models.conditioning import new_conditioning
from vidaccel.models.loading import LoadedPipeline, as_student, load_pipeline
from vidaccel.models.steps import GridScheduler
from vidaccel.models.student import save_student
from vidaccel.models.velocity import Text, Velocity
from vidaccel.sampling import generate
from vidaccel.train import jvp, meanflow
from vidaccel.train.cfg_distill import cfg_loss, sample_guidance
from vidaccel.train.flow_matching import sample_times
from vidaccel.train.loop import generator_for, train
from vidaccel.train.parallel import full_state, processes, rank, shard, world

log = logging.getLogger(__name__)
EVALUATION_PASSES = 4
EVALUATION_INDEX = 10**9
"""Index of the first of them: further than any training goes."""
SHEET_PROMPTS = 4
"""Of a sheet for which the user names none."""

Data = ShardFolder | EncodedSource


@dataclass(frozen=True)
class Distillation:
    """What a loss is computed from."""

    config: DistillConfig
    teacher: Velocity
    student: Velocity
    data: Data
    empty: Text
    """The unconditional text [1, ...]."""
    shift: float

    def draw(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Text]:
        """x_0 and eps [B, C, T, H, W], t and g [B], and text, of forward pass `index`."""
        size, device = self.config.train.batch_size, next(self.student.parameters()).device
        positions = (self.data.at(index * size + i, self.config.seed) for i in range(size))
        text = batch([self.data[i][0] for i in positions], device, torch.float32)
        x_0 = text.pop(LATENT)
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        if self.config.times == "uniform":
            t = torch.rand(size, generator=generator)
        else:
            t = sample_times(size, self.shift, generator)
        g = sample_guidance(size, *self.config.guidance_range, generator)
        return x_0, eps, t.to(device), g.to(device), text


def distill(config: DistillConfig, output: Path, device: str = "auto") -> None:
    """Train a student into the folder `output`, going on where an earlier run was stopped.

    Raises:
        UserError: teacher, data and settings do not go together, or cannot be read.
        TrainingFailed: the training did not stay finite.
    """
    check_writable(output / RUN_FILE)
    with processes():
        _distill(config, output, device)


def _distill(config: DistillConfig, output: Path, device: str) -> None:
    started = datetime.now(UTC)
    config = _resolved(config)
    loaded = load_pipeline(config.teacher, device=device, dtype="float32")
    _check_teacher(loaded, config)
    data, made_of = open_data(loaded, config)
    copy = student_of(loaded, config)
    setting = Distillation(
        config,
        teacher=velocity_of(loaded).requires_grad_(False).eval(),
        student=velocity_of(copy).requires_grad_(True),
        data=data,
        empty=encode_texts(loaded, [""]),
        shift=shift_of(loaded, config),
    )
    blocks = _blocks(copy)
    if config.train.lora_rank:
        from vidaccel.train import lora  # wants peft, which the extra `train` brings

        lora.add_lora(setting.student.transformer, blocks, config.train.lora_rank)
    if config.method == "mean_velocity":
        _say_what_is_trained_on(setting)
    shard(setting.student, blocks)
    shard(setting.teacher, _blocks(loaded))
    loss = LOSSES[config.method](setting)
    train(
        setting.student,
        loss,
        config.train,
        output,
        seed=config.seed,
        title="student",
        settings=_shaping(config) | {"made_of": made_of, "teacher": loaded.hashes},
        evaluate=lambda model: _evaluate(model, loss, config.seed),
        sample=lambda step: _sheet(copy, config, data, output / "samples" / f"{step:08d}.png"),
    )
    _save(config, loaded, copy, setting, output, started)


def _resolved(config: DistillConfig) -> DistillConfig:
    """With the way to the derivative chosen, which under sharding is the difference."""
    derivative = config.mean_velocity.derivative or ("exact" if world() == 1 else "finite_difference")
    return replace(config, mean_velocity=replace(config.mean_velocity, derivative=derivative))


def _shaping(config: DistillConfig) -> dict:
    """The settings that shape a training, besides those that `train` is given itself."""
    elsewhere = {"train", "prompts", "features", "data", "clips", "seed", "guidance", "merge_lora"}
    return {key: value for key, value in configuration.to_dict(config).items() if key not in elsewhere}


def open_data(loaded: LoadedPipeline, config: DistillConfig) -> tuple[Data, dict]:
    """The encoded clips to train on, and what tells them from others."""
    if config.features is not None:
        features = open_features(config.features, "encoded", loaded.hashes)
        return features, {"features": sha256_file(features.folder / RUN_FILE)}
    clips = CollectConfig(model=config.teacher, data=config.data, clips=config.clips, seed=config.seed)
    source = open_source(loaded, clips)
    return EncodedSource(loaded, source), {"clips": len(source)} | source.identity


def student_of(loaded: LoadedPipeline, config: DistillConfig) -> LoadedPipeline:
    """The teacher once more, its transformer to be trained, which starts equal to it: new embeddings give nothing."""
    family, attribute = loaded.family, loaded.family.denoisers[0].attribute
    modules = {name: part for name, part in loaded.pipe.components.items() if isinstance(part, nn.Module)}
    modules.pop(attribute)
    copy = load_pipeline(config.teacher, device=loaded.pipe.device.type, dtype="float32", given=modules)
    transformer = getattr(copy.pipe, attribute)
    wanted = ["g"] if config.method == "cfg" else ["r", *(["g"] if velocity_of(loaded).embeds("g") else [])]
    embeds = tuple(name for name in wanted if not Velocity(transformer, family).embeds(name))
    trained = {"shift": shift_of(loaded, config), "steps": config.sample_steps}
    if config.method == "mean_velocity":
        widest = meanflow.widest_interval(config.sample_steps, trained["shift"])
        trained["restrict"] = meanflow.restrict_at(config.mean_velocity, widest, 1.0)
    conditioning = new_conditioning(transformer, family, embeds, loaded.conditioning, **trained) if embeds else None
    guidance = loaded.default("guidance") if config.guidance is None else config.guidance
    own = {"steps": config.sample_steps, "guidance": guidance, "two_pass": False}
    return as_student(replace(copy, call=copy.call | own), conditioning, GridScheduler(shift=trained["shift"]))


def _check_teacher(loaded: LoadedPipeline, config: DistillConfig) -> None:
    teacher = velocity_of(loaded)
    if len(loaded.family.denoisers) > 1:
        raise UserError(
            f"{loaded.family.title} denoises with {len(loaded.family.denoisers)} transformers",
            "distil a family with one: this vidaccel does not train several together",
        )
    if config.method == "cfg" and teacher.embeds("g"):
        raise UserError(
            f"{loaded.source} has its guidance distilled into one pass already",
            "train a few-step student of it: --conf sprites/restricted_meanflow, or method=mean_velocity",
        )
    if config.method == "mean_velocity" and not teacher.embeds("g"):
        log.warning(
            "%s is not CFG-distilled: the student learns its velocities without guidance, and follows prompts as "
            "loosely as they do; distil it with --conf sprites/cfg first",
            loaded.source,
        )


def velocity_of(loaded: LoadedPipeline) -> Velocity:
    """u(x, r, t) of a loaded pipeline's transformer."""
    transformer = getattr(loaded.pipe, loaded.family.denoisers[0].attribute)
    return Velocity(transformer, loaded.family, loaded.conditioning)


def shift_of(loaded: LoadedPipeline, config: DistillConfig) -> float:
    """Shift of the student's step grid: the one asked for, else the teacher's scheduler's, else the family's."""
    own = loaded.pipe.scheduler.config
    return config.shift or own.get("shift") or own.get("flow_shift") or loaded.family.defaults.shift


def _blocks(loaded: LoadedPipeline) -> list[nn.Module]:
    transformer = getattr(loaded.pipe, loaded.family.denoisers[0].attribute)
    return [block for blocks in loaded.family.block_lists for block in getattr(transformer, blocks.name)]


def _cfg(setting: Distillation) -> Callable:
    def loss(model: nn.Module, index: int, generator: torch.Generator):
        x_0, eps, t, g, text = setting.draw(index, generator)
        return cfg_loss(model, setting.teacher, _noised(x_0, eps, t), t, g, text, setting.empty), {}

    return loss


def _mean_velocity(setting: Distillation) -> Callable:
    config, steps = setting.config.mean_velocity, setting.config.train.steps
    per_step = setting.config.train.accumulate * world()
    widest = meanflow.widest_interval(setting.config.sample_steps, setting.shift)

    def loss(model: nn.Module, index: int, generator: torch.Generator):
        x_0, eps, t, g, text = setting.draw(index, generator)
        restrict = meanflow.restrict_at(config, widest, min(1.0, index / (steps * per_step)))
        r = meanflow.sample_interval_ends(t.cpu(), restrict, config.equal_share, generator).to(t)
        x = _noised(x_0, eps, t)
        teacher, student = _bound(setting.teacher, text, g), _bound(model, text, g)
        if config.target == "rollout":
            target = meanflow.rollout_target(lambda x, t: teacher(x, t, t), x, t, r, config.substeps)
        else:
            v = teacher(x, t, t).detach() if config.velocity == "teacher" else eps - x_0
            warmup = min(1.0, index / per_step / config.tangent_warmup) if config.tangent_warmup else 1.0
            target = meanflow.derivative_target(student, v, x, t, r, config, warmup)
        error, left_out = meanflow.weighted_error(student(x, t, r), target, config.error_power, config.error_constant)
        return error, {"restrict": restrict, "left_out": float(left_out)}

    return loss


def _bound(model: nn.Module, text: Text, g: Tensor) -> meanflow.MeanVelocity:
    """u(x, t, r) of a Velocity with its text, and its scale where it embeds one."""
    scale = g if model.embeds("g") else None
    return lambda x, t, r: model(x, t, text, r=r, g=scale)


def _noised(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    at = t.view(-1, 1, 1, 1, 1)
    return (1 - at) * x_0 + at * eps


LOSSES = {"cfg": _cfg, "mean_velocity": _mean_velocity}


def _say_what_is_trained_on(setting: Distillation) -> None:
    """How wide the grid's intervals are, and, before a training on Du/Dt, what the student is about to see."""
    config, steps = setting.config.mean_velocity, setting.config.sample_steps
    widest = meanflow.widest_interval(steps, setting.shift)
    restrict = meanflow.restrict_at(config, widest, 0.0)
    log.info("%d steps, shift %g: widest interval %.2f; R starts at %.2f", steps, setting.shift, widest, restrict)
    if config.target == "rollout":
        return
    x_0, eps, t, g, text = setting.draw(0, generator_for(setting.config.seed, 0))
    x, r = _noised(x_0, eps, t), (t - restrict).clamp(min=0.0)
    student = _bound(setting.student, text, g)
    missing = jvp.missing_memory(student, x, t, r, config.kernels)
    if missing and config.derivative == "exact":
        needed, free = (count / 2**30 for count in missing)
        raise UserError(
            f"the exact derivative would need {needed:.1f} GiB for attention, and {free:.1f} GiB are free",
            "set mean_velocity.derivative=finite_difference, or run on a GPU with mean_velocity.kernels=fused",
        )
    with torch.no_grad():
        v = _bound(setting.teacher, text, g)(x, t, t)
    check = jvp.check_derivatives(student, x, t, r, v, config.difference_step, config.kernels, with_exact=not missing)
    log.info("before training: %s", check)


def _evaluate(model: nn.Module, loss: Callable, seed: int) -> float:
    """The loss on batches, noise and times that are the same every time."""
    indices = range(EVALUATION_INDEX, EVALUATION_INDEX + EVALUATION_PASSES)
    return sum(float(loss(model, i, generator_for(~seed, i))[0]) for i in indices) / EVALUATION_PASSES


def _sheet(copy: LoadedPipeline, config: DistillConfig, data: Data, file: Path) -> None:
    """Videos of a few prompts by the student as it is, frames side by side. Every process makes them, one writes."""
    prompts = config.prompts or [data[i][1]["caption"] for i in range(min(SHEET_PROMPTS, len(data)))]
    videos = [
        generate(copy, [prompt], GenerateConfig(), [config.seed + i]).frames[0] for i, prompt in enumerate(prompts)
    ]
    if rank() == 0:
        contact_sheet(videos, file, labels=list(prompts))


def _save(
    config: DistillConfig, loaded: LoadedPipeline, copy: LoadedPipeline, setting: Distillation, output: Path, started
) -> None:
    student = setting.student
    if config.train.lora_rank and config.merge_lora:
        from vidaccel.train import lora

        lora.merge_lora(student.transformer)
    transformer, conditioning = student.transformer, student.conditioning
    if world() > 1:
        transformer, conditioning = _gathered(student)
    if rank() == 0:
        save_student(
            output,
            loaded,
            transformer,
            conditioning,
            steps=config.sample_steps,
            guidance=copy.call["guidance"],
            shift=setting.shift,
            command="vidaccel distill",
            config=configuration.to_dict(config),
            seed=config.seed,
            started=started,
        )


def _gathered(student: Velocity) -> tuple[nn.Module | None, nn.Module | None]:
    """Whole copies of a sharded student's parts, in process 0; every process has to call it."""
    state = full_state(student)
    if rank():
        return None, None
    parts = []
    for name, part in (("transformer", student.transformer), ("conditioning", student.conditioning)):
        with torch.device("meta"):
            whole = type(part)(part.config) if name == "conditioning" else type(part).from_config(part.config)
        prefix = f"{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        whole.load_state_dict(own, assign=True)
        parts.append(whole)
    return tuple(parts)
