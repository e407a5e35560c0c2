"""What the teacher is trained on, in a device's memory: which samples, which captions, and that nothing waits."""

from collections import Counter

import pytest
import torch

from vidaccel.config import loader as configuration
from vidaccel.config.training import TrainConfig
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.worlds.sprites import align
from vidaccel.worlds.sprites.pipeline import build_transformer
from vidaccel.worlds.sprites.rendered_bank import rendered_bank
from vidaccel.worlds.sprites.settings import CONF, SpritesConfig, TeacherTraining
from vidaccel.worlds.sprites.source import RenderedScenes
from vidaccel.worlds.sprites.teacher import Draw, draw_batch, from_scenes, teacher_loss

CLIPS, CAPTIONS = 3, 2
SOURCE = RenderedScenes(CLIPS, 5, pair_share=1.0)


@pytest.fixture(scope="module")
def loaded() -> LoadedPipeline:
    return load_pipeline("sprites/teacher", dtype="float32")


def opened(loaded: LoadedPipeline, *overrides: str) -> Draw:
    config = configuration.load(CONF, SpritesConfig, "default", [f"captions={CAPTIONS}", "seed=5", *overrides])
    return from_scenes(config, loaded, SOURCE, autoencoder="").open()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_samples_are_those_of_the_bank_with_what_their_tokens_show(loaded):
    bank, labels = (
        rendered_bank(loaded, SOURCE.scenes, CLIPS, CAPTIONS),
        align.shown([*map(SOURCE.scene, range(CLIPS))]),
    )
    draw = opened(loaded, "teacher.caption_dropout=0")
    positions = range(4, 9)
    indices = [bank.at(position, 5) for position in positions]
    with torch.device("meta"):  # where a tensor would lie that is made on no device in particular
        drawn = draw(positions, generator())
    shown = drawn.pop("shown")
    assert torch.equal(shown, labels[[index // CAPTIONS for index in indices]])
    theirs = bank.batch(indices, torch.float32)
    assert drawn.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in drawn.items())


def test_a_share_of_captions_is_dropped_anew_in_each_pass(loaded):
    plain, drops = opened(loaded, "teacher.caption_dropout=0"), opened(loaded, "teacher.caption_dropout=0.25")
    positions = range(400)
    whole, some, others = plain(positions, generator()), drops(positions, generator()), drops(positions, generator(1))
    dropped = some["prompt_mask"].sum(1) == 2  # begin and end alone
    assert 0.15 < dropped.float().mean() < 0.35
    assert not torch.equal(dropped, others["prompt_mask"].sum(1) == 2)
    for name in ("prompt_embeds", "prompt_mask", "pooled"):
        assert torch.equal(some[name][~dropped], whole[name][~dropped])
        first, *rest = some[name][dropped]
        assert all(torch.equal(first, one) for one in rest)
    assert torch.equal(some["latent"], whole["latent"])


def test_clips_are_drawn_evenly_and_labels_only_where_they_are_wanted(loaded):
    drawn = opened(loaded, "teacher.alignment=0")(range(6 * CLIPS), generator())
    counts = Counter(float(latent.sum()) for latent in drawn["latent"])
    assert list(counts.values()) == [6] * CLIPS
    assert "shown" not in drawn


@pytest.mark.parametrize("labelled", [True, False])
def test_the_loss_asks_for_no_value(labelled, loaded):
    """Nothing can be asked of a tensor on the meta device."""
    settings = TeacherTraining(alignment_warmup=10, double_blocks=1, single_blocks=1, heads=2, head_dim=16)
    batch = draw_batch(opened(loaded), settings, TrainConfig(batch_size=2), 0, generator())
    if not labelled:
        del batch["shown"]
    width = batch["pooled"].shape[1]
    aligned = align.Aligned(build_transformer(settings, 16, width)).to("meta")
    batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    loss, measured = teacher_loss(aligned, batch, alignment=0.5)
    loss.backward()
    assert loss.is_meta and set(measured) == ({"flow_matching", "alignment"} if labelled else set())


def test_the_weight_of_naming_rises(loaded):
    draw, settings = opened(loaded), TeacherTraining(alignment=0.4, alignment_warmup=10)
    twice = TrainConfig(batch_size=1, accumulate=2)
    weights = [draw_batch(draw, settings, twice, index, generator())["alignment"].item() for index in (0, 1, 8, 40)]
    assert weights == pytest.approx([0.02, 0.02, 0.18, 0.4])
    assert "alignment" not in draw_batch(draw, TeacherTraining(), twice, 0, generator())
    head = lambda *args: (torch.zeros(1), torch.zeros(1, 80, 5 + 7 + 8))  # noqa: E731
    batch = draw_batch(draw, settings, twice, 8, generator()) | {"v": torch.zeros(1)}
    loss, measured = teacher_loss(head, batch, alignment=0.4)
    assert loss.item() == pytest.approx(0.18 * measured["alignment"].item())
