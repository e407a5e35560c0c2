"""The models that rows run on, each loaded once, and under a row's schedule or cache for the time of a generation.

The pipeline and the predictor of one row at a time are on the device, so that its memory is its own.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vidaccel.bench.baselines.registry import switched_on
from vidaccel.bench.generation import Size, sampling_of, timed_generation
from vidaccel.bench.measures.quality import fitting_prompts
from vidaccel.cache.attach import attach
from vidaccel.cache.schedule import Schedule, pick, schedules_of
from vidaccel.config.benchmark import FROM_FOLDERS, BenchmarkConfig, MethodConfig
from vidaccel.data.images import fitted, images_in, read_image
from vidaccel.errors import UserError
from vidaccel.families.walk import denoisers_of
from vidaccel.forecasters.base import Forecaster, Making
from vidaccel.forecasters.learned import Predictor, predictor_at
from vidaccel.forecasters.multistep import Multistep
from vidaccel.forecasters.registry import forecaster_class
from vidaccel.models.calling import guidance_in_force
from vidaccel.models.decoder import read_decoder, with_decoder
from vidaccel.models.files import local_path, read_model
from vidaccel.models.grid import Grid, on_grid
from vidaccel.models.loading import LoadedPipeline, load_named, named_decoder, resolve_device
from vidaccel.runtime.prepare import prepare

NAMED = 3
"""Rows that a line names."""
PARKED = torch.device("cpu")
"""Where the models of other rows wait."""
CALIBRATION_SEED = 2**31
"""Beyond the seed of the first prompt: of videos that are measured nowhere."""


class Models:
    """Pipelines and predictors by their path."""

    def __init__(self, config: BenchmarkConfig, device: str = "auto"):
        self.config, self.device = config, resolve_device(device)
        self._pipelines: dict[tuple[str, ...], LoadedPipeline | UserError] = {}
        self._predictors: dict[tuple[str, str], Predictor] = {}
        self._made: dict[tuple, Forecaster] = {}
        self._decoders: dict[tuple[str, int], nn.Module] = {}
        self._images: list[np.ndarray] | None = None

    def begin(self, config: BenchmarkConfig) -> None:
        """Another benchmark of the same models, which stay loaded: what is fitted to its prompts is made anew."""
        self.config, self._images = config, None
        self._made.clear()

    def pipeline(self, method: MethodConfig) -> LoadedPipeline:
        """What the row runs on; `place` puts it on the device.

        Raises:
            UserError: the same each time, if there is no such model or it cannot be loaded.
        """
        key = path, *lora = self.weights(method)
        if key not in self._pipelines:
            self._park(self._loaded())  # a model is loaded on the device, which may have no room for two
            how = {"device": self.device.type, "dtype": self.config.dtype, "lora": lora}
            try:
                loaded = load_named(path, self.config.model, **how)
                prepare(loaded, self.config)
                self._pipelines[key] = loaded
            except UserError as error:
                self._pipelines[key] = error
        loaded = self._pipelines[key]
        if isinstance(loaded, UserError):
            standing_in = method.weights == "teacher" and path == self.config.student != self.config.model
            why = "a single pass of the teacher needs guidance distilled into it: " if standing_in else ""
            raise UserError(why + loaded.message, loaded.hint)
        if loaded.family.name != self.config.family and path != self.config.model:
            raise UserError(
                f"{path} is of the family {loaded.family.name}, and {self.config.model} of {self.config.family}",
                "compare models of one family",
            )
        return loaded

    def image(self, index: int, size: Size) -> np.ndarray | None:
        """What the videos of prompt `index` begin with, fitted to theirs; None where no images are named.

        Raises:
            UserError: an image cannot be taken, or there are not as many as prompts.
        """
        if self.config.images is None:
            return None
        if self._images is None:
            files = images_in(self.config.images, len(self.config.prompts))
            self._images = [read_image(file) for file in files]
        return fitted(self._images[index], *size[1:], f"image {index} of {self.config.images}")[0]

    def place(self, method: MethodConfig) -> bool:
        """Put what the row runs on the device, and all else off it; whether anything had to be brought.

        Raises:
            UserError: a model or a predictor that the row needs is not there.
        """
        needed = self.modules(method, self.pipeline(method))
        kept = set(map(id, needed))
        self._park(module for module in self._loaded() if id(module) not in kept)
        brought = [_move(module, self.device) for module in needed]  # all of them, and not up to the first
        return any(brought)

    def path(self, method: MethodConfig) -> str:
        """The model that the row runs on; `UserError` where the configuration names none."""
        if method.model is not None:
            return method.model
        which = self.config.student if method.weights == "student" else self._teacher(method)
        if which is None:
            raise UserError(f"no {self.missing(method)}= is named", "name a folder")
        return which

    def weights(self, method: MethodConfig) -> tuple[str, ...]:
        """The model that the row runs on, and LoRA files that are added to it."""
        path = self.path(method)
        own = self.config.lora if path == self.config.model else None
        return path, *((own or ()) if method.lora is None else method.lora)

    def missing(self, method: MethodConfig) -> str | None:
        """The setting that has to name what the row runs on, and names nothing."""
        if method.model is None and method.weights == "student" and self.config.student is None:
            return "student"
        if method.model is None and method.weights == "teacher" and self._teacher(method) is None:
            return "model" if self.config.model is None else "distilled"
        if method.budget is not None and method.on_skipped not in FROM_FOLDERS:
            return "methods.NAME.predictor" if method.predictor is None else None
        by_folder = method.predicts or method.by_folder or method.on_skipped == "multistep"
        return "predictor" if by_folder and (method.predictor or self.config.predictor) is None else None

    def student_stands_for_teacher(self, methods: Mapping[str, MethodConfig], left_out: Container[str]) -> str | None:
        """A line about rows of the teacher in one pass that run on the student, because no other model makes one."""
        config = self.config
        rows = [
            name
            for name, method in methods.items()
            if name not in left_out and method.weights == "teacher" and self.path(method) == config.student
        ]
        if not rows or config.student == config.model:
            return None
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        which = f"{', '.join(rows[:NAMED])}{more}"
        why = "which has had the training for few steps too: distilled= names the model before that"
        return f"{which}: on {config.student} at r = t, {why}"

    def predictor(self, method: MethodConfig, loaded: LoadedPipeline) -> Predictor:
        """The row's predictor, made to run as the blocks of that pipeline do."""
        folder = self.predictor_folder(method)
        key = str(folder), loaded.source
        if key not in self._predictors:
            transformers = denoisers_of(loaded.pipe, loaded.family)
            made = predictor_at(folder, transformers[0], loaded.family)
            made.check_denoisers(loaded.pipe, loaded.family)
            self._predictors[key] = made.run_like(*transformers)
        return self._predictors[key]

    def predictor_folder(self, method: MethodConfig) -> Path:
        name = method.predictor or self.config.predictor
        if name is None:
            raise UserError("no predictor= is named", "name a folder")
        folder = local_path(name)
        if not folder.exists():
            raise UserError(f"there is no predictor {name}", "train one: vidaccel train-predictor")
        return folder

    def searched(self, method: MethodConfig) -> Schedule:
        """The schedule of the row's budget, from the folder of its predictor; `UserError` where there is none."""
        return pick(schedules_of(self.predictor_folder(method)), method.budget, method.steps)

    def check_decoder(self, method: MethodConfig) -> None:
        """`UserError` where the row's distilled decoder is not there, or is not for its model's latents."""
        assert method.decoder is not None
        model = self.path(method)
        named = self.config.model if local_path(model).is_file() else model  # which a released student is a file of
        named_decoder(method.decoder, read_model(named or model))

    def autoencoder(self, method: MethodConfig, loaded: LoadedPipeline) -> nn.Module:
        """What makes the row's frames: the pipeline's own autoencoder, or that with the row's decoder."""
        if method.decoder is None:
            return loaded.pipe.vae
        key = method.decoder, id(loaded.pipe)
        if key not in self._decoders:
            files = read_decoder(local_path(method.decoder), method.decoder)
            self._decoders[key] = with_decoder(loaded.pipe.vae, files)
        return self._decoders[key]

    def parameters(self, method: MethodConfig, loaded: LoadedPipeline) -> int:
        """Of transformer, added embeddings and predictor."""
        denoisers = denoisers_of(loaded.pipe, loaded.family)
        modules = [*denoisers, *self._added(method, loaded)]
        weights = {id(weight): weight.numel() for module in modules for weight in module.parameters()}
        return sum(weights.values())

    def modules(self, method: MethodConfig, loaded: LoadedPipeline) -> list[nn.Module]:
        """All that the row needs on the device: the whole pipeline, added embeddings and predictor."""
        own = getattr(loaded.pipe, "vae", None)
        parts = [self.autoencoder(method, loaded) if part is own else part for part in _parts(loaded)]
        return [*parts, *self._added(method, loaded)]

    @contextmanager
    def running(self, method: MethodConfig, settings: dict[str, Any]) -> Iterator[LoadedPipeline]:
        """The row's pipeline with its decoder, under its cache (with these settings), its forecaster, or nothing.

        Raises:
            Exception: whatever stands against it.
        """
        self.place(method)
        loaded = self.pipeline(method)
        with self.decoded(method, loaded), self._sampled(method, loaded, settings):
            yield loaded

    @contextmanager
    def decoded(self, method: MethodConfig, loaded: LoadedPipeline) -> Iterator[None]:
        """The pipeline with the row's decoder and way of decoding, for the time of a `with` block."""
        pipe, own, way = loaded.pipe, getattr(loaded.pipe, "vae", None), loaded.decode
        if method.decoder is not None:
            pipe.vae = self.autoencoder(method, loaded)
        loaded.decode = method.decode or way
        try:
            yield
        finally:
            loaded.decode = way
            if method.decoder is not None:
                pipe.vae = own

    @contextmanager
    def _sampled(self, method: MethodConfig, loaded: LoadedPipeline, settings: dict[str, Any]) -> Iterator[None]:
        grid = Grid.listed(method.timesteps, method.sigmas)
        if method.cache is not None:
            with switched_on(loaded, method, settings):
                yield
        elif method.full_count() == method.steps:
            yield
        else:
            with (
                on_grid(loaded.pipe, method.shift, grid),  # which a schedule has to fit
                attach(loaded, predictor=self._forecaster(method, loaded), **self._schedule(method)),
            ):
                yield

    def _added(self, method: MethodConfig, loaded: LoadedPipeline) -> list[nn.Module]:
        added: list[nn.Module] = _conditionings(loaded)
        return [*added, self.predictor(method, loaded)] if method.predicts else added

    def _teacher(self, method: MethodConfig) -> str | None:
        """A teacher's single pass needs guidance distilled into it."""
        config = self.config
        if (
            method.two_pass
            or method.as_called
            or (config.model is not None and config.distilled is None and self._embeds_guidance())
        ):
            return config.model
        return config.distilled or config.student

    def _embeds_guidance(self) -> bool:
        teacher = self.pipeline(MethodConfig(model=self.config.model))
        return not guidance_in_force(teacher, None, None)[1]

    def _forecaster(self, method: MethodConfig, loaded: LoadedPipeline) -> Forecaster | Multistep:
        """The row's, made once for each model and way of sampling."""
        if not method.forecasts:
            raise UserError(
                f"on_skipped={method.on_skipped} says what is left out, not by which cache", "set cache=..."
            )
        if method.on_skipped == "predictor":
            return self.predictor(method, loaded)
        if method.on_skipped == "multistep":
            return Multistep.from_pretrained(self.predictor_folder(method))
        full = method.schedule() if method.budget is None else list(self.searched(method).full_steps)
        sampled = repr(sampling_of(method, self.config.videos[0], self.config))
        key = self.weights(method), method.on_skipped, method.order, tuple(full), sampled
        if key not in self._made:
            generate = partial(self._calibrate, method, loaded)
            making = Making(loaded.pipe, loaded.family, method.order, None, full, generate)
            self._made[key] = forecaster_class(method.on_skipped).make(making)
        return self._made[key]

    def _calibrate(self, method: MethodConfig, loaded: LoadedPipeline) -> None:
        """Make the row's videos of prompts and noise that are measured nowhere."""
        prompts, size = fitting_prompts(self.config), self.config.videos[0]
        seeds = [self.config.seed + CALIBRATION_SEED + i for i in range(len(prompts))]
        apart = range(len(prompts)) if self.config.images else [None]  # of images, a call takes one
        for i in apart:
            which, image = (slice(None), None) if i is None else (slice(i, i + 1), self.image(i, size))
            timed_generation(loaded, method, size, prompts[which], seeds[which], self.config, False, image)

    def _schedule(self, method: MethodConfig) -> dict[str, Any]:
        if method.budget is None:
            return {"steps": method.steps, "full_steps": method.schedule()}
        return {"steps": method.steps, "schedule": self.searched(method)}

    def _loaded(self) -> Iterator[nn.Module]:
        """Every part of every model that was loaded so far."""
        for loaded in self._pipelines.values():
            if isinstance(loaded, LoadedPipeline):
                yield from _parts(loaded)
                yield from _conditionings(loaded)
        yield from self._predictors.values()
        yield from self._decoders.values()

    @staticmethod
    def _park(modules: Iterable[nn.Module]) -> None:
        for module in modules:
            _move(module, PARKED)


def _conditionings(loaded: LoadedPipeline) -> list[nn.Module]:
    return [each.conditioning for each in (loaded, *loaded.further) if each.conditioning is not None]


def _parts(loaded: LoadedPipeline) -> list[nn.Module]:
    return [part for part in loaded.pipe.components.values() if isinstance(part, nn.Module)]


def _move(module: nn.Module, device: torch.device) -> bool:
    """Whether the module was on another device."""
    tensors = (*module.parameters(), *module.buffers())
    if all(tensor.device.type == device.type for tensor in tensors):
        return False
    module.to(device)
    return True
