"""Random pipelines of every family, from the real diffusers and transformers classes: a video in about a second.

`tiny_pipeline(name)` holds nothing that a download would bring: word-level tokenizers are made here from `VOCABULARY`.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.mochi import pipeline_mochi
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from vidaccel.compat.diffusers import do_without_ftfy
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import FAMILIES, family_of
from vidaccel.families.walk import as_latents, as_taken

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
COLOURS = ("red", "green", "blue", "black", "white")
VOCABULARY = (*SPECIAL, *COLOURS, "a", "circle", "square", "moving", "right", "left", "on", "and", ".", ",")
SIZE = {"num_frames": 5, "height": 32, "width": 32}
"""The smallest interesting video: two latent frames."""
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
"""What the videos of image to video begin with."""
IMAGE_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
HUNYUAN_CALL = {"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 16}
"""HunyuanVideoPipeline cuts its own template after 95 tokens, which only Llama's tokenizer makes of it."""
PADDED_15 = {"tokenizer_max_length": 32, "tokenizer_2_max_length": 32, "vision_num_semantic_tokens": 4}
"""What HunyuanVideo-1.5's pipelines, made or loaded, pad texts and the missing image to here: nine tenths of a tiny
pass would be attention between paddings."""
BLANK = FAMILIES["hunyuan_video_15"].blank_inputs[0]
"""The missing image, as the family's record has it."""
BLANK_TOKENS = BLANK.tokens
vars(BLANK)["tokens"] = PADDED_15["vision_num_semantic_tokens"]


def padded_less(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        assert self.vision_num_semantic_tokens == BLANK_TOKENS  # elsewhere
        vars(self).update(PADDED_15)

    return made


for each in HunyuanVideo15Pipeline, HunyuanVideo15ImageToVideoPipeline:
    each.__init__ = padded_less(each.__init__)

MOCHI_FRAMES = 4
"""Of a latent frame in the tiny autoencoder, as in others; the pipeline takes it for 6."""


def frames_of_four(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        assert self.vae_temporal_scale_factor == 6
        self.vae_temporal_scale_factor = MOCHI_FRAMES

    return made


MochiPipeline.__init__ = frames_of_four(MochiPipeline.__init__)
MOCHI_TIMES = pipeline_mochi.linear_quadratic_schedule
pipeline_mochi.linear_quadratic_schedule = lambda steps, *more: MOCHI_TIMES(steps, *more) if steps > 1 else [1.0]
"""Of one step as well, for which the pipeline's own divides by zero."""

PATCHES = 4
"""Tokens of an image in HunyuanVideo's image to video."""
HEADER = "<|end_header_id|>"
pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE.update(
    template=f"<image> {HEADER} a {HEADER} {{}} . . . {HEADER}",  # <s> before it; 4 tokens behind the text are its own
    crop_start=5,
    image_emb_start=1,
    image_emb_end=1 + PATCHES,
    image_emb_len=PATCHES,
)

SHORT = {"max_sequence_length": 16}
CALLS = {
    "anyflow": SHORT,
    "hunyuan_video": HUNYUAN_CALL,
    "hunyuan_video_i2v": SHORT,
    "ltx2": SHORT,
    "mochi": {"max_sequence_length": 5},
    "sana_video": SHORT,
    "skyreels_v2": SHORT,
}
"""What a tiny pipeline has to be called with, for families that need anything."""


def guided(pipe: DiffusionPipeline, scale: float, prompt: str | list[str] = "") -> dict[str, Any]:
    """Arguments of a call with guidance of that scale in two passes, or with a scale of 1 in one, for this prompt.

    A guider is set on the pipeline.
    """
    family = family_of(pipe)
    rule = family.guidance
    if rule.guider:
        setattr(pipe, rule.guider, getattr(pipe, rule.guider).new(guidance_scale=scale, enabled=scale > 1))
        return {}
    # Where one pass embeds a scale of its own, two are made only with a negative prompt.
    negative = [""] * len(prompt) if isinstance(prompt, list) else ""
    more = {"negative_prompt": negative} if rule.embedded_argument else {}
    return CALLS.get(family.name, {}) | {rule.cfg_argument: scale} | more


def called(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What a call of a tiny pipeline says of the video, where it takes that: its size, the image it begins with."""
    known = inspect.signature(type(pipe).__call__).parameters
    said = SIZE | {family_of(pipe).frames_argument: SIZE["num_frames"], "image": Image.fromarray(IMAGE)}
    return {name: value for name, value in said.items() if name in known}


def as_given(family: DiTFamily, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, T, H, W] as the pipeline's call takes them; AnyFlow's turns them round itself."""
    return latents if family.name == "anyflow" else as_taken(family, latents)


def as_made(family: DiTFamily, latents: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """What the call makes, of that size (T, H, W), as [B, C, T, H, W]."""
    return latents if family.name == "anyflow" else as_latents(family, latents, size)


def image_of(family: str) -> np.ndarray | None:
    """What `vidaccel.sampling.generate` has to be given for a family."""
    return IMAGE if FAMILIES[family].begins_with_image else None


def calls_of_a_step(pipe: DiffusionPipeline, passes: int = 2) -> int:
    """How often a pipeline calls its transformer for so many passes a step: once where both are a doubled batch."""
    return 1 if family_of(pipe).guidance.doubled else passes


def passes_of(pipe: DiffusionPipeline, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a transformer's calls were given, by pass: with the prompt first, where two are a doubled batch."""
    if calls_of_a_step(pipe) == 2:
        return given
    parts = []
    for call in given:
        halves = {name: value.chunk(2) for name, value in call.items() if isinstance(value, torch.Tensor)}
        doubled = len(call["hidden_states"]) > 1 and pipe.guidance_scale > 1
        kept = [{name: half[side] for name, half in halves.items()} for side in (1, 0)] if doubled else [call]
        parts += [call | half for half in kept]
    return parts


def word_tokenizer(max_length: int = 77, chat_prefix: int = 0) -> PreTrainedTokenizerFast:
    """Lower-cased words and punctuation between <s> and </s>.

    Those two keep the attention mask of an empty prompt from being empty, which HunyuanVideo's transformers turn into
    NaN (they average the text over it). The chat template, if asked for, puts `chat_prefix` tokens
    before the user's text.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(word, VOCABULARY.index(word)) for word in ("<s>", "</s>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
    )
    if chat_prefix:
        fast.chat_template = f"{{{{ '<s>' * {chat_prefix} }}}}{{{{ messages[1]['content'] }}}}</s>"
    return fast


def hunyuan_video(guidance_embeds: bool = False) -> DiffusionPipeline:
    width = 32
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(
            LlamaConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=3,
                num_attention_heads=2,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            )
        ),
        tokenizer=word_tokenizer(),
        text_encoder_2=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=width,
                intermediate_size=width,
                projection_dim=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=77,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            )
        ),
        tokenizer_2=word_tokenizer(),
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            guidance_embeds=guidance_embeds,
            text_embed_dim=width,
            pooled_projection_dim=width,
            rope_axes_dim=(4, 4, 4),
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def hunyuan_video_i2v(guidance_embeds: bool = False, kind: str = "token_replace") -> DiffusionPipeline:
    """Further channels are those of the image and its mask, for `latent_concat`."""
    parts = hunyuan_video(guidance_embeds).components
    config, text = parts["transformer"].config, parts["text_encoder"].config
    channels = config.in_channels if kind == "token_replace" else 2 * config.in_channels + 1
    parts["transformer"] = HunyuanVideoTransformer3DModel.from_config(
        config, in_channels=channels, image_condition_type=kind
    )
    parts["tokenizer"].add_special_tokens({"additional_special_tokens": ["<image>", HEADER]})
    words = {"image_token_index": len(VOCABULARY), "pad_token_id": 0}
    text = LlamaConfig(**text.to_dict() | {"vocab_size": len(VOCABULARY) + 2})
    parts["text_encoder"] = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**IMAGE_ENCODER), text_config=text, **words)
    )
    size = {"height": 32, "width": 32}
    parts["image_processor"] = CLIPImageProcessorPil(size=size, crop_size=size)
    return HunyuanVideoImageToVideoPipeline(**parts)


def hunyuan_video_15(use_meanflow: bool = False) -> DiffusionPipeline:
    width, latent = 32, 4
    return HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            )
        ),
        tokenizer=word_tokenizer(max_length=2048, chat_prefix=108),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=384, d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2, pad_token_id=0)
        ),
        tokenizer_2=ByT5Tokenizer(),
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=2 * latent + 1,
            out_channels=latent,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=width,
            text_embed_2_dim=width,
            image_embed_dim=16,
            rope_axes_dim=(4, 4, 4),
            task_type="t2v",
            use_meanflow=use_meanflow,
        ),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=latent, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, scaling_factor=1.0
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def hunyuan_video_15_i2v(use_meanflow: bool = False) -> DiffusionPipeline:
    parts = hunyuan_video_15(use_meanflow).components
    config = parts["transformer"].config
    parts["transformer"] = HunyuanVideo15Transformer3DModel.from_config(config, task_type="i2v", target_size=32)
    parts["image_encoder"] = SiglipVisionModel(SiglipVisionConfig(**IMAGE_ENCODER))
    parts["feature_extractor"] = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return HunyuanVideo15ImageToVideoPipeline(**parts)


def wan() -> DiffusionPipeline:
    width, latent = 32, 4
    return WanPipeline(
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(VOCABULARY), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2, pad_token_id=0
            )
        ),
        tokenizer=word_tokenizer(max_length=512),
        transformer=WanTransformer3DModel(
            in_channels=latent,
            out_channels=latent,
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=width,
            freq_dim=32,
            ffn_dim=width,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=latent, num_res_blocks=1, latents_mean=[0.0] * latent, latents_std=[1.0] * latent
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def wan_i2v() -> DiffusionPipeline:
    parts = wan().components
    del parts["transformer_2"]
    config = parts["transformer"].config
    size = {"height": 32, "width": 32}
    parts["transformer"] = WanTransformer3DModel.from_config(
        config, in_channels=2 * config.in_channels + 4, image_dim=16, added_kv_proj_dim=24
    )
    parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**IMAGE_ENCODER))
    parts["image_processor"] = CLIPImageProcessorPil(size=size, crop_size=size)
    do_without_ftfy(WanImageToVideoPipeline)
    return WanImageToVideoPipeline(**parts)


def _with_second(pipe: DiffusionPipeline, boundary: float) -> DiffusionPipeline:
    """Wan 2.2's: a second transformer of the same form, with weights of its own."""
    config = pipe.transformer.config
    parts = pipe.components | {"transformer_2": WanTransformer3DModel.from_config(config)}
    return type(pipe)(**parts, boundary_ratio=boundary)


def wan22() -> DiffusionPipeline:
    """At shift 3 the second of its transformers has the last 2 of 4 steps."""
    return _with_second(wan(), boundary=0.8)


def wan22_i2v() -> DiffusionPipeline:
    parts = wan_i2v().components
    config = parts["transformer"].config
    parts["transformer"] = WanTransformer3DModel.from_config(config, image_dim=None, added_kv_proj_dim=None)
    return _with_second(
        WanImageToVideoPipeline(**parts | {"image_encoder": None, "image_processor": None}), boundary=0.8
    )


def wan_vace() -> DiffusionPipeline:
    parts = wan().components
    config = parts["transformer"].config
    control = 2 * config.in_channels + 8 * 8  # what is kept and what is not, and the mask's pixels
    parts["transformer"] = WanVACETransformer3DModel.from_config(config, vace_layers=[0], vace_in_channels=control)
    do_without_ftfy(WanVACEPipeline)
    return WanVACEPipeline(**parts)


def anyflow() -> DiffusionPipeline:
    parts = wan().components
    config = parts["transformer"].config
    known = inspect.signature(AnyFlowTransformer3DModel.__init__).parameters.keys() & config.keys()
    parts["transformer"] = AnyFlowTransformer3DModel(**{name: config[name] for name in known})
    parts["scheduler"] = FlowMapEulerDiscreteScheduler(shift=5.0)
    del parts["transformer_2"]
    do_without_ftfy(AnyFlowPipeline)
    return AnyFlowPipeline(**parts)


def cogvideox() -> DiffusionPipeline:
    """With rotations, as the 5B model has them, and half its compression of time: two groups of latent frames."""
    width, latent = 32, 4
    return CogVideoXPipeline(
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=len(VOCABULARY), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2)
        ),
        tokenizer=word_tokenizer(max_length=226),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=latent,
            out_channels=latent,
            time_embed_dim=12,
            text_embed_dim=width,
            num_layers=2,
            sample_width=90,
            sample_height=60,
            use_rotary_positional_embeddings=True,
        ),
        vae=AutoencoderKLCogVideoX(
            latent_channels=latent,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            temporal_compression_ratio=2,
            sample_height=32,
            sample_width=32,
        ),
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )


def cogvideox_i2v() -> DiffusionPipeline:
    parts = cogvideox().components
    config = parts["transformer"].config
    parts["transformer"] = CogVideoXTransformer3DModel.from_config(config, in_channels=2 * config.in_channels)
    return CogVideoXImageToVideoPipeline(**parts)


def ltx_video() -> DiffusionPipeline:
    """Without the `shift_terminal` of its scheduler, which makes nothing finite of a single step (diffusers 0.42)."""
    width, latent = 32, 4
    return LTXPipeline(
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=len(VOCABULARY), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2)
        ),
        tokenizer=word_tokenizer(max_length=128),
        transformer=LTXVideoTransformer3DModel(
            in_channels=latent,
            out_channels=latent,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=width,
        ),
        vae=AutoencoderKLLTXVideo(
            latent_channels=latent,
            block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False,) * 3,
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
            timestep_conditioning=True,
            patch_size=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=1024,
            base_shift=0.95,
            max_shift=2.05,
        ),
    )


def ltx2() -> DiffusionPipeline:
    """Audio of 8 channels in 2 x 4 mel bins, and the scheduler of `ltx_video`."""
    width, latent = 32, 4
    connector = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_learnable_registers": None}
    return LTX2Pipeline(
        text_encoder=LlamaModel(
            LlamaConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            )
        ),
        tokenizer=word_tokenizer(max_length=1024),
        connectors=LTX2TextConnectors(
            caption_channels=width,
            text_proj_in_factor=2,
            **{
                f"{stream}_connector_{name}": value
                for stream in ("video", "audio")
                for name, value in connector.items()
            },
        ),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=latent,
            out_channels=latent,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=width,
        ),
        vae=AutoencoderKLLTX2Video(
            latent_channels=latent,
            block_out_channels=(8, 8),
            down_block_types=("LTX2VideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False,) * 3,
            downsample_type=("spatiotemporal",) * 2,
            upsample_type=("spatiotemporal",) * 2,
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
            patch_size=2,
        ),
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16
        ),
        vocoder=LTX2Vocoder(
            in_channels=32,
            hidden_channels=8,
            upsample_kernel_sizes=[4],
            upsample_factors=[2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1]],
        ),
        scheduler=ltx_video().scheduler,
    )


def mochi() -> DiffusionPipeline:
    width, latent = 32, 4
    return MochiPipeline(
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=len(VOCABULARY), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2)
        ),
        tokenizer=word_tokenizer(max_length=256),
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            pooled_projection_dim=12,
            in_channels=latent,
            text_embed_dim=width,
            time_embed_dim=12,
        ),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            latent_channels=latent,
            layers_per_block=(1, 1, 1, 1, 1),
            temporal_expansions=(1, 2, 2),
            spatial_expansions=(2, 2, 2),
            add_attention_block=(False,) * 5,
            latents_mean=None,
            latents_std=None,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


def sana_video() -> DiffusionPipeline:
    width, latent = 24, 4
    return SanaVideoPipeline(
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(VOCABULARY),
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            )
        ),
        tokenizer=word_tokenizer(max_length=512),
        transformer=SanaVideoTransformer3DModel(
            in_channels=latent,
            out_channels=latent,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=width,
            rope_max_seq_len=32,
        ),
        vae=wan().vae,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
    )


def skyreels_v2() -> DiffusionPipeline:
    parts = wan().components
    parts["transformer"] = SkyReelsV2Transformer3DModel.from_config(parts["transformer"].config)
    del parts["transformer_2"]
    do_without_ftfy(SkyReelsV2Pipeline)
    return SkyReelsV2Pipeline(**parts)


def skyreels_v2_i2v() -> DiffusionPipeline:
    parts = wan_i2v().components
    parts["transformer"] = SkyReelsV2Transformer3DModel.from_config(parts["transformer"].config)
    del parts["transformer_2"]
    do_without_ftfy(SkyReelsV2ImageToVideoPipeline)
    return SkyReelsV2ImageToVideoPipeline(**parts)


BUILDERS = {
    "anyflow": anyflow,
    "cogvideox": cogvideox,
    "cogvideox_i2v": cogvideox_i2v,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video_15": hunyuan_video_15,
    "hunyuan_video_15_i2v": hunyuan_video_15_i2v,
    "hunyuan_video_i2v": hunyuan_video_i2v,
    "ltx2": ltx2,
    "ltx_video": ltx_video,
    "mochi": mochi,
    "sana_video": sana_video,
    "skyreels_v2": skyreels_v2,
    "skyreels_v2_i2v": skyreels_v2_i2v,
    "wan": wan,
    "wan22": wan22,
    "wan22_i2v": wan22_i2v,
    "wan_i2v": wan_i2v,
    "wan_vace": wan_vace,
}
VARIED = {
    "anyflow",
    "cogvideox_i2v",
    "hunyuan_video_i2v",
    "ltx2",
    "mochi",
    "sana_video",
    "skyreels_v2",
    "skyreels_v2_i2v",
    "wan_vace",
}
"""Families that most tests of a single room do without: what is particular to them is tried where it is made."""
ONE_DENOISER = sorted(name for name in BUILDERS if len(FAMILIES[name].denoisers) == 1 and name not in VARIED)
"""Families with one transformer: the further ones of others are like the first."""
ALL_TEXT_TO_VIDEO = sorted(name for name in BUILDERS if not FAMILIES[name].begins_with_image)
"""Families whose videos begin with no image."""
EVERY = sorted({*ALL_TEXT_TO_VIDEO, *VARIED})
"""Those that the suite of all abilities goes through; image to video of others is tried in test_image_to_video.py."""
TEXT_TO_VIDEO = [name for name in ALL_TEXT_TO_VIDEO if name in ONE_DENOISER]
"""Those of them with one transformer."""
FLOW = [name for name in TEXT_TO_VIDEO if FAMILIES[name].predicts == "flow"]
"""Those of them that students and grids are for."""


def tiny_pipeline(family: str, seed: int = 0, **options: bool | str) -> DiffusionPipeline:
    """A random pipeline of a family in float32 on the CPU, the same for the same seed.

    `options` are the builder's: `guidance_embeds` (hunyuan_video and its image to video, which has `kind` as well),
    `use_meanflow` (HunyuanVideo-1.5's). The caller's random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = BUILDERS[family](**options)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
