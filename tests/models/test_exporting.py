"""Models that diffusers loads without vidaccel make what they make here, at the scale that they were fixed at."""

import json
import logging
import warnings

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import vidaccel
from tests.models.test_adapters import comfyui
from tests.students import contents, save, save_teacher, student, trained
from tests.tiny import SIZE
from vidaccel.artefacts import sha256_file
from vidaccel.cli.main import app
from vidaccel.compat.diffusers import hook_registry
from vidaccel.errors import UserError
from vidaccel.models.calling import call_arguments
from vidaccel.models.exporting import export_model
from vidaccel.models.grid import running_grid
from vidaccel.models.loading import LoadedPipeline, load_pipeline, of_one


def guided(folder, family: str) -> LoadedPipeline:
    """A student that embeds g alone; of two transformers both."""
    if family != "wan22":
        return load_pipeline(student(folder, family, ("g",)))
    teacher = of_one(load_pipeline(save_teacher(folder / "teacher", family)), "transformer")
    first = load_pipeline(save(folder / "first", teacher, trained(teacher, ("g",))))
    second = of_one(first, "transformer_2")
    return load_pipeline(save(folder / "both", second, trained(second, ("g",))))


def latents(pipe, **arguments) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", generator=generator, output_type="latent", **arguments).frames


@pytest.mark.parametrize("family", ["wan", "wan22", "hunyuan_video_15", "ltx_video"])
def test_a_student_at_a_fixed_scale(family, tmp_path):
    loaded = guided(tmp_path, family)
    before = {name: weight.clone() for name, weight in loaded.pipe.transformer.state_dict().items()}
    second = {"guidance_2": 2.0} if family == "wan22" else {}
    arguments = export_model(tmp_path / "plain", loaded, guidance=5.0, **second)
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.pipe.transformer.state_dict().items())
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "plain")
    assert type(plain).__module__.startswith("diffusers.") and type(plain.scheduler).__module__.startswith("diffusers.")
    assert hook_registry(plain.transformer) is None
    made = latents(plain, **arguments)
    assert arguments["num_inference_steps"] == 4
    own = loaded.pipe.scheduler
    own.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert running_grid(own, loaded.family).fits(running_grid(plain.scheduler, loaded.family).times)
    loaded.pipe.scheduler = type(plain.scheduler).from_config(plain.scheduler.config)
    for each, scale in zip((loaded, *loaded.further), (5.0, 2.0), strict=False):
        each.hook.guidance = scale
    torch.testing.assert_close(made, latents(loaded.pipe, **arguments), rtol=1e-3, atol=1e-4)
    loaded.hook.guidance = 1.0
    assert not torch.allclose(made, latents(loaded.pipe, **arguments), rtol=1e-2, atol=1e-3)
    again = load_pipeline(tmp_path / "plain")  # here it is a plain model that is called without guidance
    assert again.conditioning is None and again.guidance == 1.0 and again.default("steps") == 4
    assert "negative_prompt" not in again.call and again.call["num_frames"] == SIZE["num_frames"]


def test_a_plain_model_with_its_loras(tmp_path):
    save_teacher(tmp_path / "wan", "wan")
    save_file(comfyui(), tmp_path / "lora.safetensors")
    lora = [f"{tmp_path / 'lora.safetensors'}:0.5"]
    arguments = vidaccel.export_model(tmp_path / "fused", model=str(tmp_path / "wan"), lora=lora)
    assert arguments["guidance_scale"] == 3.0 and arguments["negative_prompt"] == ""
    expected = load_pipeline(tmp_path / "wan", lora=lora).pipe.transformer.state_dict()
    plain = diffusers.WanPipeline.from_pretrained(tmp_path / "fused")
    assert isinstance(plain.scheduler, diffusers.UniPCMultistepScheduler)
    assert all(torch.equal(weight, expected[name]) for name, weight in plain.transformer.state_dict().items())
    run = json.loads((tmp_path / "fused" / "run.json").read_text())
    assert run["config"]["lora"] == lora
    files = {"model": tmp_path / "wan" / "run.json", "lora.0": tmp_path / "lora.safetensors"}
    assert run["parents"] == {role: sha256_file(file) for role, file in files.items()}


def test_of_two_plain_transformers_each_keeps_its_scale(tmp_path):
    loaded = load_pipeline(save_teacher(tmp_path / "two", "wan22"))
    arguments = export_model(tmp_path / "plain", loaded, guidance=4.0, guidance_2=2.0)
    assert (arguments["guidance_scale"], arguments["guidance_scale_2"]) == (4.0, 2.0)
    again = call_arguments(load_pipeline(tmp_path / "plain"))
    assert (again["guidance_scale"], again["guidance_scale_2"]) == (4.0, 2.0)


def test_what_diffusers_has_no_place_for_is_refused(tmp_path):
    loaded = load_pipeline(student(tmp_path, "wan"))
    with pytest.raises(UserError, match=r"how far it goes \(r\)"):
        export_model(tmp_path / "plain", loaded)
    assert not (tmp_path / "plain").exists()
    first = of_one(load_pipeline(save_teacher(tmp_path / "two", "wan22")), "transformer")
    half = load_pipeline(save(tmp_path / "half", first, trained(first, ("g",))))
    with pytest.raises(UserError, match="the transformer_2 of .* has not been distilled"):
        export_model(tmp_path / "plain", half)
    assert not (tmp_path / "plain").exists()
    for target, taken in (("plain.safetensors", loaded), ("half.safetensors", half)):
        with pytest.raises(UserError, match=r"how far it goes \(r\)|has not been distilled"):
            export_model(tmp_path / target, taken)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_pipeline_that_tells_r_itself_needs_nobody_else(tmp_path):
    loaded = load_pipeline(save_teacher(tmp_path / "anyflow", "anyflow"))
    arguments = export_model(tmp_path / "plain", loaded)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "plain")
    assert hook_registry(plain.transformer) is None and arguments["num_inference_steps"] == 3
    assert torch.equal(latents(plain, **arguments), latents(loaded.pipe, **arguments))


def test_times_that_rise_are_those_of_the_pipeline(tmp_path, caplog):
    """Mochi's, which gives its scheduler a list of its own, and calls its transformer with what is left of the way."""
    caplog.set_level(logging.INFO)
    loaded = load_pipeline(student(tmp_path, "mochi", ("g",)))
    arguments = export_model(tmp_path / "plain", loaded, guidance=5.0)
    assert "the pipeline of Mochi gives its scheduler times of its own" in caplog.text
    plain = diffusers.MochiPipeline.from_pretrained(tmp_path / "plain")
    assert plain.scheduler.config["invert_sigmas"] and plain.scheduler.config["shift"] == 1.0
    made = latents(plain, **arguments)
    loaded.pipe.scheduler = type(plain.scheduler).from_config(plain.scheduler.config)
    for scale, same in ((5.0, True), (1.0, False)):
        loaded.hook.guidance = scale
        assert torch.allclose(made, latents(loaded.pipe, **arguments), rtol=1e-3, atol=1e-4) == same
    again = load_pipeline(tmp_path / "plain")
    assert "shift" not in again.call and again.guidance == 1.0
    torch.testing.assert_close(latents(again.pipe, **arguments), made)


@pytest.mark.parametrize("family", ["wan", "wan22"])
def test_one_file_of_each_transformer_by_its_original_names(family, tmp_path):
    """What is in it is what the folder of the same model has, and its header says how it is to be called."""
    loaded = guided(tmp_path, family)
    arguments = export_model(tmp_path / "plain", loaded, guidance=5.0)
    assert export_model(tmp_path / "m.safetensors", loaded, guidance=5.0) == arguments
    files = {"transformer": "m.safetensors"}
    if family == "wan22":
        files = {name: f"m.{name}.safetensors" for name in ("transformer", "transformer_2")}
    assert {file.name for file in tmp_path.glob("*.safetensors")} == set(files.values())
    for name, file in files.items():
        folder = tmp_path / "plain" / name
        expected = diffusers.WanTransformer3DModel.from_pretrained(folder).state_dict()
        how = {"config": str(tmp_path / "plain"), "subfolder": name, "local_files_only": True}
        made = diffusers.WanTransformer3DModel.from_single_file(str(tmp_path / file), **how).state_dict()
        assert made.keys() == expected.keys() and all(torch.equal(made[key], expected[key]) for key in made)
        with safe_open(tmp_path / file, framework="pt") as opened:
            said = json.loads(opened.metadata()["vidaccel"])
        assert said["call"]["guidance"] == 1.0 and said["call"]["steps"] == 4 and said["parents"].keys() == {"model"}
    with pytest.raises(UserError, match=r"m\..*safetensors is there already"):
        export_model(tmp_path / "m.safetensors", loaded)
    *_, last = (getattr(loaded.pipe, name) for name in files)
    last.register_buffer("of_nobody", torch.zeros(1))
    with pytest.raises(UserError, match="have no original name, such as of_nobody"):
        export_model(tmp_path / "n.safetensors", loaded)
    assert not list(tmp_path.glob("*n.*"))  # nor the first of two


def test_an_adapter_is_a_lora_of_the_pipeline_that_it_was_trained_on(tmp_path):
    """Loaded by diffusers alone, at the scale that it was fixed at."""
    teacher = load_pipeline(save_teacher(tmp_path / "teacher", "wan"))
    targets = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn1.to_q", "attn2.to_out.0", "ffn.net.2")]
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    teacher.pipe.transformer.add_adapter(adapter)
    folder, file = save(tmp_path / "student", teacher, trained(teacher, ("g",))), tmp_path / "m.lora.safetensors"
    loaded = load_pipeline(folder)
    arguments = vidaccel.export_model(file, model=str(folder), guidance=5.0)
    assert arguments["guidance_scale"] == 1.0 and arguments["num_inference_steps"] == 4
    plain = diffusers.WanPipeline.from_pretrained(tmp_path / "teacher")
    plain.load_lora_weights(tmp_path, weight_name=file.name)
    beside = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "teacher", subfolder="transformer")
    beside.load_lora_adapter(tmp_path, prefix="transformer", weight_name=file.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Adapter")  # its biases are no shards of anything
        load_pipeline(tmp_path / "teacher", lora=[f"{file}:1"])
    own, added = plain.transformer.state_dict(), beside.state_dict()
    assert own.keys() == added.keys()
    names = {key: [each for each in own if ".lora_B" in each and each.endswith(key)] for key in ("weight", "bias")}
    assert len(names["weight"]) == len(names["bias"]) == len(targets) + 1
    plain.scheduler = loaded.pipe.scheduler
    for scale, same in ((5.0, True), (1.0, False)):
        loaded.hook.guidance = scale
        made = [latents(pipe, **arguments) for pipe in (plain, loaded.pipe)]
        assert torch.allclose(*made, rtol=1e-3, atol=1e-4) == same
    with safe_open(file, framework="pt") as opened:
        said = json.loads(opened.metadata()["vidaccel"])
    assert said["call"]["shift"] == 2.0 and said["parents"].keys() == {"model"}
    with pytest.raises(UserError, match=r"m\.lora\.safetensors is there already"):
        export_model(file, loaded)
    with pytest.raises(UserError, match="teacher has no adapter of its own"):
        vidaccel.export_model(tmp_path / "n.lora.safetensors", model=str(tmp_path / "teacher"))


def test_what_no_file_can_be_made_of_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    for family in ("ltx_video", "wan22"):
        save_teacher(tmp_path / family, family)
    (tmp_path / "m.transformer_2.safetensors").touch()
    monkeypatch.setattr("vidaccel.models.loading.load_pipeline", None)
    with pytest.raises(UserError, match="what the authors of LTX-Video call its weights is not known here"):
        vidaccel.export_model(tmp_path / "m.safetensors", model=str(tmp_path / "ltx_video"))
    with pytest.raises(UserError, match=r"m\.transformer_2\.safetensors is there already"):
        vidaccel.export_model(tmp_path / "m.safetensors", model=str(tmp_path / "wan22"))


def test_no_folder_is_emptied_for_an_export(tmp_path):
    """One that holds anything is refused before a weight is read: the model itself, and whatever else is named."""
    model = save_teacher(tmp_path / "wan", "wan")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("precious")
    before = contents(tmp_path)
    for target in (model, tmp_path / "home", tmp_path):
        with pytest.raises(UserError, match="is there already"):
            vidaccel.export_model(target, model=str(model))
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    vidaccel.export_model(tmp_path / "empty", model=str(model))
    assert (tmp_path / "empty" / "model_index.json").exists()


def test_the_command(tmp_path):
    guided(tmp_path, "wan")
    words = ["generate", "--export", f"model={tmp_path / 'student'}", "guidance=5", "-o", str(tmp_path / "plain")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "call its pipeline with num_inference_steps=4, " in result.stdout and "guidance_scale=1.0" in result.stdout
    readme = (tmp_path / "plain" / "README.md").read_text()
    assert "its guidance fixed at 5" in readme and "WanPipeline.from_pretrained" in readme
    assert "--export" in (tmp_path / "student" / "README.md").read_text()
    for wrong, message in (
        (words[:-2], "and none is named"),
        ([*words, "a cat"], "not a video of a cat"),
        ([*words, "shift=3"], "shift=3.0 is of making videos, and an export makes none"),
        ([*words, "decoder=runs/decoder"], "decoder=runs/decoder is of making videos"),
        ([*words, "--json"], "--export came with --json"),
    ):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 2 and message in refused.stderr
