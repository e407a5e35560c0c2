import errno
import io
import json
import os
import signal
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidaccel.data import shards
from vidaccel.data.order import epoch_order
from vidaccel.data.shards import ShardFolder, write_shards
from vidaccel.errors import UserError

COUNT, PER_SHARD = 7, 3
RUN = {"count": COUNT, "per_shard": PER_SHARD, "kind": "encoded", "settings": {"student": "abc", "steps": 20}}

busy_machine = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


class Compute:
    """Samples that differ in size, and a note of the indices they were computed for."""

    def __init__(self, before=lambda index: None):
        self.batches = []
        self.before = before

    def __call__(self, indices):
        self.batches.append(indices)
        return [self.sample(index) for index in indices]

    def sample(self, index):
        self.before(index)
        latent = torch.randn(4, 100 * index, generator=torch.Generator().manual_seed(index))
        return {"latent": latent.bfloat16(), "prompt_mask": latent[0] > 0}, {"caption": f"größer: {index}"}

    @property
    def indices(self):
        return [index for batch in self.batches for index in batch]


def write(folder, compute=None, **changes):
    """Write the folder of these tests; returns the indices that were computed."""
    compute = compute or Compute()
    write_shards(folder, compute, **RUN | changes)
    return compute.indices


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copy(source, target):
    for name, data in tree(source).items():
        (target / name).write_bytes(data)


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    copy(whole, tmp_path)
    return tmp_path


# What is written is read

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]


@st.composite
def tensors(draw):
    """Any bits, NaN among them."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 5), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    data = torch.randint(256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


texts = st.text(st.characters(), max_size=20)  # lone surrogates too: JSON can hold them
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts, st.lists)
names = st.text("abcdefghijklmnopqrstuvwxyz_.", min_size=1)
samples = st.tuples(st.dictionaries(names, tensors(), max_size=4), st.dictionaries(texts, values, max_size=4))


@settings(max_examples=30, **busy_machine)
@given(st.lists(samples, min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 3))
def test_what_is_written_is_read(written, per_shard, batch_size):
    with tempfile.TemporaryDirectory() as folder:
        compute = lambda indices: [written[index] for index in indices]  # noqa: E731
        changes = {"count": len(written), "per_shard": per_shard, "batch_size": batch_size}
        write_shards(folder, compute, **RUN | changes)
        read = list(ShardFolder(folder))
    assert len(read) == len(written)
    for (new, record), (old, old_record) in zip(read, written, strict=True):
        assert record == old_record
        assert {name: bits(tensor) for name, tensor in new.items()} == {name: bits(old[name]) for name in old}


def test_views_are_stored_as_what_they_show(tmp_path):
    batch = torch.arange(24.0).reshape(2, 3, 4)
    views = {"a": batch[0], "b": batch[1].T, "mask": torch.tensor([True, False]), "wide": torch.ones(1).expand(3)}
    write_shards(tmp_path, lambda indices: [(views, {})], **RUN | {"count": 1})
    read, _ = ShardFolder(tmp_path)[0]
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in views.items()
    }
    read["a"] += 1


def test_layout(whole):
    assert sorted(tree(whole)) == [
        ".settings.json",
        "index.json",
        "shard-00000.tar",
        "shard-00001.tar",
        "shard-00002.tar",
    ]
    entries = json.loads((whole / "index.json").read_text())["shards"]
    assert [[span["key"] for span in entry["samples"]] for entry in entries] == [
        ["00000000", "00000001", "00000002"],
        ["00000003", "00000004", "00000005"],
        ["00000006"],
    ]
    for entry in entries:
        with open(whole / entry["file"], "rb") as shard:
            for span in entry["samples"]:
                assert span["kind"] == "encoded"
                shard.seek(span["offset"])
                with tarfile.open(fileobj=io.BytesIO(shard.read(span["length"]))) as tar:
                    assert tar.getnames() == [f"{span['key']}.json", f"{span['key']}.safetensors"]


def test_webdataset_reads_the_shards(whole):
    from webdataset import WebDataset

    paths = [str(path) for path in sorted(whole.glob("*.tar"))]
    read = list(WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{index:08d}" for index in range(COUNT)]
    assert json.loads(read[3]["json"]) == {"caption": "größer: 3"}


def test_batches_stay_within_a_shard(tmp_path, whole):
    compute = Compute()
    write(tmp_path, compute, batch_size=2)
    assert compute.batches == [[0, 1], [2], [3, 4], [5], [6]]
    assert tree(tmp_path) == tree(whole)


def test_order_and_position(whole):
    features = ShardFolder(whole)
    walked = [features.at(position, seed=3) for position in range(2 * COUNT)]
    assert walked == [*epoch_order(COUNT, 3, 0), *epoch_order(COUNT, 3, 1)]
    assert sorted(walked[:COUNT]) == list(range(COUNT))


# A run that was killed


@settings(max_examples=60, **busy_machine)
@given(st.data(), st.integers(1, 3), st.sampled_from([True, False]))
def test_a_run_killed_at_any_byte_continues(whole, data, batch_size, renamed):
    entries = json.loads((whole / "index.json").read_text())["shards"]
    killed = data.draw(st.integers(0, len(entries) - 1))
    written = data.draw(st.integers(0, entries[killed]["bytes"]))
    stored = sum(span["offset"] + span["length"] <= written for span in entries[killed]["samples"])
    kept = PER_SHARD * killed + stored // batch_size * batch_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for entry in entries[:killed]:
            (folder / entry["file"]).write_bytes((whole / entry["file"]).read_bytes())
        cut = (whole / entries[killed]["file"]).read_bytes()[:written]
        if renamed and written == entries[killed]["bytes"]:
            (folder / entries[killed]["file"]).write_bytes(cut)
            kept = min(COUNT, PER_SHARD * (killed + 1))
        else:
            (folder / f"{entries[killed]['file']}.part").write_bytes(cut)
        assert write(folder, batch_size=batch_size) == list(range(kept, COUNT))
        assert tree(folder) == tree(whole)


@pytest.mark.parametrize("at", [0, 4, 6])
def test_a_killed_process_loses_the_sample_it_was_at(tmp_path, whole, at):
    def kill(index):
        if index == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            write(tmp_path, Compute(before=kill))
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(UserError, match=r"not a finished feature folder: it has no index\.json"):
        ShardFolder(tmp_path)
    assert write(tmp_path) == list(range(at, COUNT))
    assert tree(tmp_path) == tree(whole)


def test_a_finished_folder_is_not_computed_again(folder, whole):
    assert write(folder) == []
    assert tree(folder) == tree(whole)


def test_a_removed_shard_is_made_again(folder, whole):
    (folder / "shard-00001.tar").unlink()
    assert write(folder) == [3, 4, 5]
    assert tree(folder) == tree(whole)


def test_an_index_is_gone_while_its_folder_is_unfinished(folder):
    (folder / "shard-00001.tar").unlink()

    def stop(index):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, Compute(before=stop))
    assert not (folder / "index.json").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"student": "xyz", "steps": 20}}, "student was 'abc', now 'xyz'"),
        ({"settings": {"student": "abc"}}, "steps was 20, now None"),
        ({"count": 8}, "count was 7, now 8"),
        ({"per_shard": 4}, "per_shard was 3, now 4"),
        ({"kind": "trajectory"}, "kind was 'encoded', now 'trajectory'"),
    ],
)
def test_other_settings_are_refused(folder, whole, changes, named):
    with pytest.raises(UserError, match=named):
        write(folder, **changes)
    assert tree(folder) == tree(whole)


def test_a_shard_found_damaged_at_the_end_is_named(folder):
    os.truncate(folder / "shard-00000.tar", 2048)
    with pytest.raises(UserError, match=r"shard-00000\.tar is damaged: its samples are not 00000000 to 00000002"):
        write(folder)
    assert not (folder / "index.json").exists()


def test_a_finished_shard_that_changed_is_not_vouched_for_anew(folder):
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-2000] + bytes([255] * 16) + path.read_bytes()[-1984:])
    for _ in range(2):
        with pytest.raises(UserError, match=r"shard-00001\.tar is damaged: its bytes are not those that index\.json"):
            write(folder)
    path.unlink()
    assert write(folder) == [3, 4, 5]


@pytest.mark.parametrize("damage", ["zeros", "header", "repeated", "cut"])
def test_a_damaged_tail_costs_its_own_samples_and_is_named(tmp_path, whole, damage, caplog):
    """Of sample 5: zeros, where a machine went down, a broken tar header, another writer's sample, half missing."""
    entry = json.loads((whole / "index.json").read_text())["shards"][1]
    span = entry["samples"][2]
    (tmp_path / "shard-00000.tar").write_bytes((whole / "shard-00000.tar").read_bytes())
    good = (whole / entry["file"]).read_bytes()[: span["offset"] + span["length"]]
    before, sample = good[: span["offset"]], good[span["offset"] :]
    first = entry["samples"][0]
    tails = {
        "zeros": sample[:512] + bytes(len(sample) - 512),
        "header": b"x" * 512 + sample[512:],
        "repeated": good[first["offset"] :][: first["length"]],
        "cut": sample[:700],
    }
    (tmp_path / f"{entry['file']}.part").write_bytes(before + tails[damage])
    assert write(tmp_path) == [5, 6]
    assert "shard-00001.tar.part is cut off or damaged: samples from 00000005 on are made again" in caplog.text
    assert tree(tmp_path) == tree(whole)


def test_a_full_disk_leaves_no_index(full_disk, whole):
    filler = full_disk / "filler"
    filler.write_bytes(bytes(36 << 10))
    with pytest.raises(UserError, match=r"cannot write .*shard-0000\d\.tar: no space left on device"):
        write(full_disk)
    assert not (full_disk / "index.json").exists()
    filler.unlink()
    assert 0 < len(write(full_disk)) < COUNT
    assert tree(full_disk) == tree(whole)


def test_a_full_disk_without_a_mount(tmp_path, monkeypatch):
    def full(key, *sample):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_pack", full)
    with pytest.raises(UserError, match=r"cannot write .*shard-00000\.tar: no space left on device"):
        write(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    compute = Compute()
    with pytest.raises(UserError, match="not a folder"):
        write(tmp_path / "file", compute)
    assert compute.batches == []


def test_what_a_caller_does_wrong(tmp_path):
    with pytest.raises(ValueError, match="0 samples were computed for 1 indices"):
        write_shards(tmp_path, lambda indices: [], **RUN)
    for name in ("count", "per_shard", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            write(tmp_path, **{name: 0})


# A folder that was damaged


@pytest.mark.parametrize("name", ["shard-00001.tar", "index.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        ShardFolder(folder)


def test_a_shard_of_another_size_is_named(folder):
    path = folder / "shard-00001.tar"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(UserError) as caught:
        ShardFolder(folder)
    expected = f"{path} is damaged: it has {size - 1} bytes where index.json says {size}"
    assert caught.value.message == expected


def test_shards_that_fail_after_opening_are_named(folder):
    features = ShardFolder(folder)
    features.verify()
    os.truncate(folder / "shard-00000.tar", 2048)
    (folder / "shard-00002.tar").unlink()
    assert features[4]
    for index, name in ((1, "shard-00000.tar"), (2, "shard-00000.tar"), (6, "shard-00002.tar")):
        with pytest.raises(UserError, match=f"{name} is damaged: sample 0000000{index} cannot be read"):
            features[index]
    with pytest.raises(UserError, match=r"damaged or missing: shard-00000\.tar, shard-00002\.tar\n"):
        features.verify()


@settings(max_examples=30, **busy_machine)
@given(st.data())
def test_any_flipped_bit_of_a_shard_is_found_by_verify(whole, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(whole, folder)
        shard = folder / "shard-00001.tar"
        flip(shard, data.draw(st.integers(0, shard.stat().st_size - 1)))
        features = ShardFolder(folder)
        with pytest.raises(UserError, match=r"damaged or missing: shard-00001\.tar\n"):
            features.verify()
        read_all(features)


@settings(max_examples=60, **busy_machine)
@given(st.data(), st.booleans())
def test_a_damaged_index_raises_nothing_but_user_errors(whole, data, cut):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(whole, folder)
        index = folder / "index.json"
        place = data.draw(st.integers(0, index.stat().st_size - 2))  # the last byte is a newline
        if cut:
            os.truncate(index, place)
            with pytest.raises(UserError, match=r"index\.json is damaged"):
                ShardFolder(folder)
        else:
            flip(index, place)
            try:
                features = ShardFolder(folder)
            except UserError:
                return
            read_all(features)


def read_all(features):
    for index in range(len(features)):
        try:
            features[index]
        except UserError as error:
            assert "is damaged: sample" in error.message


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda index: [], "list indices must be"),
        (lambda index: {}, "shards"),
        (lambda index: {"shards": []}, "it lists no sample"),
        (lambda index: index["shards"][0].pop("sha256") and index, "sha256"),
        (lambda index: index["shards"][0].update(bytes="4") or index, "a number of bytes is no whole number"),
        (lambda index: index["shards"][0].update(file=None) or index, "a file or sha256 is no text"),
        (lambda index: index["shards"][0]["samples"][0].update(offset=1.5) or index, "an offset or length is no whole"),
        (lambda index: index["shards"][0]["samples"][0].update(offset=-1) or index, "lies outside shard-00000.tar"),
        (lambda index: index["shards"][0]["samples"][0].update(length=1 << 40) or index, "outside shard-00000.tar"),
        (lambda index: index["shards"][0]["samples"][0].update(key=7) or index, "a key or kind is no text"),
        (lambda index: index["shards"][0]["samples"][0].update(size=7) or index, "size"),
    ],
)
def test_an_index_of_another_shape(folder, change, fault):
    path = folder / "index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=r"index\.json is damaged: .*" + fault):
        ShardFolder(folder)


def test_the_kind_that_is_asked_for(folder):
    assert len(ShardFolder(folder, "encoded")) == COUNT
    with pytest.raises(UserError, match="holds samples of kind encoded, where trajectory is needed"):
        ShardFolder(folder, "trajectory")
