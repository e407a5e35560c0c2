"""A pipeline that is called as its model is made to be: `pipe("a cat")` takes the model's own steps, size and guidance.

What the caller gives comes first; what is left out is what `call_arguments` says, not the default of the pipeline's
class, by which a student of Wan would make two passes a step. A student is not saved by diffusers, which would leave
out what its transformer is told. One pipeline is given a class of its own, of the same name; its class in diffusers,
and other pipelines of it, stay as they are.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from diffusers import DiffusionPipeline

from vidaccel.compat.torch import uncompiled
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import denoisers_of
from vidaccel.models.calling import call_arguments

if TYPE_CHECKING:  # which imports this
    from vidaccel.models.loading import LoadedPipeline

LOADED = "vidaccel_loaded"
"""Attribute of a pipeline: what is known of it."""
OWN = "vidaccel_own"
"""Attribute of the class that a pipeline was given here: its members beside those of diffusers' class."""


def called_as_made(loaded: "LoadedPipeline") -> None:
    """Let `loaded.pipe` be called so from now on."""
    stock = _stock(loaded.pipe)

    @functools.wraps(stock.__call__)  # and with its signature
    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(stock.__call__).bind_partial(self, *args, **kwargs).arguments
        return stock.__call__(self, *args, **kwargs, **_left_out(loaded, given))

    _give(loaded.pipe, "__call__", call)
    student = loaded.released or any(each.conditioning for each in (loaded, *loaded.further))
    _give(loaded.pipe, "save_pretrained", functools.partialmethod(_refuse_saving, loaded) if student else None)
    remember(loaded)


def keep_transformers(pipe: DiffusionPipeline, family: DiTFamily) -> Callable[[], None]:
    """Let the pipeline refuse another module in the place of a transformer that hooks are on, which would run without
    them; until what this returns is called. The same one, compiled, is taken."""
    stock, kept = _stock(pipe), {d.attribute: getattr(pipe, d.attribute) for d in family.denoisers}

    def set_part(self: DiffusionPipeline, name: str, value: Any) -> None:
        if name in kept and uncompiled(value) is not uncompiled(kept[name]):
            raise UserError(
                f"the {name} of this {stock.__name__} has a predictor attached, and another would run without it",
                "detach it first, then replace the transformer, then attach again",
            )
        stock.__setattr__(self, name, value)

    _give(pipe, "__setattr__", set_part)
    return lambda: _give(pipe, "__setattr__", None)


def _stock(pipe: DiffusionPipeline) -> Any:
    """The pipeline's class in diffusers."""
    return next(cls for cls in type(pipe).__mro__ if OWN not in vars(cls))


def _give(pipe: DiffusionPipeline, name: str, member: Any) -> None:
    """A class of its own with this member as well, or without it; that of diffusers where none is left."""
    stock, own = _stock(pipe), vars(type(pipe)).get(OWN, {}) | {name: member}
    own = {name: member for name, member in own.items() if member is not None}
    made = own | {"__module__": stock.__module__, "__doc__": stock.__doc__, OWN: own}
    object.__setattr__(pipe, "__class__", type(stock.__name__, (stock,), made) if own else stock)


def remember(loaded: "LoadedPipeline") -> None:
    """Let `loaded_of` know where the pipeline comes from."""
    setattr(loaded.pipe, LOADED, (loaded, denoisers_of(loaded.pipe, loaded.family)))


def loaded_of(pipe: DiffusionPipeline) -> "LoadedPipeline | None":
    """What `load_pipeline` gave with this pipeline; None for another, and where its transformer was put in since."""
    loaded, transformers = vars(pipe).get(LOADED, (None, []))
    if loaded is None or any(a is not b for a, b in zip(transformers, denoisers_of(pipe, loaded.family), strict=True)):
        return None
    return loaded


def _refuse_saving(pipe: DiffusionPipeline, loaded: "LoadedPipeline", *args: Any, **kwargs: Any) -> NoReturn:
    """In the place of a student's `save_pretrained`: what diffusers writes is a model without what its transformer is
    told, which loads and makes other videos."""
    own = "vidaccel.save_model(folder, loaded) writes it" if loaded.released else f"copy {loaded.source}"
    raise UserError(
        f"diffusers would save this {type(pipe).__name__} without what tells its transformer r and g",
        f"{own}; vidaccel.export_model writes a folder for diffusers alone where there can be one",
    )


def _left_out(loaded: "LoadedPipeline", given: dict[str, Any]) -> dict[str, Any]:
    """The model's own arguments besides those that are given."""
    own = {name: value for name, value in call_arguments(loaded).items() if name not in given}
    prompt = given.get("prompt")
    rule = loaded.family.guidance
    if rule.second_argument and rule.cfg_argument in given:
        own.pop(rule.second_argument, None)  # what is said of the first alone holds for both
    if "negative_prompt_embeds" in given or prompt is None:
        own.pop("negative_prompt", None)  # texts that are encoded already
    elif "negative_prompt" in own and isinstance(prompt, list):
        own["negative_prompt"] = [own["negative_prompt"]] * len(prompt)
    return own
