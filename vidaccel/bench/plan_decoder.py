"""`distill method=decoder --plan`: what teaching a narrower decoder costs, before a weight is read.

Both decoders run on the meta device, the teacher's by its config.json or, where there is none, by its class's defaults,
which are the released autoencoder's.
"""

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from vidaccel.bench.plan_training import (
    FLOAT32,
    HALF,
    Costs,
    Held,
    TrainingPlan,
    Work,
    asked_size,
    checkpoint_bytes,
    features_disk,
    folder_size,
    optimised,
    steps_of,
    work,
)
from vidaccel.bench.planned_model import PlannedModel, planned_model
from vidaccel.config.distill import DistillConfig
from vidaccel.config.plan import PlanConfig
from vidaccel.errors import UserError
from vidaccel.models.decoder import autoencoder_of, decode_whole, latent_width, trained_parts
from vidaccel.models.files import config_folder, local_path
from vidaccel.models.folder import read_json
from vidaccel.models.live_bytes import LiveBytes, Unwritten
from vidaccel.train.methods.decoder.method import KEPT_OUT
from vidaccel.train.methods.decoder.slices import narrower


@dataclass(frozen=True)
class DecoderCosts:
    """Of one latent."""

    parameters: int
    """That decode."""
    flops: float
    """Of decoding it."""
    kept: int
    """Bytes that are kept for a backward pass, or without one the most that are alive at once."""
    frames: int
    """Numbers in the frames."""


def decoder_costs(vae: Any, latent: tuple[int, ...], gradients: bool, dtype: torch.dtype) -> DecoderCosts:
    """What an autoencoder on the meta device takes to decode a latent [C, T, H, W]."""
    vae = vae.to(dtype).requires_grad_(gradients)
    z = torch.empty(1, *latent, dtype=dtype, device="meta")
    with torch.set_grad_enabled(gradients), torch.device("meta"), LiveBytes() as live, Unwritten():
        with FlopCounterMode(display=False) as counted:
            frames = decode_whole(vae, z)
        kept = live.now if gradients else live.peak
    parameters = sum(p.numel() for p in trained_parts(vae))
    return DecoderCosts(parameters, float(counted.get_total_flops()), kept, frames.numel())


def plan_decoder(config: DistillConfig, plan: PlanConfig, conf: str | None, named: bool) -> TrainingPlan:
    """What `vidaccel distill method=decoder` costs; arguments and errors as of `plan_distillation`."""
    model = replace(planned_model(config.teacher, plan, conf, named, asked_size(config)), beside={})
    settings, train = config.own_settings, config.train
    cls, made_as = _autoencoder(model, config.teacher)
    with torch.device("meta"):
        teacher = autoencoder_of(cls, made_as)
        student = autoencoder_of(cls, narrower(teacher, model.family, settings))
    latent = _latent(model, made_as, settings.crop)
    halves = train.precision == "bfloat16"
    theirs = decoder_costs(teacher, latent, False, torch.bfloat16)
    ours = decoder_costs(student, latent, True, torch.bfloat16 if halves else torch.float32)
    again = 1 if train.checkpointing else 0
    own = work("", (3 + again) * ours.flops, halves)
    sample = own + Work("", theirs.flops)
    steps, notes = steps_of(train, plan, sample)
    samples = steps * train.batch_size * train.accumulate
    clips = folder_size(config.features) or (None if config.data or config.features else config.clips)
    keeps = settings.noise == 0 and settings.crop is None
    targets = samples
    if keeps and clips is not None:
        room = int(settings.kept * 2**30 / (HALF * (theirs.frames + math.prod(latent))))
        targets = samples if room < clips else min(samples, clips)
    if targets < samples:
        notes.append(f"the teacher decodes {targets:,} of {samples:,} samples, whose frames are kept for the others")
    notes.append("one process trains it; encoding clips is left out")
    evaluated = -(-steps // train.evaluate_every) * KEPT_OUT if steps else 0
    parts = [
        own.times(samples, f"training: {steps:,} steps, {samples:,} samples"),
        Work(f"the teacher's frames: {targets:,}", theirs.flops * targets),
        work(f"evaluations: {evaluated:,} samples", ours.flops * evaluated, halves),
    ]
    shared: dict[str, float] = {"teacher": HALF * theirs.parameters, "student": FLOAT32 * ours.parameters}
    shared |= optimised(ours.parameters, train, 0)
    each = {"activations": float(train.batch_size * max(ours.kept, theirs.kept))}
    disk = {
        **features_disk(clips, samples, HALF * math.prod(latent)),
        "a checkpoint": checkpoint_bytes(ours.parameters, shared),
        "the decoder": float(HALF * ours.parameters),
    }
    known = {"trained": ours.parameters, "of the teacher's decoder": theirs.parameters}
    gain = theirs.flops / ours.flops
    of = f"distill, method=decoder, {train.precision}: {gain:.1f} times fewer FLOPs than the teacher's decoder"
    return TrainingPlan(of, model, Costs(model).tokens, known, parts, Held(shared, each, 0.0), disk, notes)


def _autoencoder(model: PlannedModel, teacher: str) -> tuple[Any, dict[str, Any]]:
    """Its class and config."""
    if local_path(teacher).is_dir():
        folder = config_folder(teacher)
        file = folder / "vae" / "config.json"
        if file.is_file():
            config = read_json(file)
            return getattr(diffusers, config["_class_name"]), config
    pipeline = getattr(diffusers, model.family.pipelines[0])
    cls = inspect.signature(pipeline.__init__).parameters["vae"].annotation
    if not hasattr(cls, "from_config"):
        raise UserError(f"nothing says what autoencoder {teacher} has", "name a folder that is there: teacher=FOLDER")
    return cls, {}


def _latent(model: PlannedModel, config: dict[str, Any], crop: list[int] | None) -> tuple[int, ...]:
    """[C, T, H, W] of what a pass sees."""
    frames, height, width = model.size
    times, pixels = model.config.compression
    whole = ((frames - 1) // times + 1, height // pixels, width // pixels)
    extent = whole if crop is None else tuple(map(min, whole, crop))
    return (_width(model, config), *extent)


def _width(model: PlannedModel, config: dict[str, Any]) -> int:
    known = config.keys() & {"latent_channels", "z_dim"}
    if known:
        return latent_width(config)
    transformer: Any = Costs(model).transformer.config
    return transformer.out_channels or transformer.in_channels
