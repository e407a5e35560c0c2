"""A distilled decoder: the decoder of a family's autoencoder with fewer channels, in a folder of its own.

    config.json                             of the autoencoder's own diffusers class, with the narrower decoder
    diffusion_pytorch_model.safetensors     its weights but for those of the encoder
    run.json                                "family", and the "autoencoder" whose latents it decodes

It takes the place of a pipeline's decoder as an autoencoder of the narrower config which keeps the encoder that was
there: whatever asks the autoencoder for its class, config or size then sees what decodes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_FILE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidaccel.artefacts import RUN_FILE, own_files, read_run, refuse_unfinished, verify_files, write_json
from vidaccel.compat.diffusers import built_with
from vidaccel.errors import UserError
from vidaccel.models.decoding import speed_up
from vidaccel.models.folder import read_json, safetensors_header
from vidaccel.models.weights import reading

FORMAT = "decoder/1"
FOLDER = "decoder"
"""Of a decoder that lies in a model folder."""
CONFIG_FILE = "config.json"
ENCODING = ("encoder.", "quant_conv.")
"""What the names of an autoencoder's weights begin with that have no part in decoding."""
SAME = ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""What decoders of one latent have in common, by the names of their configs."""
SAME += ("spatial_compression_ratio", "temporal_compression_ratio", "patch_size", "patch_size_t", "out_channels")

IN_TILES = ("use_slicing", "use_tiling", "use_framewise_decoding")
"""Attributes of autoencoders that take a video apart."""


@dataclass(frozen=True)
class DecoderFiles:
    """A decoder on disk, checked, before any weight is read."""

    source: str
    """What named it."""
    folder: Path
    config: dict[str, Any]
    """Of the autoencoder's class."""
    run: dict[str, Any]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of its files, "decoder/config.json" -> hex, as its run.json has them."""
        return {f"{FOLDER}/{name}": self.run["files"][name] for name in (CONFIG_FILE, WEIGHTS_FILE)}


def autoencoder_hash(hashes: Mapping[str, str]) -> str | None:
    """One SHA-256 for a model's autoencoder, by names and hashes of its weight files; None where they are not known."""
    own = {name: hashes[name] for name in hashes if name.startswith("vae/")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest() if own else None


def read_decoder(folder: str | Path, called: str | None = None) -> DecoderFiles:
    """The decoder in a folder, or in that of the model folder which this is, every byte of it checked.

    Raises:
        UserError: it is missing, unfinished or damaged.
    """
    named, folder = called or str(folder), Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no decoder {named}", "distil one: vidaccel distill method=decoder")
    if (folder / "model_index.json").exists() or not (folder / CONFIG_FILE).exists():
        if not (folder / FOLDER / CONFIG_FILE).exists():
            refuse_unfinished(folder)
            raise UserError(
                f"{named} holds no decoder", "give the folder that `vidaccel distill method=decoder` finished"
            )
        folder /= FOLDER
    if not (folder / RUN_FILE).exists():
        refuse_unfinished(folder)
    run = read_run(folder, FORMAT)
    verify_files(folder, run)
    config = read_json(folder / CONFIG_FILE)
    for file in own_files(folder, "*.safetensors"):
        safetensors_header(file)
    if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in run["files"]]:
        raise UserError(f"{folder} lacks {missing[0]}", "copy the folder again")
    return DecoderFiles(named, folder, config, run)


def check_decoder(
    files: DecoderFiles, cls: type, config: Mapping[str, Any], hashes: Mapping[str, str], model: str
) -> None:
    """`UserError` unless the decoder is for the latents of a model's autoencoder.

    Args:
        files: the decoder.
        cls: class of the autoencoder.
        config: its config.
        hashes: of the model's weight files.
        model: what the model is called.
    """
    hint = "take the decoder that was distilled from this model's autoencoder"
    made = files.config.get("_class_name")
    if made != cls.__name__:
        raise UserError(f"the decoder {files.source} is of an {made}, and {model} has an {cls.__name__}", hint)
    ours, theirs = latent_width(config), latent_width(files.config)
    if ours != theirs:
        raise UserError(
            f"the decoder {files.source} is for latents of {theirs} channels, and those of {model} have {ours}", hint
        )
    for name in SAME:
        if name in files.config and plain(files.config[name]) != plain(config.get(name, files.config[name])):
            raise UserError(
                f"the decoder {files.source} is for {name}={files.config[name]}, and {model} has {name}={config[name]}",
                hint,
            )
    known = autoencoder_hash(hashes)
    if known is not None and files.run.get("autoencoder") not in (None, known):
        raise UserError(
            f"the decoder {files.source} was distilled from another autoencoder than that of {model}: its weights "
            "are others",
            hint,
        )


def with_decoder(vae: Any, files: DecoderFiles) -> nn.Module:
    """An autoencoder with the encoder of `vae` and the decoder of a folder, of its type and on its device.

    Raises:
        UserError: weights are missing, left over, or of another shape.
    """
    made = autoencoder_of(type(vae), files.config)
    fill(made, files)
    weight = next(vae.parameters())
    nn.Module.to(sharing_encoder(made, vae), weight.device, weight.dtype)  # diffusers' own warns
    speed_up(made)
    return made.eval()


def autoencoder_of(cls: type, config: Mapping[str, Any]) -> Any:
    """An untrained autoencoder of that config, which may be one as it lies on disk; `UserError` where it is none."""
    with reading(Path(CONFIG_FILE), "its channels do not go together"):
        return cls.from_config(built_with(config))  # type: ignore[attr-defined]  of every ModelMixin


def sharing_encoder(made: Any, vae: Any) -> Any:
    """`made`, with the encoder of `vae` in place of its own."""
    for name in (prefix.rstrip(".") for prefix in ENCODING):
        if hasattr(vae, name):
            setattr(made, name, getattr(vae, name))
    return made


def decoding_state(vae: nn.Module) -> dict[str, Tensor]:
    """The weights that decode, by name."""
    return {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith(ENCODING)}


def fill(made: nn.Module, files: DecoderFiles) -> None:
    """Put the folder's weights into the decoder of `made`; `UserError` unless each of them has its place."""
    stored, wanted = load_file(files.folder / WEIGHTS_FILE), decoding_state(made)
    wrong = sorted(stored.keys() ^ wanted.keys())
    wrong += [name for name in sorted(stored.keys() & wanted.keys()) if stored[name].shape != wanted[name].shape]
    if wrong:
        raise UserError(
            f"the weights of the decoder {files.source} do not fit its config.json: {len(wrong)} differ, such as "
            f"{wrong[0]}",
            "copy the folder again",
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])


def write_decoder(folder: Path, made: Any, dtype: torch.dtype) -> None:
    """config.json and the weights that decode, in `dtype`; run.json is for the command that made the folder.

    Raises:
        UserError: a weight is not finite in `dtype`.
    """
    config = {key: plain(value) for key, value in built_with(made.config).items()}
    version = {"_class_name": type(made).__name__, "_diffusers_version": diffusers.__version__}
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in decoding_state(made).items()}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"the decoder's {name} is not finite in {dtype}", "the training diverged")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, version | config)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def decode_whole(vae: Any, z: Tensor) -> Tensor:
    """Frames [B, 3, T, H, W] of latents [B, C, T', H', W'] in the autoencoder's units, by its own `decode` without
    tiles in space or time, which blend in place and so have no gradient."""
    ways = {name: getattr(vae, name) for name in IN_TILES if hasattr(vae, name)}
    try:
        for name in ways:
            setattr(vae, name, False)
        return vae.decode(z).sample
    finally:
        for name, value in ways.items():
            setattr(vae, name, value)


def latent_width(config: Mapping[str, Any]) -> int:
    """Channels of the latents of an autoencoder of that config."""
    return config.get("latent_channels") or config["z_dim"]


def plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def trained_parts(made: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that decode."""
    return (p for name, p in made.named_parameters() if not name.startswith(ENCODING))
