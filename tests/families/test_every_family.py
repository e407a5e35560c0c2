"""Everything that vidaccel does, on a tiny pipeline of every family: what is not refused works.

`ABILITIES` are the columns of the table in docs/families.md, which is made of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vidaccel
from tests.students import save_teacher
from tests.tiny import ALL_TEXT_TO_VIDEO, EVERY, SIZE, called, image_of, tiny_pipeline
from vidaccel.bench.plan import plan
from vidaccel.bench.random_weights import time_random_weights
from vidaccel.cache.schedule import Schedule
from vidaccel.cache.trunk import Trunk
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import denoisers_of
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.calling import compression_of
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.train.objective import generator_for
from vidaccel.train.predictor import training
from vidaccel.train.predictor.loss import PredictorLoss
from vidaccel.train.predictor.task import task_of

CAPTIONS = ("a red circle", "a blue square")
SHIFT = 3.0
TRAIN = {
    "steps": 1,
    "batch_size": 2,
    "accumulate": 1,
    "learning_rate": 1e-3,
    "warmup": 0,
    "save_every": 9,
    "log_every": 1,
}
PAGE = Path(vidaccel.__file__).parents[1] / "docs" / "families.md"


class Clips:
    """Two random videos, in the place of a folder's."""

    fingerprint = {"data": "random"}

    def __len__(self) -> int:
        return len(CAPTIONS)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        shape = 3, SIZE["num_frames"], SIZE["height"], SIZE["width"]
        return torch.rand(shape, generator=torch.Generator().manual_seed(index)) * 2 - 1, self.record(index)

    def record(self, index: int) -> dict[str, Any]:
        return {"caption": CAPTIONS[index], "fps": 8}


@dataclass
class Model:
    """A tiny model and what is made of it, each when it is first asked for."""

    family: DiTFamily
    folder: Path

    @cached_property
    def teacher(self) -> Path:
        return save_teacher(self.folder / "teacher", self.family.name)

    @cached_property
    def loaded(self) -> LoadedPipeline:
        return load_pipeline(self.teacher)

    @cached_property
    def image(self) -> Path | None:
        """What its videos begin with."""
        if (pixels := image_of(self.family.name)) is None:
            return None
        Image.fromarray(pixels).save(self.folder / "image.png")
        return self.folder / "image.png"

    @cached_property
    def features(self) -> Path:
        return self.folder / "none" if self.family.untrained else self.collected()

    def collected(self) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vidaccel.collect.kinds.open_source", lambda loaded, config: Clips())
            vidaccel.collect_features("clips", self.folder / "features", model=str(self.teacher), store="float32")
        return self.folder / "features"

    @cached_property
    def cfg(self) -> Path:
        return self.of_each("cfg", self.teacher)

    @property
    def passes(self) -> int:
        """Of a step, as it is made to be called."""
        return 1 if self.family.embeds_r else 2

    @cached_property
    def student(self) -> Path:
        if self.family.embeds_r:
            return self.teacher
        return self.of_each("mean_velocity", self.cfg)

    def of_each(self, method: str, teacher: Path) -> Path:
        """Distilled; of two transformers one after the other."""
        first, *others = [denoiser.attribute for denoiser in self.family.denoisers]
        made = self.distilled(method, teacher, **({"denoiser": first} if others else {}))
        for name in others:
            made = self.distilled(method, made, name, denoiser=name)
        return made

    @property
    def steps(self) -> int:
        """Of a student: each transformer has one to predict."""
        return 3 if len(self.family.denoisers) == 1 else 4

    @cached_property
    def predictor(self) -> Path:
        self.trained("learned", self.student)
        return self.folder / "learned"

    def trained(self, forecaster: str, student: Path, **more: Any) -> list[Schedule]:
        settings = {"student": str(student), "features": str(self.features), "blocks": 1, "search_prompts": 1, **more}
        stages = {"mse": TRAIN, "adversarial": TRAIN | {"steps": 0}}
        config = PredictorConfig(forecaster=forecaster)
        return vidaccel.train_predictor(config, self.folder / forecaster, **settings, **stages)

    def distilled(self, method: str, teacher: Path, name: str = "", **more: Any) -> Path:
        made = {"teacher": str(teacher), "features": str(self.features), "sample_steps": self.steps, "shift": SHIFT}
        vidaccel.distill("cfg", self.folder / (method + name), method=method, train=TRAIN, **made, **more)
        return self.folder / (method + name)


def latents(loaded: LoadedPipeline, **more: Any) -> Tensor:
    """Of a generation as its model is made to be called."""
    settings = {"num_inference_steps": 3, "output_type": "latent", **more}
    settings |= {name: value for name, value in called(loaded.pipe).items() if name == "image"}
    return loaded.pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), **settings).frames


# what it does


def generates(model: Model) -> None:
    frames = vidaccel.generate("a red circle", model=str(model.teacher), image=model.image, steps=2)
    assert frames.shape == (SIZE["num_frames"], SIZE["height"], SIZE["width"], 3) and frames.std() > 0


def runs_predicted_steps(model: Model) -> None:
    """Nothing but full steps are the pipeline's own, bit for bit; detached it is as it was; predicted ones are not."""
    several = len(model.family.denoisers) > 1
    steps, full = (4, [0, 2]) if several else (3, [0, 1])  # a predicted step of each denoiser
    called = {"num_inference_steps": steps}
    plain = latents(model.loaded, **called)
    with vidaccel.attach(model.loaded, predictor="reuse", steps=steps, full_steps=list(range(steps))) as attachment:
        assert torch.equal(latents(model.loaded, **called), plain)
        assert (attachment.full_passes, attachment.predicted_passes) == (model.passes * steps, 0)
    for predictor in ("reuse", "taylor"):
        with vidaccel.attach(model.loaded, predictor=predictor, steps=steps, full_steps=full) as attachment:
            predicted = latents(model.loaded, **called)
        assert predicted.isfinite().all() and not torch.equal(predicted, plain)
        passes = attachment.full_passes, attachment.predicted_passes
        assert passes == (2 * model.passes, model.passes * (steps - 2))
    assert torch.equal(latents(model.loaded, **called), plain)


def reuses_exactly(model: Model) -> None:
    """On the same input, reuse gives what the trunk gave: embedders and head are those of the model."""
    passes: dict[torch.nn.Module, tuple[tuple, dict[str, Any]]] = {}
    hook = partial(torch.nn.Module.register_forward_pre_hook, with_kwargs=True)
    transformers = denoisers_of(model.loaded.pipe, model.family)
    hooks = [hook(each, lambda module, *given: passes.update({module: given})) for each in transformers]
    latents(model.loaded)
    for each in hooks:
        each.remove()
    assert list(passes) == transformers
    for transformer, (args, kwargs) in passes.items():
        with torch.no_grad(), Trunk(transformer, model.family) as trunk:
            with trunk.full(0.5):
                full = transformer(*args, **kwargs)[0]
            with trunk.predicted(Reuse(), 0.5):
                assert torch.equal(transformer(*args, **kwargs)[0], full)


def collects(model: Model) -> None:
    tensors, record = ShardFolder(model.features)[1]
    assert record["caption"] == CAPTIONS[1]
    own = {"image"} if model.family.begins_with_image else set()
    stored = (*model.family.text_tensors, *model.family.conditions)
    assert tensors.keys() == {"latent", *own, *(each.stored for each in stored)}


def distils_guidance(model: Model) -> None:
    """One pass a step, whose guidance is told."""
    student = load_pipeline(model.cfg)
    calls: list[int] = []
    for transformer in denoisers_of(student.pipe, model.family):
        transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert latents(student).isfinite().all() and len(calls) == 3
    student.guidance = 7.0
    assert student.hook.guidance == 7.0


def distils_steps(model: Model) -> None:
    assert set(load_pipeline(model.student).conditioning.config.embeds) == {"r", "g"}
    assert vidaccel.generate("a red circle", model=str(model.student), image=model.image).std() > 0


def trains_predictors(model: Model) -> None:
    """The predictor of a student serves it, by schedules that were searched; on one batch its loss falls tenfold."""
    student = load_pipeline(model.student)
    with vidaccel.attach(student, predictor=str(model.predictor), budget=2) as attachment:
        assert latents(student, num_inference_steps=model.steps).isfinite().all()
    assert (attachment.full_passes, attachment.predicted_passes) == (2, model.steps - 2)
    config = PredictorConfig(
        student=str(model.student),
        features=str(model.features),
        blocks=1,
        mse=TrainConfig(**TRAIN),
        adversarial=TrainConfig(steps=0),
    )
    task = task_of(student, config, None)
    with task.trunks:
        predictor, pairs = training._start(task)
        loss, pair = PredictorLoss(task.student, task.trunks, predictor), pairs.draw(0, 2, 0, generator_for(0, 0))
        optimizer, found = torch.optim.Adam(predictor.parameters(), lr=0.01), []
        while len(found) < 200 and (not found or found[-1] > 0.09 * found[0]):
            value = loss(pair)[0]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            found.append(float(value.detach()))
    assert found[-1] < 0.1 * found[0], found


def searches(model: Model) -> None:
    """Schedules of forecasters that need no training, with the first step of each transformer."""
    if len(model.family.denoisers) == 1:
        assert [schedule.budget for schedule in model.trained("taylor", model.student)] == [1, 2, 3]
        return
    found = model.trained("taylor", model.teacher, guidance=1.0, steps=4)
    assert [schedule.budget for schedule in found] == [2, 3, 4]
    assert all({0, 2} <= set(schedule.full_steps) and schedule.boundary == 0.8 for schedule in found)
    with vidaccel.attach(model.loaded, predictor="taylor", schedule=found[0]) as attachment:
        assert latents(model.loaded, num_inference_steps=4).isfinite().all()
    assert (attachment.full_passes, attachment.predicted_passes) == (4, 4)


def plans(model: Model) -> None:
    results = plan(toy(model))
    assert all(run["error"] is None and run["flops"] for run in results["runs"])
    assert results["runs"][1]["speedup"]["ideal"] > 1


def is_timed(model: Model) -> None:
    results = time_random_weights(toy(model), "cpu")
    assert all(run["denoise_seconds"]["rounds"] == 2 for run in results["runs"])


def toy(model: Model) -> BenchmarkConfig:
    """The tiny transformer as if it were a full-size one."""
    methods = {"full": MethodConfig(weights="teacher", steps=3, two_pass=True)}
    methods["predictor"] = MethodConfig(steps=3, full_steps=[0, 2])
    pipe = tiny_pipeline(model.family.name)
    return BenchmarkConfig(
        family=model.family.name,
        transformer={key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")},
        compression=list(compression_of(pipe, model.family)),
        text_tokens={stream: 729 if stream == "image" else 16 for stream in model.family.costs.texts},
        sizes=[list(SIZE.values())],
        dtype="float32",
        predictor_blocks=1,
        rounds=2,
        whole=True,
        methods=methods,
        baseline="full",
    )


ABILITIES: dict[str, Callable[[Model], None]] = {
    "generate": generates,
    "attach": runs_predicted_steps,
    "reuse": reuses_exactly,
    "collect-features": collects,
    "distill method=cfg": distils_guidance,
    "distill method=mean_velocity": distils_steps,
    "train-predictor": trains_predictors,
    "forecaster=taylor": searches,
    "benchmark --plan": plans,
    "--random-weights": is_timed,
}
"""Columns of the table."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def of(name: str) -> Model:
        return made.setdefault(name, Model(FAMILIES[name], tmp_path_factory.mktemp(name)))

    return of


NOT_ALL: dict[str, Callable[[Model], Any]] = {
    "collect-features": Model.collected,
    "distill method=cfg": lambda model: model.cfg,
    "distill method=mean_velocity": lambda model: model.distilled("mean_velocity", model.teacher),
    "train-predictor": lambda model: model.trained("learned", model.teacher),
    "forecaster=taylor": lambda model: model.trained("taylor", model.teacher),
}
"""Abilities that not all models have, as they are asked of one that has not."""


def why_not(family: DiTFamily, ability: str) -> str | None:
    """With which words it is refused, as a regular expression; None if it works."""
    if ability in NOT_ALL and family.untrained:
        return f"{family.title} {family.untrained}, and .* is of clips and captions alone"
    if ability in set(NOT_ALL) - {"collect-features"} and family.predicts != "flow":
        return f"{family.title} predicts v .* is for flow velocities"
    if ability.startswith("distill") and family.embeds_r:
        return f"is a student already: {family.title} is told where a step ends"
    return None


def works(family: DiTFamily, ability: str) -> bool:
    return why_not(family, ability) is None


@pytest.mark.parametrize("ability", ABILITIES)
@pytest.mark.parametrize("family", EVERY)
def test_it_works_or_is_refused_with_the_reason(family, ability, models):
    model = models(family)
    if (reason := why_not(model.family, ability)) is None:
        ABILITIES[ability](model)
        return
    with pytest.raises(UserError, match=reason):
        NOT_ALL[ability](model)


def table() -> list[str]:
    """Rows of Markdown: which ability has been tried on which family."""
    heads = ["", *(f"`{ability}`" for ability in ABILITIES)]
    rows = [
        [family.title, *("yes" if works(family, ability) else "no" for ability in ABILITIES)]
        for family in map(FAMILIES.get, EVERY)
    ]
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def front() -> list[str]:
    """The same in short, and which have fused kernels."""
    lines = []
    for name in ALL_TEXT_TO_VIDEO:
        family = FAMILIES[name]
        others = [each for each in FAMILIES.values() if each.begins_with_image and _alike(each, family)]
        images = [f"`{each.pipelines[0]}`" for each in others]
        distilled = [works(family, f"distill method={name}") for name in ("cfg", "mean_velocity")]
        said = [works(family, name) for name in ("attach", "train-predictor", "benchmark --plan")]
        attached, *rest = ["yes" if cell else "no" for cell in (*said, family.fused)]
        few = "yes" if all(distilled) else "no"
        cells = [family.title, f"`{family.pipelines[0]}`", images[0] if images else "no", attached, few, *rest]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _alike(one: DiTFamily, other: DiTFamily) -> bool:
    return (one.transformer, len(one.denoisers)) == (other.transformer, len(other.denoisers))


def test_the_pages_have_these_tables():
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith("|")] == table()
    readme = PAGE.parents[1].joinpath("README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in readme if line.startswith("| ") and "Pipeline` |" in line] == front()
