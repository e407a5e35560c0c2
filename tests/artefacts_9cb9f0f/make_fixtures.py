"""Files as commit 9cb9f0f wrote them, and what reading them back with that commit gives. See README.md beside this.

    cd TREE && PYTHONPATH=TREE OMP_NUM_THREADS=1 python .../make_fixtures.py make OUT      # TREE at 9cb9f0f
    cd TREE && PYTHONPATH=TREE OMP_NUM_THREADS=1 python .../make_fixtures.py expect OUT    # expected.json again
    cd TREE && PYTHONPATH=TREE OMP_NUM_THREADS=1 python .../make_fixtures.py check OUT     # the same, compared
    cd TREE && PYTHONPATH=TREE OMP_NUM_THREADS=1 python .../make_fixtures.py shipped OUT WEIGHTS

The last makes `score` and `latents` alone again, with later weights, those in the folder WEIGHTS, in place of TREE's.

Everything is made in a temporary folder that is the working directory, with relative paths only, by the commands that
README.md lists, run in this process so that some can be stopped half way. `expect` reads all of it back from a copy.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import hashlib
import json
import math
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel
from typer.testing import CliRunner

import vidaccel
from tests.tiny import HUNYUAN_CALL, SIZE, VOCABULARY, word_tokenizer
from vidaccel import config as configuration
from vidaccel.artefacts import read_run, sha256_file, verify_files, write_json, write_run
from vidaccel.bench import runner as bench
from vidaccel.cache.schedule import read_schedules
from vidaccel.cli.main import app
from vidaccel.collect.encode import encode_texts
from vidaccel.data.clips import write_clips
from vidaccel.data.shards import ShardFolder
from vidaccel.models.identity import student_hash
from vidaccel.models.loading import load_pipeline
from vidaccel.predictor.forecasters import Cached
from vidaccel.predictor.network import Predictor
from vidaccel.sprites.__main__ import app as sprites
from vidaccel.train.distill import velocity_of
from vidaccel.train.objective import Distillation
from vidaccel.train.pairs import Pairs

MODELS = ("teacher", "cfg", "student", "lora")
CAPTIONS = ["a red circle moving right on black", "a blue square on white", "a green circle moving left"]
PROMPT = "a red circle moving right on black"
TINY_CALL = {**SIZE, **HUNYUAN_CALL, "max_sequence_length": 16}
SPRITES_CALL = {
    "num_frames": 17,
    "height": 64,
    "width": 64,
    "prompt_template": {"template": "{}", "crop_start": 0},
    "max_sequence_length": 32,
}
TWO_PASS = {"true_cfg_scale": 3.0, "guidance_scale": 1.0, "negative_prompt": ""}
KEPT = {  # latents of the shipped models: model, steps, arguments of attach, further ones of the call
    "teacher": ("sprites/teacher", 6, None, TWO_PASS),
    "student": ("sprites/student", 8, None, {}),
    "student+predictor": ("sprites/student", 8, {"predictor": "sprites/predictor", "steps": 8, "budget": 4}, {}),
}

SCORE = (
    "score",
    "sprites/student",
    "predictor=sprites/predictor",
    "steps=8",
    "budget=4",
    "--prompts",
    "10",
    "-o",
    "score",
)
RESULTS = (  # fields of a row that are the same each time
    "passes",
    "full_steps",
    "flops",
    "cache_bytes",
    "parameters",
    "error",
    "fidelity",
    "prompts",
    "seeds",
)

CONF = {
    "collect-features": """\
# Clips and captions of the tiny pipeline, encoded.
kind: encoded
model: teacher
data: clips
store: float16
per_shard: 2
batch_size: 1
max_bad_share: 0.0
max_gigabytes: 0.1
tiling: false
""",
    "collect-trajectories": """\
# The tiny student's own runs on the same captions.
kind: trajectory
model: student
data: clips
steps: 4
cache: false
store: float16
per_shard: 4
batch_size: 1
""",
    "distill-cfg": """\
# Two passes into one.
method: cfg
teacher: teacher
features: features
on_damage: stop
sample_steps: 6
guidance_range: [1.0, 4.0]
guidance: 3.0
times: logit_normal
train_shift: 3.0
prompts: [a red circle]
train:
  steps: 2
  batch_size: 2
  learning_rate: 1.0e-2
  warmup: 0
  ema_decay: 0.5
  log_every: 1
  save_every: 2
""",
    "distill-lora": """\
# The same as an adapter of rank 2, which is saved apart from its pipeline.
defaults: [distill-cfg, _self_]
merge_lora: false
train:
  lora_rank: 2
""",
    "distill": """\
# A few-step student of the one-pass model.
method: mean_velocity
teacher: cfg
features: features
sample_steps: 4
times: uniform
guidance_range: [1.0, 4.0]
guidance: 2.0
shift: 2.0
prompts: [a red circle]
mean_velocity:
  target: rollout
  restrict: 0.4
  restrict_end: 0.5
  equal_share: 0.3
  substeps: 1
  velocity: teacher
  difference_step: 0.02
  tangent_clip: null
  tangent_warmup: 0
  error_power: 0.5
  error_constant: 1.0e-3
  kernels: auto
  attention_precision: float32
train:
  steps: 4
  batch_size: 2
  accumulate: 1
  optimizer: muon
  learning_rate: 1.0e-2
  warmup: 1
  schedule: cosine
  weight_decay: 0.01
  clip_norm: 1.0
  ema_decay: 0.5
  log_every: 1
  save_every: 2
  evaluate_every: 100
  sample_every: 100
""",
    "train-predictor": """\
# On the student's own runs, predicted steps included, with a second stage against a discriminator.
student: student
features: trajectories
stage: all
blocks: 1
history: 2
pairs: trajectory
longest: 2
relative: true
search_prompts: 2
mse:
  steps: 3
  batch_size: 2
  learning_rate: 1.0e-2
  warmup: 0
  ema_decay: 0.5
  log_every: 1
  save_every: 3
adversarial:
  steps: 3
  batch_size: 2
  learning_rate: 1.0e-2
  warmup: 0
  ema_decay: 0.5
  log_every: 1
  save_every: 2
discriminator:
  depths: [0.5, 1.0]
  scales: [1, 2]
  width: 4
  learning_rate: 1.0e-2
  weight: 1.0
""",
    "train-predictor-clips": """\
# As published, on noised clips. Not run here: a file of settings.
student: student
features: features
pairs: data
history: 1
intervals: restricted
restrict: 0.5
lag: 0.2
guidance_range: [1.0, 4.0]
relative: false
adversarial:
  steps: 0
""",
    "generate": """\
# The tiny student and its predictor, two steps of four in full.
model: student
predictor: predictor
budget: 2
seed: 5
num_frames: 5
height: 32
width: 32
guidance: 2.0
instantaneous: false
force: false
dtype: float32
kernels: reference
attention: native
trim_text: false
""",
    "generate-shipped": """\
# The shipped default on another grid of its schedules.
defaults: [default, _self_]
steps: 8
budget: 4
seed: 3
""",
    "benchmark": """\
# Samplers, forecasts and a cache on the tiny models.
family: hunyuan_video
model: teacher
student: student
distilled: cfg
predictor: predictor
marker: null
dtype: float32
sizes: [[5, 16, 16]]
prompts: [a red circle, a green circle on black, blue]
seed: 7
rounds: 3
timed_prompts: 1
timed_seconds: 0
scored_prompts: 3
batch_size: 2
keep_videos: false
sweeps: true
baseline: cfg
only: [student, searched, listed, linear, reuse, taylor, first-block]
methods:
  cfg: {weights: teacher, steps: 6, two_pass: true, guidance: 3.0}
  distilled: {weights: teacher, steps: 6}
  student: {steps: 4}
  listed: {steps: 4, full_steps: [0, 2], between: predictor}
  searched: {steps: 6, budget: 3, shift: 3.0}
  linear: {steps: 4, every: 2, between: linear}
  reuse: {steps: 4, full_steps: [0, 2], between: trunk}
  taylor: {steps: 4, full_steps: [0, 1], between: trunk, order: 1}
  first-block: {steps: 4, cache: first_block, settings: {threshold: 9.0}, sweep: {threshold: [0.0]}}
""",
    "benchmark-shipped": """\
# The shipped models, marked as sprites.
defaults: [sprites, _self_]
marker: sprites
rounds: 2
scored_prompts: 2
timed_seconds: 0
only: [student-8, mine, linear-8]
baseline: student-20
methods:
  mine: {steps: 8, budget: 4}
  linear-8: {steps: 8, full_steps: [0, 2, 4, 7], between: linear}
""",
}
"""Settings as a user writes them, by file name, in the words of 9cb9f0f."""
COMMAND_OF = {  # each file's command, where its name does not begin with it
    "collect-trajectories": "collect-features",
    "distill-cfg": "distill",
    "distill-lora": "distill",
    "train-predictor-clips": "train-predictor",
    "generate-shipped": "generate",
    "benchmark-shipped": "benchmark",
}


# making


def tiny() -> HunyuanVideoPipeline:
    """tests/tiny.py's HunyuanVideo with half the width, and weights large enough for steps to matter."""
    width = 16
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": len(VOCABULARY)}
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,
        **ids,
    )
    clip = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        **ids,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=1,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        guidance_embeds=False,
        text_embed_dim=width,
        pooled_projection_dim=width,
        rope_axes_dim=(4, 4, 4),
    )
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=1.2 / math.sqrt(module.in_features))
    autoencoder = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(2, 2, 2, 2),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=word_tokenizer(),
        text_encoder_2=CLIPTextModel(clip),
        tokenizer_2=word_tokenizer(),
        transformer=transformer,
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return pipe.to(torch.float16)


def save_teacher() -> None:
    tiny().save_pretrained("teacher")
    call = SIZE | HUNYUAN_CALL | {"steps": 6, "guidance": 3.0, "fps": 8}
    moment = datetime(2000, 1, 1, tzinfo=UTC)
    write_run("teacher", format="model/1", command="make_fixtures.py", config={}, seed=0, started=moment, call=call)


def save_clips() -> None:
    rng = np.random.default_rng(0)
    clips = []
    for caption in CAPTIONS:
        start, end = rng.integers(0, 256, (2, 1, 1, 3))
        frames = np.linspace(start, end, 5).round().astype(np.uint8)
        clips.append((np.broadcast_to(frames, (5, 32, 32, 3)).copy(), caption))
    write_clips("clips", clips, fps=8)


def run(*words: str, program=app, code: int = 0) -> str:
    """A command line, in this process."""
    print("$", "vidaccel" if program is app else "python -m vidaccel.sprites", *words, flush=True)
    result = CliRunner().invoke(program, [str(word) for word in words])
    if result.exit_code != code:
        print(result.output)
        raise SystemExit(f"exit {result.exit_code}") from result.exception
    return result.stdout


@contextlib.contextmanager
def stopped(owner: type, name: str, when):
    """Ctrl-C in the method `owner.name` where `when` says so of its arguments."""
    plain = getattr(owner, name)

    def interrupted(self, *args, **kwargs):
        if when(self, *args):
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    setattr(owner, name, interrupted)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def make(out: Path) -> None:
    Path("conf").mkdir()
    for name, text in CONF.items():
        Path("conf", f"{name}.yaml").write_text(text)
    for command in configuration.SCHEMAS:
        printed = configuration.to_yaml(configuration.SCHEMAS[command]())
        place = Path("conf", "print-conf")
        place.mkdir(exist_ok=True)
        (place / f"{command}.yaml").write_text(printed)
    save_teacher()
    save_clips()
    run("collect-features", "--conf", "conf/collect-features.yaml", "-o", "features")
    with stopped_after_shards(3):
        run(
            "collect-features",
            "--conf",
            "conf/collect-features.yaml",
            "-o",
            "features-interrupted",
            "per_shard=4",
            code=130,
        )
    run("distill", "--conf", "conf/distill-cfg.yaml", "-o", "cfg")
    run("distill", "--conf", "conf/distill-lora.yaml", "-o", "lora")
    run("distill", "--conf", "conf/distill.yaml", "-o", "student")
    with stopped(Distillation, "draw", lambda self, index, generator: index == 2):
        run("distill", "--conf", "conf/distill.yaml", "-o", "distill-interrupted", code=130)
    run("collect-features", "--conf", "conf/collect-trajectories.yaml", "-o", "trajectories")
    run("train-predictor", "--conf", "conf/train-predictor.yaml", "-o", "predictor")
    run(
        "train-predictor",
        "--conf",
        "conf/train-predictor.yaml",
        "-o",
        "predictor",
        "stage=search",
        "steps=6",
        "shift=3",
    )
    calls = []

    def third_of_second_stage(self, index, *rest):
        calls.append(index)
        return calls.count(0) > 2 and index == 2  # 0 comes first for the statistics, then once a stage

    with stopped(Pairs, "draw", third_of_second_stage):
        run("train-predictor", "--conf", "conf/train-predictor.yaml", "-o", "predictor-interrupted", code=130)
    with stopped(bench.Benchmark, "_time_row", lambda self, row: row.name == "listed" and len(row.rounds) == 1):
        run("benchmark", "--speedup", "--conf", "conf/benchmark.yaml", "-o", "bench-timing", code=130)
    few = "only=[student,searched,first-block]"
    with stopped(bench.Benchmark, "_score_batch", lambda self, row, i, _: row.name == "searched" and i.start == 2):
        words = ("--speedup", "--quality", "--conf", "conf/benchmark.yaml", "-o", "bench-scoring", few, "rounds=2")
        run("benchmark", *words, code=130)
    run(*SCORE, program=sprites)
    keep_latents()
    strip()
    shutil.copytree(".", out, dirs_exist_ok=True)


@contextlib.contextmanager
def stopped_after_shards(count: int):
    """Ctrl-C at the `count`-th sample that is appended to a shard."""
    from vidaccel.data import shards

    plain, seen = shards._append, []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == count:
            raise KeyboardInterrupt
        return plain(*args)

    shards._append = interrupted
    try:
        yield
    finally:
        shards._append = plain


def shipped_latents() -> dict[str, torch.Tensor]:
    tensors, models = {}, {}
    for name, (model, steps, attached, more) in KEPT.items():
        loaded = models.get(model) or models.setdefault(model, load_pipeline(model, dtype="float32"))
        with vidaccel.attach(loaded, **attached) if attached else contextlib.nullcontext():
            tensors[name] = latents(loaded, PROMPT, 0, steps, SPRITES_CALL | more)
    return tensors


def keep_latents() -> None:
    Path("latents").mkdir()
    save_file(shipped_latents(), "latents/latents.safetensors")
    settings = {
        name: {"model": model, "steps": steps, "attach": attached, "call": SPRITES_CALL | more}
        for name, (model, steps, attached, more) in KEPT.items()
    }
    settings = {"prompt": PROMPT, "seed": 0, "dtype": "float32", "device": "cpu", "threads": 1, "cases": settings}
    Path("latents/settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_shipped(out: Path, weights: Path) -> None:
    """`score` and `latents` in `out`, and what is expected of them, of `weights`, which take the place of this tree's.

    A predictor's times are of a later format: this code computes the same from steps and shift.
    """
    place = Path(vidaccel.__file__).parent / "sprites" / "weights"
    shutil.rmtree(place)
    shutil.copytree(weights, place)
    config, schedules = (json.loads((place / "predictor" / f"{n}.json").read_text()) for n in ("config", "schedule"))
    for entry in (config, *(each for each in schedules.values() if isinstance(each, dict))):
        entry.pop("times", None)
    write_json(place / "predictor" / "config.json", config)
    write_json(place / "predictor" / "schedule.json", schedules)
    (place / "predictor" / "run.json").unlink()  # which vouches for those with times
    run(*SCORE, program=sprites)
    keep_latents()
    expected = json.loads((out / "expected.json").read_text())
    for name in ("score", "latents"):
        shutil.rmtree(out / name)
        shutil.copytree(name, out / name)
    expected |= {"score": score_again(), "latents": latents_again()}
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def strip() -> None:
    """What no test reads; and the one path that is not relative."""
    for name in (*MODELS, "predictor"):
        for part in ("checkpoints", "samples", "metrics.jsonl"):
            path = Path(name, part)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    run_file = Path("lora/run.json")
    record = json.loads(run_file.read_text())
    assert record["pipeline"] == str(Path("teacher").resolve())
    run_file.write_text(json.dumps(record | {"pipeline": "../teacher"}, indent=2, ensure_ascii=False) + "\n")


# reading back


def wave(*shape: int, step: float = 0.7) -> torch.Tensor:
    """sin(0, step, 2 step, ...): an input that needs no random numbers."""
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float64)).float().view(*shape)


def described(tensor: torch.Tensor) -> dict:
    flat = tensor.detach().double().flatten()
    return {"shape": list(tensor.shape), "norm": float(flat.norm()), "first": flat[:4].tolist()}


@torch.no_grad()
def latents(loaded, prompt: str, seed: int, steps: int, call: dict) -> torch.Tensor:
    loaded.pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = loaded.pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **call).frames
    return made.float().contiguous()


@torch.no_grad()
def velocity(loaded) -> torch.Tensor:
    """u(x, r, t) of wave(1, 4, 2, 4, 4) at t = 0.7, r = 0.4, g = 2, for the text of CAPTIONS[0]."""
    model = velocity_of(loaded)
    text = {name: tensor.float() for name, tensor in encode_texts(loaded, [CAPTIONS[0]]).items()}
    g = torch.tensor([2.0]) if model.embeds("g") else None
    return model(wave(1, 4, 2, 4, 4), torch.tensor([0.7]), text, r=torch.tensor([0.4]), g=g)


@torch.no_grad()
def predicted_tokens(predictor: Predictor) -> dict[str, torch.Tensor]:
    """Of 8 video and 4 text tokens, all waves, without rotation or mask: at t = 0.5 after full steps at 0.8 and 0.9."""
    sizes = {"hidden_states": (1, 8, 12), "encoder_hidden_states": (1, 4, 12)}
    arguments = {name: wave(*size, step=0.7) for name, size in sizes.items()}
    arguments |= {"temb": wave(1, 12, step=0.3), "attention_mask": None}
    arguments |= {"freqs_cis": (torch.ones(8, 12), torch.zeros(8, 12))}
    memory = tuple(
        Cached({name: wave(*size, step=step) for name, size in sizes.items()}, torch.tensor(t))
        for step, t in ((0.5, 0.8), (0.4, 0.9))
    )
    names = predictor._arguments
    given = dict(zip(names, arguments.values(), strict=False))
    return predictor(given, memory, torch.tensor(0.5))


def metrics(folder: str) -> list[dict]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(file: str) -> dict:
    tensors = load_file(file)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
    return {"tensors": len(tensors), "norm": norm, "sha256": sha256_file(file)}


def frames_of(folder: str) -> dict:
    from PIL import Image

    files = sorted(Path(folder).glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    return {
        "shape": list(pixels.shape),
        "mean": float(pixels.mean()),
        "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }


def measured() -> tuple[dict, dict[str, torch.Tensor]]:
    """What the files in the working directory give, and some tensors."""
    found: dict = {}
    tensors: dict[str, torch.Tensor] = {}

    found["conf"] = {}
    for name in CONF:
        command = COMMAND_OF.get(name, name)
        words = [PROMPT] if command == "generate" else []
        printed = yaml.safe_load(run(command, *words, "--conf", f"conf/{name}.yaml", "--print-conf"))
        if name == "benchmark-shipped":  # not all the rows that ship
            printed["methods"] = {row: printed["methods"][row] for row in (*printed["only"], printed["baseline"])}
        found["conf"][name] = printed
    for command in configuration.SCHEMAS:
        schema = configuration.SCHEMAS[command]
        again = configuration.load(command, schema, f"conf/print-conf/{command}.yaml")
        assert configuration.to_dict(again) == configuration.to_dict(schema())

    found["models"] = {}
    for name in MODELS:
        loaded = load_pipeline(name, dtype="float32")
        run_record = read_run(name, "model/1")
        verify_files(name, run_record)
        steps = loaded.call["steps"]
        two_pass = TWO_PASS if name == "teacher" else {}
        tensors[f"{name}.latents"] = latents(loaded, PROMPT, 1, steps, TINY_CALL | two_pass)
        tensors[f"{name}.velocity"] = velocity(loaded)
        found["models"][name] = {
            "call": loaded.call,
            "steps": steps,
            "hashes": loaded.hashes,
            "student_hash": student_hash(loaded),
            "parents": run_record["parents"],
            "conditioning": loaded.conditioning and json.loads(json.dumps(vars(loaded.conditioning.config))),
            "shift": loaded.pipe.scheduler.config.shift,
            "latents": described(tensors[f"{name}.latents"]),
            "velocity": described(tensors[f"{name}.velocity"]),
        }

    loaded = load_pipeline("student", dtype="float32")
    predictor = Predictor.from_pretrained("predictor")
    predictor.check_fits(loaded.pipe.transformer, loaded.family, student_hash(loaded))
    schedules = read_schedules("predictor/schedule.json")
    found["predictor"] = {
        "config": json.loads(json.dumps(vars(predictor.config))),
        "parameters": sum(p.numel() for p in predictor.parameters()),
        "weights": weights("predictor/model.safetensors"),
        "searched_on": read_run("predictor", "predictor/1")["searched_on"],
        "schedules": [json.loads(json.dumps(vars(s))) | {"budget": s.budget} for s in schedules],
    }
    tokens = predicted_tokens(predictor)
    found["predictor"]["tokens"] = {name: described(t) for name, t in tokens.items()}
    tensors |= {f"predictor.tokens.{name}": t.contiguous() for name, t in tokens.items()}
    found["predictor"]["attached"] = {}
    for key, way in {
        "budget-2-of-4": {"steps": 4, "budget": 2},
        "listed-of-4": {"steps": 4, "full_steps": [0, 1]},
    }.items():
        with vidaccel.attach(loaded, predictor="predictor", **way) as attachment:
            made = latents(loaded, PROMPT, 1, 4, TINY_CALL)
            passes = [attachment.full_passes, attachment.predicted_passes]
        tensors[f"predictor.{key}"] = made
        found["predictor"]["attached"][key] = {"full_and_predicted": passes, "latents": described(made)}

    found["generate"] = {}
    for key, words in {
        "conf": [PROMPT, "--conf", "conf/generate.yaml"],
        "shift-3-budget-3-of-6": [PROMPT, "--conf", "conf/generate.yaml", "steps=6", "shift=3", "budget=3"],
        "lora": [PROMPT, "model=lora", "steps=3"],
    }.items():
        report = json.loads(run("generate", *words, "-o", f"made-{key}", "--json"))
        keys = ("steps", "passes", "full_steps", "shift", "guidance", "size", "hashes")
        found["generate"][key] = {name: report[name] for name in keys} | {"frames": frames_of(f"made-{key}")}

    found["features"] = {}
    for name, kind in (("features", "encoded"), ("trajectories", "trajectory")):
        folder = ShardFolder(name, kind)
        folder.verify()
        record = read_run(name, "features/1")
        samples = []
        for values, about in (folder[i] for i in range(len(folder))):
            described_ = {key: described(t) | {"dtype": str(t.dtype)} for key, t in sorted(values.items())}
            samples.append({"record": about, "tensors": described_})
        found["features"][name] = {"kind": record["kind"], "made_with": record["made_with"], "samples": samples}

    run("collect-features", "--conf", "conf/collect-features.yaml", "-o", "features-interrupted", "per_shard=4")
    same = [(a, b) for a, b in zip(ShardFolder("features-interrupted"), ShardFolder("features"), strict=True)]
    assert all(torch.equal(a[0][key], b[0][key]) for a, b in same for key in b[0])
    found["features-interrupted"] = {"samples": len(same), "equal_to": "features"}

    before = Path("distill-interrupted/metrics.jsonl").read_text()
    run("distill", "--conf", "conf/distill.yaml", "-o", "distill-interrupted")
    assert Path("distill-interrupted/metrics.jsonl").read_text().startswith(before)  # its times too: it went on
    found["distill-interrupted"] = {
        "lines_kept": before.count("\n"),
        "metrics": metrics("distill-interrupted"),
        "transformer": weights("distill-interrupted/transformer/diffusion_pytorch_model.safetensors"),
        "conditioning": weights("distill-interrupted/conditioning/model.safetensors"),
        "equal_to": "student",
    }
    for file in ("transformer/diffusion_pytorch_model.safetensors", "conditioning/model.safetensors"):
        assert sha256_file(f"distill-interrupted/{file}") == sha256_file(f"student/{file}"), file

    logs = [Path("predictor-interrupted/checkpoints", stage, "metrics.jsonl") for stage in ("mse", "adversarial")]
    begun = [log.read_text() for log in logs]
    run("train-predictor", "--conf", "conf/train-predictor.yaml", "-o", "predictor-interrupted")
    assert all(log.read_text().startswith(before) for log, before in zip(logs, begun, strict=True))
    found["predictor-interrupted"] = {
        "lines_kept": [before.count("\n") for before in begun],
        "mse": metrics("predictor-interrupted/checkpoints/mse"),
        "adversarial": metrics("predictor-interrupted/checkpoints/adversarial"),
        "weights": weights("predictor-interrupted/model.safetensors"),
        "schedules": [
            json.loads(json.dumps(vars(s))) | {"budget": s.budget}
            for s in read_schedules("predictor-interrupted/schedule.json")
        ],
        "equal_to": "predictor (weights, and schedules of 4 steps)",
    }
    assert sha256_file("predictor-interrupted/model.safetensors") == sha256_file("predictor/model.safetensors")

    for name, words in {
        "bench-timing": ["--speedup"],
        "bench-scoring": ["--speedup", "--quality", "only=[student,searched,first-block]", "rounds=2"],
    }.items():
        before = {file.name: json.loads(file.read_text()) for file in sorted(Path(name, "rows").glob("*.json"))}
        # The machine and commit that began it are part of what a folder is known by.
        began_on = json.loads(Path(name, "settings.json").read_text())["environment"]
        plain, bench.environment = bench.environment, lambda device: began_on  # noqa: B023
        try:
            run("benchmark", *words, "--conf", "conf/benchmark.yaml", "-o", name)
        finally:
            bench.environment = plain
        after = {file.name: json.loads(file.read_text()) for file in sorted(Path(name, "rows").glob("*.json"))}
        results = {row["method"]: row for row in json.loads(Path(name, "results.json").read_text())["runs"]}
        whole = min((len(row["rounds"]) for row in before.values() if row["error"] is None), default=0)
        for file, row in before.items():
            assert after[file]["counts"] == row["counts"]
            assert after[file]["rounds"][:whole] == row["rounds"][:whole]
            assert after[file]["videos"][: len(row["videos"])] == row["videos"]
        found[name] = {
            "whole_rounds_before": whole,
            "rounds_before": {file: len(row["rounds"]) for file, row in before.items()},
            "videos_before": {file: len(row["videos"]) for file, row in before.items()},
            "rounds_after": {file: len(row["rounds"]) for file, row in after.items()},
            "results": {method: {key: row[key] for key in RESULTS} for method, row in results.items()},
        }

    found |= {"score": score_again(), "latents": latents_again()}
    return found, tensors


def score_again() -> dict:
    lines = Path("score/marks.jsonl").read_text().splitlines()
    summary = json.loads(Path("score/score.json").read_text())
    run(*SCORE, program=sprites)
    again = Path("score/marks.jsonl").read_text().splitlines()
    assert again[:8] == lines[:8]
    return {
        "lines_kept": 8,
        "lines": 10,
        "last_marks": json.loads(lines[-1]),
        "same_bytes": again == lines and json.loads(Path("score/score.json").read_text()) == summary,
        "total": summary["total"],
    }


def latents_again() -> dict:
    kept, again = load_file("latents/latents.safetensors"), shipped_latents()
    return {
        name: described(t) | {"made_again_apart": float((again[name] - t).norm() / t.norm())}
        for name, t in kept.items()
    }


def apart(old, new, where: str = ""):
    """Differences beyond rounding; hashes have to be equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from apart(old.get(key), new.get(key), f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from apart(*pair, f"{where}/{i}")
    elif isinstance(old, float) and isinstance(new, float):
        if not math.isclose(old, new, rel_tol=1e-4, abs_tol=1e-6):
            yield f"{where}: was {old}, is {new}"
    elif old != new:
        yield f"{where}: was {old}, is {new}"


def main() -> None:
    what, out, *more = sys.argv[1], *(Path(word).resolve() for word in sys.argv[2:])
    torch.set_num_threads(1)
    from vidaccel.cli.common import quiet_libraries

    quiet_libraries()
    print(vidaccel.__file__)
    with tempfile.TemporaryDirectory() as folder:
        if what == "shipped":
            with contextlib.chdir(folder):
                make_shipped(out, *more)
            return
        if what == "make":
            with contextlib.chdir(folder):
                make(out)
            what = "expect"
            for path in (out, *out.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(out, folder, dirs_exist_ok=True)
        with contextlib.chdir(folder):
            found, tensors = measured()
    found = json.loads(json.dumps(found))
    if what == "expect":
        (out / "expected.json").write_text(json.dumps(found, indent=1) + "\n")
        save_file(tensors, out / "expected.safetensors")
        (out / "expected.safetensors").chmod(0o644)
        return
    differing = list(apart(json.loads((out / "expected.json").read_text()), found))
    before = load_file(out / "expected.safetensors")
    differing += [name for name in before if not torch.equal(before[name], tensors[name])]
    print("\n".join(differing) or "as expected")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
