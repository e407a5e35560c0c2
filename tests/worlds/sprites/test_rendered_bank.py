"""Scenes rendered and encoded together are what a feature folder of them would hold."""

import pytest
import torch

from vidaccel.collect.bank import Bank, world_bank
from vidaccel.collect.encode import batch, encode_samples
from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.worlds import world
from vidaccel.worlds.sprites import rendered_bank as module
from vidaccel.worlds.sprites.drawing import Scenes
from vidaccel.worlds.sprites.rendered_bank import rendered_bank
from vidaccel.worlds.sprites.source import RenderedScenes

SCENES = Scenes(4, pair_share=0.5, odds={"cross": 2})
CLIPS, CAPTIONS = 5, 3


@pytest.fixture(scope="module")
def loaded() -> LoadedPipeline:
    return load_pipeline("sprites/teacher", dtype="float32")


@pytest.fixture(scope="module")
def bank(loaded) -> Bank:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CLIPS_AT_ONCE", 2)
        patch.setattr(module, "CAPTIONS_AT_ONCE", 4)
        return rendered_bank(loaded, SCENES, CLIPS, CAPTIONS)


def test_it_holds_what_a_feature_folder_would(bank, loaded):
    source, told = RenderedScenes(CLIPS, 4, 0.5, {"cross": 2}), SCENES.many(CLIPS, CAPTIONS)
    drawn = [clip * CAPTIONS + clip % CAPTIONS for clip in range(CLIPS)]
    records = [{"caption": told[clip][1][clip % CAPTIONS]} for clip in range(CLIPS)]
    samples = encode_samples(loaded, [source[clip][0] for clip in range(CLIPS)], records, "float16")
    theirs = batch([tensors for tensors, _ in samples], torch.device("cpu"), torch.float32)
    ours = bank.batch(drawn, torch.float32)
    assert (len(bank), bank.captions) == (CLIPS, CAPTIONS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name][:, : tensor.shape[1]], atol=2e-3, rtol=2e-3)
    assert torch.equal(ours["prompt_mask"].sum(1), theirs["prompt_mask"].sum(1))
    assert {t.dtype for t in (bank.latents, bank.texts["prompt_embeds"], bank.texts["pooled"])} == {torch.float16}


def test_a_caption_of_several_clips_is_there_once(bank, loaded):
    distinct = {caption for _, captions in SCENES.many(CLIPS, CAPTIONS) for caption in captions}
    assert {len(text) for text in bank.texts.values()} == {len(distinct)}
    same = rendered_bank(loaded, Scenes(0), 1, 40)
    assert len(same.texts["pooled"]) < 40 and same.which.shape == (1, 40)


def test_general_code_gets_it_from_the_world(loaded):
    ours, held_out = world_bank(loaded, 2, 1, seed=4), world_bank(loaded, 2, 1, seed=4, split="held_out")
    assert ours and held_out
    assert torch.equal(ours.latents, rendered_bank(loaded, Scenes(4), 2, 1).latents)
    assert not torch.equal(ours.latents, held_out.latents)


def test_a_world_gives_its_bank_and_scorer_more_than_once(loaded):
    sprites = world("sprites")
    for _ in range(2):
        assert sprites.bank(loaded, 1, 1, 0, "train")
        assert sprites.scorer().held_out_prompts(1)


def test_what_does_not_fit_half_precision_is_refused(loaded):
    factor = loaded.pipe.vae.config.scaling_factor
    loaded.pipe.vae.register_to_config(scaling_factor=1e9)
    try:
        with pytest.raises(UserError, match="latent of a scene is not finite"):
            rendered_bank(loaded, SCENES, 2, 1)
    finally:
        loaded.pipe.vae.register_to_config(scaling_factor=factor)
