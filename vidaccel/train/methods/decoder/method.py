"""`vidaccel distill method=decoder` from end to end: a model and latents in, a decoder's folder out.

The teacher is the autoencoder alone: of a large model neither transformer nor text encoders are read where the latents
are in a feature folder.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.artefacts import RUN_FILE, atomic_folder, is_finished, read_run, say_finished, sha256_file, write_run
from vidaccel.collect.encode import decodable
from vidaccel.collect.features import FORMAT as FEATURES
from vidaccel.collect.features import open_features
from vidaccel.collect.source import open_source
from vidaccel.config import loader as configuration
from vidaccel.config.checks import CLIP_SIZE
from vidaccel.config.collect import CollectConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.data.video import contact_sheet
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.models.decoder import (
    FORMAT,
    DecoderFiles,
    autoencoder_hash,
    autoencoder_of,
    check_decoder,
    decode_whole,
    decoding_state,
    fill,
    latent_width,
    plain,
    read_decoder,
    trained_parts,
    write_decoder,
)
from vidaccel.models.files import ModelFiles, local_path, read_model
from vidaccel.models.loading import load_pipeline, resolve_device, stored_dtype
from vidaccel.models.weights import load_module
from vidaccel.processes import world
from vidaccel.train.methods.base import OtherTraining
from vidaccel.train.methods.decoder import DecoderTraining
from vidaccel.train.methods.decoder.data import EncodedLatents, Latents, Lessons, StoredLatents
from vidaccel.train.methods.decoder.loss import decoder_loss, perceptual_loss
from vidaccel.train.methods.decoder.slices import narrower, slice_into
from vidaccel.train.objective import Batch, Objective
from vidaccel.train.trainer import train

log = logging.getLogger(__name__)

KEPT_OUT, EVALUATED_AT_ONCE = 16, 4
"""Clips that are not trained on, the last ones of the data, a fifth of it where that is less; and how many of them at a
time."""
SHEET_CLIPS = 4


def distill_decoder(config: DistillConfig, output: Path, device: str) -> None:
    """Train a decoder into the folder `output`, going on where an earlier run was stopped.

    Raises:
        UserError: teacher, data and settings do not go together, or cannot be read.
        TrainingFailed: the training did not stay finite.
    """
    started, target, settings = datetime.now(UTC), resolve_device(device), config.own_settings
    _check(config)
    files = read_model(config.teacher)
    family, component = files.contents.family, files.contents.components["vae"]
    teacher: Any = load_module(component, stored_dtype(component.weight_files, "auto", target))
    teacher.to(target).eval().requires_grad_(False)
    perceptual = perceptual_loss(settings, target)
    made = student_of(teacher, family, settings).to(target)
    for module in made.modules():
        if isinstance(module, nn.Conv3d):  # which so takes a third less time, on a CPU too
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    started_from = {}
    if config.start is not None:
        before = read_decoder(local_path(config.start), config.start)
        check_decoder(before, type(teacher), teacher.config, files.hashes, config.teacher)
        _check_sizes(before, made, family)
        fill(made, before)
        started_from = {"start": sha256_file(before.folder / RUN_FILE)}
    latents, made_of = _latents(config, files, teacher)
    made_of |= started_from
    if len(latents) < 2:
        raise UserError("one clip leaves none to keep out of the training", "take many more")
    held_out = min(KEPT_OUT, max(1, len(latents) // 5))
    lessons = Lessons(_Part(latents, 0, len(latents) - held_out), teacher, settings, config.seed)
    middles = _Part(latents, len(latents) - held_out, held_out, settings.crop)
    kept_out = Lessons(middles, teacher, DecoderTraining(), config.seed)
    size = config.train.batch_size

    def draw(index: int, generator: torch.Generator) -> Batch:
        z, frames = lessons.draw(index, size, generator)
        z = decodable(teacher, z).contiguous(memory_format=torch.channels_last_3d)
        return Batch({"z": z, "frames": frames})

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return decoder_loss(decode_whole(model, batch.tensors["z"]), batch.tensors["frames"], settings, perceptual)

    def frames_of(chosen: list[int]) -> tuple[Tensor, Tensor]:
        z, frames = kept_out.of(chosen)
        with torch.no_grad():
            return decode_whole(made, decodable(teacher, z)).float(), frames

    def evaluate(model: nn.Module) -> float:
        parts = [list(range(held_out))[i : i + EVALUATED_AT_ONCE] for i in range(0, held_out, EVALUATED_AT_ONCE)]
        losses = [float(decoder_loss(*frames_of(part), settings, perceptual)[0]) * len(part) for part in parts]
        return sum(losses) / held_out

    def sheet(step: int) -> None:
        chosen = list(range(min(SHEET_CLIPS, held_out)))
        ours, theirs = frames_of(chosen)
        videos = [_bytes(video) for pair in zip(theirs, ours, strict=True) for video in pair]
        captions = [kept_out.latents.caption(i) for i in chosen]
        labels = [f"{who}: {caption}" for caption in captions for who in ("teacher", "student")]
        contact_sheet(videos, output / "samples" / f"{step:08d}.png", labels=labels)

    trained, wide = (sum(p.numel() for p in trained_parts(each)) for each in (made, teacher))
    log.info("a decoder of %s parameters is taught what one of %s does", f"{trained:,}", f"{wide:,}")
    train(
        made,
        Objective(draw, loss),
        config.train,
        output,
        seed=config.seed,
        title="decoder",
        settings=_shaping(config) | {"made_of": made_of, "autoencoder": autoencoder_hash(files.hashes)},
        evaluate=evaluate,
        sample=sheet,
    )
    measured = {"psnr_db": _psnr(frames_of, held_out), "clips": held_out}
    log.info("%.1f dB to the teacher's frames of %d clips that it was not trained on", measured["psnr_db"], held_out)
    _save(config, files, made, teacher, output, started, measured, made_of)


def student_of(teacher: Any, family: DiTFamily, settings: DecoderTraining) -> Any:
    """An autoencoder with a narrower decoder that starts as a slice of the teacher's, and no encoder.

    Raises:
        UserError: the settings do not fit the teacher, or no such decoder runs.
    """
    config = narrower(teacher, family, settings)
    made = autoencoder_of(type(teacher), config)
    for name in ("encoder", "quant_conv"):
        if getattr(made, name, None) is not None:
            setattr(made, name, nn.Identity())
    slice_into(decoding_state(made), decoding_state(teacher))
    _check_runs(made, teacher)
    return made.requires_grad_(True)


def _check_runs(made: Any, teacher: Any) -> None:
    """Whether the narrower decoder gives frames of the same shape, on the smallest latent."""
    width = latent_width(teacher.config)
    weight = next(trained_parts(teacher))
    z = torch.zeros(1, width, 1, 4, 4)
    try:
        with torch.no_grad():
            ours = decode_whole(made, z).shape
            theirs = decode_whole(teacher, z.to(weight.device, weight.dtype)).shape
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"a decoder of such widths does not run: {reason}", "take others: decoder.widths") from error
    if ours != theirs:
        raise UserError(
            f"a decoder of such widths gives frames {list(ours)} in place of {list(theirs)}",
            "take others: decoder.widths",
        )


def _check_sizes(before: DecoderFiles, made: Any, family: DiTFamily) -> None:
    """`UserError` unless the decoder to go on from has the sizes that are asked for."""
    assert family.decoder is not None  # or it could not be made narrower
    for key in (family.decoder.widths, family.decoder.depth):
        theirs, ours = plain(before.config.get(key)), plain(made.config[key])
        if theirs != ours:
            raise UserError(
                f"start={before.source} is a decoder of {key}={theirs}, and these settings ask for {ours}",
                "give decoder.width, decoder.widths and decoder.layers_per_block as it was distilled with",
            )


def _check(config: DistillConfig) -> None:
    if world() > 1:
        raise UserError("a decoder is distilled by one process", "run the command without torchrun")


class _Part:
    """Some latents in a row of others, or the middle of each, of that size."""

    def __init__(self, latents: Latents, first: int, count: int, size: Sequence[int] | None = None):
        self._latents, self._first, self._count, self._size = latents, first, count, size

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        z = self._latents.read([self._first + i for i in indices])
        for axis, wanted in zip((2, 3, 4), self._size or (), strict=False):
            extent = min(wanted, z.shape[axis])
            z = z.narrow(axis, (z.shape[axis] - extent) // 2, extent)
        return z

    def caption(self, index: int) -> str:
        return self._latents.caption(self._first + index)


def _latents(config: DistillConfig, files: ModelFiles, vae: Any) -> tuple[Latents, dict[str, Any]]:
    """What to learn from, and what tells it from others."""
    family = files.contents.family
    if config.features is not None:
        # Of a student's runs nothing but its autoencoder matters, which this model has too.
        run = read_run(config.features, FEATURES)
        hashes = files.hashes
        if run["kind"] == "trajectory":
            _check_same_autoencoder(config, run, files)
            hashes = run.get("made_with", {})
        features = open_features(config.features, None, hashes, config.on_damage)
        found = StoredLatents(features)
        width = found.read([0]).shape[1]
        if width != latent_width(vae.config):
            raise UserError(
                f"latents in {config.features} have {width} channels, and {config.teacher} others", "collect again"
            )
        return found, {"features": sha256_file(features.folder / RUN_FILE), "samples": len(features)}
    blank = {each.attribute: _blank(files, each.attribute) for each in family.denoisers}
    without = replace(files, contents=replace(files.contents, lora=None))  # no weights for an adapter to be added to
    loaded = load_pipeline(without, given={"vae": vae, **blank}, placed=False)
    own = {name: getattr(config, name) for name in ("data", "clips", "seed", *CLIP_SIZE)}
    source = open_source(loaded, CollectConfig(model=config.teacher, **own))
    return EncodedLatents(vae, source, family.batched_autoencoder), {"clips": len(source)} | source.fingerprint


def _blank(files: ModelFiles, attribute: str) -> nn.Module:
    """A transformer without weights: clips are encoded without it."""
    component: Any = files.contents.components[attribute]
    with torch.device("meta"):
        return component.cls.from_config(component.cls.load_config(component.folder))


def _check_same_autoencoder(config: DistillConfig, run: Mapping[str, Any], files: ModelFiles) -> None:
    theirs = autoencoder_hash(run.get("made_with", {}))
    if theirs not in (None, autoencoder_hash(files.hashes)):
        raise UserError(
            f"{config.features} was made with another autoencoder than {config.teacher} has",
            "collect features with this model",
        )


def _shaping(config: DistillConfig) -> dict[str, Any]:
    """The settings that shape a training, besides those that `train` is given itself."""
    own = {key: value for key, value in configuration.to_dict(config.own_settings).items() if key != "kept"}
    return {"method": config.method, config.method: own}


def _psnr(frames_of: Any, count: int) -> float:
    """Of all kept-out clips together."""
    squares = []
    for i in range(count):
        ours, theirs = frames_of([i])
        squares.append(float((ours - theirs).square().mean()))
    return float(10 * torch.log10(4 / torch.tensor(squares).mean().clamp(min=1e-12)))


def _bytes(video: Tensor) -> Any:
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).cpu().numpy()


def _save(
    config: DistillConfig,
    files: ModelFiles,
    made: Any,
    teacher: Any,
    output: Path,
    started: datetime,
    measured: Mapping[str, Any],
    made_of: Mapping[str, Any],
) -> None:
    """Put the decoder into `output`, where its checkpoints lie."""
    dtype = stored_dtype(files.contents.components["vae"].weight_files, "auto", torch.device("meta"))
    with atomic_folder(output / "draft") as draft:
        write_decoder(draft, made, dtype)
        write_run(
            draft,
            format=FORMAT,
            command="vidaccel distill",
            config=configuration.to_dict(config),
            seed=config.seed,
            started=started,
            parents=_parents(config, files, made_of),
            family=files.contents.family.name,
            autoencoder=autoencoder_hash(files.hashes),
            measured=dict(measured),
        )
    run = read_run(output / "draft", FORMAT)
    if is_finished(output, FORMAT) and read_run(output, FORMAT)["files"] == run["files"]:
        say_finished(output)
    else:
        for name in (*run["files"], RUN_FILE):
            (output / "draft" / name).replace(output / name)
    shutil.rmtree(output / "draft")


def _parents(config: DistillConfig, files: ModelFiles, made_of: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the run.json of what it was made of."""
    run = Path(files.source) / RUN_FILE
    found = {"teacher": sha256_file(run)} if run.exists() else {}
    return found | {role: made_of[role] for role in ("features", "start") if role in made_of}


METHOD = OtherTraining(
    distill_decoder,
    FORMAT,
    made="the decoder; `vidaccel generate PROMPT decoder={output}` decodes with it",
    plan="vidaccel.bench.plan_decoder:plan_decoder",
)
