"""HunyuanVideo text-to-video: name tables and configs for both of its layouts.

Original names: Tencent-Hunyuan/HunyuanVideo hyvideo/modules/models.py and hyvideo/vae. The others: diffusers'
HunyuanVideoTransformer3DModel and AutoencoderKLHunyuanVideo, transformers' LlamaModel and CLIPTextModel.
"""

from minidit.models.hunyuan_video import HunyuanVideo
from minidit.presets import HunyuanVideoConfig, LlamaConfig
from minidit.text.clip import CLIPText
from minidit.text.llama import UNUSED_LAYERS, LlamaEncoder
from minidit.vae.hunyuan_video import HunyuanVAE
from weights_convert.names import Layout, Shapes, Table, under

# The transformer

ORIGINAL = {
    "img_in.proj.weight": "patch_in.weight (flat)",
    "img_in.proj.bias": "patch_in.bias",
    "time_in.mlp.0.{}": "time_mlp.up.{}",
    "time_in.mlp.2.{}": "time_mlp.down.{}",
    "vector_in.in_layer.{}": "pooled_mlp.up.{}",
    "vector_in.out_layer.{}": "pooled_mlp.down.{}",
    "guidance_in.mlp.0.{}": "guidance_mlp.up.{}",
    "guidance_in.mlp.2.{}": "guidance_mlp.down.{}",
    "txt_in.input_embedder.{}": "refiner.text_in.{}",
    "txt_in.t_embedder.mlp.0.{}": "refiner.time_mlp.up.{}",
    "txt_in.t_embedder.mlp.2.{}": "refiner.time_mlp.down.{}",
    "txt_in.c_embedder.linear_1.{}": "refiner.text_mlp.up.{}",
    "txt_in.c_embedder.linear_2.{}": "refiner.text_mlp.down.{}",
    "final_layer.adaLN_modulation.1.{}": "head.mod.{}",
    "final_layer.linear.{}": "head.out.{}",
}
ORIGINAL_REFINER = {
    "norm1.{}": "norm1.{}",
    "self_attn_qkv.{}": "qkv.{}",
    "self_attn_proj.{}": "out.{}",
    "norm2.{}": "norm2.{}",
    "mlp.fc1.{}": "mlp.up.{}",
    "mlp.fc2.{}": "mlp.down.{}",
    "adaLN_modulation.1.{}": "mod.{}",
}

DIFFUSERS = {
    "x_embedder.proj.weight": "patch_in.weight (flat)",
    "x_embedder.proj.bias": "patch_in.bias",
    "time_text_embed.timestep_embedder.linear_1.{}": "time_mlp.up.{}",
    "time_text_embed.timestep_embedder.linear_2.{}": "time_mlp.down.{}",
    "time_text_embed.text_embedder.linear_1.{}": "pooled_mlp.up.{}",
    "time_text_embed.text_embedder.linear_2.{}": "pooled_mlp.down.{}",
    "time_text_embed.guidance_embedder.linear_1.{}": "guidance_mlp.up.{}",
    "time_text_embed.guidance_embedder.linear_2.{}": "guidance_mlp.down.{}",
    "context_embedder.proj_in.{}": "refiner.text_in.{}",
    "context_embedder.time_text_embed.timestep_embedder.linear_1.{}": "refiner.time_mlp.up.{}",
    "context_embedder.time_text_embed.timestep_embedder.linear_2.{}": "refiner.time_mlp.down.{}",
    "context_embedder.time_text_embed.text_embedder.linear_1.{}": "refiner.text_mlp.up.{}",
    "context_embedder.time_text_embed.text_embedder.linear_2.{}": "refiner.text_mlp.down.{}",
    "norm_out.linear.{}": "head.mod.{} (2+1 of 2)",  # (scale, shift) there, (shift, scale) here
    "proj_out.{}": "head.out.{}",
}
DIFFUSERS_REFINER = {
    "norm1.{}": "norm1.{}",
    "attn.to_q.{}": "qkv.{} (1 of 3)",
    "attn.to_k.{}": "qkv.{} (2 of 3)",
    "attn.to_v.{}": "qkv.{} (3 of 3)",
    "attn.to_out.0.{}": "out.{}",
    "norm2.{}": "norm2.{}",
    "ff.net.0.proj.{}": "mlp.up.{}",
    "ff.net.2.{}": "mlp.down.{}",
    "norm_out.linear.{}": "mod.{}",
}
DIFFUSERS_DOUBLE = {
    "norm1.linear.{}": "mod.video.{}",
    "norm1_context.linear.{}": "mod.text.{}",
    "attn.to_q.{}": "attn.video.qkv.{} (1 of 3)",
    "attn.to_k.{}": "attn.video.qkv.{} (2 of 3)",
    "attn.to_v.{}": "attn.video.qkv.{} (3 of 3)",
    "attn.norm_q.{}": "attn.video.q_norm.{}",
    "attn.norm_k.{}": "attn.video.k_norm.{}",
    "attn.to_out.0.{}": "attn.video.out.{}",
    "attn.add_q_proj.{}": "attn.text.qkv.{} (1 of 3)",
    "attn.add_k_proj.{}": "attn.text.qkv.{} (2 of 3)",
    "attn.add_v_proj.{}": "attn.text.qkv.{} (3 of 3)",
    "attn.norm_added_q.{}": "attn.text.q_norm.{}",
    "attn.norm_added_k.{}": "attn.text.k_norm.{}",
    "attn.to_add_out.{}": "attn.text.out.{}",
    "ff.net.0.proj.{}": "mlp.video.up.{}",
    "ff.net.2.{}": "mlp.video.down.{}",
    "ff_context.net.0.proj.{}": "mlp.text.up.{}",
    "ff_context.net.2.{}": "mlp.text.down.{}",
}


def original_double() -> Table:
    lines = {}
    for theirs, ours in (("img", "video"), ("txt", "text")):
        lines |= {
            f"{theirs}_mod.linear.{{}}": f"mod.{ours}.{{}}",
            f"{theirs}_attn_qkv.{{}}": f"attn.{ours}.qkv.{{}}",
            f"{theirs}_attn_q_norm.{{}}": f"attn.{ours}.q_norm.{{}}",
            f"{theirs}_attn_k_norm.{{}}": f"attn.{ours}.k_norm.{{}}",
            f"{theirs}_attn_proj.{{}}": f"attn.{ours}.out.{{}}",
            f"{theirs}_mlp.fc1.{{}}": f"mlp.{ours}.up.{{}}",
            f"{theirs}_mlp.fc2.{{}}": f"mlp.{ours}.down.{{}}",
        }
    return lines


def single_out(config: HunyuanVideoConfig, name: str) -> Table:
    """One matrix for attention and MLP together there, two here; their bias is one."""
    d = config.width
    return {
        f"{name}.weight": (
            f"attn.out.weight (columns 0:{d})",
            f"mlp.down.weight (columns {d}:{d + config.mlp_width})",
        ),
        f"{name}.bias": "attn.out.bias",
    }


def transformer_original(config: HunyuanVideoConfig, shapes: Shapes) -> Table:
    d = 3 * config.width
    single = {
        "modulation.linear.{}": "mod.{}",
        "linear1.{}": (f"attn.qkv.{{}} (rows 0:{d})", f"mlp.up.{{}} (rows {d}:{d + config.mlp_width})"),
        "q_norm.{}": "attn.q_norm.{}",
        "k_norm.{}": "attn.k_norm.{}",
        **single_out(config, "linear2"),
    }
    lines = ORIGINAL | under("double_blocks.{}", "blocks.{}", original_double())
    lines |= under("txt_in.individual_token_refiner.blocks.{}", "refiner.blocks.{}", ORIGINAL_REFINER)
    for k in range(config.single):
        lines |= under(f"single_blocks.{k}", f"blocks.{config.double + k}", single)
    return lines


def transformer_diffusers(config: HunyuanVideoConfig, shapes: Shapes) -> Table:
    single = {
        "norm.linear.{}": "mod.{}",
        "attn.to_q.{}": "attn.qkv.{} (1 of 3)",
        "attn.to_k.{}": "attn.qkv.{} (2 of 3)",
        "attn.to_v.{}": "attn.qkv.{} (3 of 3)",
        "attn.norm_q.{}": "attn.q_norm.{}",
        "attn.norm_k.{}": "attn.k_norm.{}",
        "proj_mlp.{}": "mlp.up.{}",
        **single_out(config, "proj_out"),
    }
    lines = DIFFUSERS | under("transformer_blocks.{}", "blocks.{}", DIFFUSERS_DOUBLE)
    refiner = "context_embedder.token_refiner.refiner_blocks.{}"
    lines |= under(refiner, "refiner.blocks.{}", DIFFUSERS_REFINER)
    for k in range(config.single):
        lines |= under(f"single_transformer_blocks.{k}", f"blocks.{config.double + k}", single)
    return lines


def original_config(shapes: Shapes, known: dict) -> dict:
    """HunyuanVideoConfig from the original names; `known` holds the arguments of its class."""
    names = {
        "patch": "img_in.proj.weight",
        "up": "double_blocks.0.img_mlp.fc1.weight",
        "head": "double_blocks.0.img_attn_q_norm.weight",
        "text": "txt_in.input_embedder.weight",
        "pooled": "vector_in.in_layer.weight",
        "time": "time_in.mlp.0.weight",
    }
    rows = {
        "double": depth(shapes, "double_blocks"),
        "single": depth(shapes, "single_blocks"),
        "refiner_depth": depth(shapes, "txt_in.individual_token_refiner.blocks"),
    }
    known = {"rope_widths": known["rope_dim_list"]} if "rope_dim_list" in known else {}
    return transformer_shapes(shapes, names) | rows | known


def diffusers_config(shapes: Shapes, known: dict) -> dict:
    names = {
        "patch": "x_embedder.proj.weight",
        "up": "transformer_blocks.0.ff.net.0.proj.weight",
        "head": "transformer_blocks.0.attn.norm_q.weight",
        "text": "context_embedder.proj_in.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "time": "time_text_embed.timestep_embedder.linear_1.weight",
    }
    rows = {
        "double": depth(shapes, "transformer_blocks"),
        "single": depth(shapes, "single_transformer_blocks"),
        "refiner_depth": depth(shapes, "context_embedder.token_refiner.refiner_blocks"),
    }
    words = {"rope_axes_dim": "rope_widths", "rope_theta": "rope_theta"}
    return transformer_shapes(shapes, names) | rows | renamed(known, words)


def transformer_shapes(shapes: Shapes, names: dict[str, str]) -> dict:
    """What the shapes say of a HunyuanVideoConfig, given the names of telling tensors."""
    width, channels, *patch = shapes[names["patch"]]
    (head,) = shapes[names["head"]]
    return {
        "width": width,
        "mlp_width": shapes[names["up"]][0],
        "heads": width // head,
        "rope_widths": [head // 8, 7 * head // 16, 7 * head // 16],
        "channels": channels,
        "text_width": shapes[names["text"]][1],
        "pooled_width": shapes[names["pooled"]][1],
        "freq_width": shapes[names["time"]][1],
        "patch": patch,
    }


# The text encoders


def llama(prefix: str, config: LlamaConfig) -> Table:
    """transformers' names below a prefix. The last layers, the norm and the output layer are not used."""
    layer = {
        "input_layernorm.weight": "norm1.weight",
        "self_attn.q_proj.weight": "attn.q.weight",
        "self_attn.k_proj.weight": "attn.kv.weight (1 of 2)",
        "self_attn.v_proj.weight": "attn.kv.weight (2 of 2)",
        "self_attn.o_proj.weight": "attn.out.weight",
        "post_attention_layernorm.weight": "norm2.weight",
        "mlp.gate_proj.weight": "mlp.gate.weight",
        "mlp.up_proj.weight": "mlp.up.weight",
        "mlp.down_proj.weight": "mlp.down.weight",
    }
    behind = {
        f"{prefix}layers.{config.depth + k}.{name}": "drop: behind the layer whose states are used"
        for k in range(UNUSED_LAYERS)
        for name in layer
    }
    return {
        f"{prefix}embed_tokens.weight": "embed.weight",
        **behind,
        **under(f"{prefix}layers.{{}}", "blocks.{}", layer),
        f"{prefix}norm.weight": "drop: behind the layer whose states are used",
    }


LLAMA_DROP = {
    "*lm_head.weight": "predicts words; only states are used",
    "*vision_tower.*": "reads images; only text is used",
    "*multi_modal_projector.*": "reads images; only text is used",
    "*rotary_emb.inv_freq": "a table that is computed",
}
LLAMA_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "")


def llama_config(prefix: str, shapes: Shapes, known: dict) -> dict:
    """LlamaConfig; heads are 128 wide, as in every Llama 3, where no config.json says otherwise."""
    known = known.get("text_config", known)  # of a model that also sees
    words = {
        "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "rms_norm_eps": "eps",
        "rope_theta": "theta",
    }  # fmt: skip
    (vocab, width), first = shapes[f"{prefix}embed_tokens.weight"], f"{prefix}layers.0."
    found = {
        "vocab": vocab,
        "width": width,
        "mlp_width": shapes[f"{first}mlp.up_proj.weight"][0],
        "heads": shapes[f"{first}self_attn.q_proj.weight"][0] // 128,
        "kv_heads": shapes[f"{first}self_attn.k_proj.weight"][0] // 128,
        "depth": depth(shapes, f"{prefix}layers") - UNUSED_LAYERS,
    }
    return found | renamed(known.get("rope_parameters") or {}, words) | renamed(known, words)


def clip(prefix: str) -> Table:
    layer = {
        "layer_norm1.{}": "norm1.{}",
        "self_attn.q_proj.{}": "attn.qkv.{} (1 of 3)",
        "self_attn.k_proj.{}": "attn.qkv.{} (2 of 3)",
        "self_attn.v_proj.{}": "attn.qkv.{} (3 of 3)",
        "self_attn.out_proj.{}": "attn.out.{}",
        "layer_norm2.{}": "norm2.{}",
        "mlp.fc1.{}": "mlp.up.{}",
        "mlp.fc2.{}": "mlp.down.{}",
    }
    return {
        f"{prefix}embeddings.token_embedding.weight": "embed.weight",
        f"{prefix}embeddings.position_embedding.weight": "positions.weight",
        **under(f"{prefix}encoder.layers.{{}}", "blocks.{}", layer),
        f"{prefix}final_layer_norm.{{}}": "norm_out.{}",
    }


CLIP_DROP = {
    "*embeddings.position_ids": "the numbers from 0 on",
    "vision_model.*": "reads images; only text is used",
    "*_projection.weight": "into the space shared with images; the pooled vector is taken before it",
    "logit_scale": "compares images with text",
}


def clip_config(prefix: str, shapes: Shapes, known: dict) -> dict:
    """CLIPTextConfig; heads are 64 wide, as in every CLIP, where no config.json says otherwise."""
    known = known.get("text_config", known)  # of the whole model
    (vocab, width) = shapes[f"{prefix}embeddings.token_embedding.weight"]
    found = {
        "vocab": vocab,
        "width": width,
        "mlp_width": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "heads": width // 64,
        "depth": depth(shapes, f"{prefix}encoder.layers"),
        "positions": shapes[f"{prefix}embeddings.position_embedding.weight"][0],
    }
    words = {"num_attention_heads": "heads", "layer_norm_eps": "eps"}
    return found | renamed(known, words)


# The autoencoder

RES = {
    "norm1.{}": "norm1.{}",
    "conv1.conv.{}": "conv1.{}",
    "norm2.{}": "norm2.{}",
    "conv2.conv.{}": "conv2.{}",
    "conv_shortcut.conv.{}": "shortcut.{}",
}
ATTENTION = {
    "group_norm.{}": "norm.{}",
    "to_q.{}": "qkv.{} (1 of 3)",
    "to_k.{}": "qkv.{} (2 of 3)",
    "to_v.{}": "qkv.{} (3 of 3)",
    "to_out.0.{}": "out.{}",
}


def vae_table(prefix: str) -> Table:
    """The same names in both layouts."""
    lines = {"quant_conv.{}": "quant.{}", "post_quant_conv.{}": "post_quant.{}"}
    for half, way in (("encoder", "down"), ("decoder", "up")):
        lines |= {
            f"{half}.conv_in.conv.{{}}": f"{half}.conv_in.{{}}",
            f"{half}.conv_norm_out.{{}}": f"{half}.norm_out.{{}}",
            f"{half}.conv_out.conv.{{}}": f"{half}.conv_out.{{}}",
        }
        level = f"{half}.{way}_blocks.{{}}"
        lines[f"{level}.{way}samplers.0.conv.conv.{{}}"] = f"{half}.levels.{{}}.{way}.{{}}"
        lines |= under(f"{level}.resnets.{{}}", f"{half}.levels.{{}}.blocks.{{}}", RES)
        lines |= under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn", ATTENTION)
        for i in (0, 1):
            lines |= under(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block{i + 1}", RES)
    return {f"{prefix}{theirs}": ours for theirs, ours in lines.items()}


def vae_config(prefix: str, shapes: Shapes, known: dict) -> dict:
    words = {
        "layers_per_block": "res_blocks", "norm_num_groups": "groups", "scaling_factor": "scale",
        "sample_size": "tile", "sample_tsize": "tile_frames",
    }  # fmt: skip
    levels = depth(shapes, f"{prefix}encoder.down_blocks")
    first = f"{prefix}encoder.down_blocks.{{}}.resnets.0.conv1.conv.weight"
    found = {
        "widths": [shapes[first.format(i)][0] for i in range(levels)],
        "res_blocks": depth(shapes, f"{prefix}encoder.down_blocks.0.resnets"),
        "latent": shapes[f"{prefix}post_quant_conv.weight"][0],
    }
    return found | renamed(known, words)


# Shared


def renamed(known: dict, words: dict[str, str]) -> dict:
    """The values of an upstream config.json under our names; what it leaves out or null is left out."""
    return {ours: known[theirs] for theirs, ours in words.items() if known.get(theirs) is not None}


def depth(shapes: Shapes, prefix: str) -> int:
    """The number of blocks: how many different names follow the prefix."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{prefix}.")})


def refusal(shapes: Shapes) -> str:
    """Why a checkpoint of the wider HunyuanVideo family cannot be run, or ''."""
    patch = shapes.get("img_in.proj.weight") or shapes.get("x_embedder.proj.weight") or ()
    head = shapes.get("final_layer.linear.weight") or shapes.get("proj_out.weight") or ()
    is_ours = "double_blocks.0.img_mod.linear.weight" in shapes or any(
        name.startswith("context_embedder.token_refiner.") for name in shapes
    )
    if not is_ours or len(patch) != 5 or len(head) != 2:
        return ""
    cells = patch[1] * patch[2] * patch[3] * patch[4]
    if cells != head[0]:  # it is fed more channels than it predicts
        kind = f"a HunyuanVideo image-to-video transformer ({patch[1]} channels)"
        return f"this is {kind}; minidit runs text-to-video"
    if not any(name.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for name in shapes):
        return "this HunyuanVideo transformer is not told its guidance; minidit runs the distilled release"
    return ""


LAYOUTS = (
    Layout(
        component="transformer",
        family="hunyuan_video",
        class_name="HunyuanVideo",
        origin="original",
        signs=(
            "img_in.proj.weight",
            "double_blocks.0.img_mod.linear.weight",
            "single_blocks.0.linear1.weight",
        ),
        build=HunyuanVideo,
        config=original_config,
        table=transformer_original,
        is_config="rope_dim_list",
    ),
    Layout(
        component="transformer",
        family="hunyuan_video",
        class_name="HunyuanVideo",
        origin="diffusers",
        signs=("x_embedder.proj.weight", "context_embedder.proj_in.weight", "norm_out.linear.weight"),
        build=HunyuanVideo,
        config=diffusers_config,
        table=transformer_diffusers,
        is_config="rope_axes_dim",
    ),
    *(
        Layout(
            component="text_encoder",
            family="hunyuan_video",
            class_name="LlamaEncoder",
            origin="transformers",
            signs=(f"{prefix}embed_tokens.weight", f"{prefix}layers.0.self_attn.q_proj.weight"),
            build=LlamaEncoder,
            config=lambda shapes, known, prefix=prefix: llama_config(prefix, shapes, known),
            table=lambda config, shapes, prefix=prefix: llama(prefix, config),
            is_config="architectures",
            drop=LLAMA_DROP,
        )
        for prefix in LLAMA_PREFIXES
    ),
    *(
        Layout(
            component="text_encoder_2",
            family="hunyuan_video",
            class_name="CLIPText",
            origin="transformers",
            signs=(f"{prefix}embeddings.token_embedding.weight", f"{prefix}final_layer_norm.weight"),
            build=CLIPText,
            config=lambda shapes, known, prefix=prefix: clip_config(prefix, shapes, known),
            table=lambda config, shapes, prefix=prefix: clip(prefix),
            is_config="architectures",
            drop=CLIP_DROP,
        )
        for prefix in ("text_model.", "")
    ),
    *(
        Layout(
            component="vae",
            family="hunyuan_video",
            class_name="HunyuanVAE",
            origin="original",  # and diffusers', which kept every name
            signs=(
                f"{prefix}encoder.conv_in.conv.weight",
                f"{prefix}encoder.mid_block.attentions.0.to_q.weight",
            ),
            build=HunyuanVAE,
            config=lambda shapes, known, prefix=prefix: vae_config(prefix, shapes, known),
            table=lambda config, shapes, prefix=prefix: vae_table(prefix),
            is_config="latent_channels",
        )
        for prefix in ("", "vae.")
    ),
)
