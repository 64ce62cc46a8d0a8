"""Open-Sora 1.2: name tables and configs of the transformer and the autoencoder, which have one layout each.

Names: hpcaitech/Open-Sora v1.2.0 opensora/models/{stdit/stdit3,vae/vae,vae/vae_temporal}.py.
"""

from minidit.models.open_sora import OpenSora
from minidit.presets import KLConfig, OpenSoraVAEConfig
from minidit.vae.open_sora import OpenSoraVAE
from weights_convert.latte import kl_config, kl_table
from weights_convert.names import Layout, Shapes, under
from weights_convert.wan import depth, renamed

HEAD_WIDTH = 72  # of the released transformer

# The transformer

HALF = {  # spatial_blocks.i or temporal_blocks.i -> the sub-modules of blocks.i, but for their prefix
    "attn.qkv.{}": "attn.qkv.{}",
    "attn.q_norm.{}": "attn.q_norm.{}",
    "attn.k_norm.{}": "attn.k_norm.{}",
    "attn.proj.{}": "attn.out.{}",
    "cross_attn.q_linear.{}": "cross.q.{}",
    "cross_attn.kv_linear.{}": "cross.kv.{}",
    "cross_attn.proj.{}": "cross.out.{}",
    "mlp.fc1.{}": "mlp.up.{}",
    "mlp.fc2.{}": "mlp.down.{}",
    "scale_shift_table": "mod",
}
OPEN_SORA = {
    "x_embedder.proj.weight": "patch_in.weight (flat)",
    "x_embedder.proj.bias": "patch_in.bias",
    "y_embedder.y_proj.fc1.{}": "text_mlp.up.{}",
    "y_embedder.y_proj.fc2.{}": "text_mlp.down.{}",
    "y_embedder.y_embedding": "null_text",
    "t_embedder.mlp.0.{}": "time_mlp.up.{}",
    "t_embedder.mlp.2.{}": "time_mlp.down.{}",
    "fps_embedder.mlp.0.{}": "fps_mlp.up.{}",
    "fps_embedder.mlp.2.{}": "fps_mlp.down.{}",
    "t_block.1.{}": "time_mod.{}",
    **under("spatial_blocks.{}", "blocks.{}", HALF),
    **{f"temporal_blocks.{{}}.{theirs}": f"blocks.{{}}.t_{ours}" for theirs, ours in HALF.items()},
    "final_layer.scale_shift_table": "head.mod",
    "final_layer.linear.{}": "head.out.{}",
}
OPEN_SORA_DROP = {"rope.freqs": "computed in use"}


def open_sora_config(shapes: Shapes, known: dict) -> dict:
    """OpenSoraConfig from the shapes and, over them, config.json."""
    words = {"num_heads": "heads", "depth": "depth", "input_sq_size": "base_size"}
    width, channels, _, patch, _ = shapes["x_embedder.proj.weight"]
    found = {
        "width": width,
        "heads": width // shapes["spatial_blocks.0.attn.q_norm.weight"][0],
        "mlp_width": shapes["spatial_blocks.0.mlp.fc1.weight"][0],
        "depth": depth(shapes, "spatial_blocks"),
        "channels": channels,
        "out_channels": shapes["final_layer.linear.bias"][0] // patch**2,
        "text_width": shapes["y_embedder.y_embedding"][1],
        "text_len": shapes["y_embedder.y_embedding"][0],
        "freq_width": shapes["t_embedder.mlp.0.weight"][1],
        "patch": patch,
    }
    return found | renamed(known, words)


# The autoencoder

IMAGE = "spatial_vae.module"
RES_BLOCK = {
    "norm1.{}": "norm1.{}",
    "conv1.conv.{}": "conv1.{}",
    "norm2.{}": "norm2.{}",
    "conv2.conv.{}": "conv2.{}",
    "conv3.conv.{}": "shortcut.{}",
}


def vae_table(config: OpenSoraVAEConfig, shapes: Shapes) -> dict[str, str]:
    """Levels of the decoder are numbered like the encoder's upstream, and run backwards: ours as they run."""
    last = len(config.time_multipliers) - 1
    lines = under(IMAGE, "image", kl_table(KLConfig(), shapes)) | {
        "temporal_vae.quant_conv.conv.{}": "quant.{}",
        "temporal_vae.post_quant_conv.conv.{}": "post_quant.{}",
        "temporal_vae.encoder.conv_in.conv.{}": "time_encoder.conv_in.{}",
        "temporal_vae.encoder.conv2.conv.{}": "time_encoder.conv_out.{}",
        "temporal_vae.encoder.conv_blocks.{}.conv.{}": "time_encoder.levels.{}.down.{}",
        "temporal_vae.decoder.conv1.conv.{}": "time_decoder.conv_in.{}",
        "temporal_vae.decoder.conv_out.conv.{}": "time_decoder.conv_out.{}",
    }
    for half in ("encoder", "decoder"):
        theirs, ours = f"temporal_vae.{half}", f"time_{half}"
        lines |= {f"{theirs}.norm1.{{}}": f"{ours}.norm_out.{{}}"}
        lines |= under(f"{theirs}.res_blocks.{{}}", f"{ours}.mid.{{}}", RES_BLOCK)
        for i in range(last + 1):
            level = i if half == "encoder" else last - i
            blocks = f"{theirs}.block_res_blocks.{i}.{{}}", f"{ours}.levels.{level}.blocks.{{}}"
            lines |= under(*blocks, RES_BLOCK)
    for i in range(last):  # upstream's number is of the level that comes after
        up = f"time_decoder.levels.{last - 1 - i}.up.{{}}"
        lines[f"temporal_vae.decoder.conv_blocks.{i}.conv.{{}}"] = up
    return lines


VAE_DROP = {"scale": "in the config", "shift": "in the config"}


def vae_config(shapes: Shapes, known: dict) -> dict:
    """OpenSoraVAEConfig from the shapes; group counts and statistics are in config.json alone, if there."""
    image_shapes = {n.removeprefix(f"{IMAGE}."): s for n, s in shapes.items() if n.startswith(IMAGE)}
    image_known, time_known = known.get("vae_2d", {}), known.get("vae_temporal", {})
    found = kl_config(image_shapes, {})
    del found["is_temporal"]
    row = "temporal_vae.encoder.block_res_blocks"
    levels = depth(shapes, row)
    base = shapes["temporal_vae.encoder.conv_in.conv.weight"][0]
    found |= {
        "time_base": base,
        "time_multipliers": [shapes[f"{row}.{i}.0.conv1.conv.weight"][0] // base for i in range(levels)],
        "time_blocks": depth(shapes, f"{row}.0"),
        "temporal_down": [
            f"temporal_vae.encoder.conv_blocks.{i}.conv.weight" in shapes for i in range(levels - 1)
        ],
    }
    found |= renamed(image_known, {"norm_num_groups": "groups"})
    found |= renamed(time_known, {"num_groups": "time_groups"})
    return found | renamed(known, {"micro_frame_size": "chunk", "shift": "mean", "scale": "std"})


LAYOUTS = (
    Layout(
        component="transformer",
        family="open_sora",
        class_name="OpenSora",
        origin="original",
        signs=("fps_embedder.mlp.0.weight", "temporal_blocks.0.attn.qkv.weight"),
        build=OpenSora,
        config=open_sora_config,
        table=lambda config, shapes: OPEN_SORA,
        is_config="input_sq_size",
        drop=OPEN_SORA_DROP,
    ),
    Layout(
        component="vae",
        family="open_sora",
        class_name="OpenSoraVAE",
        origin="original",
        signs=("spatial_vae.module.quant_conv.weight", "temporal_vae.encoder.conv_in.conv.weight"),
        build=OpenSoraVAE,
        config=vae_config,
        table=vae_table,
        is_config="micro_frame_size",
        drop=VAE_DROP,
    ),
)
