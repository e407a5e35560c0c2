"""The sprites model's parts, untrained: the classes of HunyuanVideo, small.

Word-level tokenizers over the closed vocabulary, a Llama and a CLIP text encoder, the causal video autoencoder and the
dual-then-single-stream transformer. `assemble` puts trained parts into a real `HunyuanVideoPipeline`.
"""

import copy
import math
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from vidaccel.errors import UserError
from vidaccel.worlds.sprites.captions import vocabulary
from vidaccel.worlds.sprites.settings import AutoencoderTraining, TeacherTraining

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "</s>"
TEXT_TOKENS = 32
"""Longest caption, begin and end included; the longest that the templates can say has as many, 24 without lamps."""
INITIAL_LOG_VARIANCE = -5.0
CALL = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "fps": 8,
    "prompt_template": {"template": "{}", "crop_start": 0},
    "max_sequence_length": TEXT_TOKENS,
}
"""How the pipeline has to be called: what the model's run.json keeps under "call"."""
HIDDEN_LAYER = -3
"""The Llama layer whose output is the prompt's embedding: HunyuanVideoPipeline skips the last two."""

Encoder = TypeVar("Encoder", LlamaModel, CLIPTextModel)

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")


def build_tokenizer(max_length: int, lamps: bool = False) -> PreTrainedTokenizerFast:
    """One token a word or comma, lower-cased; begin and end added; padded on the right. Words of lamps come last."""
    names = [PAD, UNKNOWN, BEGIN, END, *vocabulary(lamps)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, names.index(BEGIN)), (END, names.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=max_length,
        padding_side="right",
    )


def knows_lamps(encoder: LlamaModel | CLIPTextModel) -> bool:
    """Whether a text encoder of this world has the words of lamps."""
    return encoder.config.vocab_size == len(build_tokenizer(TEXT_TOKENS, lamps=True))


@torch.no_grad()
def grown(encoder: Encoder) -> Encoder:
    """A copy that has the words of lamps as well, its tokenizer then being `build_tokenizer(..., lamps=True)`.

    Old words keep their tokens and their embeddings, and so old prompts mean what they meant, bit for bit. Those of the
    new words are drawn at random, as wide as the others.

    Raises:
        UserError: it has other words than this world's.
    """
    old = embedding_of(encoder).weight
    if len(old) != len(build_tokenizer(TEXT_TOKENS)):
        raise UserError(
            f"a text encoder of {len(old)} words cannot learn those of lamps",
            f"the sprites world's have {len(build_tokenizer(TEXT_TOKENS))} without them",
        )
    larger = copy.deepcopy(encoder)
    larger.resize_token_embeddings(len(build_tokenizer(TEXT_TOKENS, lamps=True)), mean_resizing=False)
    new = embedding_of(larger).weight[len(old) :]
    new.copy_(old.mean(0) + old.std(0) * torch.randn(new.shape).to(old))
    return larger


def embedding_of(encoder: LlamaModel | CLIPTextModel) -> nn.Embedding:
    embedding = encoder.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding | GrowingEmbedding)
    return embedding  # type: ignore[return-value]  # which has its weight


class GrowingEmbedding(nn.Module):
    """The embedding of a grown text encoder while it trains: only the rows of new words are parameters."""

    old: torch.Tensor

    def __init__(self, embedding: nn.Embedding, old: int):
        super().__init__()
        self.register_buffer("old", embedding.weight.detach()[:old].clone())
        self.new = nn.Parameter(embedding.weight.detach()[old:].clone())

    @property
    def weight(self) -> torch.Tensor:
        return torch.cat([self.old, self.new])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight)


def build_llama(tokenizer: PreTrainedTokenizerFast, width: int) -> LlamaModel:
    """Two layers that are used and two that are not: the pipeline always reads the third last hidden state."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaModel(config)


def build_clip(tokenizer: PreTrainedTokenizerFast, width: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def build_autoencoder(config: AutoencoderTraining) -> AutoencoderKLHunyuanVideo:
    """The video autoencoder, 8x in space and 4x in time, initialised so that a short training suffices.

    The stock initialisation shrinks the signal at each convolution outside a residual branch, and starts with a
    posterior as wide as the prior, which drowns it. Here such convolutions keep the variance, residual branches start
    small, the posterior starts narrow, and the residual stream starts with a constant pattern, so that a group norm of
    a plain background has something to divide by.
    """
    model = AutoencoderKLHunyuanVideo(
        latent_channels=config.latent_channels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
            if "conv2" in name:
                nn.init.normal_(module.weight, std=0.3 * module.weight[0].numel() ** -0.5)
            if any(part in name for part in ("conv_in", "conv_shortcut", "samplers")):
                with torch.no_grad():
                    module.bias.copy_(torch.tensor([0.5, -0.5]).repeat(module.out_channels // 2))
    with torch.no_grad():
        model.quant_conv.weight[config.latent_channels :] = 0
        model.quant_conv.bias[config.latent_channels :] = INITIAL_LOG_VARIANCE
    return model


@torch.no_grad()
def inflate(model: nn.Module) -> None:
    """Let every causal convolution that was trained on single frames look at the present frame alone.

    On one frame, repeated as its own past, only the sum of the three time taps matters, so training leaves each of them
    arbitrary. Moved into the last tap, the sum gives the same pictures, and a clip starts out as its own frames, each
    fourth held, instead of a blur of neighbours.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
            total = module.weight.sum(2)
            module.weight.zero_()
            module.weight[:, :, -1] = total


@torch.no_grad()
def whiten(model: AutoencoderKLHunyuanVideo, latents: torch.Tensor, noise: float) -> None:
    """Change the basis of the latents so that a sprite's shape weighs as much in them as the background does.

    Most variance of trained latents is the background's; what tells shapes apart lies in directions a tenth as wide.
    Noise hides those long before the rest, so that flow matching spends next to nothing on the times at which shapes
    are decided. With C the covariance of the latents z, scaled to a mean variance of 1, they become
    (C + noise^2)^-1/2 (z - mean), scaled to a mean variance of 1 again. The 1 x 1 convolutions on both sides of the
    latent take that in and undo it, so that pictures stay the same. The posterior becomes a constant one of that noise:
    its spread was known in the old basis only.

    Args:
        latents: [B, C, T, H, W] of clips, as the encoder gives them, before any scaling factor.
    """
    flat = latents.movedim(1, -1).flatten(0, -2).double()
    centre, covariance = flat.mean(0), torch.cov(flat.T)
    covariance /= covariance.diagonal().mean()
    variances, directions = torch.linalg.eigh(covariance)
    stretch = (variances + noise**2).rsqrt()
    stretch /= (flat.sub(centre) @ directions * stretch).var(0).mean().sqrt()
    forward = directions * stretch @ directions.T
    backward = directions / stretch @ directions.T

    into, out, channels = model.quant_conv, model.post_quant_conv, len(centre)
    mean_weight, weight = into.weight[:channels].flatten(1).double(), out.weight.flatten(1).double()
    into.weight[:channels] = (forward @ mean_weight).view_as(into.weight[:channels])
    into.bias[:channels] = forward @ (into.bias[:channels].double() - centre)
    into.weight[channels:], into.bias[channels:] = 0, 2 * math.log(noise)
    out.bias.copy_(out.bias.double() + weight @ centre)
    out.weight.copy_((weight @ backward).view_as(out.weight))


def build_transformer(config: TeacherTraining, latent_channels: int, text_width: int) -> HunyuanVideoTransformer3DModel:
    """The denoiser. RoPE gets a quarter of each head for time and the rest for height and width."""
    temporal = config.head_dim // 4
    spatial = (config.head_dim - temporal) // 2
    return HunyuanVideoTransformer3DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        text_embed_dim=text_width,
        pooled_projection_dim=text_width,
        guidance_embeds=False,
        rope_axes_dim=(temporal, spatial, spatial),
    )


@torch.no_grad()
def deepen(shallow: HunyuanVideoTransformer3DModel, deep: HunyuanVideoTransformer3DModel) -> None:
    """Give `deep` the function of `shallow`, which has the same widths and a fraction of its blocks.

    Each block of `shallow` becomes a run of blocks of `deep`: itself, then copies whose gates are shut, so that they
    pass the tokens on as they are, and whose every other weight is already of use once training opens them.
    """
    few, weights = shallow.state_dict(), {}
    runs = {name: _run_length(getattr(shallow, name), getattr(deep, name)) for name in BLOCK_LISTS}
    for key in deep.state_dict():
        name, *rest = key.split(".", 2)
        weights[key] = few[f"{name}.{int(rest[0]) // runs[name]}.{rest[1]}" if name in runs else key]
    deep.load_state_dict(weights)
    for name, run in runs.items():
        for i, block in enumerate(getattr(deep, name)):
            if i % run:
                _shut_gates(block)


def _run_length(few: nn.ModuleList, many: nn.ModuleList) -> int:
    run, left = divmod(len(many), len(few))
    if left:
        raise ValueError(f"{len(many)} blocks are no multiple of {len(few)}")
    return run


def _shut_gates(block: nn.Module) -> None:
    """Zero the rows of the modulation that give the gates: chunks 2 and 5 of six, or 2 of three in a single block."""
    for norm in (block.norm,) if hasattr(block, "norm") else (block.norm1, block.norm1_context):
        width = norm.linear.in_features
        for chunk in range(2, norm.linear.out_features // width, 3):
            rows = slice(chunk * width, (chunk + 1) * width)
            norm.linear.weight[rows], norm.linear.bias[rows] = 0, 0


def assemble(
    llama: LlamaModel,
    clip: CLIPTextModel,
    autoencoder: AutoencoderKLHunyuanVideo,
    transformer: HunyuanVideoTransformer3DModel,
    shift: float,
    dtype: torch.dtype = torch.float16,
) -> HunyuanVideoPipeline:
    """The pipeline, its weights in `dtype` to be stored, its step grid that of flow-match Euler with `shift`."""
    lamps = knows_lamps(llama)
    return HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=build_tokenizer(TEXT_TOKENS, lamps),
        transformer=transformer,
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder_2=clip,
        tokenizer_2=build_tokenizer(77, lamps),
    ).to(dtype)
