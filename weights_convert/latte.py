"""Latte-1: name tables and configs of the transformer and of both autoencoders.

The original (Vchitect/Latte models/latte_t2v.py) and diffusers' LatteTransformer3DModel share their names.
The autoencoders are diffusers' AutoencoderKL and AutoencoderKLTemporalDecoder.
"""

from minidit.models.latte import Latte
from minidit.presets import KLConfig
from minidit.vae.kl import KLVAE
from weights_convert.names import Layout, Shapes, under
from weights_convert.wan import depth, renamed

HEAD_WIDTH = 72  # of the released transformer

# The transformer

SELF_ATTENTION = {
    "to_q.{}": "qkv.{} (1 of 3)",
    "to_k.{}": "qkv.{} (2 of 3)",
    "to_v.{}": "qkv.{} (3 of 3)",
    "to_out.0.{}": "out.{}",
}
CROSS_ATTENTION = {
    "to_q.{}": "q.{}",
    "to_k.{}": "kv.{} (1 of 2)",
    "to_v.{}": "kv.{} (2 of 2)",
    "to_out.0.{}": "out.{}",
}
MLP = {"net.0.proj.{}": "up.{}", "net.2.{}": "down.{}"}

LATTE = {
    "pos_embed.proj.weight": "patch_in.weight (flat)",
    "pos_embed.proj.bias": "patch_in.bias",
    "caption_projection.linear_1.{}": "text_mlp.up.{}",
    "caption_projection.linear_2.{}": "text_mlp.down.{}",
    "adaln_single.emb.timestep_embedder.linear_1.{}": "time_mlp.up.{}",
    "adaln_single.emb.timestep_embedder.linear_2.{}": "time_mlp.down.{}",
    "adaln_single.linear.{}": "time_mod.{}",
    "transformer_blocks.{}.scale_shift_table": "blocks.{}.mod",
    **under("transformer_blocks.{}.attn1", "blocks.{}.attn", SELF_ATTENTION),
    **under("transformer_blocks.{}.attn2", "blocks.{}.cross", CROSS_ATTENTION),
    **under("transformer_blocks.{}.ff", "blocks.{}.mlp", MLP),
    "temporal_transformer_blocks.{}.scale_shift_table": "blocks.{}.t_mod",
    **under("temporal_transformer_blocks.{}.attn1", "blocks.{}.t_attn", SELF_ATTENTION),
    **under("temporal_transformer_blocks.{}.ff", "blocks.{}.t_mlp", MLP),
    "scale_shift_table": "head.mod",
    "proj_out.{}": "head.out.{}",
}

# in the file or not: not persistent in diffusers, a stray buffer in the original
LATTE_DROP = {
    "caption_projection.y_embedding": "the original never reads it",
    "pos_embed.pos_embed": "computed in use",
    "temp_pos_embed": "computed in use",
}


def latte_config(shapes: Shapes, known: dict) -> dict:
    """LatteConfig from the shapes and, over them, config.json."""
    words = {
        "num_attention_heads": "heads", "num_layers": "depth", "in_channels": "channels",
        "out_channels": "out_channels", "caption_channels": "text_width", "patch_size": "patch",
        "sample_size": "sample_size", "video_length": "frames", "norm_eps": "eps",
    }  # fmt: skip
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    found = {
        "width": width,
        "mlp_width": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0],
        "depth": depth(shapes, "transformer_blocks"),
        "channels": channels,
        "out_channels": shapes["proj_out.bias"][0] // patch**2,
        "text_width": shapes["caption_projection.linear_1.weight"][1],
        "freq_width": shapes["adaln_single.emb.timestep_embedder.linear_1.weight"][1],
        "patch": patch,
    }
    return found | ({} if width % HEAD_WIDTH else {"heads": width // HEAD_WIDTH}) | renamed(known, words)


# The autoencoders

RES_BLOCK = {
    "norm1.{}": "norm1.{}",
    "conv1.{}": "conv1.{}",
    "norm2.{}": "norm2.{}",
    "conv2.{}": "conv2.{}",
    "conv_shortcut.{}": "shortcut.{}",
}
SPACE_TIME = {
    **under("spatial_res_block", "space", RES_BLOCK),
    **under("temporal_res_block", "time", RES_BLOCK),
    "time_mixer.mix_factor": "mix",
}
FRAME_ATTENTION = {
    "group_norm.{}": "norm.{}",
    **SELF_ATTENTION,
    "query.{}": "qkv.{} (1 of 3)",  # the names before diffusers 0.15
    "key.{}": "qkv.{} (2 of 3)",
    "value.{}": "qkv.{} (3 of 3)",
    "proj_attn.{}": "out.{}",
}


def kl_table(config: KLConfig, shapes: Shapes) -> dict[str, str]:
    """An AutoencoderKL's names; those of a temporal decoder's blocks are one level deeper."""
    block = SPACE_TIME if config.is_temporal else RES_BLOCK
    lines = {
        "quant_conv.{}": "quant.{}",
        "post_quant_conv.{}": "post_quant.{}",
        "decoder.time_conv_out.{}": "decoder.time_out.{}",
        "encoder.down_blocks.{}.downsamplers.0.conv.{}": "encoder.levels.{}.down.{}",
        "decoder.up_blocks.{}.upsamplers.0.conv.{}": "decoder.levels.{}.up.{}",
        **under("encoder.down_blocks.{}.resnets.{}", "encoder.levels.{}.blocks.{}", RES_BLOCK),
        **under("decoder.up_blocks.{}.resnets.{}", "decoder.levels.{}.blocks.{}", block),
    }
    for half, kind in (("encoder", RES_BLOCK), ("decoder", block)):
        lines |= {
            f"{half}.conv_in.{{}}": f"{half}.conv_in.{{}}",
            f"{half}.conv_norm_out.{{}}": f"{half}.norm_out.{{}}",
            f"{half}.conv_out.{{}}": f"{half}.conv_out.{{}}",
            **under(f"{half}.mid_block.resnets.0", f"{half}.mid.block1", kind),
            **under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn", FRAME_ATTENTION),
            **under(f"{half}.mid_block.resnets.1", f"{half}.mid.block2", kind),
        }
    return lines


def kl_config(shapes: Shapes, known: dict) -> dict:
    """KLConfig from the shapes; the number of groups and the scale are in config.json alone."""
    words = {"norm_num_groups": "groups", "scaling_factor": "scale"}
    levels = range(depth(shapes, "encoder.down_blocks"))
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels]
    found = {
        "widths": widths,
        "res_blocks": depth(shapes, "encoder.down_blocks.0.resnets"),
        "latent": shapes["decoder.conv_in.weight"][1],
        "is_temporal": "decoder.time_conv_out.weight" in shapes,
    }
    return found | renamed(known, words)


LAYOUTS = (
    Layout(
        component="transformer",
        family="latte",
        class_name="Latte",
        origin="diffusers",
        signs=("adaln_single.linear.weight", "temporal_transformer_blocks.0.attn1.to_q.weight"),
        build=Latte,
        config=latte_config,
        table=lambda config, shapes: LATTE,
        is_config="num_attention_heads",
        drop=LATTE_DROP,
    ),
    Layout(
        component="vae_2",
        family="latte",
        class_name="KLVAE",
        origin="diffusers",
        signs=("decoder.time_conv_out.weight", "encoder.down_blocks.0.resnets.0.norm1.weight"),
        build=KLVAE,
        config=kl_config,
        table=kl_table,
        is_config="block_out_channels",
    ),
    Layout(
        component="vae",
        family="latte",
        class_name="KLVAE",
        origin="diffusers",
        signs=("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
        build=KLVAE,
        config=kl_config,
        table=kl_table,
        is_config="block_out_channels",
    ),
)
