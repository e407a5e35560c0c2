"""A feature folder from plan to reading: continued, not mixed, and refused where it was made for another model."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.collect.conftest import CAPTIONS, save_model
from tests.data.conftest import drifting, full_disk  # noqa: F401
from vidaccel.artefacts import sha256_file
from vidaccel.collect.features import called_like, check_made_for, check_tensors, open_features
from vidaccel.collect.job import collect, plan
from vidaccel.collect.kinds import job_of
from vidaccel.collect.source import EncodedSource, open_source
from vidaccel.config.collect import CollectConfig
from vidaccel.data.clips import write_clips
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import encoder_hashes


def config(clips, **changes) -> CollectConfig:
    return CollectConfig(data=str(clips), per_shard=2, **changes)


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


@pytest.fixture(scope="module")
def whole(loaded, whole_clips, tmp_path_factory):
    """A finished folder of five samples in three shards; not to be changed."""
    folder = tmp_path_factory.mktemp("features")
    collect(job_of(loaded, config(whole_clips)), folder)
    return folder


@pytest.fixture
def features(whole, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "features"))


def test_a_folder_holds_every_clip_encoded(loaded, model, clips, features):
    read = open_features(features, "encoded", loaded.hashes)
    source = open_source(loaded, config(clips))
    expected = EncodedSource(loaded, source)
    assert [read[i][1]["caption"] for i in range(len(read))] == CAPTIONS
    for i in range(len(read)):
        (tensors, record), (fresh, fresh_record) = read[i], expected[i]
        assert record == fresh_record and tensors.keys() == fresh.keys()
        assert all(torch.equal(tensors[name], fresh[name]) for name in fresh)
    run = json.loads((features / "run.json").read_text())
    assert run["parents"] == {"model": sha256_file(model / "run.json")}
    assert run["kind"] == "encoded" and run["made_with"].keys() == {
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    }


def test_the_plan_is_what_is_then_written(loaded, clips, features):
    planned = plan(job_of(loaded, config(clips)))
    shards = sum(path.stat().st_size for path in features.glob("*.tar"))
    assert planned.count == 5
    assert 5 * planned.sample_bytes == pytest.approx(shards, abs=3 * 1024)  # each tar ends in a kilobyte


def test_a_plan_computes_one_sample(loaded, clips):
    job = job_of(loaded, config(clips))
    asked = []

    def compute(indices):
        asked.extend(indices)
        return job.compute(indices)

    plan(replace(job, compute=compute))
    assert asked == [0]


def test_a_limit_on_the_size_is_kept_before_anything_is_written(loaded, clips):
    needed = plan(job_of(loaded, config(clips)))
    gigabytes = needed.count * needed.sample_bytes / 1e9
    assert plan(job_of(loaded, config(clips, max_gigabytes=gigabytes))) == needed
    with pytest.raises(UserError, match="are more than max_gigabytes"):
        plan(job_of(loaded, config(clips, max_gigabytes=0.999 * gigabytes)))


@pytest.mark.parametrize("at", [0, 3])
def test_a_killed_collection_goes_on_at_the_sample_it_was_at(loaded, clips, features, tmp_path, at):
    job, folder, asked = job_of(loaded, config(clips)), tmp_path / "killed", []

    def kill(indices):
        if at in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return job.compute(indices)

    def watched(indices):
        asked.extend(indices)
        return job.compute(indices)

    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a child of a fork waits for ever for the threads of its parent
            collect(replace(job, compute=kill), folder)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(UserError, match="no run.json" if at == 0 else "is not finished: .* of its shards are written"):
        open_features(folder, "encoded", loaded.hashes)
    collect(replace(job, compute=watched), folder)
    assert asked == list(range(at, 5))
    assert tree(folder) == tree(features)


def test_a_finished_folder_is_left_alone_for_trainings_to_know_it_by_its_run(loaded, clips, features):
    before = (features / "run.json").read_bytes()
    assert collect(job_of(loaded, config(clips)), features)
    assert (features / "run.json").read_bytes() == before


def test_a_run_that_does_not_vouch_for_the_folder_is_written_again(loaded, clips, features):
    run = json.loads((features / "run.json").read_text())
    right = dict(run["files"])
    run["files"]["shard-00001.tar"] = "0" * 64
    (features / "run.json").write_text(json.dumps(run))
    assert not collect(job_of(loaded, config(clips)), features)
    assert json.loads((features / "run.json").read_text())["files"] == right


def test_models_are_not_mixed_in_a_folder(loaded, clips, features, tmp_path):
    other = load_pipeline(save_model(tmp_path / "other", seed=1))
    before = tree(features)
    with pytest.raises(UserError, match=r"other settings .*vae/diffusion_pytorch_model.safetensors was"):
        collect(job_of(other, config(clips)), features)
    assert tree(features) == before
    hub = replace(loaded, hashes={}, source="someone/model")
    with pytest.raises(UserError, match="model was 'someone/model', now 'someone/else'"):
        collect(job_of(hub, config(clips)), tmp_path / "hub")
        collect(job_of(replace(hub, source="someone/else"), config(clips)), tmp_path / "hub")


@pytest.mark.parametrize("changes", [{"store": "float32"}, {"tiling": True}, {"height": 16}])
def test_settings_are_not_mixed_either(model, clips, features, changes):
    with pytest.raises(UserError, match="begun with other settings"):
        collect(job_of(load_pipeline(model), config(clips, **changes)), features)


def test_features_of_another_autoencoder_are_refused(loaded, features):
    check_made_for(features, loaded.hashes)
    for name in encoder_hashes(loaded):
        with pytest.raises(UserError, match=f"made with another model: its {re.escape(name)} differ"):
            check_made_for(features, loaded.hashes | {name: "0"})
    with pytest.raises(UserError, match="made with another model"):
        check_made_for(features, {"vae/model.safetensors": "0"})


def test_clips_that_were_encoded_serve_every_transformer(loaded, features):
    check_made_for(features, loaded.hashes | {"transformer/diffusion_pytorch_model.safetensors": "0"})


def test_a_model_without_hashes_is_warned_of(loaded, features, caplog):
    check_made_for(features, {})
    assert "may not fit" in caplog.text


def test_features_of_other_widths_are_refused_where_no_hash_tells(model, loaded, features):
    read = open_features(features, "encoded", {})
    check_tensors(read, loaded)
    other = load_pipeline(model)
    other.pipe.transformer.register_to_config(out_channels=16)
    with pytest.raises(UserError, match="another model: latent do not fit"):
        check_tensors(read, other)


def damage(path, how):
    if how == "truncated":
        os.truncate(path, path.stat().st_size - 1024)
    elif how == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "missing", "flipped"])
def test_a_damaged_shard_stops_or_is_left_out(loaded, features, caplog, how):
    damage(features / "shard-00001.tar", how)
    with pytest.raises(UserError, match=r"shard-00001\.tar"):
        open_features(features, "encoded", loaded.hashes)
    read = open_features(features, "encoded", loaded.hashes, on_damage="skip")
    assert "shard-00001.tar, damaged or missing, with its 2 samples" in caplog.text
    assert [read[i][1]["caption"] for i in range(len(read))] == [*CAPTIONS[:2], CAPTIONS[4]]
    assert sorted(read.at(position, seed=0) for position in range(3)) == [0, 1, 2]
    for name in ("shard-00000.tar", "shard-00002.tar"):
        damage(features / name, "flipped")
    with pytest.raises(UserError, match="every shard of .* is damaged"):
        open_features(features, "encoded", loaded.hashes, on_damage="skip")


def test_another_kind_is_refused(loaded, features):
    with pytest.raises(UserError, match="kind encoded, where trajectory is needed"):
        open_features(features, "trajectory", loaded.hashes)


def test_a_full_disk_leaves_a_folder_that_goes_on(loaded, clips, features, full_disk):  # noqa: F811
    filler = full_disk / "filler"
    filler.write_bytes(bytes(48 << 10))
    job = job_of(loaded, config(clips))
    with pytest.raises(UserError, match="no space left on device"):
        collect(job, full_disk / "features")
    filler.unlink()
    collect(job, full_disk / "features")
    assert tree(full_disk / "features") == tree(features)


def test_clips_of_several_sizes_lie_in_one_folder(loaded, tmp_path, caplog):
    """Each brought to the nearest; whoever takes one size gets that which most have."""
    caplog.set_level("INFO")
    shapes = ((9, 64, 96), (9, 96, 64), (5, 64, 64), (9, 128, 192), (9, 70, 100))
    write = ((drifting(frames, height, width), f"clip {frames}") for frames, height, width in shapes)
    write_clips(tmp_path / "clips", write, fps=8)
    several = [[9, 32, 48], [9, 48, 32], [5, 32, 32]]
    asked = config(tmp_path / "clips", sizes=several, batch_size=2, fps=8)
    job = job_of(loaded, asked)
    assert "3 clips of 9 x 32 x 48; 1 clips of 9 x 48 x 32; 1 clips of 5 x 32 x 32" in caplog.text
    planned = plan(job)
    collect(job, tmp_path / "features")
    index = json.loads((tmp_path / "features" / "index.json").read_text())
    sizes = [sample["size"] for shard in index["shards"] for sample in shard["samples"]]
    assert sizes == [several[i] for i in (0, 1, 2, 0, 0)]
    shards = sum(path.stat().st_size for path in (tmp_path / "features").glob("*.tar"))
    assert 5 * planned.sample_bytes == pytest.approx(shards, abs=3 * 1024 + 5)
    read = open_features(tmp_path / "features", "encoded", loaded.hashes, several_sizes=True)
    for (tensors, record), (frames, height, width), shape in zip(read, sizes, shapes, strict=True):
        assert tensors["latent"].shape[1:] == ((frames - 1) // 4 + 1, height // 8, width // 8)
        assert record["caption"] == f"clip {shape[0]}"
    alone = job.compute([1])[0][0]
    assert torch.equal(alone["latent"], read[1][0]["latent"])
    some = open_features(tmp_path / "features", "encoded", loaded.hashes)
    assert [record["file"] for _, record in some] == ["00000.mp4", "00003.mp4", "00004.mp4"]
    assert "3 of 5 samples: those of the size that most have" in caplog.text
    call = called_like(read, loaded).call
    assert [call[name] for name in ("num_frames", "height", "width")] == several[0]
    one = config(tmp_path / "clips", sizes=[[5, 32, 32]], fps=8)
    collect(job_of(loaded, one), tmp_path / "one")
    assert '"size"' not in (tmp_path / "one" / "index.json").read_text()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sizes": [[5, 32, 32]], "height": 32}, "goes with data="),
        ({"sizes": [[5, 32, 32]], "kind": "trajectory"}, "goes with data="),
        ({"sizes": [[5, 32]]}, "list of"),
        ({"sizes": []}, "list of"),
    ],
)
def test_sizes_that_make_no_sense(clips, said, message):
    with pytest.raises(UserError, match=message):
        config(clips, **said)
