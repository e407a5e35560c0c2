"""Sana-Video, text to video: linear self-attention, so that keys and values are summed up to as many rows as a head is
wide, cross-attention, and a feed-forward of convolutions over the video's places.

Nothing is kept between passes: the sums are made anew in each. The pipeline calls the frames `frames`, makes the two
passes of guidance in one doubled batch, and puts an instruction before each prompt, which negative prompts lack. Here
it makes videos of the size that is asked for, and not of the nearest of its list, scaled. Defaults are those of 480p.
"""

from vidaccel.families.base import BlockList, Denoiser, DiTFamily, Guidance, SamplingDefaults, TextTensor
from vidaccel.families.costs import Argument, BlockCosts, FamilyCosts

_ROTATIONS = Argument((1, "video", 1, "head"), copies=2)

SANA_VIDEO = DiTFamily(
    name="sana_video",
    title="Sana-Video",
    pipelines=("SanaVideoPipeline",),
    transformer="SanaVideoTransformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(
        BlockList(
            "transformer_blocks",
            arguments=(
                "hidden_states",
                "attention_mask",
                "encoder_hidden_states",
                "encoder_attention_mask",
                "timestep",
                "frames",
                "height",
                "width",
                "rotary_emb",
            ),
            returns=("hidden_states",),
            mask="encoder_attention_mask",
            branches=("attn1", "attn2", "ff"),
            residual_layers=("attn1.to_out.0", "attn2.to_out.0", "ff.conv_point"),
        ),
    ),
    timestep_embedder="time_embed.emb.timestep_embedder",
    text_tensors=(
        TextTensor(
            "prompt_embeds",
            "encoder_hidden_states",
            stored="prompt_embeds",
            shape=("prompt", "caption_channels"),
            mask="encoder_attention_mask",
            least=1,  # attention over no text at all is not a number
        ),
        TextTensor("prompt_attention_mask", "encoder_attention_mask", stored="prompt_mask", shape=("prompt",)),
    ),
    guidance=Guidance(cfg_argument="guidance_scale", doubled=True),
    defaults=SamplingDefaults(steps=50, guidance=6.0, num_frames=81, height=480, width=832, fps=16, shift=8.0),
    size_multiple=32,
    costs=FamilyCosts(
        layers=(
            ("patch_embedding", "video"),
            ("proj_out", "video"),
            ("caption_projection.*", "prompt"),
            ("*", "one"),
        ),
        attentions={},
        blocks={
            "transformer_blocks": BlockCosts(
                layers=(("attn2.to_[kv]", "text"), ("*", "video")),
                attentions=(
                    ("video", "head"),
                    ("video", "half", "num_attention_heads"),  # what each row is divided by
                    ("video", "text"),
                ),
                branches=("video", "video", "video"),
                arguments={
                    "attention_mask": None,
                    "encoder_attention_mask": Argument((1, 1, "text")),
                    "timestep": Argument((1, 1, 6, "width")),
                    "frames": "frames",
                    "height": "frame",  # a frame's places in one column cost the same
                    "width": "one",
                    "rotary_emb": _ROTATIONS,
                },
            ),
        },
        fusions=("video",),
        static_embedders=(_ROTATIONS, Argument((1, "prompt", "width")), Argument((1, "prompt", "width"))),
    ),
    frames_argument="frames",
    call={"use_resolution_binning": False},
    rotary="rope",
    static_embedders=("rope", "caption_projection", "caption_norm"),
    chunked_autoencoder="AutoencoderKLWan",
    untrained="puts an instruction before each prompt and none before a negative one",
)
