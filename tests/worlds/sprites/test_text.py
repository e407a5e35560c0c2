"""The text encoders: what they are asked, and that training and the pipeline see the same embeddings."""

import random
from dataclasses import replace

import pytest
import torch

from vidaccel.errors import UserError
from vidaccel.models.calling import unknown_words
from vidaccel.worlds.sprites import text
from vidaccel.worlds.sprites.captions import AFTER, BEFORE, LAMP_PHRASES, MOTION_PHRASES, caption, vocabulary, words
from vidaccel.worlds.sprites.pipeline import (
    CALL,
    TEXT_TOKENS,
    assemble,
    build_autoencoder,
    build_tokenizer,
    build_transformer,
    grown,
    knows_lamps,
)
from vidaccel.worlds.sprites.settings import AutoencoderTraining, TeacherTraining
from vidaccel.worlds.sprites.world import COLOURS, MOTIONS, SHAPES, Scene, Sprite, random_scene

RED_CIRCLE = Sprite("circle", "red", "right", 10, 10, 8)
BLUE_CROSS = Sprite("cross", "blue", "still", 40, 40, 8)


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    return text.CaptionReader(16).eval()


def test_labels_by_hand():
    scenes = [Scene("gray", (RED_CIRCLE,)), Scene("black", (BLUE_CROSS, RED_CIRCLE))]
    absent = text.ABSENT
    assert text.labels(scenes).tolist() == [
        [1, 0, 0, 0, 1, absent, absent, absent],
        [0, 1, 3, 2, 4, 0, 0, 1],
    ]
    unsaid = Scene("gray", (replace(RED_CIRCLE, colour=None), replace(BLUE_CROSS, motion=None)))
    assert text.labels([unsaid]).tolist() == [[1, 1, 0, len(COLOURS), 1, 3, 2, len(MOTIONS)]]


def test_every_caption_fits_and_is_known():
    tokenizer = build_tokenizer(TEXT_TOKENS)
    rng = random.Random(0)
    for _ in range(500):
        ids = tokenizer(caption(random_scene(rng), rng)).input_ids
        assert len(ids) <= TEXT_TOKENS
        assert tokenizer.unk_token_id not in ids


def test_captions_with_lamps_fit_as_well():
    tokenizer, rng = build_tokenizer(TEXT_TOKENS, lamps=True), random.Random(0)
    longest = max((phrase for phrases in MOTION_PHRASES.values() for phrase in phrases), key=lambda p: len(words(p)))
    lamps = max(LAMP_PHRASES, key=lambda phrase: len(words(phrase)))
    subject = " and ".join(f"a red {shape} {lamps} {longest}" for shape in ("circle", "square"))
    texts = [template.format(subject=subject, bg="black") for template in BEFORE + AFTER]
    for text_ in texts + [caption(random_scene(rng, lamps=1.0), rng) for _ in range(300)]:
        ids = tokenizer(text_).input_ids
        assert len(ids) <= TEXT_TOKENS and tokenizer.unk_token_id not in ids


def test_the_tokenizer_knows_exactly_the_vocabulary():
    tokenizer = build_tokenizer(77)
    assert set(tokenizer.get_vocab()) == {"<pad>", "<unk>", "<s>", "</s>", *vocabulary()}
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_training_sees_what_the_pipeline_sees(reader):
    autoencoder = build_autoencoder(AutoencoderTraining(block_out_channels=[4, 4, 4, 4]))
    small = TeacherTraining(heads=2, head_dim=16, double_blocks=1, single_blocks=1)
    transformer = build_transformer(small, 16, 16)
    pipe = assemble(reader.llama, reader.clip, autoencoder, transformer, 3.0, torch.float32)
    captions = ["a red circle moving right on black", "a blue cross growing and a red circle shrinking, on gray"]
    call = {name: CALL[name] for name in ("prompt_template", "max_sequence_length")}
    embeds, pooled, mask = pipe.encode_prompt(captions, **call)
    with torch.no_grad():
        ours, tokens, our_pooled = text.encode_captions(reader.tokenizer, reader.llama, reader.clip, captions)
    our_mask = tokens.attention_mask.bool()
    assert torch.equal(our_mask, mask.bool())
    torch.testing.assert_close(ours[our_mask], embeds[our_mask])
    torch.testing.assert_close(our_pooled, pooled)
    assert unknown_words(pipe, "a red zebra on mars") == ["zebra", "mars"]


def test_each_token_is_asked_about_its_own_sprite():
    answers = text.labels([Scene("gray", (RED_CIRCLE,)), Scene("black", (BLUE_CROSS, RED_CIRCLE))])
    second = torch.tensor([[False, False, False], [False, True, True]])
    circle, cross = [0, 0, 1], [3, 2, 4]
    assert text.token_answers(answers, second).tolist() == [
        [[1, 0, *circle]] * 3,
        [[0, 1, *cross], [0, 1, *circle], [0, 1, *circle]],
    ]


def test_and_begins_the_second_sprite():
    tokenizer = build_tokenizer(TEXT_TOKENS)
    for told, about in [
        ("on gray, a red circle and a blue cross", ["and", "a", "blue", "cross", "</s>"]),
        ("a red circle growing and a cross, on gray", ["and", "a", "cross", ",", "on", "gray", "</s>"]),
        ("a red circle on gray", []),
    ]:
        ids = tokenizer(told, return_tensors="pt").input_ids
        assert tokenizer.convert_ids_to_tokens(ids[text.about_second(tokenizer, ids)]) == about


def test_an_untrained_reader_guesses(reader):
    """Heads on nearly constant embeddings: about log(classes) a question."""
    scenes = [random_scene(random.Random(i)) for i in range(64)]
    captions = [caption(scene, random.Random(0)) for scene in scenes]
    loss, right = text.caption_loss(reader, captions, text.labels(scenes))
    chance = torch.tensor([float(n) for n in text.classes(1) + text.classes(2)]).log().mean().item()
    assert loss.item() == pytest.approx(chance, rel=0.5)
    assert 0 <= right["last_right"] < 0.7


def test_a_missing_second_sprite_is_not_asked_about(reader):
    scene = Scene("gray", (RED_CIRCLE,))
    answers = text.labels([scene, Scene("gray", (RED_CIRCLE, BLUE_CROSS))])
    loss, _ = text.caption_loss(reader, ["a red circle on gray"] * 2, answers)
    loss.backward()
    only_first = text.classes(2).index(len(SHAPES), 5)
    gradient = reader.pooled_heads[only_first].weight.grad
    assert torch.isfinite(loss) and gradient is not None and gradient.abs().sum() > 0


LIT = "a red square with flickering lamps moving right on black"


def test_grown_encoders_say_of_old_prompts_what_they_said(reader):
    old, new = build_tokenizer(TEXT_TOKENS), build_tokenizer(TEXT_TOKENS, lamps=True)
    captions = ["a red circle moving right on black", "a blue cross growing and a red circle shrinking, on gray", ""]
    assert old(captions).input_ids == new(captions).input_ids
    assert old.unk_token_id in old(LIT).input_ids and new.unk_token_id not in new(LIT).input_ids
    llama, clip = grown(reader.llama).eval(), grown(reader.clip).eval()
    assert knows_lamps(llama) and knows_lamps(clip) and not knows_lamps(reader.llama)
    with torch.no_grad():
        before = text.encode_captions(old, reader.llama, reader.clip, captions)
        after = text.encode_captions(new, llama, clip, captions)
        lit = text.encode_captions(new, llama, clip, [LIT, LIT.replace("flickering", "blinking")])
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.equal(lit[0][0], lit[0][1])
    with pytest.raises(UserError, match="cannot learn those of lamps"):
        grown(llama)


def test_only_new_words_are_learnt():
    torch.manual_seed(0)
    plain = text.CaptionReader(16)
    reader = text.CaptionReader(16, lamps=True)
    reader.llama.load_state_dict(grown(plain.llama).state_dict())
    reader.clip.load_state_dict(grown(plain.clip).state_dict())
    old = len(build_tokenizer(TEXT_TOKENS))
    before = {name: weight.clone() for name, weight in reader.state_dict().items()}
    scenes = [random_scene(random.Random(i), lamps=1.0) for i in range(8)]
    with text.new_words_alone(reader):
        trained = [weight for weight in reader.parameters() if weight.requires_grad]
        captions = [caption(scene, random.Random(0)) for scene in scenes]
        loss, _ = text.caption_loss(reader, captions, text.labels(scenes, lamps=True))
        loss.backward()
        torch.optim.SGD(trained, 1.0).step()
    for name, weight in reader.state_dict().items():
        if "embed_tokens" in name or "token_embedding" in name:
            assert torch.equal(weight[:old], before[name][:old]) and not torch.equal(weight[old:], before[name][old:])
        elif "heads" not in name:
            assert torch.equal(weight, before[name]), name
    with pytest.raises(KeyboardInterrupt), text.new_words_alone(reader):
        raise KeyboardInterrupt
    assert reader.state_dict().keys() == before.keys()  # plain embeddings, as they are saved


def test_whether_a_sprite_has_lamps_is_asked_where_they_are_known():
    lit = random_scene(random.Random(0), pair_share=0.0, lamps=1.0)
    assert text.labels([lit], lamps=True)[0, 5] == 1 and text.labels([lit])[0, 5] == text.ABSENT
    plain = Scene("gray", (RED_CIRCLE, BLUE_CROSS))
    assert text.labels([plain], lamps=True).tolist() == [[1, 1, 0, 0, 1, 0, 3, 2, 4, 0]]
    assert text.classes(2, lamps=True) == (3, 2, 4, 7, 8, 2, 4, 7, 8, 2) and len(text.classes(1)) == 5
