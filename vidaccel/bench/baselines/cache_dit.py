"""cache-dit (extra `peers`), the package that users of diffusers install for caching, switched on for a row.

DBCache computes the first n blocks of each list, compares what they add with what they added on the last full pass, and
below a threshold gives again what the other blocks added then; its TaylorSeer calibrator carries that on along its
change, and a mask of steps decides in the threshold's place. Each of two passes of guidance keeps its own.

It replaces the `__call__` of the pipeline's class and leaves traces when it is disabled, which are removed here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vidaccel.compat.cache_dit import cache_dit, disable
from vidaccel.config.benchmark import MethodConfig
from vidaccel.errors import UserError
from vidaccel.families.walk import denoisers_of
from vidaccel.models.loading import LoadedPipeline

POLICIES = ("slow", "medium", "fast", "ultra")
"""Its predefined masks, for 4, 6 or 8 steps and more."""


@dataclass(frozen=True)
class DBCache:
    """Settings of a row, by cache-dit's names and with its defaults."""

    Fn_compute_blocks: int = 8
    """First blocks of each list that every pass computes."""
    Bn_compute_blocks: int = 0
    """Last blocks of each list that every pass computes."""
    residual_diff_threshold: float = 0.08
    max_warmup_steps: int = 8
    """Full steps in the beginning, beside the first."""
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    steps_computation_mask: Sequence[int] | str | None = None
    """1 for each full step and 0 for the others, as a list or a string such as "1001", or one of POLICIES."""
    steps_computation_policy: str = "dynamic"
    """Of the others: `dynamic` leaves them to the threshold, `static` computes none."""
    taylorseer_order: int = 0
    """Of its TaylorSeer calibrator; 0 is without."""

    def __post_init__(self) -> None:
        mask, policy = self.steps_computation_mask, self.steps_computation_policy
        steps = "".join(map(str, mask or "1"))
        known = mask in POLICIES or (set(steps) <= {"0", "1"} and steps[0] == "1")
        if not known or policy not in ("dynamic", "static") or (self.static and mask is None):
            raise UserError(
                f"cache-dit with steps_computation_mask={mask}, steps_computation_policy={policy}",
                f"a mask is a list of 0 and 1 that begins with 1, or one of: {', '.join(POLICIES)}; the policy is "
                "dynamic or, with a mask, static",
            )

    @property
    def static(self) -> bool:
        """Whether it decides by the mask alone, and not by what it sees."""
        return self.steps_computation_policy == "static"


@contextmanager
def enabled(loaded: LoadedPipeline, method: MethodConfig, settings: Mapping[str, Any]) -> Iterator[None]:
    """The row's cache for the time of a `with` block; whatever cache-dit itself raises."""
    library, row = cache_dit(), DBCache(**settings)
    given = asdict(row)
    order, mask = given.pop("taylorseer_order"), given.pop("steps_computation_mask")
    if mask in POLICIES:
        mask = library.steps_mask(total_steps=method.steps, mask_policy=mask)
    elif mask is not None and len(mask) != method.steps:
        raise UserError(f"a mask of {len(mask)} steps, and the row has {method.steps}", "make it as long")
    config = library.DBCacheConfig(
        **given,
        steps_computation_mask=mask and [int(step) for step in mask],
        num_inference_steps=method.steps,
        enable_separate_cfg=method.two_pass,
    )
    calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    with _as_it_was(loaded):
        try:
            library.enable_cache(loaded.pipe, cache_config=config, calibrator_config=calibrator)
            yield
        finally:
            disable(loaded.pipe, denoisers_of(loaded.pipe, loaded.family))


@contextmanager
def _as_it_was(loaded: LoadedPipeline) -> Iterator[None]:
    """Attributes that were put on the pipeline's transformers and their lists of blocks are gone afterwards, and the
    lists, which were taken out and put back for every pass, in their order: others go by it."""
    transformers = denoisers_of(loaded.pipe, loaded.family)
    lists = [each.get_submodule(kind.name) for each in transformers for kind in loaded.family.block_lists]
    modules: list[nn.Module] = [*transformers, *lists]
    before = [dict(vars(module)) for module in modules]
    children = [list(transformer.named_children()) for transformer in transformers]
    try:
        yield
    finally:
        for module, known in zip(modules, before, strict=True):
            for name in vars(module).keys() - known.keys():
                delattr(module, name)
            if "forward" in known:
                module.forward = known["forward"]
        for transformer, named in zip(transformers, children, strict=True):
            for name, child in named:
                delattr(transformer, name)
                setattr(transformer, name, child)
