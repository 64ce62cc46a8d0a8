"""CogVideoX text-to-video: name tables, configs and refusals for both of its layouts.

Original names: zai-org/CogVideo sat/ (SwissArmyTransformer, SAT). The others: diffusers'
CogVideoXTransformer3DModel and AutoencoderKLCogVideoX.
"""

import math

from minidit.models.cogvideox import CogVideoX
from minidit.presets import CogVideoXConfig, CogVideoXVAEConfig
from minidit.vae.cogvideox import CogVideoXVAE
from weights_convert.names import Layout, Shapes, under
from weights_convert.wan import depth, renamed

HEAD_WIDTH = 64  # of every released CogVideoX transformer
SINCOS_WIDTH = 1920  # CogVideoX-2B: the one release with a position table in place of rotations
ROPE_WIDTH = 3072  # the others

# The transformer

DIFFUSERS_SIGNS = "patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight"
DIFFUSERS = {
    "patch_embed.proj.weight": "patch_in.weight (flat)",
    "patch_embed.proj.bias": "patch_in.bias",
    "patch_embed.text_proj.{}": "text_in.{}",
    "time_embedding.linear_1.{}": "time_mlp.up.{}",
    "time_embedding.linear_2.{}": "time_mlp.down.{}",
    # shift, scale and gate of video, then of text; ours go: video attn, video mlp, text attn, text mlp
    "transformer_blocks.{}.norm1.linear.{}": "blocks.{}.mod.{} (1+3 of 4)",
    "transformer_blocks.{}.norm2.linear.{}": "blocks.{}.mod.{} (2+4 of 4)",
    "transformer_blocks.{}.norm1.norm.{}": "blocks.{}.norm1.{}",
    "transformer_blocks.{}.norm2.norm.{}": "blocks.{}.norm2.{}",
    "transformer_blocks.{}.attn1.to_q.{}": "blocks.{}.attn.qkv.{} (1 of 3)",
    "transformer_blocks.{}.attn1.to_k.{}": "blocks.{}.attn.qkv.{} (2 of 3)",
    "transformer_blocks.{}.attn1.to_v.{}": "blocks.{}.attn.qkv.{} (3 of 3)",
    "transformer_blocks.{}.attn1.norm_q.{}": "blocks.{}.attn.q_norm.{}",
    "transformer_blocks.{}.attn1.norm_k.{}": "blocks.{}.attn.k_norm.{}",
    "transformer_blocks.{}.attn1.to_out.0.{}": "blocks.{}.attn.out.{}",
    "transformer_blocks.{}.ff.net.0.proj.{}": "blocks.{}.mlp.up.{}",
    "transformer_blocks.{}.ff.net.2.{}": "blocks.{}.mlp.down.{}",
    "norm_final.{}": "head.norm1.{}",
    "norm_out.linear.{}": "head.mod.{}",
    "norm_out.norm.{}": "head.norm2.{}",
    "proj_out.{}": "head.out.{}",
}

SAT_PREFIX = "model.diffusion_model."
SAT_SIGNS = (f"{SAT_PREFIX}mixins.adaln_layer.adaLN_modulations.0.1.weight",)
SAT = {
    SAT_PREFIX + upstream: ours
    for upstream, ours in {
        "mixins.patch_embed.proj.weight": "patch_in.weight (flat)",
        "mixins.patch_embed.proj.bias": "patch_in.bias",
        "mixins.patch_embed.text_proj.{}": "text_in.{}",
        "time_embed.0.{}": "time_mlp.up.{}",
        "time_embed.2.{}": "time_mlp.down.{}",
        "mixins.adaln_layer.adaLN_modulations.{}.1.{}": "blocks.{}.mod.{}",
        "transformer.layers.{}.input_layernorm.{}": "blocks.{}.norm1.{}",
        "transformer.layers.{}.post_attention_layernorm.{}": "blocks.{}.norm2.{}",
        "transformer.layers.{}.attention.query_key_value.{}": "blocks.{}.attn.qkv.{}",
        "mixins.adaln_layer.query_layernorm_list.{}.{}": "blocks.{}.attn.q_norm.{}",
        "mixins.adaln_layer.key_layernorm_list.{}.{}": "blocks.{}.attn.k_norm.{}",
        "transformer.layers.{}.attention.dense.{}": "blocks.{}.attn.out.{}",
        "transformer.layers.{}.mlp.dense_h_to_4h.{}": "blocks.{}.mlp.up.{}",
        "transformer.layers.{}.mlp.dense_4h_to_h.{}": "blocks.{}.mlp.down.{}",
        "transformer.final_layernorm.{}": "head.norm1.{}",
        "mixins.final_layer.adaLN_modulation.1.{}": "head.mod.{}",
        "mixins.final_layer.norm_final.{}": "head.norm2.{}",
        "mixins.final_layer.linear.{}": "head.out.{}",
    }.items()
}
TABLES_OF_POSITIONS = "a table that follows from the size, computed for each run"
SAT_DROP = {
    **{
        f"{SAT_PREFIX}mixins.pos_embed.{name}": TABLES_OF_POSITIONS
        for name in ("pos_embedding", "freqs_cos", "freqs_sin")
    },
    **{
        f"{SAT_PREFIX}transformer.{name}.weight": "of the language models that SAT was made for"
        for name in ("word_embeddings", "position_embeddings")
    },
}


def diffusers_config(shapes: Shapes, known: dict) -> dict:
    """CogVideoXConfig from diffusers' names. Where positions start from is in its config.json alone."""
    words = {
        "num_attention_heads": "heads", "num_layers": "depth", "in_channels": "channels",
        "text_embed_dim": "text_width", "max_text_seq_length": "text_len", "time_embed_dim": "time_width",
        "norm_eps": "eps",
    }  # fmt: skip
    found = transformer_shapes(
        shapes,
        patch="patch_embed.proj.weight",
        out="proj_out.weight",
        text="patch_embed.text_proj.weight",
        time="time_embedding.linear_1.weight",
        up="transformer_blocks.0.ff.net.0.proj.weight",
    )
    found |= {"depth": depth(shapes, "transformer_blocks")} | renamed(known, words)
    if "use_rotary_positional_embeddings" in known:
        cropped = "rope" if known.get("patch_size_t") else "rope-cropped"
        found["positions"] = cropped if known["use_rotary_positional_embeddings"] else "sincos"
    if found.get("positions") == "rope-cropped" and {"sample_height", "sample_width"} <= set(known):
        found["base_grid"] = [known[name] // found["patch"][1] for name in ("sample_height", "sample_width")]
    return found


def sat_config(shapes: Shapes, known: dict) -> dict:
    """CogVideoXConfig from SwissArmyTransformer's names; its yaml files are not read."""
    found = transformer_shapes(
        shapes,
        patch=f"{SAT_PREFIX}mixins.patch_embed.proj.weight",
        out=f"{SAT_PREFIX}mixins.final_layer.linear.weight",
        text=f"{SAT_PREFIX}mixins.patch_embed.text_proj.weight",
        time=f"{SAT_PREFIX}time_embed.0.weight",
        up=f"{SAT_PREFIX}transformer.layers.0.mlp.dense_h_to_4h.weight",
    )
    return found | {"depth": depth(shapes, f"{SAT_PREFIX}transformer.layers")}


def transformer_shapes(shapes: Shapes, *, patch: str, out: str, text: str, time: str, up: str) -> dict:
    """What the shapes say of a CogVideoXConfig, given the names of five telling tensors.

    Version 1.5 has patches of two frames, and so twice the values per token; the others have a convolution.
    """
    width, cells = shapes[patch][0], shapes[out][0]
    latent = CogVideoXConfig.channels
    found = {
        "width": width,
        "mlp_width": shapes[up][0],
        "text_width": shapes[text][1],
        "time_width": shapes[time][0],
        "patch": (cells // (4 * latent), 2, 2) if len(shapes[patch]) == 2 else (1, *shapes[patch][2:]),
        "channels": shapes[patch][1] if len(shapes[patch]) == 4 else latent,
    }
    if width % HEAD_WIDTH == 0:
        found["heads"] = width // HEAD_WIDTH
    if width == SINCOS_WIDTH:
        found["positions"] = "sincos"
    elif width == ROPE_WIDTH:
        found["positions"] = "rope-cropped" if found["patch"][0] == 1 else "rope"
    return found


# The autoencoder

RES_DIFFUSERS = {"conv1.conv.{}": "conv1.{}", "conv2.conv.{}": "conv2.{}", "conv_shortcut.{}": "shortcut.{}"}
RES_SAT = {"conv1.conv.{}": "conv1.{}", "conv2.conv.{}": "conv2.{}", "nin_shortcut.{}": "shortcut.{}"}


def norm_lines(half: str, upstream: str, ours: str) -> dict[str, str]:
    """A group norm of the encoder, or one of the decoder with its two convolutions of the latents."""
    if half == "encoder":
        return {f"{upstream}.{{}}": f"{ours}.{{}}"}
    lines = {"norm_layer.{}": "norm.{}", "conv_y.conv.{}": "scale.{}", "conv_b.conv.{}": "shift.{}"}
    return under(upstream, ours, lines)


def res_lines(half: str, lines: dict[str, str]) -> dict[str, str]:
    return lines | norm_lines(half, "norm1", "norm1") | norm_lines(half, "norm2", "norm2")


def half_lines(half: str) -> dict[str, str]:
    """The ends of a half, named alike in both layouts."""
    return {
        f"{half}.conv_in.conv.{{}}": f"{half}.conv_in.{{}}",
        f"{half}.conv_out.conv.{{}}": f"{half}.conv_out.{{}}",
    } | norm_lines(half, f"{half}.norm_out", f"{half}.norm_out")


def vae_diffusers(config: CogVideoXVAEConfig, shapes: Shapes) -> dict[str, str]:
    lines = {}
    for half, way in (("encoder", "down"), ("decoder", "up")):
        res = res_lines(half, RES_DIFFUSERS)
        lines |= half_lines(half)
        lines |= under(f"{half}.mid_block.resnets.0", f"{half}.mid.block1", res)
        lines |= under(f"{half}.mid_block.resnets.1", f"{half}.mid.block2", res)
        lines |= under(f"{half}.{way}_blocks.{{}}.resnets.{{}}", f"{half}.levels.{{}}.blocks.{{}}", res)
        resample = f"{half}.{way}_blocks.{{}}.{way}samplers.0.conv.{{}}"
        lines[resample] = f"{half}.levels.{{}}.{way}.conv.{{}}"
    return lines


def vae_sat(config: CogVideoXVAEConfig, shapes: Shapes) -> dict[str, str]:
    lines, last = {}, len(config.widths) - 1
    for half, way in (("encoder", "down"), ("decoder", "up")):
        res = res_lines(half, RES_SAT)
        lines |= half_lines(half)
        lines |= under(f"{half}.mid.block_1", f"{half}.mid.block1", res)
        lines |= under(f"{half}.mid.block_2", f"{half}.mid.block2", res)
        for i in range(last + 1):  # the decoder's levels are counted from the finest
            theirs, ours = f"{half}.{way}.{i if way == 'down' else last - i}", f"{half}.levels.{i}"
            lines |= under(f"{theirs}.block.{{}}", f"{ours}.blocks.{{}}", res)
            lines[f"{theirs}.{way}sample.conv.{{}}"] = f"{ours}.{way}.conv.{{}}"
    return lines


def diffusers_vae_config(shapes: Shapes, known: dict) -> dict:
    words = {
        "block_out_channels": "widths", "latent_channels": "latent", "layers_per_block": "res_blocks",
        "norm_num_groups": "groups", "scaling_factor": "scale", "norm_eps": "eps",
    }  # fmt: skip
    found = vae_shapes(shapes, "encoder.down_blocks.{}.resnets.{}.conv1.conv.weight") | renamed(known, words)
    if {"sample_height", "sample_width"} <= set(known):
        found["tile"] = [known["sample_height"] // 2, known["sample_width"] // 2]
    return found


def sat_vae_config(shapes: Shapes, known: dict) -> dict:
    return vae_shapes(shapes, "encoder.down.{}.block.{}.conv1.conv.weight")


def vae_shapes(shapes: Shapes, conv: str) -> dict:
    """What the shapes say of a CogVideoXVAEConfig; conv: the first convolution of a level and block."""
    count = lambda names: next(i for i, name in enumerate(names) if name not in shapes)
    levels = count(conv.format(i, 0) for i in range(len(shapes)))
    return {
        "widths": [shapes[conv.format(i, 0)][0] for i in range(levels)],
        "res_blocks": count(conv.format(0, j) for j in range(len(shapes))),
        "latent": shapes["decoder.conv_in.conv.weight"][1],
    }


def refusal(shapes: Shapes) -> str:
    """Why a checkpoint of the wider CogVideoX family cannot be run, or ''."""
    sat = f"{SAT_PREFIX}mixins.patch_embed.proj.weight", f"{SAT_PREFIX}mixins.final_layer.linear.weight"
    diffusers = "patch_embed.proj.weight", "proj_out.weight"
    for signs, (patch, out) in ((DIFFUSERS_SIGNS, diffusers), (SAT_SIGNS, sat)):
        if not {*signs, patch, out} <= set(shapes):
            continue
        if math.prod(shapes[patch][1:]) == 2 * shapes[out][0]:  # it is fed the image beside the noise
            return "this is a CogVideoX image-to-video transformer; minidit runs text-to-video"
    return ""


LAYOUTS = (
    Layout(
        component="transformer",
        family="cogvideox",
        class_name="CogVideoX",
        origin="diffusers",
        signs=DIFFUSERS_SIGNS,
        build=CogVideoX,
        config=diffusers_config,
        table=lambda config, shapes: DIFFUSERS,
        is_config="use_rotary_positional_embeddings",
        drop={"patch_embed.pos_embedding": TABLES_OF_POSITIONS},
    ),
    Layout(
        component="transformer",
        family="cogvideox",
        class_name="CogVideoX",
        origin="original",
        signs=SAT_SIGNS,
        build=CogVideoX,
        config=sat_config,
        table=lambda config, shapes: SAT,
        drop=SAT_DROP,
    ),
    Layout(
        component="vae",
        family="cogvideox",
        class_name="CogVideoXVAE",
        origin="diffusers",
        signs=("decoder.mid_block.resnets.0.norm1.conv_y.conv.weight",),
        build=CogVideoXVAE,
        config=diffusers_vae_config,
        table=vae_diffusers,
        is_config="latent_channels",
    ),
    Layout(
        component="vae",
        family="cogvideox",
        class_name="CogVideoXVAE",
        origin="original",
        signs=("decoder.mid.block_1.norm1.conv_y.conv.weight",),
        build=CogVideoXVAE,
        config=sat_vae_config,
        table=vae_sat,
        drop={"loss.*": "of training alone"},
        unsaid=("scale",),
    ),
)
