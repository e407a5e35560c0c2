"""Any supported model (files.py) as a diffusers pipeline ready to call.

Modules are loaded one by one through their own class with `output_loading_info`, because a pipeline's
`from_pretrained` fills weights that a file lacks with random numbers and only warns; the pipeline class then takes the
modules and loads the rest. A student's conditioning is attached, its adapter merged, and a `StepHook` registered.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.distributed.device_mesh import DeviceMesh

from vidaccel.compat.accelerate import is_offloaded
from vidaccel.compat.diffusers import do_without_ftfy
from vidaccel.errors import UserError, nearest
from vidaccel.families.base import Denoiser, DiTFamily
from vidaccel.families.registry import family_of
from vidaccel.families.walk import denoisers_of, embeds
from vidaccel.file_hashes import FileHashes
from vidaccel.models.adapters import Adapter, add_adapters, check_denoisers
from vidaccel.models.calling import guidance_in_force, second_guidance, set_guidance, warn_of_guidance
from vidaccel.models.conditioning import Conditioning
from vidaccel.models.decoder import DecoderFiles, check_decoder, read_decoder, with_decoder
from vidaccel.models.decoding import speed_up
from vidaccel.models.files import ADAPTERS, ModelFiles, hashes_of, local_path, read_model, released_call
from vidaccel.models.folder import (
    ModelFolder,
    read_json,
    safetensors_header,
)
from vidaccel.models.grid import Grid, GridScheduler, ListedScheduler
from vidaccel.models.own_call import called_as_made, loaded_of, remember
from vidaccel.models.released import Released, released_student
from vidaccel.models.step_hook import StepHook, step_hook_of
from vidaccel.models.unchanged import Sample, pipeline_sample
from vidaccel.models.weights import load_module, merge_adapter, reading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class LoadedPipeline:
    """A pipeline in memory, and what is known about where it came from."""

    pipe: DiffusionPipeline
    """The diffusers pipeline, on its device; called with its prompt alone it takes the model's own settings."""
    family: DiTFamily
    """The record that describes it."""
    source: str
    """The local folder or hub id it was loaded from."""
    call: dict[str, Any]
    """The model's own sampling settings, by the names of `SamplingDefaults` or of the pipeline's call arguments."""
    hashes: Mapping[str, str]
    """SHA-256 of each weight file, "transformer/diffusion_pytorch_model.safetensors" -> hex, made when asked for."""
    conditioning: Conditioning | None = None
    """A student's added embeddings, attached to the transformer."""
    hook: StepHook | None = None
    """What tells the transformer r and g: only for a model that has a conditioning, or embeds r itself."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """What parts of its checkpoint say of its settings, by the same names as `call`, which comes first."""
    trunk: Sample | None = None
    """A few numbers of the transformer's matrices as they were loaded; None where nobody knows."""
    released: Path | None = None
    """The file of a student that others have released."""
    further: tuple["LoadedPipeline", ...] = ()
    """Of several denoisers each after the first alone, as by `of_one`: `conditioning` and `hook` are the first's."""
    decode: str = "auto"
    """How its latents become frames: `auto`, `tiled`, `whole` or `once` (runtime/decode.py)."""
    devices: DeviceMesh | None = None
    """Of one dimension: the processes that make a video together, each with this pipeline."""
    decoder: DecoderFiles | None = None
    """The distilled decoder that its autoencoder decodes with, if not its own."""

    def default(self, name: str) -> Any:
        """A field of `SamplingDefaults` (steps, guidance, fps, ...): the model's own value, else its family's."""
        return self.call.get(name, self.parts.get(name, getattr(self.family.defaults, name)))

    def says(self, name: str) -> str:
        """Where `default` has a value from, in words."""
        if name in self.call:
            return "the released student's authors" if self.released else "the model's run.json"
        return "the model's guider" if name in self.parts else f"{self.family.title}'s defaults"

    @property
    def guidance(self) -> float:
        """The scale that the pipeline is called with unless told; 1 is none.

        Set it for the calls to come, of a student too, whose scale is no argument of its pipeline, and for both of two
        transformers; `UserError` for what is no scale, or one that the model cannot follow.
        """
        return guidance_in_force(self, None, None)[0]

    @guidance.setter
    def guidance(self, scale: float) -> None:
        guidance_in_force(self, scale, None)
        warn_of_guidance(self, scale)
        self.call = {key: value for key, value in self.call.items() if key != "guidance_2"} | {"guidance": float(scale)}
        set_guidance(self)
        called_as_made(self)


def load_pipeline(
    model: str | Path | ModelFiles,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    given: Mapping[str, torch.nn.Module] | None = None,
    denoiser_dtype: str | None = None,
    placed: bool = True,
    lora: Sequence[str] = (),
    student: str | Path | None = None,
    decoder: str | Path | None = None,
) -> LoadedPipeline:
    """Load a model after checking that it is whole and supported.

    Args:
        model: a diffusers pipeline folder, plain or a student's; a folder of a transformer or an adapter (lora/) whose
            run.json names its "pipeline"; a hub id; sprites/<name> for a shipped model; or what `read_model` gave.
        device: "cpu", "cuda", or "auto" (cuda if there is one).
        dtype: "float32", "bfloat16", "float16", or "auto" (as stored on cuda, float32 on a CPU).
        given: modules to take instead of loading them, by component name, such as those of a pipeline in memory.
        denoiser_dtype: the transformers', where it is not `dtype`.
        placed: whether all of it goes to the device; otherwise it stays on the CPU, typed for the device.
        lora: LoRA files that are added to the transformer's weights, each FILE or FILE:SCALE; where there are two,
            transformer:FILE:SCALE or transformer_2:FILE:SCALE.
        student: a file of weights that others have released, in the place of the transformer's; `read_model` was given
            it where that has been called.
        decoder: the folder of a distilled decoder, in the place of the autoencoder's own.

    Raises:
        UserError: the model, the student, a LoRA or the decoder cannot be found, is broken, foreign or a pickle, or the
            device is not there.
    """
    target = resolve_device(device)
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"no dtype is called {dtype}", nearest(dtype, ("auto", *DTYPES)))
    adapters = [Adapter.parsed(each) for each in lora]
    files = model if isinstance(model, ModelFiles) else read_model(model, student)
    check_denoisers(files.contents.family, adapters)
    modules = dict(given or {})
    narrow = None if decoder is None else named_decoder(decoder, files)
    denoisers = [denoiser.attribute for denoiser in files.contents.family.denoisers]
    if len(denoisers) == 1:  # whose name then changes neither what is added nor what the model is known by
        adapters = [replace(each, denoiser=None) for each in adapters]
    conditioning = None
    if files.student is not None:
        component = files.contents.components[denoisers[0]]
        config = read_json(component.folder / component.config_name)
        stored_in = stored_dtype([files.student.file], denoiser_dtype or dtype, target)
        modules[denoisers[0]], conditioning = released_student(
            files.student, component.cls, config, files.contents.family, stored_in
        )
    for component in files.contents.components.values():
        if component.is_module and component.name not in modules:
            wanted = denoiser_dtype if denoiser_dtype and component.name in denoisers else dtype
            modules[component.name] = load_module(component, stored_dtype(component.weight_files, wanted, target))
            if component.name == "vae":
                speed_up(modules["vae"])
    if narrow is not None:
        modules["vae"] = with_decoder(modules["vae"], narrow)
    if files.contents.lora:
        merge_adapter(modules[denoisers[0]], files.contents.lora)
    pipe, family = _assemble(files.contents, modules), files.contents.family
    add_adapters(pipe, family, adapters)
    trunk = pipeline_sample(pipe, family)
    if placed:
        pipe.to(target)
    hashes = hashes_of(files.contents, adapters, files.student) if adapters else files.hashes
    parts = _said_by_parts(pipe, family)
    loaded = LoadedPipeline(pipe, family, files.source, files.call, hashes, parts=parts, trunk=trunk)
    loaded.decoder = narrow
    if files.student is not None:
        return _as_released(loaded, files.student, conditioning)
    return _as_saved(loaded, files.contents)


def named_decoder(decoder: str | Path, files: ModelFiles) -> DecoderFiles:
    """The decoder of that name or in that folder, for a model; `UserError` where it is not whole or for another."""
    found, vae = read_decoder(local_path(decoder), str(decoder)), files.contents.components["vae"]
    check_decoder(found, vae.cls, read_json(vae.folder / vae.config_name), files.hashes, files.source)
    return found


def load_named(student: str | Path, model: str | Path | None, **how: Any) -> LoadedPipeline:
    """The model that `student` names, by `load_pipeline`, which `how` is for; where that is a file of weights that
    others have released, with the `model` that it was made of."""
    if Path(student).expanduser().is_file():
        if model is None:
            raise UserError(f"{student} is a file", "name the model that it was made of as well: model=FOLDER")
        return load_pipeline(model, student=student, **how)
    return load_pipeline(student, **how)


def load_student(path: str | Path, pipe: DiffusionPipeline | LoadedPipeline) -> LoadedPipeline:
    """The pipeline with a student that others have released in the place of its transformer, sampled as they do.

    Args:
        path: the student's safetensors file.
        pipe: of the model that it was distilled from; its transformer gives type and device, and leaves it.

    Raises:
        UserError: the file is of no known layout, or for another model, or not whole; the pipeline is offloaded, or has
            a predictor attached.
    """
    known = pipe if isinstance(pipe, LoadedPipeline) else loaded_of(pipe)
    if known is None:
        known = LoadedPipeline(pipe, family_of(pipe), str(pipe.name_or_path or "a pipeline in memory"), {}, {})
    pipe, family = known.pipe, known.family
    released, attribute = Released.opened(path, "student", family), family.denoisers[0].attribute
    before: Any = denoisers_of(pipe, family)[0]
    _refuse_offloaded(before)
    _grid_scheduler(pipe.scheduler, released.file)  # now, and not when the transformer has been replaced
    cls = getattr(diffusers, family.transformer)
    transformer, conditioning = released_student(released, cls, before.config, family, before.dtype)
    setattr(pipe, attribute, transformer.to(before.device))  # which a pipeline with a predictor refuses, as it was
    Conditioning.detach(before, family)
    if known.hook is not None:
        known.hook.remove()
    del before
    others = known.hashes.files if isinstance(known.hashes, FileHashes) else {}
    gone = re.compile(rf"({attribute}|conditioning|lora|{ADAPTERS}\d+)/")  # with the transformer that they were of
    beside = {name: file for name, file in others.items() if not gone.match(name)}
    hashes = FileHashes(beside | {f"{attribute}/{released.file.name}": released.file})
    call, parts = released_call(known.call, released), _said_by_parts(pipe, family)
    loaded = replace(known, call=call, hashes=hashes, parts=parts, trunk=pipeline_sample(pipe, family))
    return _as_released(loaded, released, conditioning)


def of_one(loaded: LoadedPipeline, attribute: str) -> LoadedPipeline:
    """The same pipeline as that of one of its denoisers alone, whose conditioning, hook and scale it then has."""
    first = loaded.family.denoisers[0].attribute
    if attribute != first:
        return next(each for each in loaded.further if each.family.denoisers[0].attribute == attribute)
    return replace(loaded, family=_family_of_one(loaded.family, attribute), further=())


def _family_of_one(family: DiTFamily, attribute: str) -> DiTFamily:
    return replace(family, denoisers=(Denoiser(attribute),), guidance=replace(family.guidance, second_argument=None))


def resolve_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device; `UserError` for another name, and for cuda where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"no device is called {name}", nearest(name, ("auto", "cpu", "cuda")))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("cuda was asked for, but torch sees no CUDA device", "use device=cpu, or install a CUDA torch")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def stored_dtype(files: Sequence[Path], name: str, device: torch.device) -> torch.dtype:
    """The dtype to hold a module in; "auto" on cuda is the one that most bytes of its weights are stored in."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    stored: dict[str, int] = {}
    for file in files:
        for dtype, shape in safetensors_header(file).values():
            bits = "".join(filter(str.isdigit, dtype.partition("_")[0]))  # F32, F8_E4M3; BOOL is a byte
            stored[dtype] = stored.get(dtype, 0) + math.prod(shape) * int(bits or 8)
    most = max(stored, key=stored.__getitem__, default="F32")
    if most not in STORED_DTYPES:
        raise UserError(f"{files[0]} is stored as {most}", f"name a dtype to load it in: {', '.join(DTYPES)}")
    return STORED_DTYPES[most]


def _said_by_parts(pipe: DiffusionPipeline, family: DiTFamily) -> dict[str, Any]:
    """Settings that a checkpoint's parts have: the scale of its guider."""
    guider = family.guidance.guider and getattr(pipe, family.guidance.guider).config
    if not guider or guider.get("guidance_scale") is None:
        return {}
    return {"guidance": float(guider["guidance_scale"]) if guider.get("enabled", True) else 1.0}


def _as_saved(loaded: LoadedPipeline, contents: ModelFolder) -> LoadedPipeline:
    """The pipeline made to sample as the student it holds, if it holds one."""
    conditioning, scheduler = None, loaded.pipe.scheduler
    if contents.conditioning is not None:
        scheduler = _grid_scheduler(scheduler, contents.conditioning)
        conditioning = Conditioning.from_pretrained(contents.conditioning)
    listed = Grid.listed(loaded.call.get("timesteps"), loaded.call.get("sigmas"))
    if listed is not None:
        scheduler = ListedScheduler.of(listed, scheduler)
        loaded = replace(loaded, call=loaded.call | {"steps": listed.steps})
    further = []
    for denoiser in loaded.family.denoisers[1:]:
        family = _family_of_one(loaded.family, denoiser.attribute)
        scale = second_guidance(loaded, None, None, True)
        alone = replace(loaded, family=family, call=loaded.call | {"guidance": scale})
        own = contents.further.get(denoiser.attribute)
        if own is not None:
            scheduler = scheduler if conditioning else _grid_scheduler(scheduler, own)
            alone = as_student(alone, Conditioning.from_pretrained(own), scheduler)
        further.append(alone)
    return as_student(replace(loaded, further=tuple(further)), conditioning, scheduler)


def as_student(loaded: LoadedPipeline, conditioning: Conditioning | None, scheduler: Any) -> LoadedPipeline:
    """The pipeline made to sample with these embeddings of r and g, in place of any it has, and this scheduler.

    Raises:
        UserError: the transformer is offloaded already. accelerate puts the forward that it found back at the end of
            each generation, and the hook that tells r and g would go with it.
    """
    pipe, family = loaded.pipe, loaded.family
    transformer = denoisers_of(pipe, family)[0]
    _refuse_offloaded(transformer)
    pipe.scheduler = scheduler
    Conditioning.detach(transformer, family)
    if (before := step_hook_of(transformer)) is not None:
        before.remove()
    if conditioning is not None:
        conditioning.to(transformer.device).attach(transformer, family)
        if family.guidance.guider and "g" in conditioning.config.embeds:
            guider = getattr(pipe, family.guidance.guider)
            setattr(pipe, family.guidance.guider, guider.new(enabled=False))
    hook = None
    if conditioning is not None or embeds(transformer, family, "r"):
        hook = StepHook(pipe, family, conditioning, loaded.default("guidance"))
    made = replace(loaded, conditioning=conditioning, hook=hook)
    if "guidance" in made.call and family.guidance.guider:
        set_guidance(made)
    if made.call or hook:
        called_as_made(made)
    else:
        remember(made)  # and call it as diffusers does
    return made


def _refuse_offloaded(transformer: torch.nn.Module) -> None:
    if is_offloaded(transformer):
        raise UserError(
            f"this {type(transformer).__name__} is offloaded to the CPU already",
            "call pipe.remove_all_hooks() first, and enable offload again when the student is there",
        )


def _as_released(loaded: LoadedPipeline, released: Released, conditioning: Conditioning | None) -> LoadedPipeline:
    """The pipeline made to sample as the released student that it holds."""
    scheduler, shift = _grid_scheduler(loaded.pipe.scheduler, released.file), released.layout.call.get("shift")
    if shift is not None:
        scheduler = GridScheduler.from_config(scheduler.config, shift=shift)
    return as_student(replace(loaded, released=released.file), conditioning, scheduler)


def _grid_scheduler(scheduler: Any, made_for: Path) -> GridScheduler:
    if isinstance(scheduler, ListedScheduler):  # whose times are those of what the student takes the place of
        scheduler = scheduler.stands_for
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise UserError(
            f"the scheduler that goes with {made_for} is a {type(scheduler).__name__}",
            "a student is sampled by FlowMatchEulerDiscreteScheduler: bring its scheduler/ folder",
        )
    return GridScheduler.from_config(scheduler.config)


def _assemble(contents: ModelFolder, modules: dict[str, torch.nn.Module]) -> DiffusionPipeline:
    """The pipeline of these modules with the tokenizers, scheduler and guider of the folder."""
    scheduler = contents.components["scheduler"]
    with reading(contents.path, "its tokenizer or scheduler is broken: copy or download the folder again"):
        if scheduler.folder.parent != contents.path:
            modules = modules | {"scheduler": scheduler.cls.from_pretrained(scheduler.folder)}
        cls = getattr(diffusers, contents.pipeline)
        do_without_ftfy(cls)
        return cls.from_pretrained(contents.path, local_files_only=True, **modules)
