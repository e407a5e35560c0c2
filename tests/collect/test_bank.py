"""A bank gives what its folder gives, and nothing in it waits for a device or lies on another."""

import pytest
import torch

from tests.tiny import CALLS, SIZE, tiny_pipeline
from vidaccel.collect.bank import Bank, cut_texts, world_bank
from vidaccel.collect.encode import LATENT, batch, encode_samples, encode_texts
from vidaccel.data.shards import Sample, ShardFolder, write_shards
from vidaccel.families.registry import FAMILIES
from vidaccel.models.loading import LoadedPipeline

CAPTIONS = ["a red circle", "a", "a blue square moving right on a white background", "", "two things"]
CPU = torch.device("cpu")


def model(family: str) -> LoadedPipeline:
    return LoadedPipeline(tiny_pipeline(family), FAMILIES[family], "here", SIZE | CALLS.get(family, {}), {})


def encoded(loaded: LoadedPipeline, dtype: str = "float16") -> list[Sample]:
    videos = torch.rand(len(CAPTIONS), 3, 5, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return encode_samples(loaded, list(videos), [{"caption": caption} for caption in CAPTIONS], dtype)


@pytest.fixture(scope="module", params=["hunyuan_video", "hunyuan_video_15", "wan"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(family) -> LoadedPipeline:
    return model(family)


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory) -> ShardFolder:
    samples, path = encoded(loaded), tmp_path_factory.mktemp("features")
    rows = {"count": len(samples), "kind": "encoded", "settings": {}, "per_shard": 2}
    write_shards(path, lambda indices: [samples[i] for i in indices], **rows)
    return ShardFolder(path)


@pytest.fixture(scope="module")
def bank(folder, loaded) -> Bank:
    with torch.device("meta"):  # where a tensor would lie that is made on no device in particular
        return Bank.of(folder, CPU, loaded.family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_batches_are_those_of_the_folder_but_for_padding(bank, folder, loaded, dtype):
    indices = [3, 0, 4, 0]
    theirs = batch([tensors for tensors, _ in folder.read(indices)], CPU, dtype)
    with torch.device("meta"):
        ours = bank.batch(indices, dtype)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == dtype and tensor.device == CPU
        whole = theirs[name]
        assert torch.equal(tensor, whole if tensor.shape == whole.shape else whole[:, : tensor.shape[1]])
    for text in loaded.family.text_tensors:
        if "mask" in text.argument:  # no word is lost
            assert ours[text.stored].sum() == theirs[text.stored].sum()


def test_texts_are_cut_to_the_longest_where_padding_is_masked(bank, folder, loaded):
    stored = {text.argument: text.stored for text in loaded.family.text_tensors}
    cut = {text.stored: stored[text.mask] for text in loaded.family.text_tensors if text.mask}
    for name, mask in cut.items():
        longest = max(_used(folder[i][0][mask]) for i in range(len(folder)))
        least = next(text.least for text in loaded.family.text_tensors if text.stored == name)
        whole = folder[0][0][mask].shape[0]
        assert bank.texts[name].shape[1] == bank.texts[mask].shape[1] == min(whole, -(-max(longest, least) // 8) * 8)
    for name in bank.texts.keys() - cut.keys() - set(cut.values()):
        assert bank.texts[name].shape[1:] == folder[0][0][name].shape


def _used(mask: torch.Tensor) -> int:
    """Tokens up to the last one that the mask [L] lets through."""
    return max((i + 1 for i, one in enumerate(mask.tolist()) if one), default=0)


def test_the_order_is_the_folders(bank, folder):
    assert len(bank) == len(folder) and bank.captions == 1
    assert [bank.at(i, 3) for i in range(17)] == [folder.at(i, 3) for i in range(17)]


def _bank(clips: int, captions: int) -> Bank:
    """Latent and text of every sample are its own numbers."""
    which = torch.arange(clips * captions).view(clips, captions).flip(0)
    return Bank(torch.arange(clips).view(-1, 1, 1, 1, 1), {"pooled": torch.arange(clips * captions).view(-1, 1)}, which)


def test_an_epoch_has_every_clip_once_and_its_captions_turn():
    bank = _bank(6, 3)
    epochs = [[divmod(bank.at(6 * epoch + i, 7), 3) for i in range(6)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(clip for clip, _ in epoch) == list(range(6))
        assert len({caption for _, caption in epoch}) == 3
    assert sorted(sample for epoch in epochs for sample in epoch) == [(i, k) for i in range(6) for k in range(3)]


def test_a_sample_is_a_clip_with_one_of_its_captions():
    drawn = _bank(6, 3).batch([0, 5, 17], torch.float32)
    assert drawn[LATENT].flatten().tolist() == [0, 1, 5]
    assert drawn["pooled"].flatten().tolist() == [15, 14, 2]


def test_the_last_clips_are_split_off():
    bank = _bank(6, 3)
    trained, kept = bank.split(2)
    assert (len(trained), len(kept)) == (4, 2)
    for name, tensor in trained.batch(range(12), torch.float32).items():
        assert torch.equal(tensor, bank.batch(range(12), torch.float32)[name])
    for name, tensor in kept.batch(range(6), torch.float32).items():
        assert torch.equal(tensor, bank.batch(range(12, 18), torch.float32)[name])
    assert {trained.at(i, 0) // 3 for i in range(4)} == set(range(4))
    for count in (0, 6, 7):
        with pytest.raises(ValueError, match="cannot be split off"):
            bank.split(count)


def test_another_text_is_cut_as_the_banks_are(bank, loaded):
    empty = bank.cut(encode_texts(loaded, [""]))
    assert {name: t.shape[1:] for name, t in empty.items()} == {name: t.shape[1:] for name, t in bank.texts.items()}


def test_a_text_that_is_to_be_cut_alike_is_kept_whole(folder, loaded):
    """A long negative prompt beside short captions."""
    unwanted = encode_texts(loaded, ["a red circle moving to the right and a blue square on white"])
    held = Bank.of(folder, CPU, loaded.family, unwanted)
    cut = held.cut(unwanted)
    for text in loaded.family.text_tensors:
        if text.mask:
            mask = next(each.stored for each in loaded.family.text_tensors if each.argument == text.mask)
            assert cut[mask].sum() == unwanted[mask].sum() and cut[text.stored].shape[1] == cut[mask].shape[1]


def test_no_words_of_another_text_are_cut_off():
    loaded = model("hunyuan_video")
    short = Bank(torch.zeros(1), cut_texts(_stored(encode_texts(loaded, ["a"])), loaded.family), torch.zeros(1, 1))
    assert short.texts["prompt_mask"].shape[1] == 8
    with pytest.raises(ValueError, match="longer than the 8 tokens"):
        short.cut(encode_texts(loaded, ["a red circle moving to the right and a blue square on white"]))


def _stored(texts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.bool() if "mask" in name else tensor for name, tensor in texts.items()}


def test_precision_is_that_of_the_folder(loaded):
    samples = encoded(loaded, "float32")
    bank = Bank.of(samples, CPU, loaded.family)
    assert torch.equal(bank.batch([2], torch.float32)[LATENT][0], samples[2][0][LATENT])


def test_no_world_has_clips_for_a_model_of_other_words():
    assert world_bank(model("hunyuan_video"), clips=2, captions=1, seed=0) is None
