"""Text encoders that know what a caption means: trained to name, at every word, what has been said so far.

Random encoders tell words apart but not which colour belongs to which shape, since the transformer sees text tokens
without positions. So both encoders are trained together with linear heads that read off the scene; the heads are then
thrown away. B captions, L tokens, D width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from vidaccel.sprites.pipeline import HIDDEN_LAYER, TEXT_TOKENS, build_clip, build_llama, build_tokenizer
from vidaccel.sprites.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene

ABSENT = -100
"""Label of what a scene lacks (a second sprite): `cross_entropy` leaves it out."""
ATTRIBUTES = (("shape", SHAPES), ("colour", tuple(COLOURS)), ("motion", MOTIONS))
UNSAID = {"shape": 0, "colour": 1, "motion": 1}
"""Further classes of an attribute: that the caption does not say."""
CLASSES = (len(BACKGROUNDS), 2, *(len(values) + UNSAID[name] for _ in range(2) for name, values in ATTRIBUTES))
"""Classes of each question: background, number of sprites less one, then shape, colour and motion of each sprite."""


class CaptionReader(nn.Module):
    """The pipeline's two text encoders and the heads they are trained with."""

    def __init__(self, width: int):
        super().__init__()
        self.tokenizer = build_tokenizer(TEXT_TOKENS)
        self.llama = build_llama(self.tokenizer, width)
        self.clip = build_clip(self.tokenizer, width)
        self.token_heads = nn.ModuleList(nn.Linear(width, n) for n in CLASSES)
        self.pooled_heads = nn.ModuleList(nn.Linear(width, n) for n in CLASSES)

    def forward(self, captions: list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Answers to each question from every token [B, L, classes] and from the pooled embedding [B, classes].

        The third result says which tokens are not padding, [B, L] bool.
        """
        embeds, mask, pooled = encode_captions(self.tokenizer, self.llama, self.clip, captions)
        return [head(embeds) for head in self.token_heads], [head(pooled) for head in self.pooled_heads], mask


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, llama: nn.Module, clip: nn.Module, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token embeddings [B, L, D], which of them are not padding [B, L] bool, pooled embedding [B, D].

    Equal to what the pipeline's `encode_prompt` gives, but differentiable.
    """
    tokens = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    tokens = tokens.to(llama.device)
    embeds = llama(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
    pooled = clip(tokens.input_ids).pooler_output
    return embeds.hidden_states[HIDDEN_LAYER], tokens.attention_mask.bool(), pooled


def labels(scenes: list[Scene]) -> torch.Tensor:
    """The right answers, [B, questions]; the sprites are in the order in which the caption names them."""
    rows = []
    for scene in scenes:
        row = [tuple(BACKGROUNDS).index(scene.background), len(scene.sprites) - 1]
        for i in range(2):
            for name, values in ATTRIBUTES:
                said = getattr(scene.sprites[i], name) if i < len(scene.sprites) else ABSENT
                row.append(said if said == ABSENT else len(values) if said is None else values.index(said))
        rows.append(row)
    return torch.tensor(rows)


def caption_loss(
    model: CaptionReader, captions: list[str], answers: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean cross-entropy of all questions at every token and at the pooled embedding.

    What a caption says later cannot be known at an earlier token; there the best answer is the prior, which costs a
    constant. Metrics: share of questions answered rightly at the last token and by the pooled embedding.
    """
    by_token, pooled, mask = model(captions)
    answers = answers.to(mask.device)
    rows = torch.arange(len(captions), device=mask.device)
    last = mask.sum(1) - 1
    losses, right = [], {"last": [], "pooled": []}
    for question in range(len(CLASSES)):
        answer = answers[:, question]
        spread = answer[:, None].expand_as(mask).masked_fill(~mask, ABSENT)
        losses.append(F.cross_entropy(by_token[question].flatten(0, 1), spread.flatten(), ignore_index=ABSENT))
        losses.append(F.cross_entropy(pooled[question], answer, ignore_index=ABSENT))
        asked = answer != ABSENT
        right["last"].append((by_token[question][rows, last].argmax(-1) == answer)[asked])
        right["pooled"].append((pooled[question].argmax(-1) == answer)[asked])
    accuracy = {f"{name}_right": torch.cat(hits).float().mean().item() for name, hits in right.items()}
    return torch.stack(losses).mean(), accuracy
