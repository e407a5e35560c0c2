"""Clips and captions as a family's transformer sees them: latents in its units, text tensors and conditions by their
stored names.

Nothing here knows how a family encodes text: the pipeline's own `encode_prompt` does it, with the values its `__call__`
would have passed. Nor what it makes of an image: its own call is run up to the first pass of the transformer, where
that is read off. The units of a latent are what each pipeline undoes before it decodes.

B batch, C channels, T frames, H and W pixels or latent pixels, L text tokens
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vidaccel.data.shards import Sample
from vidaccel.errors import UserError
from vidaccel.families.base import TextTensor
from vidaccel.families.walk import as_latents, conditions_of, denoisers_of, latent_channels, transformers_in
from vidaccel.models.calling import call_arguments, check_image, latent_size, sampled_as
from vidaccel.models.loading import DTYPES, LoadedPipeline
from vidaccel.models.velocity import Text

BLACK = (64, 64)
"""Pixels of a black image, which the encoder that sees it scales."""
LATENT = "latent"
"""Name of the latent beside the text tensors' stored names."""
IMAGE = "image"
"""Name of what a video begins with, uint8 [3, H, W], beside the conditions that are made of it."""


@torch.no_grad()
def encode_texts(loaded: LoadedPipeline, captions: Sequence[str]) -> Text:
    """What the pipeline would feed its transformer for these prompts, bit for bit: [B, ...] by stored name.

    The transformer's dtype and the pipeline's device, masks too. The negative prompt's are those of its own text; where
    texts see an image these see a black one, as the pipeline's negative prompt does.
    """
    pipe, family = loaded.pipe, loaded.family
    dtype = denoisers_of(pipe, family)[0].dtype
    extra: dict[str, Any] = {"dtype": dtype, "batch_size": len(captions), "do_classifier_free_guidance": False}
    if family.texts_see_image:
        extra["image"] = [Image.new("RGB", BLACK)] * len(captions)
    known = inspect.signature(type(pipe).encode_prompt).parameters
    extra = {name: value for name, value in extra.items() if name in known}
    encoded = pipe.encode_prompt(prompt=list(captions), **text_settings(loaded), **extra)
    encoded = [tensor for tensor in encoded if tensor is not None]  # some put the negative prompt's, None, between them
    return {text.stored: tensor.to(dtype) for text, tensor in zip(family.text_tensors, encoded, strict=False)}


def text_settings(loaded: LoadedPipeline) -> dict[str, Any]:
    """What the pipeline's call gives `encode_prompt` besides the prompt: its template, its length.

    Where the model does not say, the defaults are those of `__call__`: `encode_prompt` has others (226 tokens, say, not
    512).
    """
    known = inspect.signature(type(loaded.pipe).encode_prompt).parameters
    of_call = inspect.signature(type(loaded.pipe).__call__).parameters
    shared = [name for name in of_call if name in known and name not in ("self", "prompt", "negative_prompt", IMAGE)]
    settings = {name: loaded.call.get(name, of_call[name].default) for name in shared}
    return {name: value for name, value in settings.items() if value is not None}


class _Reached(Exception):
    """The transformer's first pass."""


def encode_conditions(
    loaded: LoadedPipeline, images: Sequence[np.ndarray], text: Text | Sequence[str], num_frames: int
) -> Text:
    """What the pipeline would feed its transformer besides the text, bit for bit: [B, ...] by stored name, in the
    transformer's dtype, on the pipeline's device.

    Args:
        loaded: a pipeline with conditions.
        images: what each video begins with, uint8 [H, W, 3] of its size.
        text: of each video, as `encode_texts` gives it, and is not encoded again; captions, where texts see the image,
            which are then given as well.
        num_frames: of each video.

    Raises:
        UserError: the model takes its image otherwise than its family's record says.
    """
    family, pipe = loaded.family, cast(Any, loaded.pipe)
    pipe.set_progress_bar_config(disable=True)  # of steps, of which not one is made
    transformer = denoisers_of(pipe, family)[0]
    transformers = transformers_in(pipe, family)  # whichever of them the first step is of
    known = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given.update(kwargs)
        raise _Reached

    conditions, made = conditions_of(transformer, family), []
    first_frame = any(each.first_frame for each in conditions)
    texts = [] if isinstance(text, Mapping) else family.text_tensors
    for i, image in enumerate(images):
        size = {"num_frames": num_frames, "height": image.shape[0], "width": image.shape[1]}
        arguments = call_arguments(loaded, guidance=1.0, two_pass=False, **size)
        if isinstance(text, Mapping):
            arguments |= {each.name: text[each.stored][i : i + 1] for each in family.text_tensors if each.name}
        else:
            arguments["prompt"] = text[i]
        arguments |= {"image": Image.fromarray(image), "output_type": "latent", "generator": torch.Generator()}
        hooks = [each.register_forward_pre_hook(stop, with_kwargs=True, prepend=True) for each in transformers]
        try:
            with sampled_as(loaded, guidance=1.0, two_pass=False):
                pipe(**{name: value for name, value in arguments.items() if name in known})
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        latents = as_latents(family, given["hidden_states"], latent_size(loaded, **size))
        channels = latents[:, latent_channels(transformer) :]
        if first_frame and channels.numel():
            raise UserError(
                f"{loaded.source} has further channels for its image",
                f"those of {family.title} that are collected from and trained keep it in the first frame",
            )
        if not first_frame and not channels.numel():
            raise UserError(
                f"{loaded.source} keeps its image in the first frame of the latents",
                "only models with further channels for it are collected from and trained",
            )
        channels = latents[:, :, :1] if first_frame else channels
        made.append({each.stored: given[each.argument] if each.argument else channels for each in conditions})
        made[-1] |= {each.stored: given[each.argument] for each in texts}
    return {name: torch.cat([one[name] for one in made]).detach() for name in made[0]}


def first_frames(videos: Tensor) -> list[np.ndarray]:
    """Of videos [B, 3, T, H, W] in [-1, 1], uint8 [H, W, 3] each."""
    frames = ((videos[:, :, 0].float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return [as_array(frame) for frame in frames]


def as_array(image: Tensor) -> np.ndarray:
    """A stored image [3, H, W] as [H, W, 3]."""
    return image.permute(1, 2, 0).contiguous().numpy()


def encode_prompts(
    loaded: LoadedPipeline, captions: Sequence[str], images: Sequence[np.ndarray] | None, num_frames: int
) -> Text:
    """Texts, and for a model that begins with an image its conditions. `images` as of `encode_conditions`.

    Raises:
        UserError: the model takes no image, or needs one.
    """
    check_image(loaded.family, images is not None)
    if images is not None and loaded.family.texts_see_image:
        return encode_conditions(loaded, images, captions, num_frames)
    text = encode_texts(loaded, captions)
    return text if images is None else text | encode_conditions(loaded, images, text, num_frames)


@torch.no_grad()
def encode_videos(autoencoder: nn.Module, videos: Tensor, at_once: int = 1) -> Tensor:
    """Videos [B, 3, T, H, W] in [-1, 1] -> latents [B, C, T', H', W'] in the transformer's units, float32.

    The posterior's mean, centred and scaled by the autoencoder's own statistics where it has them (in its configuration
    or among its weights), and times its scaling factor. `at_once` videos go through the autoencoder together: memory
    limits that, and small ones alone are four times slower on a CPU (PyTorch then takes its unoptimised convolution).
    """
    parts = videos.to(autoencoder.device, autoencoder.dtype).split(at_once)
    mean = torch.cat([autoencoder.encode(part).latent_dist.mode() for part in parts]).float()
    centre, spread, factor = _statistics(autoencoder, mean)
    return mean * factor if centre is None else (mean - centre) * factor / spread


def decodable(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """Latents [B, C, T, H, W] in the transformer's units -> as the autoencoder decodes them, float32: what
    `encode_videos` did to them undone."""
    latents = latents.float()
    centre, spread, factor = _statistics(autoencoder, latents)
    return latents / factor if centre is None else latents * spread / factor + centre


def _statistics(autoencoder: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """Centre and spread of an autoencoder's latents, [C, 1, 1, 1] where it has them, and its scaling factor."""
    config, buffers = autoencoder.config, dict(autoencoder.named_buffers())
    statistics = [config.get(name, buffers.get(name)) for name in ("latents_mean", "latents_std")]
    if statistics[0] is None:
        return None, None, config.scaling_factor
    centre, spread = (torch.as_tensor(each).to(like).view(-1, 1, 1, 1) for each in statistics)
    return centre, spread, config.get("scaling_factor", 1.0)


def encode_samples(
    loaded: LoadedPipeline, videos: Sequence[Tensor], records: Sequence[Mapping[str, Any]], dtype: str
) -> list[Sample]:
    """Samples of kind `encoded`: a latent and the text tensors of each video [3, T, H, W] and its record's caption; of
    a model that begins with an image its first frame, and the conditions that are made of it.

    Raises:
        UserError: a number is not finite in `dtype` (`float32`, `float16` or `bfloat16`), naming the sample.
    """
    at_once = len(videos) if loaded.family.batched_autoencoder else 1
    stacked = torch.stack(list(videos))
    tensors = {LATENT: encode_videos(loaded.pipe.vae, stacked, at_once)}
    images = first_frames(stacked) if loaded.family.begins_with_image else None
    tensors |= encode_prompts(loaded, [record["caption"] for record in records], images, stacked.shape[2])
    tensors |= stored_images(images)
    return rows(loaded, tensors, records, dtype)


def stored_images(images: Sequence[np.ndarray] | None) -> dict[str, Tensor]:
    """As they are stored, [B, 3, H, W]; {} for none."""
    return {} if images is None else {IMAGE: torch.stack([torch.from_numpy(each).permute(2, 0, 1) for each in images])}


def rows(
    loaded: LoadedPipeline, tensors: Mapping[str, Tensor], records: Sequence[Mapping[str, Any]], dtype: str
) -> list[Sample]:
    """Batched tensors [B, ...] as B samples to store: on the CPU, masks as bool, images in bytes, others in `dtype`."""
    own = {text.stored: torch.bool for text in loaded.family.text_tensors if is_mask(text)} | {IMAGE: torch.uint8}
    stored = {name: t.to("cpu", own.get(name, DTYPES[dtype])) for name, t in tensors.items()}
    for name, tensor in stored.items():
        bad = [i for i in range(len(records)) if not torch.isfinite(tensor[i]).all()]
        if bad:
            record = records[bad[0]]
            raise UserError(
                f"{record.get('file', 'the sample')} ({record['caption']!r}): its {name} is not finite in {dtype}",
                "use store=float32; if that fails too, the model's weights are broken",
            )
    return [({name: t[i].clone() for name, t in stored.items()}, dict(records[i])) for i in range(len(records))]


def is_mask(text: TextTensor) -> bool:
    """Whether it says which tokens are the prompt's own."""
    return "mask" in text.argument


def batch(samples: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stored samples, without images, stacked to [B, ...] for a transformer of this dtype, which takes its masks in it
    as well.

    Converted before they are stacked: autocast to bfloat16 refuses to stack float16. Sent to the device together.
    """
    return {name: torch.stack([s[name].to(dtype) for s in samples]).to(device) for name in samples[0] if name != IMAGE}
