"""Text encoders that know what a caption means: trained to name, at every word, the sprite that the word is about.

Random encoders tell words apart but not which colour belongs to which shape, since the transformer sees text tokens
without positions. So both encoders are trained together with linear heads that read off the scene; the heads are then
thrown away. A token speaks of its own sprite alone: where every token knows both, the transformer's attention has
nothing to choose between, and paints two sprites with each other's colours. B captions, L tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BatchEncoding, PreTrainedTokenizerFast

from vidaccel.worlds.sprites.pipeline import (
    HIDDEN_LAYER,
    TEXT_TOKENS,
    GrowingEmbedding,
    build_clip,
    build_llama,
    build_tokenizer,
    embedding_of,
)
from vidaccel.worlds.sprites.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene

ABSENT = -100
"""Label of what a scene lacks (a second sprite): `cross_entropy` leaves it out."""
ATTRIBUTES = (("shape", SHAPES), ("colour", tuple(COLOURS)), ("motion", MOTIONS))
LAMPS = ("lamps", (False, True))
"""An attribute more, of models that know lamps: whether the sprite has any."""
UNSAID = {"shape": 0, "colour": 1, "motion": 1}
"""Further classes of an attribute: that the caption does not say."""


def attributes(lamps: bool) -> tuple[tuple[str, tuple], ...]:
    """Name and values of what is asked of each sprite."""
    return (*ATTRIBUTES, LAMPS) if lamps else ATTRIBUTES


def classes(sprites: int, lamps: bool = False) -> tuple[int, ...]:
    """Classes of each question: background, number of sprites less one, then shape, colour, motion and perhaps lamps of
    so many sprites: of both for the pooled embedding, of the one that it is about for a token."""
    of_each = tuple(len(values) + UNSAID.get(name, 0) for name, values in attributes(lamps))
    return len(BACKGROUNDS), 2, *(sprites * of_each)


class CaptionReader(nn.Module):
    """The pipeline's two text encoders and the heads they are trained with."""

    def __init__(self, width: int, lamps: bool = False):
        super().__init__()
        self.lamps = lamps
        self.tokenizer = build_tokenizer(TEXT_TOKENS, lamps)
        self.llama = build_llama(self.tokenizer, width)
        self.clip = build_clip(self.tokenizer, width)
        self.token_heads = nn.ModuleList(nn.Linear(width, n) for n in classes(1, lamps))
        self.pooled_heads = nn.ModuleList(nn.Linear(width, n) for n in classes(2, lamps))

    def forward(self, captions: list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor], BatchEncoding]:
        """Answers to each question from every token [B, L, classes] and from the pooled embedding [B, classes].

        The third result is the tokens: `input_ids` and `attention_mask`, [B, L].
        """
        embeds, tokens, pooled = encode_captions(self.tokenizer, self.llama, self.clip, captions)
        return [head(embeds) for head in self.token_heads], [head(pooled) for head in self.pooled_heads], tokens


@contextmanager
def new_words_alone(reader: CaptionReader) -> Iterator[None]:
    """In the block, only embeddings of the words of lamps, and the heads, have gradients; all else stays as it is."""
    encoders, old = (reader.llama, reader.clip), len(build_tokenizer(TEXT_TOKENS))
    for encoder in encoders:
        encoder.requires_grad_(False)
        encoder.set_input_embeddings(GrowingEmbedding(embedding_of(encoder), old))
    try:
        yield
    finally:
        pad = reader.tokenizer.pad_token_id
        for encoder in encoders:
            weight = embedding_of(encoder).weight.detach()
            encoder.set_input_embeddings(nn.Embedding.from_pretrained(weight, padding_idx=pad))


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, llama: nn.Module, clip: nn.Module, captions: list[str]
) -> tuple[torch.Tensor, BatchEncoding, torch.Tensor]:
    """Token embeddings [B, L, D], the tokens (`input_ids` and `attention_mask`, [B, L]), pooled embedding [B, D].

    Equal to what the pipeline's `encode_prompt` gives, but differentiable.
    """
    tokens = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    tokens = tokens.to(llama.device)
    embeds = llama(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
    pooled = clip(tokens.input_ids).pooler_output
    return embeds.hidden_states[HIDDEN_LAYER], tokens, pooled


def labels(scenes: list[Scene], lamps: bool = False) -> torch.Tensor:
    """The right answers, [B, questions]; the sprites are in the order in which the caption names them."""
    rows = []
    for scene in scenes:
        row = [tuple(BACKGROUNDS).index(scene.background), len(scene.sprites) - 1]
        for i in range(2):
            for name, values in attributes(lamps):
                said = getattr(scene.sprites[i], name) if i < len(scene.sprites) else ABSENT
                row.append(said if said == ABSENT else len(values) if said is None else values.index(said))
        rows.append(row)
    return torch.tensor(rows)


def about_second(tokenizer: PreTrainedTokenizerFast, input_ids: torch.Tensor) -> torch.Tensor:
    """Which of the tokens [B, L] are about a second sprite, bool: all from the "and" on that joins it to the first."""
    return (input_ids == tokenizer.convert_tokens_to_ids("and")).cumsum(1).bool()


def token_answers(answers: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The right answers of every token, [B, L, token questions], from `labels` [B, questions].

    `second` [B, L] bool says which tokens are about the second sprite.
    """
    scene = answers[:, :2]
    first, other = answers[:, 2:].chunk(2, dim=1)
    own = torch.where(second[:, :, None], other[:, None], first[:, None])
    return torch.cat([scene[:, None].expand(-1, second.shape[1], -1), own], dim=2)


def caption_loss(
    model: CaptionReader, captions: list[str], answers: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean cross-entropy of all questions at every token and at the pooled embedding.

    What a caption says later cannot be known at an earlier token; there the best answer is the prior, which costs a
    constant. Metrics: share of questions answered rightly at the last token and by the pooled embedding.
    """
    by_token, pooled, tokens = model(captions)
    mask = tokens.attention_mask.bool()
    answers = answers.to(mask.device)
    second = about_second(model.tokenizer, tokens.input_ids)
    by_word = token_answers(answers, second).masked_fill(~mask[:, :, None], ABSENT)
    rows = torch.arange(len(captions), device=mask.device)
    last = mask.sum(1) - 1
    losses = [_answer_loss(a, b) for a, b in zip(by_token, by_word.unbind(2), strict=True)]
    losses += [_answer_loss(a, b) for a, b in zip(pooled, answers.unbind(1), strict=True)]
    accuracy = {
        "last_right": _right([a[rows, last] for a in by_token], by_word[rows, last]),
        "pooled_right": _right(pooled, answers),
    }
    return torch.stack(losses).mean(), accuracy


def _answer_loss(scores: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores.flatten(0, -2), answers.flatten(), ignore_index=ABSENT)


def _right(scores: list[torch.Tensor], answers: torch.Tensor) -> float:
    """Share of the answers [B, questions] whose class has the highest score [B, classes] each."""
    best = torch.stack([score.argmax(-1) for score in scores], dim=1)
    return (best == answers)[answers != ABSENT].float().mean().item()
