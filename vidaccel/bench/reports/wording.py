"""What a row does, in words: names of rows are a configuration's own, and a stranger has not read it."""

from pathlib import Path
from typing import Any

STAND_INS = {
    "predictor": "a learned network",
    "multistep": "fitted scalars",
    "reuse": "the last output again",
    "taylor": "a Taylor forecast",
    "linear": "a fitted linear map",
    "branches": "the last outputs of all blocks",
    "attention": "the last outputs of attention",
}
"""What runs on a step that is not full, by `on_skipped`."""
CACHES = {
    "pab": "Pyramid Attention Broadcast",
    "fastercache": "FasterCache",
    "first_block": "First Block Cache",
    "taylorseer": "TaylorSeer",
    "magcache": "MagCache",
    "seacache": "SeaCache",
    "teacache": "TeaCache",
    "fora": "FORA",
    "delta_dit": "Delta-DiT",
    "cache_dit": "cache-dit's DBCache",
}
"""Names of caches, where the configuration's is not one."""
SETTINGS = {
    "Fn_compute_blocks": "computed blocks",
    "steps_computation_mask": "mask",
    "steps_computation_policy": None,
    "taylorseer_order": "TaylorSeer order",
}
"""Of caches, where a name says too little or too much; None leaves one out."""


def in_words(run: dict[str, Any]) -> str:
    """Model, steps and what takes the place of full passes, of a run of results.json."""
    settings, passes = run["settings"], run["passes"] or {}
    steps = f"{run['steps']} step{'s' * (run['steps'] > 1)}" + " of two passes" * bool(settings.get("two_pass"))
    said = f"{_model(run)}, {steps}"
    if settings.get("cache"):
        said += f", {CACHES.get(settings['cache'], settings['cache'])}{_settings(settings)}"
    elif passes.get("predicted") or passes.get("skipped"):
        stand_in = STAND_INS.get(settings.get("on_skipped", ""), settings.get("on_skipped"))
        full = len(run["full_steps"] or ())
        said += f", {full} in full{_chosen(settings)}, else {stand_in}"
    own = [f"{key} {settings[key]:g}" for key in ("shift", "guidance", "guidance_2") if settings.get(key) is not None]
    lora = [f"with {Path(file).name}" for file in settings.get("lora") or ()]
    decoder = [f"decoded by {Path(settings['decoder']).name}"] if settings.get("decoder") else []
    way = [f"decode={settings['decode']}"] if settings.get("decode") else []
    return ", ".join([said, *own, *lora, *decoder, *way])


def _model(run: dict[str, Any]) -> str:
    settings = run["settings"]
    if settings.get("model"):
        return settings["model"].rstrip("/").rpartition("/")[2]
    if run["on"] == "teacher" and not settings.get("two_pass") and not settings.get("as_called"):
        return "teacher, guided in one pass"
    return run["on"]


def _chosen(settings: dict[str, Any]) -> str:
    return " (searched)" if settings.get("budget") is not None else ""


def _settings(settings: dict[str, Any]) -> str:
    """Those of a cache that are one number or one word."""
    told = {SETTINGS.get(key, key): value for key, value in settings["settings"].items()}
    listed = [
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:g}'}"
        for name, value in told.items()
        if name is not None and isinstance(value, int | float | str)
    ]
    return f" ({', '.join(listed)})" if listed else ""
