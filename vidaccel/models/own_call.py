"""A pipeline that is called as its model is made to be: `pipe("a cat")` takes the model's own steps, size and guidance.

What the caller gives comes first; what is left out is what `call_arguments` says, not the default of the pipeline's
class, by which a student of Wan would make two passes a step. One pipeline is given a class of its own, of the same
name; its class in diffusers, and other pipelines of it, stay as they are.
"""

import functools
import inspect
from typing import TYPE_CHECKING, Any, cast

from diffusers import DiffusionPipeline

from vidaccel.families.walk import denoisers_of
from vidaccel.models.calling import call_arguments

if TYPE_CHECKING:  # which imports this
    from vidaccel.models.loading import LoadedPipeline

LOADED = "vidaccel_loaded"
"""Attribute of a pipeline, and of each of its classes that was made here."""


def called_as_made(loaded: "LoadedPipeline") -> None:
    """Let `loaded.pipe` be called so from now on."""
    pipe = loaded.pipe
    stock = next(cls for cls in type(pipe).__mro__ if LOADED not in vars(cls))

    @functools.wraps(stock.__call__)  # and with its signature
    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(stock.__call__).bind_partial(self, *args, **kwargs).arguments
        return stock.__call__(self, *args, **kwargs, **_left_out(loaded, given))

    made = {"__call__": call, "__module__": stock.__module__, "__doc__": stock.__doc__, LOADED: True}
    cast(Any, pipe).__class__ = type(stock.__name__, (stock,), made)
    remember(loaded)


def remember(loaded: "LoadedPipeline") -> None:
    """Let `loaded_of` know where the pipeline comes from."""
    setattr(loaded.pipe, LOADED, (loaded, denoisers_of(loaded.pipe, loaded.family)))


def loaded_of(pipe: DiffusionPipeline) -> "LoadedPipeline | None":
    """What `load_pipeline` gave with this pipeline; None for another, and where its transformer was put in since."""
    loaded, transformers = vars(pipe).get(LOADED, (None, []))
    if loaded is None or any(a is not b for a, b in zip(transformers, denoisers_of(pipe, loaded.family), strict=True)):
        return None
    return loaded


def _left_out(loaded: "LoadedPipeline", given: dict[str, Any]) -> dict[str, Any]:
    """The model's own arguments besides those that are given."""
    own = {name: value for name, value in call_arguments(loaded).items() if name not in given}
    prompt = given.get("prompt")
    if "negative_prompt_embeds" in given or prompt is None:
        own.pop("negative_prompt", None)  # texts that are encoded already
    elif "negative_prompt" in own and isinstance(prompt, list):
        own["negative_prompt"] = [own["negative_prompt"]] * len(prompt)
    return own
