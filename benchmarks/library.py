"""diffusers' transformers with our weights, by the converter's tables read backwards: the rival in step.py.

diffusers is only imported here, and only when it is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import EMBEDDED_GUIDANCE, Subject, T
from minidit.models.cogvideox import CogVideoX
from minidit.models.hunyuan_video import HunyuanVideo
from minidit.models.latte import Latte
from minidit.models.wan import Wan
from minidit.sampling import guide
from weights_convert.layouts import recognise
from weights_convert.names import fit


@dataclass(frozen=True)
class Library:
    """diffusers' module, and a call that predicts some branches of a step: (rows of text) -> like x, fp32."""

    module: nn.Module
    predict: Callable[[list[int]], Tensor]

    def step(self, subject: Subject, *, is_batched: bool) -> Tensor:
        """The guided prediction, as its pipelines make it: branch by branch, or both as one batch."""
        rows = list(range(len(subject.branches)))
        groups = [rows] if is_batched else [[row] for row in rows]
        parts = [part for group in groups for part in self.predict(group).split(1)]
        return guide(dict(zip(subject.branches, parts, strict=True)), subject.scale)


def why_not(subject: Subject) -> str:
    """Why there is no rival, "" if there is one."""
    if not find_spec("diffusers"):
        return "diffusers is not installed"
    if not isinstance(subject.model, Wan | HunyuanVideo | CogVideoX | Latte):
        return f"diffusers has no class for {type(subject.model).__name__}"
    return ""


def make_library(subject: Subject, dtype: torch.dtype) -> Library:
    """The rival, in the dtypes in which its from_pretrained loads it, on the subject's device."""
    model = subject.model
    makers = {Wan: wan, HunyuanVideo: hunyuan_video, CogVideoX: cogvideox, Latte: latte}
    module, call = makers[type(model)](subject, dtype)
    fill(module, model)
    fp32 = set(module._keep_in_fp32_modules or ())
    for name, p in module.named_parameters():
        p.data = p.data.to(torch.float32 if fp32 & set(name.split(".")) else dtype)
    module.eval().requires_grad_(False)
    return Library(module, lambda rows: call(module, rows).float())


def fill(library: nn.Module, ours: nn.Module) -> None:
    """Put our weights into a library's module, nothing missing, nothing left over; what can be is shared."""
    theirs = {name: tuple(t.shape) for name, t in library.state_dict().items()}
    tensors, layout = ours.state_dict(), recognise(theirs)
    targets = {name: tuple(t.shape) for name, t in tensors.items()}
    found = fit(theirs, targets, layout.table(ours.config, theirs), layout.drop)
    if found.problems or found.dropped:
        raise ValueError(f"{type(library).__name__} does not take our weights: {found.problems}")
    state: dict[str, Tensor] = {}
    for name, pieces in found.pieces.items():
        for piece, part in zip(pieces, tensors[name].chunk(pieces[0].parts), strict=True):
            if piece.cut is None and piece.share == (0, 1):
                state[piece.upstream] = part.reshape(theirs[piece.upstream])
                continue
            whole = state.setdefault(piece.upstream, part.new_empty(theirs[piece.upstream]))
            piece.take(whole).copy_(part)
    library.load_state_dict(state, strict=True, assign=True)


def compile_blocks(module: nn.Module) -> None:
    """Compile a library's blocks one by one, as diffusers advises; not all of its classes have a way to."""
    if module._repeated_blocks:
        module.compile_repeated_blocks(fullgraph=True)
        return
    for blocks in (child for child in module.children() if isinstance(child, nn.ModuleList)):
        for block in blocks:
            block.compile()


def padded(states: Tensor, rows: int) -> Tensor:
    return F.pad(states, (0, 0, 0, rows - len(states)))


def timesteps(subject: Subject, rows: list[int]) -> Tensor:
    return torch.full((len(rows),), T, device=subject.device)


def latents(subject: Subject, rows: list[int], dtype: torch.dtype) -> Tensor:
    return subject.x.to(dtype).expand(len(rows), -1, -1, -1, -1)


def wan(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, Callable[..., Tensor]]:
    from diffusers import WanTransformer3DModel

    c = subject.model.config
    with torch.device(subject.device):
        module = WanTransformer3DModel(
            patch_size=c.patch,
            num_attention_heads=c.heads,
            attention_head_dim=c.width // c.heads,
            in_channels=c.channels,
            out_channels=c.channels,
            text_dim=c.text_width,
            freq_dim=c.freq_width,
            ffn_dim=c.mlp_width,
            num_layers=c.depth,
            eps=c.eps,
        )
    text = torch.stack([padded(states, c.text_len) for states in subject.text]).to(dtype)

    def predict(module: nn.Module, rows: list[int]) -> Tensor:
        x = latents(subject, rows, dtype)
        return module(x, timesteps(subject, rows), text[rows], return_dict=False)[0]

    return module, predict


def hunyuan_video(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, Callable[..., Tensor]]:
    from diffusers import HunyuanVideoTransformer3DModel

    c = subject.model.config
    with torch.device(subject.device):
        module = HunyuanVideoTransformer3DModel(
            in_channels=c.channels,
            out_channels=c.channels,
            num_attention_heads=c.heads,
            attention_head_dim=c.width // c.heads,
            num_layers=c.double,
            num_single_layers=c.single,
            num_refiner_layers=c.refiner_depth,
            mlp_ratio=c.mlp_width / c.width,
            text_embed_dim=c.text_width,
            pooled_projection_dim=c.pooled_width,
            rope_axes_dim=c.rope_widths,
        )
    states, pooled = zip(*subject.text, strict=True)
    text = torch.stack([padded(s, c.text_len) for s in states]).to(dtype)
    mask = torch.tensor([[1] * len(s) + [0] * (c.text_len - len(s)) for s in states], device=subject.device)
    pooled = torch.stack(pooled).to(dtype)
    told = torch.full((len(states),), 1000 * EMBEDDED_GUIDANCE, device=subject.device, dtype=dtype)

    def predict(module: nn.Module, rows: list[int]) -> Tensor:
        x, t = latents(subject, rows, dtype), timesteps(subject, rows)
        return module(x, t, text[rows], mask[rows], pooled[rows], told[rows], return_dict=False)[0]

    return module, predict


def cogvideox(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, Callable[..., Tensor]]:
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    c, (frames, height, width) = subject.model.config, subject.x.shape[2:]
    base = {
        "sincos": (height, width),
        "rope-cropped": [c.patch[1] * n for n in c.base_grid],
        "rope": (60, 60),
    }[c.positions]
    with torch.device(subject.device):
        module = CogVideoXTransformer3DModel(
            num_attention_heads=c.heads,
            attention_head_dim=c.width // c.heads,
            in_channels=c.channels,
            out_channels=c.channels,
            time_embed_dim=c.time_width,
            text_embed_dim=c.text_width,
            num_layers=c.depth,
            sample_frames=4 * frames - 3,
            sample_height=base[0],
            sample_width=base[1],
            patch_size=c.patch[1],
            patch_size_t=c.patch[0] if c.patch[0] > 1 else None,
            max_text_seq_length=c.text_len,
            use_rotary_positional_embeddings=c.positions != "sincos",
        )
    rope: Any = None
    if c.positions != "sincos":
        pipeline = CogVideoXPipeline(None, None, None, module, None)  # which alone knows the rotations
        rope = pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, frames, subject.device)
    text = torch.stack(subject.text).to(dtype)

    def predict(module: nn.Module, rows: list[int]) -> Tensor:
        x = latents(subject, rows, dtype).transpose(1, 2)
        t = timesteps(subject, rows)
        out = module(x, text[rows], t, image_rotary_emb=rope, return_dict=False)[0]
        return out.transpose(1, 2)

    return module, predict


def latte(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, Callable[..., Tensor]]:
    from diffusers import LatteTransformer3DModel

    c = subject.model.config
    with torch.device(subject.device):
        module = LatteTransformer3DModel(
            num_attention_heads=c.heads,
            attention_head_dim=c.width // c.heads,
            in_channels=c.channels,
            out_channels=c.out_channels,
            num_layers=c.depth,
            cross_attention_dim=c.width,
            attention_bias=True,
            sample_size=c.sample_size,
            patch_size=c.patch,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=c.eps,
            caption_channels=c.text_width,
            video_length=c.frames,
        )
    text = torch.stack(subject.text).to(dtype)

    def predict(module: nn.Module, rows: list[int]) -> Tensor:
        x, t = latents(subject, rows, dtype), timesteps(subject, rows)
        out = module(x, t, text[rows], return_dict=False)[0]
        return out[:, : c.channels]  # the rest, a variance, is dropped by the pipeline

    return module, predict
