"""What differs between video DiT families, as data.

Every family here is *embedders -> lists of transformer blocks -> output head* in diffusers. Loading, generating,
caching and training are written once and read a `DiTFamily` record for the rest: names of classes, attributes and
arguments. A record holds strings and numbers only, so that reading one costs no import of torch;
`tests/families/test_records.py` checks each of them against the real classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vidaccel.families.costs import FamilyCosts


@dataclass(frozen=True)
class BlockList:
    """A list of transformer blocks of one kind, called one after another with the same arguments."""

    name: str
    """Attribute of the transformer that holds the list (a ModuleList)."""
    arguments: tuple[str, ...]
    """What the transformer passes to a block, in the order of the block's own parameters. `hidden_states` are the video
    tokens [B, N, D], `encoder_hidden_states` the text tokens [B, L, D]. HunyuanVideo passes more behind these, which
    only its token-replace (image-to-video) blocks use."""
    returns: tuple[str, ...]
    """What a block gives back, by the same names: one name is a bare tensor, several are a tuple in this order."""
    keywords: bool = False
    """Whether they are passed by keyword; else by position."""
    joint: bool = False
    """Whether text tokens go through the same weights as video tokens, as one sequence [video; text]."""
    mask: str | None = None
    """The argument that masks the padding of texts; None where the blocks take none."""
    branches: tuple[str, ...] = ()
    """Modules of a block, by name, whose output is added to its tokens: a cache of residual branches (FORA, TaylorSeer)
    keeps what they give."""
    feeding: tuple[str, ...] = ()
    """Modules of a block that only work for those, and have nothing to do where those give again what they gave."""
    residual_layers: tuple[str, ...] = ()
    """Layers of a block, by dotted path, that write into the residual stream, or make the gates of all that is written:
    with all of them zero a block is the identity, and so a predictor's blocks begin. Some blocks have not all."""
    widths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of returned tokens that are not as wide as the video's: transformer config keys whose product their width is."""
    added_after: str | None = None
    """Of a list beside the trunk: transformer config key with the positions of the trunk's blocks after which what its
    blocks give is added."""


@dataclass(frozen=True)
class Denoiser:
    """One of the transformers that a pipeline denoises with, first the one for the noisiest times."""

    attribute: str
    """Attribute of the pipeline that holds the transformer."""
    until: float = 0.0
    """Time in [0, 1] (1 is noise) below which the next denoiser takes over, as published; 0 for the last."""
    until_config: str | None = None
    """Key of the pipeline's config that holds its own; there is no next one where that is null."""


@dataclass(frozen=True)
class Guidance:
    """How a pipeline is told about classifier-free guidance (CFG): two passes a step, or one that embeds the scale."""

    cfg_argument: str | None
    """Call argument that takes the scale of two-pass CFG; None where a guider component holds it."""
    embedded_argument: str | None = None
    """Call argument that takes the scale embedded in a single pass; None where the family has no such embedding."""
    second_argument: str | None = None
    """Call argument that takes the scale of the second denoiser in two passes; None where there is one for all."""
    guider: str | None = None
    """Attribute of the pipeline that holds a diffusers guider; None where a call argument sets the scale."""
    doubled: bool = False
    """Whether the two passes are one call of a doubled batch, [without the prompt; with it]; it counts as two."""
    single_contexts: tuple[str, ...] = ()
    """Contexts of further passes, which are of no doubled batch."""


@dataclass(frozen=True)
class TextTensor:
    """A tensor made from the prompt."""

    name: str | None
    """Its name among the pipeline's call arguments; None for what the call makes of what those hold."""
    argument: str
    """The transformer's forward argument that takes it."""
    stored: str
    """Its name in a feature folder, and wherever else text tensors travel by name."""
    shape: tuple[str, ...]
    """Of one prompt's: each size is a stream (costs.py), or the transformer's config key that holds it."""
    mask: str | None = None
    """The forward argument with the mask [B, L] of its padding; None where padding is not masked, and for masks."""
    least: int = 0
    """How many of its tokens have to stay when padding is cut off."""


@dataclass(frozen=True)
class BlankInput:
    """An input of image-to-video that text-to-video fills with zeros [B, tokens, width]."""

    argument: str
    """The transformer's forward argument that takes it."""
    tokens: int
    """How many the pipeline passes."""
    width_config: str
    """Transformer config key of their width."""
    masked: bool = False
    """Whether the transformer masks them where they are zero, so that none at all come to the same."""


@dataclass(frozen=True)
class Condition:
    """An input that the pipeline makes of the image that a video begins with, or of what else its call is given; the
    same in every pass."""

    stored: str
    """Its name in a feature folder, and beside text tensors wherever those travel by name."""
    argument: str | None = None
    """The transformer's forward argument that takes it, tokens [B, N, E]; None for the channels [B, C, T, H, W] that
    stand behind the latent's."""
    tokens: str | None = None
    """Stream of those tokens (costs.py)."""
    width_config: str | None = None
    """Transformer config key of their width, which is null in checkpoints without them."""
    counted: str | None = None
    """The transformer's forward argument that says how many tokens they are, for tokens that do not stand beside the
    text's."""
    channels_config: str | None = None
    """Of an argument that takes no tokens but channels [B, C, T, H, W]: transformer config key of how many."""
    made_of: str = "image"
    """Call argument that it is made of: `image` is the one that a video begins with."""
    first_frame: bool = False
    """Whether it is the first frame of the latents itself [B, C, 1, H, W], which stays clean in every pass."""


@dataclass(frozen=True)
class SizedInput:
    """An input that follows from nothing but the size of the video."""

    argument: str
    """The transformer's forward argument that takes it."""
    sizes: tuple[str, ...] = ()
    """What it is made of, one number or a tuple of several: `frames`, `height` and `width` of the latents, `seconds` of
    a latent frame, `pixels` along a side of a latent pixel."""
    function: str | None = None
    """Or what makes it of the transformer, the latents' (T, H, W) and a device: "module:name"."""


@dataclass(frozen=True)
class SequenceSplit:
    """How a video's tokens are split over several devices (runtime/context_parallel.py): a plan of diffusers' context
    parallelism, as data."""

    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Modules before the trunk whose outputs are split, by dotted path: along which dimension, one for each output.
    Nothing means the plan that the transformer has in diffusers."""
    gathered: tuple[str, ...] = ("proj_out",)
    """Modules after the trunk whose outputs [B, N, C] are put together again."""
    beside: tuple[str, ...] = ()
    """Keyword arguments of the transformer, [B, N', C], whose tokens are split beside the video's."""
    local: tuple[str, ...] = ()
    """Attentions of a block, by name, whose keys every device has: they exchange nothing."""


@dataclass(frozen=True)
class SamplingDefaults:
    """The family's published sampling settings, for a model folder that brings none of its own."""

    steps: int
    """Denoising steps."""
    guidance: float
    """CFG scale; 1 is no guidance."""
    num_frames: int
    """Frames of video."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    fps: float
    """Frames a second."""
    shift: float | None
    """Shift s of the flow-match step grid s k / (1 + (s - 1) k), k from 1 to 0, for samplers of our own; the pipeline's
    scheduler keeps the one in its config. None for what predicts no flow."""
    guidance_2: float | None = None
    """CFG scale of the second denoiser; None where there is one for all."""


@dataclass(frozen=True)
class DecoderConfig:
    """What sizes the decoder of the family's autoencoder, by the keys of its diffusers config."""

    widths: str
    """Channels: a list of those of each level, or one number that all levels have multiples of."""
    depth: str
    """Residual blocks of each level: one number, or a list."""
    base: str | None = None
    """The key that says the widths where they are null."""


@dataclass(frozen=True)
class DiTFamily:
    """One family of video diffusion transformers."""

    name: str
    """What we call it, in configs and checkpoints."""
    title: str
    """What its authors call it, in messages."""
    pipelines: tuple[str, ...]
    """diffusers pipeline classes that this record describes, where they have all of its denoisers."""
    transformer: str
    """diffusers class of the denoisers."""
    denoisers: tuple[Denoiser, ...]
    """The transformers, in the order in which sampling meets them."""
    block_lists: tuple[BlockList, ...]
    """The trunk, in the order in which the transformer runs it."""
    timestep_embedder: str
    """Dotted path in the transformer of the module whose output [B, D] stands for t alone: embeddings of r and g are
    added to it."""
    text_tensors: tuple[TextTensor, ...]
    """What `encode_prompt` returns for the prompt, in its order; the negative prompt's, which it is told to leave out,
    may be None between them or stand behind."""
    guidance: Guidance
    """How guidance is switched on and off."""
    defaults: SamplingDefaults
    """Published sampling settings."""
    size_multiple: int
    """Height and width are multiples of this many pixels, on top of what autoencoder and patches ask for."""
    costs: FamilyCosts
    """What its parts work on, from which FLOPs and memory follow."""
    side_lists: tuple[BlockList, ...] = ()
    """Blocks beside the trunk, which run before it: what they give is added to its tokens outside its blocks. On a
    predicted pass they give zeros, and the answer comes from the trunk's last block."""
    predicts: str = "flow"
    """What the transformer gives: `flow` velocities, or `v` of a diffusion process, whose models are run, cached and
    planned, and not trained from."""
    rises: bool = False
    """Whether its times rise from 0, which is noise, to 1, and its velocities lead from noise to the video."""
    times: str | None = None
    """What makes the times, from 1 down, that the pipeline gives its scheduler for a number of steps, where they are
    not in even steps: "module:name"."""
    rounds_times: bool = False
    """Whether its pipeline gives the transformer times in the type of its latents; others give them unrounded."""
    least_steps: int = 1
    """Fewest steps that the pipeline takes."""
    latents: str = "BCTHW"
    """How the transformer takes latents and gives velocities: BCTHW, BTCHW, or `tokens`, [B, T H W, C]."""
    sized_inputs: tuple[SizedInput, ...] = ()
    """What `forward` is told of the video's size."""
    compression: tuple[int, int] = (4, 8)
    """Frames of a latent frame and pixels along a side of a latent pixel, of the published autoencoder."""
    latent_frame_step: int = 1
    """Latent frames come as 1 and a multiple of this many more: the autoencoder decodes others to other lengths."""
    compression_attributes: tuple[str, str] = ("vae_scale_factor_temporal", "vae_scale_factor_spatial")
    """Attributes of the pipeline that hold those of its own."""
    frames_argument: str = "num_frames"
    """Call argument that takes the number of frames."""
    frame_rate: str | None = None
    """Call argument that takes the frames a second."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments that its authors call the pipeline with."""
    rotary: str | None = None
    """Dotted path of the embedder whose output depends on nothing but the size of the latents."""
    static_embedders: tuple[str, ...] = ()
    """Dotted paths of embedders whose output is the same at every step, or nearly: a predicted step takes that of the
    last full one."""
    r_config: str | None = None
    """Transformer config key that is true when it was built with an embedding of r; None if the class has none, or
    always one: its models are students then, from which nothing is distilled."""
    r_argument: str | None = None
    """The transformer's forward argument that then takes 1000 r."""
    g_config: str | None = None
    """Transformer config key that is true when it was built with an embedding of g; None if the class has none."""
    g_argument: str | None = None
    """The transformer's forward argument that then takes 1000 g."""
    times_per_frame: bool = False
    """Whether `forward` takes times [B, T], one of each latent frame."""
    batched_autoencoder: bool = True
    """Whether the autoencoder takes several videos at once."""
    chunked_autoencoder: str | None = None
    """diffusers class of its autoencoder, where that goes through time in chunks, all of which take the same."""
    decoder: DecoderConfig | None = None
    """What makes its decoder narrower; None where nobody has tried."""
    blank_inputs: tuple[BlankInput, ...] = ()
    """What text-to-video passes as zeros. Channels that the transformer takes beyond the latent's are zeros as well."""
    conditions: tuple[Condition, ...] = ()
    """What is made of an image, or of what else the call is given."""
    texts_see_image: bool = False
    """Whether its text encoder reads the image beside the text, and a black one beside the negative prompt."""
    sized_by_image: bool = False
    """Whether the call takes no height and width: `video_processor` chooses among sizes of its own by the image's."""
    split: SequenceSplit | None = None
    """How a video is split over several devices; None where there is no plan for it."""
    fused: str | None = None
    """Module with the fused forms of its blocks (fused.py says what such a module holds); None if there is none."""
    needs_mask: bool = False
    """Whether its stock attention cannot do without a mask; its fused processors then run where none is left."""
    batched: bool = True
    """Whether its pipeline takes several prompts at once."""
    untrained: str | None = None
    """What it does that clips and captions say nothing of, as the rest of a sentence: nothing is collected for it or
    trained from it."""

    @property
    def begins_with_image(self) -> bool:
        """Whether its videos begin with an image."""
        return any(each.made_of == "image" for each in self.conditions)

    @property
    def embeds_r(self) -> bool:
        """Whether all of its transformers are told where a step ends."""
        return self.r_argument is not None and self.r_config is None

    @property
    def all_lists(self) -> tuple[BlockList, ...]:
        """The trunk's, and those beside it."""
        return (*self.block_lists, *self.side_lists)
