"""Every example of docs/extending*.md is put where it says, and then does what the page says."""

import importlib
import json
import re
import sys
from functools import partial
from inspect import getsource, signature

import pytest
import torch
from typer.testing import CliRunner

import vidaccel.forecasters
from tests import tiny
from tests.docs.pages import EXTENDING, ROOT
from tests.docs.placing import Placed, examples, place
from tests.families import test_records
from tests.kernels.compare import assert_close, double, gradients, normal, outputs, tangents
from tests.students import save_teacher
from tests.tiny import SIZE, called, guided, tiny_pipeline
from tests.train.test_distill import TRAIN, write_features
from vidaccel import api
from vidaccel.cache.attach import attach
from vidaccel.cli.main import app
from vidaccel.collect.bank import world_bank
from vidaccel.collect.source import open_source
from vidaccel.config import loader
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.collect import CollectConfig
from vidaccel.config.distill import DistillConfig, with_method_groups
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES, PIPELINES
from vidaccel.forecasters.registry import FORECASTERS
from vidaccel.models.loading import load_pipeline
from vidaccel.train.distill import distill
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining


@pytest.fixture
def placed(request, tmp_path) -> Placed:
    """The example that the test is marked with."""
    yield from place(request.param, tmp_path)


def example(name: str):
    return pytest.mark.parametrize("placed", [name], indirect=True)


def latents(pipe, steps: int = 4, **arguments) -> torch.Tensor:
    arguments = guided(pipe, 1.0) | called(pipe) | arguments
    arguments |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    return pipe(prompt="a red circle", num_inference_steps=steps, **arguments).frames


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(*words: object):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Folder of a teacher, and features made with it."""
    folder = tmp_path_factory.mktemp("wan")
    teacher = save_teacher(folder / "teacher", "wan")
    return teacher, write_features(folder / "features", load_pipeline(teacher))


def test_every_example_is_run():
    here = set(re.findall(r'^@example\("(\w+)"\)', (ROOT / "tests/docs/test_extending.py").read_text(), re.MULTILINE))
    assert here == examples().keys()


TITLES = {
    "family": "a model family",
    "forecaster": "a forecaster",
    "method": "a distillation method",
    "target": "a target",
    "kernel": "a kernel",
    "row": "a benchmark row",
    "baseline": "a baseline",
    "world": "a world",
}
"""Of each example, what the table at the top of the page calls it."""


def rows() -> dict[str, tuple[int, list[str], list[str]]]:
    """The table: by title the number of files, patterns of what is new, and of the files that a line is added to."""
    found = {}
    for row in re.findall(r"^\| \[.*", (ROOT / "docs/extending.md").read_text(), re.MULTILINE):
        link, count, *places = row.split("|")[1:5]
        patterns = [re.findall(r"`([\w./]+)`", place) for place in places]
        found[re.match(r"\s*\[([^\]]+)", link)[1]] = (int(count), *patterns)
    return found


def fits(file: str, patterns: list[str]) -> bool:
    """`vidaccel/kernels/NAME/` is any folder there, with all that is in it."""
    return any(
        re.fullmatch(re.sub("NAME|FAMILY", r"\\w+", pattern) + (".*" if pattern.endswith("/") else ""), file)
        for pattern in patterns
    )


def test_the_table_has_a_row_for_each_example():
    assert rows().keys() == set(TITLES.values()) and TITLES.keys() == examples().keys()


@pytest.mark.parametrize("name", TITLES)
def test_the_table_of_files_is_true(name):
    count, own, others = rows()[TITLES[name]]
    files = {re.match(r"# ([\w./]+)", code.text)[1] for code in examples()[name]}
    if name == "row":  # a file of the reader's
        assert (count, own, others, files) == (1, [], [], {"mine.yaml"})
        return
    lines = {file for file in files if fits(file, others)}
    assert len(lines) + 1 == count
    assert files - lines and all(fits(file, own) for file in files - lines)


@example("family")
def test_a_family(placed, monkeypatch):
    families = placed.namespaces["vidaccel/families/registry.py"]["FAMILIES"]
    (family,) = (families[name] for name in families.keys() - FAMILIES.keys())
    monkeypatch.setitem(FAMILIES, family.name, family)
    for pipeline in family.pipelines:
        monkeypatch.setitem(PIPELINES, pipeline, family)
    builders = placed.namespaces["tests/tiny.py"]["BUILDERS"]
    monkeypatch.setitem(tiny.BUILDERS, family.name, builders[family.name])
    pipe = tiny_pipeline(family.name)

    ran = 0
    for name, check in vars(test_records).items():
        if name.startswith("test_") and list(signature(check).parameters) == ["family", "pipes"]:
            check(family, {family.name: pipe})
            ran += 1
    assert ran >= 12

    stock = latents(pipe)
    with attach(pipe, predictor="reuse", steps=4, every=1) as attachment:
        assert torch.equal(latents(pipe), stock) and attachment.full_passes == 4
    with attach(pipe, predictor="reuse", steps=4, every=2) as attachment:
        assert not torch.equal(latents(pipe), stock) and attachment.predicted_passes == 2
    assert torch.equal(latents(pipe), stock)

    result = run("benchmark", "--plan", "--json", "--conf", family.name, "only=[cfg-50,predictor-8-of-20,fora-3]")
    assert result.exit_code == 0, result.output
    runs = {each["method"]: each for each in json.loads(result.stdout)["runs"]}
    assert runs["cfg-50"]["parameters"] == 16_394_878_784
    assert runs["predictor-8-of-20"]["speedup"]["ideal"] == pytest.approx(11.58, abs=0.01)


@example("forecaster")
def test_a_forecaster(placed, monkeypatch):
    pipe = tiny_pipeline("wan")
    with attach(pipe, predictor="average", steps=4, full_steps=[0, 1]) as attachment:
        average = latents(pipe)
        assert (attachment.full_passes, attachment.predicted_passes) == (2, 2)
    forecaster = sys.modules["vidaccel.forecasters.average"].Average()
    with attach(pipe, predictor=forecaster, steps=4, full_steps=[0, 1]):
        assert torch.equal(latents(pipe), average)
    with attach(pipe, predictor="reuse", steps=4, full_steps=[0, 1]):
        assert not torch.equal(latents(pipe), average)
    assert MethodConfig(steps=4, every=2, on_skipped="average").forecasts
    monkeypatch.chdir(placed.folder)
    words = ["generate", "a red circle moving right on black", "predictor=average", "every=3"]
    result = run(*words, "steps=4", "num_frames=5", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passes"] == {"full": 2, "predicted": 2}


@example("method")
def test_a_method(placed, wan, monkeypatch):
    schema = with_method_groups(DistillConfig)
    monkeypatch.setitem(loader.SCHEMAS, "distill", schema)
    teacher, features = wan
    words = ["method=halving", "halving.width=0.25", "sample_steps=4", f"teacher={teacher}", f"features={features}"]
    words += [f"train.{key}={value}" for key, value in (TRAIN | {"sample_every": 0}).items()]
    student = placed.folder / "halved"
    result = run("distill", *words, "-o", student)
    assert result.exit_code == 0, result.output
    config = load_pipeline(student).conditioning.config
    assert (config.embeds, config.restrict, config.steps) == (("r",), 0.25, 4)
    result = run("distill", *words, "halving.width=0.00001", "-o", placed.folder / "narrow")
    assert result.exit_code == 0, result.output
    wide, narrow = (losses(placed.folder / name) for name in ("halved", "narrow"))
    assert len(wide) == 2 and 0 < 100 * narrow[0] < wide[0]  # it begins equal to its teacher, whose steps are one then
    result = run("distill", *words[2:], "method=halving", "halving.width=2", "-o", student)
    assert result.exit_code == 2 and "must be in (0, 1]" in result.stderr


@example("target")
def test_a_target(placed, wan):
    """Which is the rollout of one step, by another way."""
    teacher, features = wan
    places = {"teacher": str(teacher), "features": str(features), "train": TrainConfig(**TRAIN | {"sample_every": 0})}
    for target in ("midpoint", "rollout"):
        own = MeanVelocityTraining(target=target, substeps=1)
        distill(DistillConfig(method="mean_velocity", mean_velocity=own, **places), placed.folder / target, "cpu")
    assert losses(placed.folder / "midpoint") == pytest.approx(losses(placed.folder / "rollout"), rel=1e-4)


@example("kernel")
def test_a_kernel(placed):
    pytest.importorskip("triton")
    from vidaccel.kernels.gated_residual.op import gated_residual
    from vidaccel.kernels.gated_residual.reference import gated_residual as reference

    fused = partial(gated_residual, kernels="fused")
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN then
    try:
        for B, N, D in ((2, 7, 63), (1, 1, 3), (3, 5, 130)):
            inputs = [normal(B, N, D), normal(B, N, D, seed=1), normal(B, D, seed=2)]
            directions = [normal(B, N, D, seed=3), None, normal(B, D, seed=4)]
            exact = double(inputs)
            assert_close(outputs(fused, inputs), outputs(reference, exact), 1e-6)
            assert_close(gradients(fused, inputs), gradients(reference, exact), 1e-6)
            expected = tangents(reference, exact, double(directions))
            assert_close(tangents(fused, inputs, directions), expected, 1e-6)
            half = [each.half() for each in inputs]
            assert_close(outputs(fused, half), outputs(reference, double(half)), 1e-3)
        leaves = [each.requires_grad_() for each in inputs]
        op = torch.ops.vidaccel.gated_residual.default
        torch.library.opcheck(op, leaves, test_utils=("test_schema", "test_faketensor"))
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(ValueError, match="gate has shape"):
        fused(inputs[0], inputs[1], inputs[2][:1])


@example("kernel")
def test_the_line_that_uses_the_kernel(placed):
    """Wan's fused block with its last line replaced: the same block."""
    pytest.importorskip("triton")
    from vidaccel.families.wan import fused
    from vidaccel.kernels.gated_residual.op import gated_residual

    ((function, line),) = placed.last_lines.items()
    *others, last = getsource(getattr(fused, function.split(".")[0])).rstrip().split("\n")
    indent = last[: len(last) - len(last.lstrip())]
    assert last.strip().startswith("return ")
    namespace = vars(fused) | {"gated_residual": gated_residual}
    exec("\n".join([*others, indent + line]).replace("super()", f"super({function.split('.')[0]}, self)"), namespace)

    block = tiny_pipeline("wan").transformer.blocks[0]
    D = block.scale_shift_table.shape[-1]
    angles = torch.rand(1, 9, 1, D // 4)
    rotations = tuple(f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    arguments = normal(1, 9, D), normal(1, 3, D, seed=1), normal(1, 6, D, seed=2), rotations
    found = []
    for cls in (fused.FusedWanBlock, namespace["FusedWanBlock"]):
        block.__class__, block.kernels = cls, "fused"
        with torch.no_grad():
            found.append(block(*arguments))
    torch.testing.assert_close(*found)


@example("row")
def test_a_row(placed, monkeypatch):
    monkeypatch.chdir(placed.folder)
    result = run("benchmark", "--plan", "--json", "--conf", "mine.yaml")
    assert result.exit_code == 0, result.output
    runs = {each["method"]: each for each in json.loads(result.stdout)["runs"]}
    assert runs.keys() == {"cfg-50", "student-6", "gentle"}
    assert runs["student-6"]["passes"]["full"] == 6 and runs["gentle"]["error"]
    result = run("benchmark", "--speedup", "--conf", "mine.yaml", "methods.gentle.settings.treshold=1")
    assert result.exit_code == 2 and 'teacache has no setting "treshold"' in result.stderr


def benchmark(folder, model, **settings):
    """Results of a benchmark of tiny size, by row."""
    rows = {"full": MethodConfig(weights="teacher", two_pass=True, steps=4)} | settings.pop("methods", {})
    config = BenchmarkConfig(
        family="wan", model=str(model), dtype="float32", sizes=[list(SIZE.values())], baseline="full",
        methods=rows, rounds=2, timed_seconds=0, **settings,
    )  # fmt: skip
    results = api.benchmark(config, folder, quality="scorer" in settings, device="cpu")
    return {each["method"]: each for each in results["runs"]}


@example("baseline")
def test_a_baseline(placed, wan):
    text = next(page for page in EXTENDING if page.name == "extending.md").read_text()
    row = re.search(r"`alternate: \{steps: 20, cache: alternate, settings: \{every: (\d)\}\}` is a row", text)
    own = {"cache": "alternate", "settings": {"every": int(row[1])}, "weights": "teacher", "two_pass": True}
    methods = {"mine": MethodConfig(steps=4, **own)}
    mine = benchmark(placed.folder / "bench", wan[0], prompts=["a circle"], methods=methods)["mine"]
    assert mine["error"] is None
    assert (mine["full_steps"], mine["passes"]) == ([0, 2], {"full": 4, "predicted": 0, "skipped": 4})
    with pytest.raises(UserError, match="no setting"):
        wrong = MethodConfig(steps=4, cache="alternate", settings={"evry": 2})
        benchmark(placed.folder / "other", wan[0], prompts=["a circle"], methods={"mine": wrong})


@example("world")
def test_a_world(placed, wan, monkeypatch):
    import vidaccel.worlds

    bar = vidaccel.worlds.world("bar")
    assert not any(name.startswith("bar/") for name in vidaccel.worlds.shipped_models())
    monkeypatch.setattr(tiny, "VOCABULARY", (*tiny.SPECIAL, *sorted({word for p in bar.PROMPTS for word in p.split()})))
    model = save_teacher(placed.folder / "model", "wan")
    loaded, other = load_pipeline(model), load_pipeline(wan[0])

    source, scorer = open_source(loaded, CollectConfig(clips=9)), bar.scorer()
    assert len(source) == 9 and source.fingerprint["world"] == "bar"
    with pytest.raises(UserError, match="no model of a world"):
        open_source(other, CollectConfig(clips=9))
    bank = world_bank(loaded, 3, captions=1, seed=0)
    assert len(bank) == 3 and bank.batch([2], torch.float32)["latent"].isfinite().all()
    assert world_bank(other, 3, captions=1, seed=0) is None
    seen = set()
    for index in range(9):
        video, record = source[index]
        assert video.shape == (3, *SIZE.values()) and set(video.unique().tolist()) == {-1.0, 1.0}
        assert torch.equal(video, source[index][0]) and record == source.record(index)
        frames = ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        scores = {prompt: scorer.score(frames, prompt)["direction"] for prompt in bar.PROMPTS}
        assert scores == {prompt: float(prompt == record["caption"]) for prompt in bar.PROMPTS}
        seen.add(record["caption"])
    assert seen == set(bar.PROMPTS)
    with pytest.raises(UserError, match="no prompt of the bar world"):
        scorer.score(frames, "a red circle")

    plan = api.collect_features("sprites", placed.folder / "features", device="cpu", model=str(model), clips=3)
    assert plan.count == 3
    runs = benchmark(placed.folder / "bench", model, scorer="bar", scored_prompts=2)
    total = runs["full"]["total"]
    assert 0 <= runs["full"]["dimensions"]["direction"] == total <= 100


def test_what_was_placed_is_gone_again(tmp_path):
    before = dict(FORECASTERS), set(sys.modules), list(vidaccel.forecasters.__path__)
    for placed in place("forecaster", tmp_path):
        assert "average" in FORECASTERS and placed.folder == tmp_path
        importlib.import_module("vidaccel.forecasters.average")
    assert before == (dict(FORECASTERS), set(sys.modules), list(vidaccel.forecasters.__path__))
