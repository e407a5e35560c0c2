"""`python -m vidaccel.sprites ship`: a student of the shipped teacher, predictor and scalars, through real files."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.students import STARTED, save, trained
from vidaccel.artefacts import CHECKPOINTS, RUN_FILE, read_run, sha256_file, verify_files, write_json, write_run
from vidaccel.bench.rows import Row, blank_run
from vidaccel.cache.schedule import Schedule, write_schedules
from vidaccel.cache.whole_pass import WholePass
from vidaccel.config.benchmark import MethodConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.forecasters.learned import new_predictor
from vidaccel.forecasters.multistep import FittedList, Multistep, MultistepConfig
from vidaccel.models.conditioning import embedding_width
from vidaccel.models.decoder import autoencoder_hash, write_decoder
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.models.weight_hashes import student_hash
from vidaccel.sampling import generate, predicted_steps
from vidaccel.train.methods.decoder import DecoderTraining
from vidaccel.train.methods.decoder.method import student_of
from vidaccel.worlds.sprites import SHIPPED
from vidaccel.worlds.sprites.__main__ import app

PROMPT = "a red circle moving right on black"
TOTALS = {"cfg-50": 80.125, "student-8": 70.25, "predictor-2-of-4": 60.5, "student-fora-3": 50.75}
METHODS = {
    "cfg-50": MethodConfig(weights="teacher", two_pass=True),
    "student-8": MethodConfig(steps=8),
    "predictor-2-of-4": MethodConfig(steps=4, budget=2),
    "student-fora-3": MethodConfig(steps=20, cache="fora", every=3, on_skipped="branches"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folders cfg, student, predictor, scalars and shipped, and a results.json with a row of each kind."""
    root = tmp_path_factory.mktemp("chain")
    teacher = load_pipeline("sprites/teacher")
    for name in ("cfg", "student"):
        save_metrics(root / name, step=7, seconds=120.0, loss=0.25, skipped=3)
        config = DistillConfig(method="cfg" if name == "cfg" else "mean_velocity")
        save(root / name, teacher, trained(teacher), config=asdict(config))
    student = load_pipeline(root / "student")
    save_predictor(root / "predictor", student)
    save_scalars(root / "scalars", student)
    write_json(root / "results.json", {"command": "vidaccel benchmark --quality", "runs": [result(n) for n in METHODS]})
    words = ["--results", root / "results.json", "--remark", "It was interrupted once."]
    words += ["--predictor-remark", "Reuse is nearer.", "--scalars-remark", "Made in a minute."]
    words += ["--scalars", root / "scalars"]
    run("ship", *places(root), *words, "-o", root / "shipped")
    return root


def save_predictor(folder: Path, student: LoadedPipeline) -> None:
    """An untrained one for 4 steps, with a schedule and numbers on top, as if its first stage had been trained."""
    transformer, family = student.pipe.transformer, student.family
    tokens = torch.randn(1, 8, embedding_width(transformer, family))
    cached = dict.fromkeys(family.block_lists[-1].returns, tokens)
    made_for = {"steps": 4, "shift": 2.0, "student": student_hash(student)}
    network = new_predictor(transformer, family, cached, cached, 1, **made_for)
    on_top = FittedList((0, 2), {1: (0.5, 0.5, 0.0, 0.0), 3: (0.5, 0.5, *[0.0] * 4)}, 4, 2.0, error=0.1, network=True)
    network.scalars = Multistep(MultistepConfig(family.name, student_hash(student), (1.0, 4.0), False, (on_top,)))
    network.save_pretrained(folder)
    write_schedules(folder / "schedule.json", [Schedule(4, (0, 2), "search", 2.0, 0.1)])
    save_metrics(folder / CHECKPOINTS / "mse", step=5, seconds=60.0, loss=0.5, skipped=0)
    config = asdict(PredictorConfig(adversarial=TrainConfig(steps=0)))
    searched = [{"steps": 4, "shift": 2.0, "guidance": 3.0, "prompts": 1}]
    write_run(
        folder, format="predictor/1", command="test", config=config, seed=0, started=STARTED, searched_on=searched
    )


def save_scalars(folder: Path, student: LoadedPipeline) -> None:
    """Made up, for two lists of 4 steps, of one of which it is known what reuse does."""
    lists = [
        FittedList((0, 2), {1: (0.9, 0.0, 0.1), 3: (0.8, 0.1, 0.0, 0.1, 0.0)}, 4, 2.0, error=0.25),
        FittedList((0,), dict.fromkeys((1, 2, 3), (1.0, 0.0, 0.1)), 4, 2.0, error=0.5),
    ]
    folder.mkdir()
    Multistep(MultistepConfig("hunyuan_video", student_hash(student), (1.0, 4.0), False, tuple(lists))).save_pretrained(
        folder
    )
    write_schedules(folder / "schedule.json", [Schedule(4, each.full_steps, "search", 2.0) for each in lists])
    config = PredictorConfig(student="runs/mine", forecaster="multistep", steps=4, guidance_range=[1, 4])
    compared = [{"steps": 4, "full_steps": [0, 2], "error": 0.25, "of_reuse": 0.625}]
    write_run(
        folder,
        format="multistep/1",
        command="test",
        config=asdict(config),
        seed=0,
        started=STARTED,
        searched_on=[],
        compared=compared,
    )


def save_metrics(folder: Path, **last: float) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps(last) + "\n")


def result(name: str) -> dict:
    row = blank_run(Row(name, METHODS[name], (17, 64, 64)), "hunyuan_video")
    passes = {"full": 4, "predicted": 2 * METHODS[name].predicts, "skipped": 0}
    scores = {"semantic": 11.0, "quality": 22.0, "total": TOTALS[name], "intervals": {"total": [1.0, 99.0]}}
    return row | scores | {"passes": passes, "fidelity": None if name == "cfg-50" else {"latent_relative_l2": 0.123}}


def places(root: Path) -> list[str | Path]:
    return ["--student", root / "student", "--predictor", root / "predictor", "--distilled", root / "cfg"]


def run(*words: str | Path, fails: bool = False) -> str:
    got = CliRunner().invoke(app, list(map(str, words)))
    assert got.exit_code == (2 if fails else 0), got.output
    return got.output


def test_the_student_is_the_same_model_in_fewer_bytes(made):
    whole, own = load_pipeline(made / "student"), load_pipeline(made / "shipped" / "student")
    assert student_hash(whole) == student_hash(own)
    assert not (made / "shipped" / "student" / "vae").exists()
    assert own.call == whole.call
    videos = [generate(model, [PROMPT], GenerateConfig(steps=2), [0]) for model in (whole, own)]
    assert (videos[0].frames == videos[1].frames).all()
    assert own.pipe.scheduler.config.shift == whole.pipe.scheduler.config.shift


def test_the_predictor_goes_with_it(made):
    own = load_pipeline(made / "shipped" / "student")
    config = GenerateConfig(predictor=str(made / "shipped" / "predictor"), budget=2, steps=4)
    with predicted_steps(own, config) as attachment:
        assert isinstance(attachment, WholePass)  # the scalars on top of it have come along
        made = generate(own, [PROMPT], config, [0], attachment)
    assert (made.passes, made.predicted) == (4, 2)


def test_the_scalars_go_with_it_and_their_card_has_the_error_of_each_list(made):
    shipped = made / "shipped" / "scalars"
    config = GenerateConfig(predictor=str(shipped), budget=2, steps=4)
    own = load_pipeline(made / "shipped" / "student")
    with predicted_steps(own, config) as attachment:
        video = generate(own, [PROMPT], config, [0], attachment)
    assert (video.passes, video.predicted) == (4, 2)
    card = (shipped / "README.md").read_text()
    assert "| 0 of 4 | 0.500 |  |\n| 0 2 of 4 | 0.250 | 0.62 |\n" in card and "guidance from 1 to 4." in card
    assert "    vidaccel train-predictor forecaster=multistep student=runs/mine steps=4 guidance_range=[1,4]\n" in card
    assert "Made in a minute." in card and "forecaster: multistep" in card
    for name in ("config.json", "schedule.json"):
        assert (shipped / name).read_bytes() == (made / "scalars" / name).read_bytes()
    assert read_run(shipped, "multistep/1")["compared"] == read_run(made / "scalars", "multistep/1")["compared"]


def test_what_is_named_is_shipped(made, tmp_path):
    output = run("ship", "--scalars", made / "scalars", "-o", tmp_path / "shipped")
    assert f"{tmp_path / 'shipped'}: scalars, with a card each" in output
    assert [folder.name for folder in (tmp_path / "shipped").iterdir()] == ["scalars"]
    assert "nothing to ship is named" in run("ship", "-o", tmp_path / "none", fails=True)
    assert "where multistep/1 is needed" in run(
        "ship", "--scalars", made / "predictor", "-o", tmp_path / "none", fails=True
    )
    assert not (tmp_path / "none").exists()


def test_all_are_vouched_for(made):
    for name, kind in (("student", "model/1"), ("scalars", "multistep/1"), ("predictor", "predictor/1")):
        folder = made / "shipped" / name
        record = read_run(folder, kind)
        verify_files(folder, record)
        assert "README.md" in record["files"]
    assert record["searched_on"] == read_run(made / "predictor", "predictor/1")["searched_on"]
    parents = read_run(made / "shipped" / "student", "model/1")["parents"]
    own = read_run(made / "student", "model/1")["parents"]["teacher"]
    assert parents == {"teacher": own, "pipeline": sha256_file(SHIPPED / "teacher" / RUN_FILE)}


def test_the_cards_quote_trainings_and_results(made):
    student, predictor = ((made / "shipped" / name / "README.md").read_text() for name in ("student", "predictor"))
    assert all("Rows of `vidaccel benchmark --quality`." in card for card in (student, predictor))
    for name, passes, card, other in (
        ("student-8", "4", student, predictor),
        ("predictor-2-of-4", "4 + 2", predictor, student),
    ):
        assert f"| {name} | {passes} | 11.0 | 22.0 | {TOTALS[name]:.1f} | 1.0 to 99.0 | 0.123 |" in card
        assert f"| {name} |" not in other
    assert "| cfg-50 | 4 | 11.0 | 22.0 | 80.1 | 1.0 to 99.0 | 0.000 |" in student
    assert "fora" not in student + predictor
    assert "It was interrupted once." in student and "interrupted" not in predictor
    assert "Reuse is nearer." in predictor and "nearer" not in student
    assert "searched on grids of 4 steps" in predictor
    assert "| CFG distillation | 7 | 2 | 0.2500 | 3 |" in student and "| few steps | 7 | 2 | 0.2500 | 3 |" in student
    assert "| predictor, mse | 5 | 1 | 0.5000 | 0 |" in predictor and "adversarial |" not in predictor
    teacher = read_run(made / "student", "model/1")["config"]["teacher"]
    for card, command in (
        (student, f"distill --conf sprites/cfg -o {made / 'cfg'}"),
        (student, f"distill --conf sprites/restricted_meanflow -o {made / 'student'} teacher={teacher}"),
        (predictor, "train-predictor --conf sprites student=sprites/student"),
    ):
        assert f"    vidaccel {command}\n" in card and f"## Settings of `vidaccel {command}`" in card


def test_without_results_the_cards_have_no_scores(made, tmp_path):
    run("ship", *places(made), "-o", tmp_path / "shipped")
    assert "How it scores" not in (tmp_path / "shipped" / "student" / "README.md").read_text()


def test_weights_that_were_not_kept_are_said_to_be(made, tmp_path):
    run("ship", *places(made)[:4], "-o", tmp_path / "shipped")
    card = (tmp_path / "shipped" / "student" / "README.md").read_text()
    assert "The weights of the CFG distillation that it goes on from were not kept." in card
    assert "| few steps | 7 | 2 | 0.2500 | 3 |" in card and "| CFG distillation |" not in card
    assert "not kept" not in (made / "shipped" / "student" / "README.md").read_text()


def test_what_a_script_trained_is_shipped_with_its_command_and_machine(made, tmp_path):
    """It has neither metrics.jsonl nor the settings of a command."""
    teacher = load_pipeline("sprites/teacher")
    save(tmp_path / "student", teacher, trained(teacher), command="python train.py 60", config={"batch_size": 512})
    words = ["--student", tmp_path / "student", "--machine", "one NVIDIA H200, torch 2.11"]
    run("ship", *words, *places(made)[2:4], "-o", tmp_path / "shipped")
    folder = tmp_path / "shipped" / "student"
    card = (folder / "README.md").read_text()
    assert "    python train.py 60\n\nOn one NVIDIA H200, torch 2.11, seed 0.\n" in card
    assert "## Settings of `python train.py 60`\n\n```yaml\nbatch_size: 512\n```" in card
    assert "guidance included, in 4 steps unless" in card and "| stage |" not in card
    assert read_run(folder, "model/1")["command"] == "python train.py 60"
    assert "H200" not in (tmp_path / "shipped" / "predictor" / "README.md").read_text()


def test_a_student_of_another_model_is_refused(made, tmp_path):
    teacher = load_pipeline("sprites/teacher")
    other = tmp_path / "other"
    shutil.copytree(teacher.source, other)
    teacher.pipe.vae.decoder.conv_out.conv.bias.data += 1
    teacher.pipe.vae.save_pretrained(other / "vae")
    (other / RUN_FILE).unlink()
    save(tmp_path / "student", replace(teacher, source=str(other)), trained(teacher), config=asdict(DistillConfig()))
    output = run("ship", "--student", tmp_path / "student", *places(made)[2:], "-o", tmp_path / "shipped", fails=True)
    assert (
        f"the vae/diffusion_pytorch_model.safetensors of {tmp_path / 'student'} is not that of sprites/teacher"
        in output
    )
    assert not (tmp_path / "shipped").exists()


def test_a_decoder_gets_a_card_and_decodes_as_before(tmp_path):
    teacher = load_pipeline("sprites/teacher")
    settings = DecoderTraining(widths=[2, 2, 4, 4], layers_per_block=0)
    write_decoder(tmp_path / "made", student_of(teacher.pipe.vae, teacher.family, settings), torch.float16)
    config = asdict(DistillConfig(method="decoder", decoder=settings))
    save_metrics(tmp_path / "more", step=7, seconds=120.0, loss=0.25, skipped=3)
    (tmp_path / "more" / "metrics.jsonl").rename(tmp_path / "made" / "metrics.jsonl")
    of = {"family": "hunyuan_video", "autoencoder": autoencoder_hash(teacher.hashes)}
    of |= {"measured": {"psnr_db": 31.25, "clips": 16}}
    common = {"command": "vidaccel distill", "config": config, "seed": 0, "started": STARTED}
    write_run(tmp_path / "made", format="decoder/1", **common, **of)
    words = ["--decoder", tmp_path / "made", "--decoder-remark", "Halted twice.", "-o", tmp_path / "shipped"]
    assert "decoder, with a card each" in run("ship", *words)
    shipped, run_file = tmp_path / "shipped" / "decoder", read_run(tmp_path / "shipped" / "decoder", "decoder/1")
    verify_files(shipped, run_file)
    assert {key: run_file[key] for key in of} == of
    card = (shipped / "README.md").read_text()
    assert "in place of 1,488,355, channels [2, 2, 4, 4] of [16, 24, 48, 64]. 31.2 dB" in card
    assert "Halted twice." in card and "| decoder | 7 | 2 | 0.2500 | 3 |" in card
    latent = torch.randn(1, 16, 1, 8, 8)
    before, after = (load_pipeline("sprites/student", decoder=each) for each in (tmp_path / "made", shipped))
    with torch.no_grad():
        assert torch.equal(*(each.pipe.vae.decode(latent).sample for each in (before, after)))


def test_an_unfinished_folder_is_refused(made, tmp_path):
    output = run("ship", *places(made)[:4], "--distilled", tmp_path, "-o", tmp_path / "shipped", fails=True)
    assert "is not a finished model folder" in output
