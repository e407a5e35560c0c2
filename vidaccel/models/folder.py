"""Is a model folder whole, and is it ours to load? Answered before any weight is read.

A pipeline folder is checked against its own model_index.json: every component's folder, config and weights are there,
every safetensors file ends where its header says, and nothing has to be unpickled. Each failure is a `UserError` that
names the file.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA_WEIGHTS
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as DIFFUSERS_WEIGHTS
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import IMAGE_PROCESSOR_NAME
from transformers.utils import SAFE_WEIGHTS_NAME as TRANSFORMERS_WEIGHTS

from vidaccel import artefacts, students
from vidaccel.artefacts import own_files
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import PIPELINES, family_of_pipeline
from vidaccel.models.conditioning import WEIGHTS_FILE as CONDITIONING_WEIGHTS

LIBRARIES = ("diffusers", "transformers")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FORMAT = "model/1"
STUDENT_PARTS = ("conditioning", "conditioning_2", "lora")
"""Folders of a model's that make a student of it: embeddings of r and g, an adapter."""
COPY_AGAIN = "copy or download the folder again"


@dataclass(frozen=True)
class Component:
    """One part of a pipeline: its class and the folder it is loaded from."""

    name: str
    """Attribute of the pipeline."""
    cls: type
    """diffusers or transformers class."""
    folder: Path
    """Where its config and weights lie."""

    @property
    def is_module(self) -> bool:
        """Whether it has weights."""
        return issubclass(self.cls, nn.Module)

    @property
    def config_name(self) -> str:
        """The file that its class reads its config from."""
        if issubclass(self.cls, diffusers.ConfigMixin):
            return self.cls.config_name
        if issubclass(self.cls, ImageProcessingMixin):
            return IMAGE_PROCESSOR_NAME
        return "config.json" if self.is_module else "tokenizer_config.json"

    @property
    def weights_name(self) -> str:
        """The file that its class reads its weights from, when they are in one piece."""
        return DIFFUSERS_WEIGHTS if issubclass(self.cls, diffusers.ModelMixin) else TRANSFORMERS_WEIGHTS

    @property
    def weight_files(self) -> list[Path]:
        """Its safetensors files."""
        return own_files(self.folder, "*.safetensors") if self.is_module else []


@dataclass(frozen=True)
class ModelFolder:
    """A pipeline folder that passed the checks."""

    path: Path
    """The folder with model_index.json."""
    family: DiTFamily
    """The family of its pipeline class."""
    pipeline: str
    """Name of its diffusers pipeline class."""
    components: dict[str, Component]
    """The components it lists, without those listed as null."""
    conditioning: Path | None = None
    """The folder of a student's added embeddings of r and g."""
    lora: Path | None = None
    """The folder of the adapter that makes a student of its transformer."""
    further: Mapping[str, Path] = field(default_factory=dict)
    """The folders of embeddings of r and g of denoisers after the first, by the denoiser's attribute."""

    @property
    def conditionings(self) -> dict[str, Path]:
        """All folders of embeddings of r and g, by the attribute of the denoiser that they are of."""
        first = self.family.denoisers[0].attribute
        return ({first: self.conditioning} if self.conditioning else {}) | dict(self.further)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model; `UserError` if the file is missing, damaged or holds anything else."""
    return artefacts.read_json(path, COPY_AGAIN)


def safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a safetensors file: name -> dtype as the format names it ("F32"), and shape.

    No byte of the data is read. `UserError` unless the file is as long as its header says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}", COPY_AGAIN) from error


def check_component(component: Component, *, any_class: bool = True) -> None:
    """`UserError` unless the component's config and, where it has any, its weights are there and whole.

    A scheduler's config may be of `any_class`, because the schedulers of diffusers read each other's.
    """
    folder = component.folder
    if not folder.is_dir():
        raise UserError(f"{folder} is missing", f"model_index.json lists it: {COPY_AGAIN}")
    config = read_json(folder / component.config_name)
    for path in own_files(folder, "*.json"):
        read_json(path)
    found = config.get("_class_name", component.cls.__name__)
    if found != component.cls.__name__ and (component.is_module or not any_class):
        raise UserError(
            f"{folder / component.config_name} belongs to a {found}, not a {component.cls.__name__}",
            "the folder is a mixture of two models: copy or download it again",
        )
    if component.is_module:
        _check_weights(component)


def _check_weights(component: Component) -> None:
    whole = component.folder / component.weights_name
    index = component.folder / f"{component.weights_name}.index.json"
    pickles = [path for path in own_files(component.folder) if path.suffix in PICKLES]
    if pickles and not component.weight_files:
        raise UserError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded",
            "convert it to safetensors in a place you trust, with save_pretrained",
        )
    for name in _shards(index) if index.exists() else [whole.name]:
        if not (component.folder / name).is_file():
            raise UserError(f"{component.folder / name} is missing", COPY_AGAIN)
    for path in component.weight_files:
        safetensors_header(path)


def _shards(index: Path) -> list[str]:
    """Names of the files that the index of a sharded checkpoint spreads its weights over."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map", COPY_AGAIN)
    return sorted(set(map(str, weight_map.values())))


def read_pipeline_folder(path: Path) -> ModelFolder:
    """What a diffusers pipeline folder holds, after every check that needs no weight to be read.

    Raises:
        UserError: something is missing, broken, foreign or a pickle; the message names the file.
    """
    index_file = path / "model_index.json"
    if not index_file.exists():
        raise UserError(f"{index_file} is missing", "a model is a folder that a diffusers pipeline was saved to")
    index = read_json(index_file)
    pipeline = str(index.get("_class_name"))
    listed = listed_parts(index)
    family = family_of_pipeline(pipeline, listed)
    parameters = inspect.signature(getattr(diffusers, pipeline).__init__).parameters
    for name, parameter in list(parameters.items())[1:]:
        if parameter.default is parameter.empty and name not in listed:
            raise UserError(f"{index_file} lists no {name}", f"{pipeline} needs one: {COPY_AGAIN}")
    components = {name: _component(path, name, entry) for name, entry in listed.items()}
    _check_denoisers(components, family, index, index_file)
    for component in components.values():
        check_component(component)
    return with_student_parts(ModelFolder(path, family, pipeline, components), path)


def listed_parts(index: dict[str, Any]) -> dict[str, list]:
    """[library, class] of what a model_index.json lists, by name, without what it lists as null."""
    parts = {name: entry for name, entry in index.items() if not name.startswith("_") and isinstance(entry, list)}
    return {name: entry for name, entry in parts.items() if entry != [None, None]}


def family_of_index(index: dict[str, Any]) -> DiTFamily | None:
    """The family that the pipeline of a model_index.json is of; None if none is known for it."""
    name = index.get("_class_name")
    return family_of_pipeline(name, listed_parts(index)) if name in PIPELINES else None


def with_own_parts(base: ModelFolder, path: Path) -> ModelFolder:
    """The pipeline `base` with the parts that the folder `path` of a student brings itself.

    They are a transformer (then the whole folder is one), or an adapter in lora/; conditioning/; and scheduler/.
    """
    components = dict(base.components)
    _refuse_one_of_several(path, base.family)
    if (path / "config.json").exists():
        name = base.family.denoisers[0].attribute
        components[name] = replace(components[name], folder=path)
        check_component(components[name])
    if (path / "scheduler").exists():
        components["scheduler"] = Component("scheduler", FlowMatchEulerDiscreteScheduler, path / "scheduler")
        check_component(components["scheduler"], any_class=False)
    contents = with_student_parts(replace(base, components=components), path)
    if contents.conditioning is None and contents.lora:  # an adapter leaves the base the model that it was
        return replace(contents, conditioning=base.conditioning)
    return contents


def with_student_parts(contents: ModelFolder, path: Path) -> ModelFolder:
    """With the conditioning and the adapter that lie in `path`, whose weights are there and whole."""
    first, *others = contents.family.denoisers
    weights = {conditioning_name(each.attribute): CONDITIONING_WEIGHTS for each in (first, *others)}
    found = {}
    for name, file in (weights | {"lora": LORA_WEIGHTS}).items():
        if (path / name).exists():
            found[name] = path / name
            if not (path / name / file).is_file():
                raise UserError(f"{path / name / file} is missing", COPY_AGAIN)
            if name == "lora":
                _refuse_one_of_several(path / name, contents.family)
            safetensors_header(path / name / file)
    further = {each.attribute: found.get(conditioning_name(each.attribute)) for each in others}
    return replace(
        contents,
        conditioning=found.get(conditioning_name(first.attribute)),
        lora=found.get("lora"),
        further={attribute: folder for attribute, folder in further.items() if folder},
    )


def conditioning_name(attribute: str) -> str:
    """The folder of the embeddings of r and g of a denoiser: conditioning of the transformer, conditioning_2 of the
    transformer_2."""
    return "conditioning" + attribute.removeprefix("transformer")


def _refuse_one_of_several(path: Path, family: DiTFamily) -> None:
    """`UserError` for what is of one transformer where there are several."""
    if len(family.denoisers) > 1:
        raise UserError(
            f"{path} is of one transformer, and {family.title} denoises with {len(family.denoisers)}",
            "take whole pipelines, whose adapters are merged or given as lora=",
        )


def _component(folder: Path, name: str, entry: list) -> Component:
    """The component that model_index.json describes as [library, class]; only diffusers' and transformers' own, under
    another name for a student's transformer, and under that of its pipelines' package for a part of theirs alone."""
    library, class_name = entry if len(entry) == 2 else (None, None)
    library = "diffusers" if library == students.MODULE else library
    if library not in LIBRARIES:
        package = f"diffusers.pipelines.{library}"
        library = package if str(library).isidentifier() and importlib.util.find_spec(package) else None
    cls = getattr(importlib.import_module(library), str(class_name), None) if library else None
    if not isinstance(cls, type):
        raise UserError(
            f"{folder / 'model_index.json'} wants {entry} as its {name}, which is not a class we can load",
            f"only classes of {' and '.join(LIBRARIES)} are loaded; a newer version of them may have it",
        )
    return Component(name, cls, folder / name)


def _check_denoisers(
    components: dict[str, Component], family: DiTFamily, index: dict[str, Any], index_file: Path
) -> None:
    """`UserError` unless the transformers are those of the family's record, neither fewer nor more, and each has its
    times."""
    expected = {denoiser.attribute for denoiser in family.denoisers}
    for name in sorted(expected):
        if name not in components or components[name].cls.__name__ != family.transformer:
            found = components[name].cls.__name__ if name in components else "none"
            raise UserError(
                f"{index_file} has {found} as its {name}", f"{family.title} needs a {family.transformer} there"
            )
    for name, component in components.items():
        if component.cls.__name__ == family.transformer and name not in expected:
            raise UserError(f"{index_file} has a second transformer, {name}", f"supported is {family.title}, with one")
    for denoiser in family.denoisers:
        if denoiser.until_config and index.get(denoiser.until_config) is None:
            raise UserError(
                f"{index_file} has no {denoiser.until_config}, below which the {family.denoisers[-1].attribute} runs",
                f"{family.title} has {denoiser.until:g}: {COPY_AGAIN}",
            )
