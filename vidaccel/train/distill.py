"""`vidaccel distill` from end to end: a teacher and data in, a student's model folder out.

A method (methods/) trains a copy of the teacher's transformer, with embeddings added for the numbers it does not know,
against the frozen teacher. The folder holds the run's checkpoints and metrics beside the model they end in.

B batch, C channels, T frames, H and W latent pixels
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from vidaccel.artefacts import check_output, say_finished, sha256_file, write_json
from vidaccel.collect.bank import Bank
from vidaccel.collect.encode import IMAGE, LATENT, as_array, encode_texts
from vidaccel.collect.source import EncodedSource
from vidaccel.config import loader as configuration
from vidaccel.config.checks import CLIP_SIZE
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.data.video import contact_sheet
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import blocks_of, boundaries_of
from vidaccel.models.adapters import Adapter
from vidaccel.models.calling import unwanted
from vidaccel.models.conditioning import Conditioning, new_conditioning
from vidaccel.models.files import read_model
from vidaccel.models.grid import GridScheduler, fixed_shift, require_trainable
from vidaccel.models.loading import LoadedPipeline, as_student, load_pipeline, of_one, resolve_device
from vidaccel.models.saving import FORMAT as MODEL
from vidaccel.models.saving import save_student
from vidaccel.models.velocity import Velocity, velocity_of
from vidaccel.models.weight_hashes import encoder_hashes, student_hash
from vidaccel.processes import by_all, locked_by_first, on_first, processes, rank, world
from vidaccel.sampling import generate
from vidaccel.train.clips import LARGE, Clips, open_data, training_clips
from vidaccel.train.finished import is_done, named_files, note_done
from vidaccel.train.gates import HeldOut, Measured
from vidaccel.train.methods import METHODS, method_of
from vidaccel.train.methods.base import Distillation, Method, OtherTraining
from vidaccel.train.metrics import ByProducts
from vidaccel.train.objective import drawing_device, generator_for
from vidaccel.train.own_call import called_as_told, own_scale, say_sources, warn_of_scale, with_scales
from vidaccel.train.parallel import full_state, shard
from vidaccel.train.trainer import train

log = logging.getLogger(__name__)

EVALUATION_PASSES = 4
EVALUATION_INDEX = 10**9
"""Index of the first of them: further than any training goes."""
GATES_FILE = "gates.json"
SHEET_PROMPTS = 4
"""Of a sheet for which the user names none."""


def distill(config: DistillConfig, output: Path, device: str = "auto", clips: Clips | None = None) -> bool:
    """Train a student into the folder `output`, going on where an earlier run was stopped.

    Returns whether this process is the one that saved it: the first of many.

    Args:
        clips: what is there already to learn from, in place of what the settings say of it.

    Raises:
        UserError: teacher, data and settings do not go together, or cannot be read.
        TrainingFailed: the training did not stay finite.
    """
    method = method_of(config.method)
    other = isinstance(method, OtherTraining)
    made = method.format if other else MODEL
    check_output(output, made)
    with processes(), locked_by_first(output):
        if clips is None and is_done(output, made, config):
            if rank() == 0:
                say_finished(output)
            return rank() == 0
        if other:
            method.run(config, output, device)
        else:
            _distill(config, output, device, clips)
        if clips is None and rank() == 0:
            note_done(output, config)
        return rank() == 0


def _distill(config: DistillConfig, output: Path, device: str, clips: Clips | None) -> None:
    started = datetime.now(UTC)
    method, target = method_of(config.method), resolve_device(device)
    config = _resolved(config, method)
    files = read_model(config.teacher)
    config = _of_one_denoiser(config, method, files.contents.family)
    whole, lora = config.denoiser is None, config.lora or ()
    loaded = load_pipeline(files, device=device, denoiser_dtype="float32", placed=whole and world() == 1, lora=lora)
    span = (0.0, 1.0)
    if config.denoiser is not None:
        span = _span(loaded, config.denoiser)
        _warn_of_other_steps(config, loaded)
        loaded = _alone(loaded, config.denoiser)
        if world() == 1:
            loaded.pipe.to(target)
    _check_teacher(loaded, method)
    seen = None
    if clips is None:
        seen, provenance = open_data(loaded, config)
        told = called_as_told(loaded, config, seen)
        clips = training_clips(loaded, config, seen, provenance, target, lambda: encode_texts(told, [unwanted(told)]))
    data, provenance, held_out = clips
    told = called_as_told(loaded, config, seen or data)
    say_sources(told, config, seen or data, loaded)
    loaded = told
    config = with_scales(config, loaded)
    warn_of_scale(config, loaded)
    if unwanted(loaded):
        provenance = provenance | {"negative_prompt": unwanted(loaded)}
    torch.manual_seed(config.seed)  # for the first layers of new embeddings
    start = _started(config, loaded)
    copy = student_of(loaded, config, start, span)
    if start is not None:
        provenance = provenance | {"start": _go_on_from(config, start, copy)}
    teacher, student = velocity_of(loaded).requires_grad_(False).eval(), velocity_of(copy).requires_grad_(True)
    blocks = _blocks(student.transformer, loaded.family)
    if config.train.lora_rank:
        from vidaccel.train import lora  # wants peft, which the extra `train` brings

        lora.add_lora(student.transformer, blocks, config.train.lora_rank, config.seed)
    parts = [part for part in (student.transformer, student.conditioning) if part]
    # The parts on their own too: a pipeline calls them without the student.
    shard(student, [*blocks, *parts], target)
    shard(teacher, _blocks(teacher.transformer, loaded.family), target)
    loaded.pipe.to(target)  # what is not sharded: text encoders and autoencoder, which both pipelines share
    empty = encode_texts(loaded, [unwanted(loaded)])
    if isinstance(data, Bank):
        empty = data.cut(empty)
    shift = config.shift or fixed_shift(loaded.pipe.scheduler, loaded.family)
    task = Distillation(config, teacher, student, data, empty, shift, span)
    if config.train.gates_every and held_out is not None and method.gates_runs and not _runs(task, held_out):
        raise UserError(
            f"gates_every={config.train.gates_every}, and gates of method={config.method} are taken on runs, of which "
            "there are none",
            "set gate_runs=16 or so, or leave gates_every= out",
        )
    method.preflight(task)
    loss = method.loss(task)
    train(
        task.student,
        loss,
        config.train,
        output,
        seed=config.seed,
        title="student",
        settings=_shaping(config) | {"made_of": provenance, "teacher": dict(loaded.hashes) or loaded.source},
        recorded=partial(_recorded, loaded, _shaping(config)),
        evaluate=lambda model: _evaluate(model, loss, config.seed),
        rates={} if config.embedding_rate == 1 else {"conditioning": config.embedding_rate},
        measure=None if held_out is None else lambda: _measured(task, method, held_out, brief=True)[0].curves(),
        sample=lambda step: (
            _sheet(copy, config, seen, output / "samples" / f"{step:08d}.png") if seen and whole else None
        ),
    )
    measured = None if held_out is None else _gates_if_they_can(task, method, held_out, output)
    if measured is None:
        (output / GATES_FILE).unlink(missing_ok=True)  # of what was there before
    _save(config, loaded, copy, task, output, started, measured)


def _resolved(config: DistillConfig, method: Method) -> DistillConfig:
    """With what the method's own settings leave open chosen."""
    own = config.own_settings
    return config if own is None else replace(config, **{config.method: method.resolved(own)})


def _shaping(config: DistillConfig) -> dict:
    """The settings that shape a training, besides those that `train` is given itself."""
    elsewhere = {"train", "start", "features", "on_damage", "data", "clips", "sizes", *CLIP_SIZE, "seed"}
    elsewhere |= {"prompts", "guidance", "merge_lora"}  # of what is made of the weights
    elsewhere |= {"bank", "gate_samples", "gate_runs"}  # what was learnt from says what that means
    elsewhere |= {"lora"}  # the teacher's hashes have them
    elsewhere |= {"negative_prompt"}  # which may be the features' or the teacher's: see `made_of`
    return _of_one_method({key: value for key, value in configuration.to_dict(config).items() if key not in elsewhere})


def _of_one_method(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the groups of other methods, which a run does not read: those of earlier versions recorded them all."""
    return {key: value for key, value in settings.items() if key not in METHODS or key == settings["method"]}


def _recorded(teacher: LoadedPipeline, now: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What would be said now of the settings in a checkpoint, whichever version wrote it: a teacher of the hub was its
    id once."""
    if settings.get("teacher") == teacher.source:
        settings = dict(settings) | {"teacher": dict(teacher.hashes) or teacher.source}
    return _of_one_method(configuration.as_recorded_now(settings, now, DistillConfig))


def _measured(task: Distillation, method: Method, clips: Bank, brief: bool = False) -> tuple[Measured, int]:
    """The numbers that say whether the student was trained, on the same clips and noise every time, and on how many
    runs."""
    device, config = clips.latents.device, task.config
    generator = generator_for(config.seed, EVALUATION_INDEX)
    text = clips.batch([clip * clips.captions for clip in range(len(clips))], torch.float32)
    x_0 = text.pop(LATENT)
    eps = torch.randn(x_0.shape, generator=generator).to(x_0)
    runs = _runs(task, clips)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16"):
        held_out = HeldOut(x_0, eps, text, generator, runs, max(config.train.batch_size, 32), brief)
        return method.gates(task, held_out), runs


def _runs(task: Distillation, clips: Bank) -> int:
    """How many of the clips gates that take runs are computed on."""
    if task.config.gate_runs is not None:
        return min(task.config.gate_runs, len(clips))
    return 0 if sum(p.numel() for p in task.student.parameters()) > LARGE else len(clips)


def _gates_if_they_can(task: Distillation, method: Method, clips: Bank, output: Path) -> Measured | None:
    """`_pass_gates`; where they fail, which takes nothing from the student that is trained, a warning says so."""
    measured: list[Measured] = []
    passing = partial(by_all, partial(_pass_gates, task, method, clips, output))
    ByProducts().make(lambda: measured.append(passing()), "computing the gates", "the student is saved")
    return measured[0] if measured else None


def _pass_gates(task: Distillation, method: Method, clips: Bank, output: Path) -> Measured:
    """Computes them, says them and writes them down."""
    measured, runs = _measured(task, method, clips)
    for line in str(measured).splitlines():
        log.info("%s", line)
    for gate in measured.gates:
        log.log(logging.INFO if gate.passed else logging.WARNING, gate.said("the student"))
    found = {"samples": len(clips), "runs": runs} | measured.as_json()
    on_first(lambda: write_json(output / GATES_FILE, found))
    return measured


def student_of(
    loaded: LoadedPipeline,
    config: DistillConfig,
    start: LoadedPipeline | None = None,
    span: tuple[float, float] = (0.0, 1.0),
) -> LoadedPipeline:
    """The teacher once more, its transformer to be trained, which starts equal to it: new embeddings give nothing.

    It embeds what `start`, whose weights it is to go on from, does as well; `span` are the transformer's own times.
    """
    loaded_embeds, family, attribute = velocity_of(loaded).embeds, loaded.family, loaded.family.denoisers[0].attribute
    copy = _beside(config.teacher, loaded, config.lora or ())
    transformer = getattr(copy.pipe, attribute)
    method = method_of(config.method)
    more = start.conditioning.config.embeds if start and start.conditioning else ()
    wanted = [name for name in ("r", "g") if name == method.embeds or name in more or loaded_embeds(name)]
    embeds = tuple(name for name in wanted if not Velocity(transformer, family).embeds(name))
    shift = config.shift or fixed_shift(loaded.pipe.scheduler, loaded.family)
    known = [each.conditioning.config.until for each in (loaded, start) if each and each.conditioning]
    trained = {"shift": shift, "steps": config.sample_steps, "until": max(known, default=0.0)}
    trained |= method.conditioning(config, shift, span)
    if "g" in embeds:
        trained["guidance_range"] = tuple(with_scales(config, loaded).guidance_range)
    conditioning = new_conditioning(transformer, family, embeds, loaded.conditioning, **trained) if embeds else None
    own = {"steps": config.sample_steps, "guidance": own_scale(config, loaded), "two_pass": False}
    scheduler = GridScheduler(shift=shift, invert_sigmas=loaded.family.rises)
    return as_student(replace(copy, call=loaded.call | own), conditioning, scheduler)


def _started(config: DistillConfig, teacher: LoadedPipeline) -> LoadedPipeline | None:
    """The student `config.start`; `UserError` if it is of another teacher."""
    if config.start is None:
        return None
    files = read_model(config.start)
    theirs, ours = files.hashes, encoder_hashes(teacher)
    if files.contents.family.name != teacher.family.name or any(theirs.get(name) != ours[name] for name in ours):
        raise _foreign(config)
    return _beside(config.start, teacher)


def _go_on_from(config: DistillConfig, start: LoadedPipeline, copy: LoadedPipeline) -> str:
    """Puts the weights of `start` into `copy`, a new student of the same teacher; returns their hash."""
    weights, own = velocity_of(start).state_dict(), velocity_of(copy)
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in own.state_dict().items()}:
        raise _foreign(config)
    own.load_state_dict(weights)
    return student_hash(start)


def _foreign(config: DistillConfig) -> UserError:
    return UserError(
        f"{config.start} is no student of {config.teacher} by method={config.method}",
        "give start= one of that teacher which embeds what this method teaches, or leave it out",
    )


def _beside(source: str, loaded: LoadedPipeline, lora: Sequence[str] = ()) -> LoadedPipeline:
    """That model with a transformer of its own and all other parts those of `loaded`, which are not read again."""
    modules = {name: part for name, part in loaded.pipe.components.items() if isinstance(part, nn.Module)}
    own = loaded.family.denoisers[0].attribute
    modules.pop(own)
    made = load_pipeline(source, device=loaded.pipe.device.type, given=modules, denoiser_dtype="float32", lora=lora)
    return made if len(made.family.denoisers) == 1 else of_one(made, own)


def _of_one_denoiser(config: DistillConfig, method: Method, family: DiTFamily) -> DistillConfig:
    """With what follows where one of several denoisers is distilled.

    Raises:
        UserError: `denoiser` does not say which, or names none of them, or not all that is asked for is for one.
    """
    names = [denoiser.attribute for denoiser in family.denoisers]
    if config.denoiser not in (None, *names):
        raise UserError(f"denoiser={config.denoiser}, and {family.title} has {', '.join(names)}", "name one of them")
    adapters = [Adapter.parsed(each) for each in config.lora or ()]
    if adapters and config.train.lora_rank and not config.merge_lora:
        raise UserError(
            "an adapter apart belongs to its teacher as that is on disk, without the files of lora=",
            "leave merge_lora=true",
        )
    if len(names) == 1:
        return replace(config, denoiser=None)
    if config.denoiser is None:
        raise UserError(
            f"{family.title} denoises with {len(names)} transformers, and nothing says which is distilled",
            f"one at a time: denoiser={names[0]}, then denoiser={names[1]} with teacher= the folder that this made",
        )
    if others := [str(each) for each in adapters if each.denoiser in names and each.denoiser != config.denoiser]:
        raise UserError(
            f"lora={others[0]} is not for the {config.denoiser} that is distilled, and would be lost",
            "give it when that one is distilled",
        )
    if config.train.lora_rank and not config.merge_lora:
        raise UserError("an adapter apart is of one transformer alone", "leave merge_lora=true")
    return replace(config, gate_samples=config.gate_samples or 0)  # none unless they are asked for


def _alone(loaded: LoadedPipeline, attribute: str) -> LoadedPipeline:
    """`of_one`, without the weights of the others in memory: what is saved of them is their files."""
    for denoiser in loaded.family.denoisers:
        if denoiser.attribute != attribute:
            for weight in getattr(loaded.pipe, denoiser.attribute).parameters():
                weight.data = weight.data.new_empty(0)
    return of_one(loaded, attribute)


def _span(loaded: LoadedPipeline, attribute: str) -> tuple[float, float]:
    """The times that one of several denoisers takes."""
    bounds = (1.0, *boundaries_of(loaded.pipe, loaded.family), 0.0)
    which = [denoiser.attribute for denoiser in loaded.family.denoisers].index(attribute)
    return bounds[which + 1], bounds[which]


def _warn_of_other_steps(config: DistillConfig, loaded: LoadedPipeline) -> None:
    """Where another denoiser's mean velocities are for another grid than that which the student is called with."""
    names = [denoiser.attribute for denoiser in loaded.family.denoisers]
    for name, each in zip(names, (loaded, *loaded.further), strict=True):
        own = each.conditioning.config if each.conditioning else None
        if name == config.denoiser or own is None or "r" not in own.embeds or own.steps is None:
            continue
        if own.steps != config.sample_steps or config.shift not in (None, own.shift):
            grid = f"sample_steps={own.steps}" + (f" shift={own.shift:g}" if own.shift is not None else "")
            log.warning("the %s of %s is for %s, and the model will be sampled otherwise", name, config.teacher, grid)


def _check_teacher(loaded: LoadedPipeline, method: Method) -> None:
    require_trainable(loaded.family, "distillation")
    if loaded.family.embeds_r:
        raise UserError(
            f"{loaded.source} is a student already: {loaded.family.title} is told where a step ends",
            f"train a predictor for it: vidaccel train-predictor student={loaded.source} -o FOLDER",
        )
    method.check_teacher(loaded, velocity_of(loaded))


def _blocks(transformer: nn.Module, family: DiTFamily) -> list[nn.Module]:
    return [block for _, block in blocks_of(transformer, family)]


def _evaluate(model: nn.Module, loss: Callable, seed: int) -> float:
    """The loss on batches, noise and times that are the same every time."""
    indices = range(EVALUATION_INDEX, EVALUATION_INDEX + EVALUATION_PASSES)
    device = drawing_device(loss, model)
    return sum(float(loss(model, i, generator_for(~seed, i, device))[0]) for i in indices) / EVALUATION_PASSES


def _sheet(copy: LoadedPipeline, config: DistillConfig, data: ShardFolder | EncodedSource, file: Path) -> None:
    """Videos of a few prompts by the student as it is, of the size that it learns from, frames side by side; they begin
    with images of the first samples where they begin with any. Every process makes them, one writes."""
    data = data.commonest()
    prompts = config.prompts or [data[i][1]["caption"] for i in range(min(SHEET_PROMPTS, len(data)))]
    own, videos = GenerateConfig(), []
    for i, prompt in enumerate(prompts):
        image = as_array(data[i % len(data)][0][IMAGE]) if copy.family.begins_with_image else None
        videos.append(generate(copy, [prompt], own, [config.seed + i], image=image).frames[0])
    if rank() == 0:
        contact_sheet(videos, file, labels=list(prompts))


def _save(
    config: DistillConfig,
    loaded: LoadedPipeline,
    copy: LoadedPipeline,
    task: Distillation,
    output: Path,
    started: datetime,
    measured: Measured | None,
) -> None:
    student = task.student if world() == 1 else _gathered(task.student, config)
    if student is None:
        return
    if config.train.lora_rank and config.merge_lora:
        from vidaccel.train import lora

        lora.merge_lora(student.transformer)
    save_student(
        output,
        loaded,
        student.transformer,
        student.conditioning,
        steps=config.sample_steps,
        guidance=copy.call["guidance"],
        shift=task.shift,
        command="vidaccel distill",
        config=configuration.to_dict(config),
        seed=config.seed,
        started=started,
        measured=str(measured) if measured else None,
        parents={role: sha256_file(file) for role, file in named_files(config).items() if file.is_file()},
    )


def _gathered(student: Velocity, config: DistillConfig) -> Velocity | None:
    """A whole copy of a sharded student in process 0, None in the others; every process has to call it."""
    state = full_state(student)
    if rank():
        return None
    own, family = student.conditioning, student.family
    with torch.device("meta"):
        transformer = getattr(diffusers, family.transformer).from_config(student.transformer.config)
        whole = Velocity(transformer, family, Conditioning(own.config) if own else None, student.scale)
    if config.train.lora_rank:
        from vidaccel.train import lora

        lora.add_lora(transformer, _blocks(transformer, family), config.train.lora_rank, config.seed)
    whole.load_state_dict(state, assign=True)
    return whole
