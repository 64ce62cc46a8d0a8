"""Eight-bit weights of a transformer's blocks: half the memory of bf16, a quarter of fp32, for a small loss.

    w' = q s,   s = max |w| / q_max  per output channel
    int8:  q = round(w / s), q_max 127              (per-row absmax, Dettmers et al., 2022)
    fp8:   q = w / s rounded to e4m3, q_max 448     (Micikevicius et al., 2022)

Linears of the blocks alone are quantised; norms, modulation, embeddings and the head stay as they are. int8
and fp8 store eight bits and multiply in the run's dtype: every call makes w' anew, so activations lose
nothing. fp8-dynamic multiplies in fp8 as well: every row of the activations is rounded to e4m3 by a scale of
its own, which is a second error of the same kind, and faster where the card has such a product. Quality:
python -m benchmarks.quantized.
"""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from minidit.layers import Linear

WEIGHTS = ("full", "int8", "fp8", "fp8-dynamic")
FP8 = torch.float8_e4m3fn
MOST = {torch.int8: 127.0, FP8: 448.0}
ROWS = 512  # that are quantised at a time
FP8_PRODUCT = (8, 9)  # the least compute capability that multiplies in fp8


def quantize(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric, by row. w (..., D) · dtype int8 or e4m3 -> q (..., D), s (..., 1) in w's dtype, w ~ q s"""
    most, q = MOST[dtype], torch.empty(w.shape, dtype=dtype, device=w.device)
    peak = torch.linalg.vector_norm(w, float("inf"), dim=-1, keepdim=True).float()
    scale = (peak / most).clamp_min(torch.finfo(w.dtype).tiny).to(w.dtype)
    for part, rows, s in zip(*(t.split(ROWS) for t in (q, w, scale)), strict=True):  # little beside w and q
        exact = (rows.float() / s.float()).clamp_(-most, most)  # by the scale as it was rounded
        part.copy_(exact.round_() if dtype == torch.int8 else exact)
    return q, scale


def multiply_fp8_reference(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The definition of a product with both sides in fp8. x (..., D) · q (D_out, D) · scale (D_out, 1)"""
    rows, row_scale = quantize(x, FP8)
    y = rows.float() @ q.float().T * (row_scale.float() * scale.float()[:, 0])
    return (y if bias is None else y + bias.float()).to(x.dtype)


def multiply_fp8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x W'^T + b with the rows of x in fp8 too. x (..., D) bf16 · q (D_out, D) · scale (D_out, 1)

    torch._scaled_mm on cards that have the product, multiply_fp8_reference elsewhere.
    """
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < FP8_PRODUCT:
        return multiply_fp8_reference(x, q, scale, bias)
    rows, row_scale = quantize(x.flatten(0, -2), FP8)
    scales = {"scale_a": row_scale.float(), "scale_b": scale.float().T}
    y = torch._scaled_mm(rows, q.T, **scales, bias=bias, out_dtype=x.dtype, use_fast_accum=True)
    return y.unflatten(0, x.shape[:-1])


class QuantLinear(Linear):
    """A Linear whose weight lies in eight bits."""

    def __init__(self, plain: nn.Linear, kind: str):
        nn.Module.__init__(self)  # Linear's own would make a weight
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.is_dynamic = kind == "fp8-dynamic"
        dtype = torch.int8 if kind == "int8" else FP8
        device, shape = plain.weight.device, plain.weight.shape
        self.register_buffer("quantized", torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("scale", torch.empty(len(plain.weight), 1, device=device))
        self.bias = plain.bias

    @property
    def weight(self) -> Tensor:
        """The matrix in the run's dtype, made anew. (D_out, D)"""
        return self.quantized.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        if not self.is_dynamic:
            return super().forward(x, gelu=gelu)
        y = multiply_fp8(x, self.quantized, self.scale, self.bias)
        return nn.functional.gelu(y, approximate="tanh") if gelu else y


def check_weights(kind: str) -> None:
    """Refuse a name that is unknown."""
    if kind not in WEIGHTS:
        raise ValueError(f"unknown weights {kind!r}; choose one of {', '.join(WEIGHTS)}")


def quantize_blocks(model: nn.Module, kind: str) -> set[str]:
    """Put a QuantLinear in the place of every linear of the blocks; the names of those, "blocks.0.attn.qkv".

    Modulation stays: it is of one row per sample, and its error would reach every token.
    """
    check_weights(kind)
    names = [n for n, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, nn.Linear)]
    names = [n for n in names if "mod" not in n.split(".")]
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, QuantLinear(getattr(owner, last), kind))
    return set(names)


def quantized(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors on their way from the file, the weights of these linears quantised one at a time."""
    for name, tensor in tensors:
        linear = name.removesuffix(".weight")
        if linear == name or linear not in names:
            yield name, tensor
            continue
        q, scale = quantize(tensor, model.get_submodule(linear).quantized.dtype)
        yield from ((f"{linear}.quantized", q), (f"{linear}.scale", scale))
