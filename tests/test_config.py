import re
from dataclasses import replace
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.checks import PATHS
from vidaccel.config.collect import CollectConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.config.explained import meanings
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.loader import SCHEMAS, conf_root, load, to_dict, to_yaml
from vidaccel.config.plan import PlanConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.worlds.sprites.settings import CONF, SpritesConfig

SHIPPED = sorted(path.relative_to(conf_root()).with_suffix("") for path in conf_root().rglob("*.yaml"))


def generate(*overrides: str) -> GenerateConfig:
    return load("generate", GenerateConfig, "teacher", overrides)


def sprites(*overrides: str) -> SpritesConfig:
    return load(CONF, SpritesConfig, "default", overrides)


def from_yaml(folder, text: str, *overrides: str) -> GenerateConfig:
    (folder / "mine.yaml").write_text(text)
    return load("generate", GenerateConfig, str(folder / "mine.yaml"), overrides)


# Shipped YAMLs, and those at a path


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_shipped_yaml_fits_its_schema(tmp_path, path):
    """Each of its keys holds, and its settings as YAML load as the same."""
    command, *name = path.parts
    schema = SCHEMAS[command]
    seed = ["seed=17"] if hasattr(schema, "seed") else []
    config = load(command, schema, "/".join(name), seed)
    assert isinstance(config, schema)
    chosen = OmegaConf.to_container(OmegaConf.load(conf_root() / f"{path}.yaml"))
    chosen.pop("defaults", None)
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    given = OmegaConf.to_container(OmegaConf.load(tmp_path / "mine.yaml"))
    if seed:
        assert given.pop("seed") == 17 != chosen.pop("seed", None)
    assert holds(chosen, given)
    assert load(command, schema, str(tmp_path / "mine.yaml")) == config


def holds(chosen, given) -> bool:
    if isinstance(chosen, dict):
        return all(holds(value, given[key]) for key, value in chosen.items())
    return given == chosen


def test_every_command_ships_a_yaml():
    assert {path.parts[0] for path in SHIPPED} == SCHEMAS.keys()


@pytest.mark.parametrize("name", ["mine.yaml", "a.b.yaml", "with space, and (more)/è.yaml", "it's=#1.yaml"])
def test_a_yaml_at_a_path(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("steps: 7\nguidance: 2")
    expected = GenerateConfig(steps=7, guidance=2.0)
    assert load("generate", GenerateConfig, str(path)) == expected
    monkeypatch.chdir(tmp_path)
    assert load("generate", GenerateConfig, name) == expected


def test_defaults_of_training_are_the_papers():
    distill, predictor = DistillConfig(), PredictorConfig()
    assert (distill.guidance_range, distill.mean_velocity.restrict) == (None, 0.2)  # 1 to 8: tests/train/test_own_call
    assert (predictor.blocks, predictor.history, predictor.pairs) == (2, 1, "data")
    assert (predictor.intervals, predictor.lag, predictor.restrict) == ("restricted", 0.2, None)
    stages = predictor.mse, predictor.adversarial
    assert [(stage.steps, stage.learning_rate, stage.schedule) for stage in stages] == [
        (500, 1e-4, "constant"),
        (1000, 1e-4, "constant"),
    ]
    assert (predictor.discriminator.learning_rate, predictor.discriminator.weight) == (1e-2, 1.0)


@pytest.mark.parametrize("world", ["sprites", "hunyuan_video"])
def test_the_published_yamls_are_the_papers(world):
    cfg, mean_velocity = (load("distill", DistillConfig, f"{world}/published_{m}") for m in ("cfg", "mean_velocity"))
    assert (cfg.method, mean_velocity.method) == ("cfg", "mean_velocity")
    assert cfg.guidance_range == mean_velocity.guidance_range == [1.0, 8.0]
    own = mean_velocity.mean_velocity
    assert (own.target, own.restrict, own.restrict_end, own.velocity) == ("derivative", 0.2, None, "teacher")
    assert (mean_velocity.times, mean_velocity.train_shift, own.r_equals_t_share) == ("uniform", None, 0.0)
    predictor = load("train-predictor", PredictorConfig, f"{world}/published")
    assert (predictor.architecture, predictor.blocks, predictor.history) == ("published", 2, 1)
    assert (predictor.pairs, predictor.intervals, predictor.lag) == ("data", "restricted", 0.2)
    assert (predictor.relative, predictor.discriminator.weight, predictor.discriminator.in_turn) == (False, 1.0, True)
    stages = predictor.mse, predictor.adversarial  # a step of each part is two
    assert [(stage.steps, stage.learning_rate) for stage in stages] == [(500, 1e-4), (2 * 1000, 1e-4)]
    assert predictor.discriminator.learning_rate == 1e-2


def test_an_empty_yaml_is_the_defaults(tmp_path):
    assert from_yaml(tmp_path, "") == GenerateConfig()


def test_a_yaml_can_build_on_another(tmp_path):
    (tmp_path / "base.yaml").write_text("steps: 7\nseed: 1")
    assert from_yaml(tmp_path, "defaults: [base, _self_]\nseed: 2") == GenerateConfig(steps=7, seed=2)


def test_a_yaml_elsewhere_can_build_on_a_shipped_one(tmp_path):
    assert from_yaml(tmp_path, "defaults: [teacher, _self_]\nseed: 2") == generate("seed=2")


@pytest.mark.parametrize(
    ("conf", "message", "hint"),
    [
        ("techer", 'no configuration "techer" for generate', 'did you mean "teacher"?'),
        ("zzz", 'no configuration "zzz" for generate', "choose from: cfg, default, student, teacher"),
        ("", 'no configuration "" for generate', "choose from: cfg, default, student, teacher"),
        ("nowhere/mine.yaml", "no configuration file nowhere/mine.yaml", "give the path"),
        ("mine.yml", "mine.yml does not end in .yaml", "rename it"),
    ],
)
def test_unknown_configurations(conf, message, hint):
    with pytest.raises(UserError) as error:
        load("generate", GenerateConfig, conf)
    assert error.value.message == message
    assert error.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1", "mine.yaml is not YAML: .* line 1"),
        ("steps: 1\nsteps: 2", "mine.yaml is not YAML: .*duplicate key steps.* line 2"),
        ("model: !!python/object/apply:os.getcwd []", "mine.yaml is not YAML: .*constructor"),
        ("\x00", "mine.yaml is not YAML"),
        ("- steps\n- 5", "mine.yaml: .*must be a DictConfig"),
        ("just words", 'mine.yaml: there is no setting "just words"'),
        ("3: 4", 'mine.yaml: there is no setting "3"'),
        ("defaults: [nowhere]", "mine.yaml: .*Could not load 'nowhere'"),
        ("model: ${nowhere}", "model: Interpolation key 'nowhere' not found"),
        ("null: 3", "mine.yaml: a key that is no name"),
    ],
)
def test_broken_yamls(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        from_yaml(tmp_path, text)
    assert "\n" not in error.value.message + error.value.hint
    assert error.value.hint


def test_a_yaml_that_is_no_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(UserError, match="mine.yaml is not YAML: 'utf-8' codec"):
        load("generate", GenerateConfig, str(tmp_path / "mine.yaml"))


# Keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("text.train.stepps", "steps"),
        ("text.trian.steps", "train"),
        ("teacher.head_dimm", "head_dim"),
        ("autoencodr", "autoencoder"),
        ("seed.value", None),
    ],
)
def test_a_wrong_key_names_the_nearest_right_one(tmp_path, key, nearest):
    yaml = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(key.split(".")))
    (tmp_path / "mine.yaml").write_text(yaml.rstrip("\n") + " 3")
    with pytest.raises(UserError) as in_word:
        sprites(f"{key}=3")
    assert in_word.value.message == f'there is no setting "{key}"'
    with pytest.raises(UserError) as in_file:
        load(CONF, SpritesConfig, str(tmp_path / "mine.yaml"))
    if nearest:
        assert "there is no setting" in in_file.value.message
        assert f'did you mean "{nearest}"?' == in_word.value.hint == in_file.value.hint
    else:
        assert "choose from" in in_word.value.hint


@pytest.mark.parametrize(
    ("row", "message", "hint"),
    [
        ("{stepps: 3}", 'the row mine has no setting "stepps"', 'did you mean "steps"? A row may have: as_called,'),
        ("{xyz: 3}", 'the row mine has no setting "xyz"', "choose from: as_called, at_most, budget"),
        ("3", "the row mine is 3, not settings", "write mine: {steps: 20}"),
        ("{steps: many}", "methods.mine.steps: Value 'many'", "see `--print-conf`"),
    ],
)
def test_what_is_wrong_with_a_row_of_a_benchmark_names_the_row(tmp_path, row, message, hint):
    (tmp_path / "rows.yaml").write_text(f"defaults: [untrained, _self_]\nmethods:\n  mine: {row}\n")
    with pytest.raises(UserError) as in_file:
        load("benchmark", BenchmarkConfig, str(tmp_path / "rows.yaml"))
    assert message in in_file.value.message and in_file.value.hint.startswith(hint)
    assert "MethodConfig" not in str(in_file.value)
    with pytest.raises(UserError, match="methods=3, where methods holds rows by name"):
        load("benchmark", BenchmarkConfig, "untrained", ["methods=3"])


def test_a_row_may_refer_to_a_setting_of_the_whole_benchmark(tmp_path):
    (tmp_path / "rows.yaml").write_text("rounds: 7\nmethods: {full: {}, mine: {steps: '${rounds}'}}\n")
    rows = load("benchmark", BenchmarkConfig, str(tmp_path / "rows.yaml")).methods
    assert (rows["full"].steps, rows["mine"].steps) == (50, 7)
    (tmp_path / "rows.yaml").write_text("methods: {full: {}, 3: {}}\n")
    with pytest.raises(UserError, match="Key 3 .int. is incompatible"):
        load("benchmark", BenchmarkConfig, str(tmp_path / "rows.yaml"))


@pytest.mark.parametrize("word", ["steps", "", "+", "~steps", "a red circle"])
def test_a_word_that_sets_nothing(word):
    with pytest.raises(UserError, match="neither a flag nor a key=value setting"):
        generate(word)


@pytest.mark.parametrize("value", ["5", "null"])
@pytest.mark.parametrize("key", ["teacher", "teacher.train"])
def test_a_group_is_no_value(key, value):
    with pytest.raises(UserError, match="is a group of settings"):
        sprites(f"{key}={value}")


# Values


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("steps=3", {"steps": 3}),
        ("+steps=3", {"steps": 3}),
        ("++steps=3", {"steps": 3}),
        ("steps=null", {"steps": None}),
        ("guidance=5", {"guidance": 5.0}),
        ("two_pass=false", {"two_pass": False}),
        ("two_pass=null", {"two_pass": None}),
        ("model='a, b'", {"model": "a, b"}),
        ('model="it\'s"', {"model": "it's"}),
    ],
)
def test_overrides(word, change):
    assert generate(word) == replace(generate(), **change)


TEXTS = (
    "a b",
    "a, b",
    "it's",
    'say "hi"',
    "a=b",
    "/data/clips (1)/ü",
    "C:\\new\\",
    "a\\'b",
    "1e3",
    "on",
    "[a",
    "{a}",
    "#",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands(text):
    """A shell has removed the user's quotes by then."""
    assert generate(f"model={text}").model == text
    assert sprites(f"data={text}").data == text


def test_nested_and_list_overrides():
    config = sprites("text.train.steps=3", "data=null", "autoencoder.block_out_channels=[8, 8, 16, 16]", "seed=5")
    expected = sprites()
    expected.text.train.steps = 3
    expected.autoencoder.block_out_channels = [8, 8, 16, 16]
    expected.seed = 5
    assert config == expected
    assert isinstance(config.autoencoder.block_out_channels, list)


def test_the_last_override_of_a_key_wins():
    assert generate("steps=3", "steps=4").steps == 4


def test_loads_do_not_share_state():
    sprites().autoencoder.block_out_channels.append(1)
    assert sprites() == sprites("seed=0")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=abc", "steps: Value 'abc' of type 'str' could not be converted to Integer"),
        ("steps=3.5", "steps: Value '3.5'"),
        ("steps=true", "steps: Value 'True'"),
        ("steps=[1]", "steps: "),
        ("steps={a: 1}", "steps: "),
        ("steps=1,2", "steps=1,2"),
        ("steps=range(1,3)", "steps=range"),
        ("steps=é", "steps=é"),
        ("guidance=fast", "guidance: Value 'fast'"),
        ("two_pass=maybe", "two_pass: Value 'maybe'"),
        ("model=null", "model: .*None"),
        ("model=", "model=''"),
        ("seed=-1", "seed=-1"),
        ("seed=9223372036854775808", "seed=9223372036854775808"),
        ("dtype=float8", "dtype='float8'"),
    ],
)
def test_values_that_do_not_fit(word, message):
    with pytest.raises(UserError, match=message) as error:
        generate(word)
    assert error.value.hint
    assert "\n" not in error.value.message + error.value.hint


@pytest.mark.parametrize("schema", [*SCHEMAS.values(), SpritesConfig])
def test_a_seed_is_what_an_order_can_be_drawn_by(schema):
    with pytest.raises(UserError, match="seed=-1 is not possible"):
        schema(seed=-1)


def test_a_value_that_does_not_fit_in_a_group_names_its_path():
    with pytest.raises(UserError, match=r"^teacher\.train\.steps: Value 'abc'"):
        sprites("teacher.train.steps=abc")
    with pytest.raises(UserError, match=r"^autoencoder\.block_out_channels\[1\]: Value 'a'"):
        sprites("autoencoder.block_out_channels=[1, a]")


@pytest.mark.parametrize("word", ["steps=7", "shift=3", "timesteps=[1000,500]", "sigmas=[1,0.5]", "guidance_2=3"])
def test_what_only_trajectories_have_is_not_said_of_encoded_clips(word):
    with pytest.raises(UserError, match=r"is not possible\nhint: .* goes with kind=trajectory"):
        load("collect-features", CollectConfig, "clips", [word])
    load("collect-features", CollectConfig, "clips", [word, "kind=trajectory"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", -1),
        ("batch_size", 0),
        ("accumulate", -1),
        ("save_every", 0),
        ("log_every", 0),
        ("warmup", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("schedule", "linear"),
        ("precision", "float16"),
    ],
)
def test_training_settings_out_of_range(key, value):
    with pytest.raises(UserError) as error:
        TrainConfig(**{key: value})
    assert error.value.message == f"{key}={value!r} is not possible"
    assert error.value.hint.startswith(f"{key} ")
    with pytest.raises(UserError, match=f"{key}={value!r} is not possible"):
        sprites(f"text.train.{key}={value}")


# Paths


def test_home_is_expanded_in_every_setting_that_is_a_path(tmp_path, monkeypatch):
    """Which a shell does not do behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for schema in (*SCHEMAS.values(), MethodConfig, PlanConfig, SpritesConfig):
        texts = [name for name, kind in get_type_hints(schema).items() if kind in (str, str | None)]
        paths = [name for name in texts if re.search(r"\b([Ff]older|[Ff]ile)\b", meanings(schema).get(name, ""))]
        assert set(paths) - {"denoiser"} <= set(PATHS)  # that one is said of the folder that is made
        for name in set(texts) & set(PATHS):
            more = {"forecaster": "multistep"} if (schema, name) == (PredictorConfig, "prompts") else {}
            assert getattr(schema(**{name: "~/a ~/b"}, **more), name) == f"{tmp_path}/a ~/b"


def test_a_setting_may_be_called_like_a_folder_beside_the_yaml(tmp_path):
    """As one of a model; Hydra takes it for a group of configurations."""
    (tmp_path / "student").mkdir()
    (tmp_path / "mse").mkdir()
    (tmp_path / "mine.yaml").write_text("seed: 3\nmse: {batch_size: 2}\nsearch_prompts: ${seed}\n")
    words = ["student=x", "mse.steps=5", "seed=4"]
    chosen = load("train-predictor", PredictorConfig, str(tmp_path / "mine.yaml"), words)
    assert (chosen.student, chosen.mse.steps, chosen.mse.batch_size, chosen.search_prompts) == ("x", 5, 2, 4)


# Names of earlier versions

OLD_NAMES = [
    (
        "distill",
        DistillConfig,
        "method: mean_velocity\nmean_velocity: {equal_share: 0.5}",
        "mean_velocity.equal_share=0.5",
        "r_equals_t_share",
    ),
    ("train-predictor", PredictorConfig, "longest: 2", "longest=2", "max_skipped"),
    ("benchmark", BenchmarkConfig, "marker: sprites", "marker=sprites", "scorer"),
    ("benchmark", BenchmarkConfig, "methods: {a: {between: linear}}", "methods.a.between=linear", "on_skipped"),
]


@pytest.mark.parametrize(("order", "new"), [(0, "reuse"), (1, "taylor")])
def test_a_renamed_value_is_read_and_warned_of(tmp_path, caplog, order, new):
    (tmp_path / "old.yaml").write_text(f"methods: {{a: {{between: trunk, order: {order}}}}}")
    (tmp_path / "new.yaml").write_text(f"methods: {{a: {{order: {order}}}}}")
    from_file = load("benchmark", BenchmarkConfig, str(tmp_path / "old.yaml"))
    from_word = load("benchmark", BenchmarkConfig, str(tmp_path / "new.yaml"), ["methods.a.on_skipped=trunk"])
    assert from_file == from_word
    assert (from_file.methods["a"].on_skipped, from_file.methods["a"].order) == (new, order)
    assert sum(f"on_skipped=trunk is called {new} now" in message for message in caplog.messages) == 2


@pytest.mark.parametrize(("command", "schema", "text", "word", "new"), OLD_NAMES, ids=[row[2] for row in OLD_NAMES])
def test_a_renamed_key_is_read_and_warned_of(tmp_path, caplog, command, schema, text, word, new):
    (tmp_path / "old.yaml").write_text(text)
    plain = "methods: {a: {steps: 50}}" if "methods" in text else "seed: 0"
    (tmp_path / "new.yaml").write_text("method: mean_velocity" if "method:" in text else plain)
    from_file = load(command, schema, str(tmp_path / "old.yaml"))
    from_word = load(command, schema, str(tmp_path / "new.yaml"), [word])
    assert from_file == from_word != load(command, schema, str(tmp_path / "new.yaml"))
    assert sum(f'is called "{new}" now' in message for message in caplog.messages) == 2
    assert "RENAMED" not in to_yaml(from_file)


# There and back

TEXT = st.text(st.characters(blacklist_categories=["C", "Z"], blacklist_characters="$"), min_size=1, max_size=20)


def test_rows_have_the_types_that_omegaconf_gives_them(tmp_path):
    """Though it does not see those of them that are of their types already."""
    odd = MethodConfig(steps=4, shift=3, at_most=8, cache="fora", settings={"every": (1, None)}, sweep={"a": (1, "b")})
    plain = MethodConfig(weights="teacher", sigmas=[1.0, 0.5], cache="fora", settings={"a": ["b", {"c": 2}]})
    config = BenchmarkConfig(methods={"odd": odd, "plain": plain})
    assert repr(to_dict(config)) == repr(OmegaConf.to_container(OmegaConf.structured(config)))
    to_dict(config)["methods"]["plain"]["sigmas"].append(0.1)
    assert plain.sigmas == [1.0, 0.5]
    (tmp_path / "new.yaml").write_text("methods: {a: {steps: '7', shift: 3, sweep: {b: [1]}, at_most: 8, cache: fora}}")
    row = load("benchmark", BenchmarkConfig, str(tmp_path / "new.yaml")).methods["a"]
    assert repr((row.steps, row.shift, row.sweep, row.at_most)) == "(7, 3.0, {'b': [1]}, 8.0)"
    (tmp_path / "new.yaml").write_text("methods: {a: {weights: '???'}}")
    assert load("benchmark", BenchmarkConfig, str(tmp_path / "new.yaml")).methods["a"] == MethodConfig()


@settings(deadline=None, max_examples=30)
@given(
    model=TEXT,
    steps=st.none() | st.integers(1, 100),
    guidance=st.none() | st.floats(1, 20),
    two_pass=st.none() | st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_yaml_of_generate_settings_loads_as_the_same(tmp_path_factory, model, steps, guidance, two_pass, seed):
    config = GenerateConfig(model=model, steps=steps, guidance=guidance, two_pass=two_pass, seed=seed)
    assert from_yaml(tmp_path_factory.mktemp("conf"), to_yaml(config)) == config


@pytest.mark.parametrize("path", CONF.glob("*.yaml"), ids=lambda path: path.stem)
def test_a_world_has_yamls_of_its_own(tmp_path, path):
    config = load(CONF, SpritesConfig, path.stem, ["seed=17"])
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    assert load(CONF, SpritesConfig, str(tmp_path / "mine.yaml")) == config


@settings(deadline=None, max_examples=30)
@given(data=TEXT.filter(lambda text: text != "null" and text[0] not in "'\"~"))  # a home folder's name is another
def test_any_text_survives_an_override(data):
    assert sprites(f"data={data}").data == data


@pytest.mark.parametrize("folder", ["a:b", "v1.0=x@y, z", "file://there"])
@pytest.mark.parametrize("name", ["my.v1.yaml", "a=b:c.yaml"])
def test_a_colon_in_a_path_is_no_protocol_and_a_byte_order_mark_no_key(tmp_path, monkeypatch, folder, name):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / name).write_bytes(b"\xef\xbb\xbfsample_steps: 7\ndefaults: [sprites/cfg@_global_, _self_]\n")
    monkeypatch.chdir(tmp_path)
    for conf in (str(tmp_path / folder / name), f"{folder}/{name}"):
        loaded = load("distill", DistillConfig, conf, ["teacher=a:b"])
        assert (loaded.sample_steps, loaded.train.batch_size, loaded.teacher) == (7, 16, "a:b")
