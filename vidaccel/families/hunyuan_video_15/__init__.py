"""HunyuanVideo-1.5, text to video: double-stream blocks only, CFG by a guider component.

diffusers' `TransformerBlockRegistry` does not know its blocks (0.42), and its pipeline never passes `timestep_r`, which
a transformer built with `use_meanflow` takes. Defaults are those of the 480p model.
"""

from vidaccel.families.base import (
    BlankInput,
    DecoderConfig,
    Denoiser,
    DiTFamily,
    Guidance,
    SamplingDefaults,
    TextTensor,
)
from vidaccel.families.costs import Argument, FamilyCosts
from vidaccel.families.hunyuan_video import (
    CONDITIONING_LAYERS,
    DOUBLE_STREAM,
    REFINER_ATTENTIONS,
    ROTATIONS,
    SPLIT,
    double_stream_costs,
)

HUNYUAN_VIDEO_15 = DiTFamily(
    name="hunyuan_video_15",
    title="HunyuanVideo-1.5",
    pipelines=("HunyuanVideo15Pipeline",),
    transformer="HunyuanVideo15Transformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(DOUBLE_STREAM,),
    timestep_embedder="time_embed.timestep_embedder",
    text_tensors=(
        TextTensor(
            "prompt_embeds",
            "encoder_hidden_states",
            stored="prompt_embeds",
            shape=("prompt", "text_embed_dim"),
            mask="encoder_attention_mask",
            least=1,  # the refiner averages over it
        ),
        TextTensor("prompt_embeds_mask", "encoder_attention_mask", stored="prompt_mask", shape=("prompt",)),
        TextTensor(
            "prompt_embeds_2",
            "encoder_hidden_states_2",
            stored="prompt_embeds_2",
            shape=("glyphs", "text_embed_2_dim"),
            mask="encoder_attention_mask_2",
        ),
        TextTensor("prompt_embeds_mask_2", "encoder_attention_mask_2", stored="prompt_mask_2", shape=("glyphs",)),
    ),
    guidance=Guidance(cfg_argument=None, guider="guider"),
    defaults=SamplingDefaults(steps=50, guidance=6.0, num_frames=121, height=480, width=848, fps=24, shift=5.0),
    size_multiple=16,
    costs=FamilyCosts(
        layers=(
            ("x_embedder.*", "video"),
            ("proj_out", "video"),
            *CONDITIONING_LAYERS,
            ("context_embedder.*", "prompt"),
            ("context_embedder_2.*", "glyphs"),
            ("image_embedder.*", "image"),
            ("*", "one"),
        ),
        attentions=REFINER_ATTENTIONS,
        blocks={"transformer_blocks": double_stream_costs(Argument((1, "text"), "bool"))},
        fusions=("video", "text"),
        static_embedders=(ROTATIONS, *(Argument((1, text, "width")) for text in ("prompt", "glyphs", "image"))),
    ),
    batched_autoencoder=False,  # the mask of its attention fits one video (diffusers 0.42.1)
    rounds_times=True,
    rotary="rope",
    static_embedders=("rope", "context_embedder", "context_embedder_2", "image_embedder"),
    r_config="use_meanflow",
    r_argument="timestep_r",
    blank_inputs=(BlankInput("image_embeds", tokens=729, width_config="image_embed_dim", masked=True),),
    split=SPLIT,
    fused="vidaccel.families.hunyuan_video_15.fused",
    needs_mask=True,
    decoder=DecoderConfig("block_out_channels", "layers_per_block"),
)
