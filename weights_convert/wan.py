"""Wan 2.1 text-to-video: name tables, configs and refusals for both of its layouts.

Original names: Wan-Video/Wan2.1 wan/modules/{model,vae,t5}.py. The others: diffusers' WanTransformer3DModel
and AutoencoderKLWan, transformers' UMT5EncoderModel.
"""

import math
from itertools import count

from minidit.models.wan import Wan
from minidit.presets import WAN21_MEAN, WAN21_STD, T5Config, WanVAEConfig
from minidit.text.t5 import T5Encoder
from minidit.vae.wan import WanVAE
from weights_convert.names import Layout, Shapes, under

HEAD_WIDTH = 128  # of every released Wan transformer

# The transformer

WAN_ORIGINAL = {
    "patch_embedding.weight": "patch_in.weight (flat)",
    "patch_embedding.bias": "patch_in.bias",
    "text_embedding.0.{}": "text_mlp.up.{}",
    "text_embedding.2.{}": "text_mlp.down.{}",
    "time_embedding.0.{}": "time_mlp.up.{}",
    "time_embedding.2.{}": "time_mlp.down.{}",
    "time_projection.1.{}": "time_mod.{}",
    "blocks.{}.modulation": "blocks.{}.mod (squeeze)",
    "blocks.{}.self_attn.q.{}": "blocks.{}.attn.qkv.{} (1 of 3)",
    "blocks.{}.self_attn.k.{}": "blocks.{}.attn.qkv.{} (2 of 3)",
    "blocks.{}.self_attn.v.{}": "blocks.{}.attn.qkv.{} (3 of 3)",
    "blocks.{}.self_attn.norm_q.{}": "blocks.{}.attn.q_norm.{}",
    "blocks.{}.self_attn.norm_k.{}": "blocks.{}.attn.k_norm.{}",
    "blocks.{}.self_attn.o.{}": "blocks.{}.attn.out.{}",
    "blocks.{}.norm3.{}": "blocks.{}.norm3.{}",
    "blocks.{}.cross_attn.q.{}": "blocks.{}.cross.q.{}",
    "blocks.{}.cross_attn.k.{}": "blocks.{}.cross.kv.{} (1 of 2)",
    "blocks.{}.cross_attn.v.{}": "blocks.{}.cross.kv.{} (2 of 2)",
    "blocks.{}.cross_attn.norm_q.{}": "blocks.{}.cross.q_norm.{}",
    "blocks.{}.cross_attn.norm_k.{}": "blocks.{}.cross.k_norm.{}",
    "blocks.{}.cross_attn.o.{}": "blocks.{}.cross.out.{}",
    "blocks.{}.ffn.0.{}": "blocks.{}.mlp.up.{}",
    "blocks.{}.ffn.2.{}": "blocks.{}.mlp.down.{}",
    "head.modulation": "head.mod (squeeze)",
    "head.head.{}": "head.out.{}",
}

WAN_DIFFUSERS = {
    "patch_embedding.weight": "patch_in.weight (flat)",
    "patch_embedding.bias": "patch_in.bias",
    "condition_embedder.text_embedder.linear_1.{}": "text_mlp.up.{}",
    "condition_embedder.text_embedder.linear_2.{}": "text_mlp.down.{}",
    "condition_embedder.time_embedder.linear_1.{}": "time_mlp.up.{}",
    "condition_embedder.time_embedder.linear_2.{}": "time_mlp.down.{}",
    "condition_embedder.time_proj.{}": "time_mod.{}",
    "blocks.{}.scale_shift_table": "blocks.{}.mod (squeeze)",
    "blocks.{}.attn1.to_q.{}": "blocks.{}.attn.qkv.{} (1 of 3)",
    "blocks.{}.attn1.to_k.{}": "blocks.{}.attn.qkv.{} (2 of 3)",
    "blocks.{}.attn1.to_v.{}": "blocks.{}.attn.qkv.{} (3 of 3)",
    "blocks.{}.attn1.norm_q.{}": "blocks.{}.attn.q_norm.{}",
    "blocks.{}.attn1.norm_k.{}": "blocks.{}.attn.k_norm.{}",
    "blocks.{}.attn1.to_out.0.{}": "blocks.{}.attn.out.{}",
    "blocks.{}.norm2.{}": "blocks.{}.norm3.{}",  # the norm before cross-attention: diffusers counts by place
    "blocks.{}.attn2.to_q.{}": "blocks.{}.cross.q.{}",
    "blocks.{}.attn2.to_k.{}": "blocks.{}.cross.kv.{} (1 of 2)",
    "blocks.{}.attn2.to_v.{}": "blocks.{}.cross.kv.{} (2 of 2)",
    "blocks.{}.attn2.norm_q.{}": "blocks.{}.cross.q_norm.{}",
    "blocks.{}.attn2.norm_k.{}": "blocks.{}.cross.k_norm.{}",
    "blocks.{}.attn2.to_out.0.{}": "blocks.{}.cross.out.{}",
    "blocks.{}.ffn.net.0.proj.{}": "blocks.{}.mlp.up.{}",
    "blocks.{}.ffn.net.2.{}": "blocks.{}.mlp.down.{}",
    "scale_shift_table": "head.mod (squeeze)",
    "proj_out.{}": "head.out.{}",
}

IMAGE_NAMES = (
    "img_emb.",
    "condition_embedder.image_embedder.",
    "blocks.0.cross_attn.k_img.",
    "blocks.0.attn2.add_",
)


def original_wan_config(shapes: Shapes, known: dict) -> dict:
    """WanConfig from the original names; `known` is the release's config.json."""
    words = {
        "dim": "width", "ffn_dim": "mlp_width", "num_heads": "heads", "num_layers": "depth",
        "in_dim": "channels", "text_dim": "text_width", "text_len": "text_len", "freq_dim": "freq_width",
        "patch_size": "patch", "eps": "eps",
    }  # fmt: skip
    found = wan_shapes(shapes, "blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight")
    return found | renamed(known, words)


def diffusers_wan_config(shapes: Shapes, known: dict) -> dict:
    """WanConfig from diffusers' names; its config.json does not say text_len."""
    words = {
        "ffn_dim": "mlp_width", "num_attention_heads": "heads", "num_layers": "depth",
        "in_channels": "channels", "text_dim": "text_width", "freq_dim": "freq_width", "patch_size": "patch",
        "eps": "eps",
    }  # fmt: skip
    embedder = "condition_embedder.{}_embedder.linear_1.weight"
    found = wan_shapes(
        shapes, "blocks.0.ffn.net.0.proj.weight", embedder.format("text"), embedder.format("time")
    )
    return found | renamed(known, words)


def wan_shapes(shapes: Shapes, mlp: str, text: str, time: str) -> dict:
    """What the shapes say of a WanConfig, given the names of three telling tensors."""
    width, channels, *patch = shapes["patch_embedding.weight"]
    found = {
        "width": width,
        "mlp_width": shapes[mlp][0],
        "depth": depth(shapes, "blocks"),
        "channels": channels,
        "text_width": shapes[text][1],
        "freq_width": shapes[time][1],
        "patch": patch,
    }
    return found | ({} if width % HEAD_WIDTH else {"heads": width // HEAD_WIDTH})


# The text encoder


def umt5_original(config: T5Config, shapes: Shapes) -> dict[str, str]:
    return {
        "token_embedding.weight": "embed.weight",
        "blocks.{}.norm1.weight": "blocks.{}.norm1.weight",
        "blocks.{}.attn.q.weight": "blocks.{}.attn.qkv.weight (1 of 3)",
        "blocks.{}.attn.k.weight": "blocks.{}.attn.qkv.weight (2 of 3)",
        "blocks.{}.attn.v.weight": "blocks.{}.attn.qkv.weight (3 of 3)",
        "blocks.{}.attn.o.weight": "blocks.{}.attn.out.weight",
        "blocks.{}.pos_embedding.embedding.weight": "blocks.{}.attn.positions.weight",
        "blocks.{}.norm2.weight": "blocks.{}.norm2.weight",
        "blocks.{}.ffn.gate.0.weight": "blocks.{}.mlp.gate.weight",
        "blocks.{}.ffn.fc1.weight": "blocks.{}.mlp.up.weight",
        "blocks.{}.ffn.fc2.weight": "blocks.{}.mlp.down.weight",
        "norm.weight": "norm_out.weight",
    }


def umt5_transformers(config: T5Config, shapes: Shapes) -> dict[str, str]:
    attention, mlp = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    return {
        embedding_name(shapes): "embed.weight",
        f"{attention}.layer_norm.weight": "blocks.{}.norm1.weight",
        f"{attention}.SelfAttention.q.weight": "blocks.{}.attn.qkv.weight (1 of 3)",
        f"{attention}.SelfAttention.k.weight": "blocks.{}.attn.qkv.weight (2 of 3)",
        f"{attention}.SelfAttention.v.weight": "blocks.{}.attn.qkv.weight (3 of 3)",
        f"{attention}.SelfAttention.o.weight": "blocks.{}.attn.out.weight",
        f"{attention}.SelfAttention.relative_attention_bias.weight": "blocks.{}.attn.positions.weight",
        f"{mlp}.layer_norm.weight": "blocks.{}.norm2.weight",
        f"{mlp}.DenseReluDense.wi_0.weight": "blocks.{}.mlp.gate.weight",
        f"{mlp}.DenseReluDense.wi_1.weight": "blocks.{}.mlp.up.weight",
        f"{mlp}.DenseReluDense.wo.weight": "blocks.{}.mlp.down.weight",
        "encoder.final_layer_norm.weight": "norm_out.weight",
    }


UMT5_DROP = {"encoder.embed_tokens.weight": "a copy of shared.weight"}


def embedding_name(shapes: Shapes) -> str:
    """The embedding is saved under two names or under either."""
    return "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"


def original_umt5_config(shapes: Shapes, known: dict) -> dict:
    positions = "blocks.0.pos_embedding.embedding.weight"
    names = "token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight", positions
    return umt5_shapes(shapes, *names) | {"depth": depth(shapes, "blocks")}


def transformers_umt5_config(shapes: Shapes, known: dict) -> dict:
    words = {
        "vocab_size": "vocab", "d_model": "width", "d_ff": "mlp_width", "num_heads": "heads",
        "d_kv": "head_width", "num_layers": "depth", "relative_attention_num_buckets": "buckets",
        "relative_attention_max_distance": "max_distance", "layer_norm_epsilon": "eps",
    }  # fmt: skip
    attention = "encoder.block.0.layer.0.SelfAttention"
    positions = f"{attention}.relative_attention_bias.weight"
    up = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
    found = umt5_shapes(shapes, embedding_name(shapes), f"{attention}.q.weight", up, positions)
    return found | {"depth": depth(shapes, "encoder.block")} | renamed(known, words)


def umt5_shapes(shapes: Shapes, embed: str, q: str, up: str, positions: str) -> dict:
    """What the shapes say of a T5Config, given the names of four telling tensors."""
    (vocab, width), (buckets, heads) = shapes[embed], shapes[positions]
    return {
        "vocab": vocab,
        "width": width,
        "mlp_width": shapes[up][0],
        "heads": heads,
        "head_width": shapes[q][0] // heads,
        "buckets": buckets,
    }


# The autoencoder

RES_ORIGINAL = {
    "residual.0.gamma": "norm1.weight (squeeze)",
    "residual.2.{}": "conv1.{}",
    "residual.3.gamma": "norm2.weight (squeeze)",
    "residual.6.{}": "conv2.{}",
    "shortcut.{}": "shortcut.{}",
}
RES_DIFFUSERS = {
    "norm1.gamma": "norm1.weight (squeeze)",
    "conv1.{}": "conv1.{}",
    "norm2.gamma": "norm2.weight (squeeze)",
    "conv2.{}": "conv2.{}",
    "conv_shortcut.{}": "shortcut.{}",
}
FRAME_ATTENTION = {"norm.gamma": "norm.weight (squeeze)", "to_qkv.{}": "qkv.{}", "proj.{}": "out.{}"}
RESAMPLE = {"resample.1.{}": "conv.{}", "time_conv.{}": "time_conv.{}"}


def vae_original(config: WanVAEConfig, shapes: Shapes) -> dict[str, str]:
    lines = {"conv1.{}": "quant.{}", "conv2.{}": "post_quant.{}"}
    for half, row, resample in (("encoder", "downsamples", "down"), ("decoder", "upsamples", "up")):
        lines |= {
            f"{half}.conv1.{{}}": f"{half}.conv_in.{{}}",
            f"{half}.head.0.gamma": f"{half}.norm_out.weight (squeeze)",
            f"{half}.head.2.{{}}": f"{half}.conv_out.{{}}",
        }
        lines |= under(f"{half}.middle.0", f"{half}.mid.block1", RES_ORIGINAL)
        lines |= under(f"{half}.middle.1", f"{half}.mid.attn", FRAME_ATTENTION)
        lines |= under(f"{half}.middle.2", f"{half}.mid.block2", RES_ORIGINAL)
        for i, place in enumerate(
            stages(config, half, resample)
        ):  # one number for blocks and resamplings alike
            kind = RESAMPLE if place.endswith(resample) else RES_ORIGINAL
            lines |= under(f"{half}.{row}.{i}", f"{half}.{place}", kind)
    return lines


def vae_diffusers(config: WanVAEConfig, shapes: Shapes) -> dict[str, str]:
    lines = {"quant_conv.{}": "quant.{}", "post_quant_conv.{}": "post_quant.{}"}
    for half in ("encoder", "decoder"):
        lines |= {
            f"{half}.conv_in.{{}}": f"{half}.conv_in.{{}}",
            f"{half}.norm_out.gamma": f"{half}.norm_out.weight (squeeze)",
            f"{half}.conv_out.{{}}": f"{half}.conv_out.{{}}",
        }
        lines |= under(f"{half}.mid_block.resnets.0", f"{half}.mid.block1", RES_DIFFUSERS)
        lines |= under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn", FRAME_ATTENTION)
        lines |= under(f"{half}.mid_block.resnets.1", f"{half}.mid.block2", RES_DIFFUSERS)
    for i, place in enumerate(stages(config, "encoder", "down")):
        kind = RESAMPLE if place.endswith("down") else RES_DIFFUSERS
        lines |= under(f"encoder.down_blocks.{i}", f"encoder.{place}", kind)
    lines |= under("decoder.up_blocks.{}.resnets.{}", "decoder.levels.{}.blocks.{}", RES_DIFFUSERS)
    lines |= under("decoder.up_blocks.{}.upsamplers.0", "decoder.levels.{}.up", RESAMPLE)
    return lines


def stages(config: WanVAEConfig, half: str, resample: str) -> list[str]:
    """Our names of a half's blocks and resamplings, in the order in which they run."""
    blocks, last = config.res_blocks + (half == "decoder"), len(config.multipliers) - 1
    per_level = [
        [f"levels.{i}.blocks.{j}" for j in range(blocks)] + [f"levels.{i}.{resample}"]
        for i in range(last + 1)
    ]
    return [place for level in per_level for place in level][:-1]  # no resampling after the last level


def original_vae_config(shapes: Shapes, known: dict) -> dict:
    found = vae_shapes(shapes, shapes["encoder.conv1.weight"][0], "encoder.downsamples", "residual.6.weight")
    return found | latents(shapes["conv2.weight"][0])


def diffusers_vae_config(shapes: Shapes, known: dict) -> dict:
    words = {
        "base_dim": "base", "z_dim": "latent", "dim_mult": "multipliers", "num_res_blocks": "res_blocks",
        "temperal_downsample": "temporal_down", "latents_mean": "mean", "latents_std": "std",
    }  # fmt: skip
    found = vae_shapes(shapes, shapes["encoder.conv_in.weight"][0], "encoder.down_blocks", "conv2.weight")
    return found | latents(shapes["post_quant_conv.weight"][0]) | renamed(known, words)


def vae_shapes(shapes: Shapes, base: int, row: str, conv: str) -> dict:
    """Walk the encoder's row of numbered stages: residual blocks, then a resampling that ends the level."""
    widths, blocks, halves_time = [], [], []
    is_new_level = True
    for i in count():
        if shape := shapes.get(f"{row}.{i}.{conv}"):
            if is_new_level:
                widths.append(shape[0])
                blocks.append(0)
            blocks[-1] += 1
            is_new_level = False
        elif f"{row}.{i}.resample.1.weight" in shapes:
            halves_time.append(f"{row}.{i}.time_conv.weight" in shapes)
            is_new_level = True
        else:
            break
    multipliers = [width // base for width in widths]
    return {"base": base, "multipliers": multipliers, "res_blocks": blocks[0], "temporal_down": halves_time}


def latents(channels: int) -> dict:
    """The 16 latent channels of the release have constants that are in its code only."""
    known = {"mean": WAN21_MEAN, "std": WAN21_STD} if channels == len(WAN21_MEAN) else {}
    return {"latent": channels, **known}


# Shared


def renamed(known: dict, words: dict[str, str]) -> dict:
    """The values of an upstream config.json under our names; what it leaves out or null is left out."""
    return {ours: known[theirs] for theirs, ours in words.items() if known.get(theirs) is not None}


def depth(shapes: Shapes, prefix: str) -> int:
    """The number of blocks: how many different names follow the prefix."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{prefix}.")})


def refusal(shapes: Shapes) -> str:
    """Why a checkpoint of the wider Wan family cannot be run, or ''."""
    vae_22 = ("encoder.downsamples.0.downsamples.0.", "encoder.down_blocks.0.resnets.0.norm1.gamma")
    if any(name.startswith(vae_22) for name in shapes):
        return "this is the Wan 2.2 VAE (48 latent channels); minidit runs Wan 2.1"
    if "blocks.0.modulation" not in shapes and "blocks.0.scale_shift_table" not in shapes:
        return ""
    if any(name.startswith(IMAGE_NAMES) for name in shapes):
        return "this is a Wan image-to-video transformer; minidit runs text-to-video"
    if any(name.startswith("vace_blocks.") for name in shapes):
        return "this is a Wan VACE transformer; minidit runs text-to-video"
    head = shapes.get("head.head.weight") or shapes.get("proj_out.weight")
    patch = shapes.get("patch_embedding.weight", ())
    if head is None or len(patch) != 5:
        return ""
    channels, cells = patch[1], math.prod(patch[1:])
    if cells != head[0]:  # it is fed more channels than it predicts
        return f"this is a Wan image-to-video transformer ({channels} channels); minidit runs text-to-video"
    if channels == 48:
        return "this is the Wan 2.2 TI2V-5B transformer (48 latent channels); minidit runs Wan 2.1"
    return ""


LAYOUTS = (
    Layout(
        component="transformer",
        family="wan",
        class_name="Wan",
        origin="original",
        signs=("patch_embedding.weight", "head.modulation", "blocks.0.self_attn.q.weight"),
        build=Wan,
        config=original_wan_config,
        table=lambda config, shapes: WAN_ORIGINAL,
        is_config="num_heads",
    ),
    Layout(
        component="transformer",
        family="wan",
        class_name="Wan",
        origin="diffusers",
        signs=("patch_embedding.weight", "scale_shift_table", "condition_embedder.time_proj.weight"),
        build=Wan,
        config=diffusers_wan_config,
        table=lambda config, shapes: WAN_DIFFUSERS,
        is_config="num_attention_heads",
    ),
    Layout(
        component="text_encoder",
        family="wan",
        class_name="T5Encoder",
        origin="original",
        signs=("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"),
        build=T5Encoder,
        config=original_umt5_config,
        table=umt5_original,
    ),
    Layout(
        component="text_encoder",
        family="wan",
        class_name="T5Encoder",
        origin="transformers",
        # a position table in the second block too: this is what sets UMT5 apart from T5
        signs=("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",),
        build=T5Encoder,
        config=transformers_umt5_config,
        table=umt5_transformers,
        is_config="d_kv",
        drop=UMT5_DROP,
    ),
    Layout(
        component="vae",
        family="wan",
        class_name="WanVAE",
        origin="original",
        signs=("encoder.downsamples.0.residual.0.gamma", "decoder.upsamples.0.residual.0.gamma"),
        build=WanVAE,
        config=original_vae_config,
        table=vae_original,
    ),
    Layout(
        component="vae",
        family="wan",
        class_name="WanVAE",
        origin="diffusers",
        signs=("encoder.down_blocks.0.norm1.gamma", "decoder.up_blocks.0.resnets.0.norm1.gamma"),
        build=WanVAE,
        config=diffusers_vae_config,
        table=vae_diffusers,
        is_config="z_dim",
    ),
)
