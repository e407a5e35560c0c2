"""What stands for a student's transformer in its model_index.json, so that diffusers alone does not take the folder.

diffusers would load the weights without what tells the transformer how far a step goes, and make wrong videos without a
word. It imports the module that model_index.json names, this one, and its classes refuse to be loaded. Vidaccel's own
loading reads the same entry as diffusers' class of that name.
"""

from typing import Any, NoReturn

from vidaccel.errors import UserError

MODULE = __name__
"""As model_index.json says it."""


def __getattr__(name: str) -> Any:
    import diffusers

    known = None if name.startswith("__") else getattr(diffusers, name, None)
    if known is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if known is diffusers.ModelMixin:
        return known  # against which diffusers checks a module that it is given
    return type(name, (known,), {"from_pretrained": classmethod(_refuse)})


def _refuse(cls: type, folder: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise UserError(
        f"{folder} is a student's {cls.__name__}, which diffusers would load without its conditioning",
        "load the model folder by vidaccel.load_pipeline(folder), and call the `pipe` of what that gives",
    )
