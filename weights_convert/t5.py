"""T5 v1.1 encoders, the text half of several families: transformers' names, sharded or not."""

from minidit.text.t5 import T5Encoder
from weights_convert.names import Layout, Shapes
from weights_convert.wan import UMT5_DROP, transformers_umt5_config, umt5_transformers

POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def t5_config(shapes: Shapes, known: dict) -> dict:
    """T5Config from transformers' names; one position table, in layer 0, serves all layers."""
    return transformers_umt5_config(shapes, known) | {"shared_positions": True}


# To be tried after UMT5, whose second block has a position table too.
LAYOUTS = (
    Layout(
        component="text_encoder",
        family="t5",
        class_name="T5Encoder",
        origin="transformers",
        signs=(POSITIONS,),
        build=T5Encoder,
        config=t5_config,
        table=umt5_transformers,
        is_config="d_kv",
        drop=UMT5_DROP,
    ),
)
