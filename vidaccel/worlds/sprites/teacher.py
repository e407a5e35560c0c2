"""What the sprites teacher is trained on, and its loss.

B samples, C channels, T frames, H and W latent pixels, N latent tokens, L text tokens, D width
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.artefacts import RUN_FILE, sha256_file
from vidaccel.collect.bank import Bank, sent
from vidaccel.collect.encode import LATENT, encode_texts
from vidaccel.collect.source import ClipSource
from vidaccel.config.training import TrainConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.models.loading import LoadedPipeline
from vidaccel.train.flow_matching import noised, sample_times
from vidaccel.worlds.sprites import align, text
from vidaccel.worlds.sprites.pipeline import TEXT_TOKENS
from vidaccel.worlds.sprites.rendered_bank import CLIPS_AT_ONCE, bank_of, in_batches
from vidaccel.worlds.sprites.settings import SpritesConfig, TeacherTraining
from vidaccel.worlds.sprites.source import RenderedScenes

Drawn = dict[str, Tensor]
"""`latent` [B, C, T, H, W] and the text, `prompt_embeds` [B, L, D], `prompt_mask` [B, L] and `pooled` [B, D], all in
float32; where it is known also `shown` [B, N, 3], what each token shows. On the model's device."""
Draw = Callable[[Sequence[int], torch.Generator], Drawn]
"""The samples at these positions, counted over all epochs, captions dropped at random."""
LEAST_SHARE = 0.05
"""Of the weight of the loss for naming what tokens show, with which it begins where it rises."""


@dataclass(frozen=True)
class TeacherData:
    """Clips and captions to train on."""

    made_of: Mapping[str, Any]
    """What tells them from others."""
    open: Callable[[], Draw]
    """Called before a training, because it may take minutes; a second call takes nothing."""


def from_features(
    config: SpritesConfig, loaded: LoadedPipeline, features: ShardFolder, source: ClipSource
) -> TeacherData:
    """A folder's clips; captions are encoded in every step, since rendered scenes have other ones each time."""
    pipe, device = loaded.pipe, loaded.pipe.device

    def say(index: int, rng: random.Random) -> str:
        if rng.random() < config.teacher.caption_dropout:
            return ""
        if isinstance(source, RenderedScenes):
            return source.another_caption(index, rng)
        return source.record(index)["caption"]

    @cache
    def opened() -> Draw:
        latents = torch.stack([features[i][0][LATENT] for i in range(len(features))])
        labels = None
        if config.teacher.alignment and isinstance(source, RenderedScenes):
            labels = torch.cat([align.shown([source.scene(i)]) for i in range(len(source))])

        def draw(positions: Sequence[int], generator: torch.Generator) -> Drawn:
            rng = python_rng(generator)
            indices = [features.at(position, config.seed) for position in positions]
            captions = [say(i, rng) for i in indices]
            with torch.no_grad():
                embeds, tokens, pooled = text.encode_captions(
                    pipe.tokenizer, pipe.text_encoder, pipe.text_encoder_2, captions
                )
            # Less work on a CPU; a GPU wants the same shapes in every step.
            longest = int(tokens.attention_mask.sum(1).max()) if device.type == "cpu" else TEXT_TOKENS
            drawn = {
                LATENT: latents[indices].to(device, torch.float32),
                "prompt_embeds": embeds[:, :longest],
                "prompt_mask": tokens.attention_mask[:, :longest].float(),
                "pooled": pooled,
            }
            return drawn if labels is None else drawn | {"shown": labels[indices].to(device)}

        return draw

    return TeacherData({"features": _hash(features)}, opened)


def from_folder(config: SpritesConfig, loaded: LoadedPipeline, features: ShardFolder) -> TeacherData:
    """A folder's clips and captions, in the device's memory."""

    @cache
    def opened() -> Draw:
        return _from_bank(config, loaded, Bank.of(features, loaded.pipe.device, loaded.family), None)

    return TeacherData({"features": _hash(features), "captions": 1}, opened)


def from_scenes(config: SpritesConfig, loaded: LoadedPipeline, source: RenderedScenes, autoencoder: str) -> TeacherData:
    """Scenes, rendered and encoded in the device's memory, by the autoencoder of that hash."""

    @cache
    def opened() -> Draw:
        told, shown, device = source.scenes.many(len(source), config.captions), None, loaded.pipe.device
        if config.teacher.alignment:
            scenes = [scene for scene, _ in told]
            shown = in_batches(lambda some: align.shown(some, device), scenes, CLIPS_AT_ONCE, "labelling tokens")
        return _from_bank(config, loaded, bank_of(loaded, told), shown)

    scenes = source.fingerprint | {"clips": len(source), "captions": config.captions}
    return TeacherData({"scenes": scenes, "autoencoder": autoencoder}, opened)


def _from_bank(config: SpritesConfig, loaded: LoadedPipeline, bank: Bank, shown: Tensor | None) -> Draw:
    """`shown` [clips, N, 3]."""
    empty = bank.cut(encode_texts(loaded, [""]))
    device = bank.latents.device

    def draw(positions: Sequence[int], generator: torch.Generator) -> Drawn:
        indices = [bank.at(position, config.seed) for position in positions]
        drawn = bank.batch(indices, torch.float32)
        chance = torch.rand(len(indices), generator=generator, device=generator.device).to(device)
        dropped = chance < config.teacher.caption_dropout
        for name, nothing in empty.items():
            drawn[name] = torch.where(dropped.view(-1, *[1] * (nothing.ndim - 1)), nothing, drawn[name])
        if shown is not None:
            drawn["shown"] = shown.index_select(0, sent([index // bank.captions for index in indices], device))
        return drawn

    return draw


def draw_batch(
    draw: Draw, settings: TeacherTraining, which: TrainConfig, index: int, generator: torch.Generator
) -> Drawn:
    """What the loss of forward pass `index` of a stage reads: `x`, `t` and `v` in place of the latent, besides what
    else is drawn, and `alignment`, its weight, while that rises."""
    size = which.batch_size
    batch = draw(range(index * size, (index + 1) * size), generator)
    x_0 = batch.pop(LATENT)
    t = sample_times(size, settings.train_shift, generator).to(x_0)
    eps = torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0)
    batch |= {"x": noised(x_0, eps, t), "t": t, "v": eps - x_0}
    if settings.alignment_warmup and "shown" in batch:
        share = min(1.0, LEAST_SHARE + index // which.accumulate / settings.alignment_warmup)
        batch["alignment"] = torch.full((), settings.alignment * share, device=x_0.device)
    return batch


def teacher_loss(aligned: nn.Module, batch: Drawn, alignment: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow matching, and `alignment` times, unless the batch says how often, the loss for naming what each token shows,
    where that is known; both are the metrics then. Waits for nothing."""
    text = (batch[name] for name in ("prompt_embeds", "prompt_mask", "pooled"))
    v, scores = aligned(batch["x"], 1000 * batch["t"], *text)
    flow_matching = F.mse_loss(v.float(), batch["v"])
    if "shown" not in batch:
        return flow_matching, {}
    named = align.alignment_loss(scores, batch["shown"])
    measured = {"flow_matching": flow_matching.detach(), "alignment": named.detach()}
    return flow_matching + batch.get("alignment", alignment) * named, measured


def python_rng(generator: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(2**62, (), generator=generator, device=generator.device)))


def _hash(features: ShardFolder) -> str:
    return sha256_file(features.folder / RUN_FILE)
