"""The stages that make the shipped world's model, each resumable: `python -m vidaccel.sprites make` in order.

text encoders -> autoencoder -> encoded clips -> teacher -> scores -> model folder with its card
"""

import hashlib
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidaccel.artefacts import RUN_FILE, atomic_folder, is_finished, sha256_file, write_json, write_run
from vidaccel.collect.encode import encode_samples, encode_videos
from vidaccel.collect.features import FORMAT
from vidaccel.collect.source import ClipSource, FolderClips
from vidaccel.config import loader as configuration
from vidaccel.config.training import TrainConfig
from vidaccel.data.clips import ClipFolder
from vidaccel.data.shards import ShardFolder, write_shards
from vidaccel.errors import UserError
from vidaccel.families.hunyuan_video import HUNYUAN_VIDEO
from vidaccel.models.loading import LoadedPipeline, load_pipeline, resolve_device
from vidaccel.models.velocity import Velocity
from vidaccel.train.objective import Batch, Objective
from vidaccel.train.trainer import train
from vidaccel.worlds.sprites import align, text
from vidaccel.worlds.sprites.autoencoder_loss import autoencoder_loss
from vidaccel.worlds.sprites.captions import caption, told
from vidaccel.worlds.sprites.card import STAGES_FILE, model_card, trained_stages
from vidaccel.worlds.sprites.pipeline import (
    CALL,
    assemble,
    build_autoencoder,
    build_transformer,
    deepen,
    grown,
    inflate,
    knows_lamps,
    whiten,
)
from vidaccel.worlds.sprites.render import render
from vidaccel.worlds.sprites.score_model import score_model
from vidaccel.worlds.sprites.settings import SpritesConfig
from vidaccel.worlds.sprites.source import RenderedScenes
from vidaccel.worlds.sprites.teacher import (
    TeacherData,
    draw_batch,
    from_features,
    from_folder,
    from_scenes,
    python_rng,
    teacher_loss,
)
from vidaccel.worlds.sprites.world import FPS, NUM_FRAMES, SIZE, random_scene

ENCODE_BATCH = 8
LAMPS_SCORES = "score-lamps"
"""Of prompts with lamps: a folder of the run, a file of the model."""
SCALE_CLIPS = 64
"""Clips from which the latents' standard deviation, and so the scaling factor, is measured."""


def make_model(config: SpritesConfig, output: Path) -> None:
    """All stages, from the newest checkpoint of each; the model ends in `output`/model."""
    with _tf32(config.tf32):
        _make_model(config, output)


def _make_model(config: SpritesConfig, output: Path) -> None:
    device = resolve_device(config.device)
    clips = open_clips(config)
    start = load_pipeline(config.start, device=config.device, dtype="float32") if config.start else None
    reader = train_text(config, output / "text", device, start)
    scenes = RenderedScenes(config.clips, config.seed, config.pair_share, config.odds, config.lamps)
    source = scenes if clips is None else FolderClips(clips)
    autoencoder = train_autoencoder(config, output / "autoencoder", device, clips, source, start)
    loaded = assembled(config, autoencoder, reader, source, start)
    hashes = {"autoencoder": _digest(autoencoder), "text": _digest(reader)}
    parents = {}
    if config.captions and clips is None:
        data = from_scenes(config, loaded, scenes, hashes["autoencoder"])
    else:
        features = encode_clips(config, output / "features", loaded, source, hashes)
        parents = {"features": sha256_file(features.folder / RUN_FILE)}
        in_memory = config.captions > 0
        data = from_folder(config, loaded, features) if in_memory else from_features(config, loaded, features, source)
    transformer = train_teacher(config, output / "teacher", device, data, hashes["text"], start)
    publish(config, output, reader, autoencoder, transformer, parents, start)


def open_clips(config: SpritesConfig) -> ClipFolder | None:
    """The user's own clips, brought to the model's size and rate, or None where scenes are rendered."""
    if config.data is None:
        return None
    return ClipFolder(config.data, num_frames=NUM_FRAMES, height=SIZE, width=SIZE, fps=FPS)


def train_text(
    config: SpritesConfig, folder: Path, device: torch.device, start: LoadedPipeline | None
) -> text.CaptionReader:
    """Both text encoders, trained on captions; of a start that lacks the words of lamps, those words alone."""
    torch.manual_seed(config.seed)
    lamps = config.lamps > 0 or (start is not None and knows_lamps(start.pipe.text_encoder))

    def loss(model: nn.Module, index: int, generator: torch.Generator):
        rng = python_rng(generator)
        scenes = [random_scene(rng, lamps=config.lamps) for _ in range(config.text.train.batch_size)]
        said = [told(scene, rng) for scene in scenes]
        return text.caption_loss(model, [caption(scene, rng) for scene in said], text.labels(said, lamps))

    reader = text.CaptionReader(config.text.width, lamps).to(device)
    growing = False
    if start:
        encoders = (start.pipe.text_encoder, start.pipe.text_encoder_2)
        growing = lamps and not knows_lamps(encoders[0])
        for part, trained in zip((reader.llama, reader.clip), encoders, strict=True):
            _go_on(part, grown(trained) if growing else trained, config.start)
    settings = _shaping(config.text, start=_digest(reader) if start else None)
    if config.lamps:
        settings |= {"lamps": config.lamps}
    if not growing:
        return train(
            reader, loss, config.text.train, folder, seed=config.seed, title="text encoders", settings=settings
        )
    with text.new_words_alone(reader):
        train(reader, loss, config.text.train, folder, seed=config.seed, title="words of lamps", settings=settings)
    return reader


def train_autoencoder(
    config: SpritesConfig,
    folder: Path,
    device: torch.device,
    clips: ClipFolder | None,
    source: ClipSource,
    start: LoadedPipeline | None,
) -> nn.Module:
    """The video autoencoder, trained on crops of single frames first, of clips then, and at last its decoder alone."""
    settings = config.autoencoder
    torch.manual_seed(config.seed)
    model = build_autoencoder(settings).to(device)
    if start:
        _go_on(model, start.pipe.vae, config.start)
    shaping = _shaping(settings, data=config.data, odds=config.odds, start=_digest(model) if start else None)
    if config.lamps:
        shaping |= {"lamps": config.lamps}

    def stage(name: str, title: str, excerpts: list[list[int]], *irrelevant: str, **before: str) -> None:
        which = getattr(settings, name)

        def loss(model: nn.Module, index: int, generator: torch.Generator):
            rng = python_rng(generator)
            count, frames, pixels = excerpt(excerpts, which.batch_size * settings.image_pixels**2, index)
            first = rng.randint(0, NUM_FRAMES - frames)
            if clips is None:
                video = render(
                    [random_scene(rng, odds=config.odds, lamps=config.lamps) for _ in range(count)],
                    frames,
                    first,
                    device,
                )
            else:
                drawn = [clips[rng.randrange(len(clips))][0] for _ in range(count)]
                video = torch.stack([clip[:, first : first + frames] for clip in drawn])
            video = torch.stack([busiest_crop(clip, pixels, rng) for clip in video])
            return autoencoder_loss(model, video.to(device), settings, generator)

        given = {key: value for key, value in shaping.items() if key not in irrelevant} | before
        train(model, loss, which, folder / name, seed=config.seed, title=title, settings=given)

    if settings.images.is_on:
        stage("images", "autoencoder on images", [[1, settings.image_pixels]], "excerpts", "latent_noise")
        inflate(model)
    if settings.clips.is_on:
        stage("clips", "autoencoder on clips", settings.excerpts, "latent_noise", images=_digest(model))
    if settings.images.is_on or settings.clips.is_on:
        whiten(model, _some_latents(model, source), settings.latent_noise)
    if settings.decoder.is_on:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
        stage("decoder", "decoder", settings.excerpts, clips=_digest(model))
    return model.eval()


def _some_latents(autoencoder: nn.Module, source: ClipSource) -> torch.Tensor:
    """Latents of the first clips, as the encoder gives them."""
    autoencoder.register_to_config(scaling_factor=1.0)
    clips = torch.stack([source[i][0] for i in range(min(SCALE_CLIPS, len(source)))])
    return encode_videos(autoencoder, clips, ENCODE_BATCH)


def excerpt(excerpts: list[list[int]], area: int, index: int) -> tuple[int, int, int]:
    """Number, frames and pixels of the clips of one forward pass, which sees about `area` pixels in all."""
    frames, pixels = excerpts[index % len(excerpts)]
    return max(1, area // (frames * pixels**2)), frames, pixels


def busiest_crop(clip: torch.Tensor, pixels: int, rng: random.Random) -> torch.Tensor:
    """Of four random crops of `clip` [C, T, H, W], the one with most variance: most of a clip is plain background."""
    corners = [(rng.randint(0, SIZE - pixels), rng.randint(0, SIZE - pixels)) for _ in range(4)]
    return max((clip[..., y : y + pixels, x : x + pixels] for y, x in corners), key=lambda crop: float(crop.var()))


def assembled(
    config: SpritesConfig,
    autoencoder: nn.Module,
    reader: text.CaptionReader,
    source: ClipSource,
    start: LoadedPipeline | None,
) -> LoadedPipeline:
    """A pipeline that encodes clips and captions, before there is a transformer; sets the autoencoder's scaling factor
    to 1 / std on the way.

    Where the encoder is still that of the model to start from, so is its factor: the transformer knows latents in it.
    """
    if start and not (config.autoencoder.images.is_on or config.autoencoder.clips.is_on):
        factor = start.pipe.vae.config.scaling_factor
    else:
        factor = round(1 / float(_some_latents(autoencoder, source).std()), 6)
    autoencoder.register_to_config(scaling_factor=factor)
    untrained = build_transformer(config.teacher, config.autoencoder.latent_channels, config.text.width)
    pipe = assemble(
        reader.llama, reader.clip, autoencoder, untrained.to(autoencoder.device), config.sample_shift, torch.float32
    )
    return LoadedPipeline(pipe, HUNYUAN_VIDEO, "the model that is being made", CALL, {})


def encode_clips(
    config: SpritesConfig, folder: Path, loaded: LoadedPipeline, source: ClipSource, made_with: Mapping[str, str]
) -> ShardFolder:
    """Clips and captions as latents and text tensors; hashes of what they are made with."""
    started = datetime.now(UTC)

    def encode(indices: list[int]):
        return encode_samples(loaded, *zip(*(source[i] for i in indices), strict=True), "float16")

    settings = dict(made_with) | source.fingerprint
    write_shards(  # which refuses a folder of other settings, finished or not
        folder,
        encode,
        count=len(source),
        kind="encoded",
        settings=settings,
        batch_size=ENCODE_BATCH,
        title="encoding",
    )
    if not is_finished(folder, FORMAT):
        write_run(
            folder,
            format=FORMAT,
            command="python -m vidaccel.sprites make",
            config=configuration.to_dict(config),
            seed=config.seed,
            started=started,
        )
    return ShardFolder(folder, kind="encoded")


def train_teacher(
    config: SpritesConfig,
    folder: Path,
    device: torch.device,
    data: TeacherData,
    text_hash: str,
    start: LoadedPipeline | None,
) -> nn.Module:
    """The diffusion transformer, by flow matching on the encoded clips, with captions dropped at random, and by naming
    what its tokens show where that is known.

    A shallow one comes first and is deepened: what a caption means is learnt there, at a fraction of the price.
    """
    settings = config.teacher
    channels, width = config.autoencoder.latent_channels, config.text.width

    def stage(model: nn.Module, which: TrainConfig, name: str, **more) -> nn.Module:
        if which.is_on:
            data.open()

        def draw(index: int, generator: torch.Generator) -> Batch:
            return Batch(draw_batch(data.open(), settings, which, index, generator))

        def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return teacher_loss(model, batch.tensors, settings.alignment)

        shaping = _shaping(settings, **data.made_of, text=text_hash, **more)
        title = f"{name} teacher"
        aligned = align.Aligned(model).to(device)
        objective = Objective(draw, loss, (Velocity(model, HUNYUAN_VIDEO),))
        train(aligned, objective, which, folder / name, seed=config.seed, title=title, settings=shaping)
        return model

    torch.manual_seed(config.seed)
    model = build_transformer(settings, channels, width).to(device)
    if settings.shallow.is_on:
        few = {key: getattr(settings, key) // settings.growth for key in ("double_blocks", "single_blocks")}
        shallow = build_transformer(replace(settings, shallow=TrainConfig(steps=0), **few), channels, width).to(device)
        deepen(stage(shallow, settings.shallow, "shallow"), model)
    elif start:
        _go_on(model, start.pipe.transformer, config.start)
    return stage(model, settings.train, "deep", start=_digest(model))


def publish(
    config: SpritesConfig,
    output: Path,
    reader: text.CaptionReader,
    autoencoder: nn.Module,
    transformer: nn.Module,
    parents: Mapping[str, str],
    start: LoadedPipeline | None,
) -> None:
    """Save the pipeline in half precision, score it as saved, and finish its folder with scores, card and run.json."""
    started = datetime.now(UTC)
    call = CALL | {"steps": config.steps, "guidance": config.guidance}
    draft = output / "draft"
    with atomic_folder(draft) as folder:
        pipe = assemble(reader.llama, reader.clip, autoencoder, transformer, config.sample_shift)
        pipe.save_pretrained(folder)
        finish = partial(
            write_run,
            format="model/1",
            command="python -m vidaccel.sprites make",
            config=configuration.to_dict(config),
            seed=config.seed,
            started=started,
            parents=parents,
            call=call,
        )
        finish(folder)
    loaded = load_pipeline(draft, device=config.device)
    settings = configuration.GenerateConfig(model=str(draft))
    summary = score_model(loaded, settings, config.score_prompts, output / "scores")
    with_lamps = (
        score_model(loaded, settings, config.score_prompts, output / LAMPS_SCORES, True) if config.lamps else {}
    )
    with atomic_folder(output / "model") as folder:
        pipe.save_pretrained(folder)
        write_json(folder / "score.json", summary)
        if with_lamps:
            write_json(folder / f"{LAMPS_SCORES}.json", with_lamps)
        stages = trained_stages(output, Path(start.source) if start else None)
        write_json(folder / STAGES_FILE, stages)
        (folder / "README.md").write_text(model_card(config, stages, summary), encoding="utf-8")
        finish(folder)
    shutil.rmtree(draft)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Float32 products on a GPU by TensorFloat-32, for the time of the block; convolutions are so anyway."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    matmul.allow_tf32 = before or allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _go_on(part: nn.Module, trained: nn.Module, source: str) -> None:
    """Give a part the weights that it has in the model to start from."""
    try:
        part.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"{source} cannot be gone on from: {' '.join(str(error).split())[:300]}",
            "give the widths and block counts that it was made with, or another start",
        ) from error


def _shaping(group: object, **more: Any) -> dict:
    """The settings of a group that train() does not see itself, and whatever else shapes that training."""
    own = {key: value for key, value in configuration.to_dict(group).items() if not is_dataclass(getattr(group, key))}
    return own | more


def _digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
