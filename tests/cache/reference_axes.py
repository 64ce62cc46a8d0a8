"""UniCP by hand on models with attention along axes: a plain loop over Latte's and Open-Sora's blocks.

Nothing of the cache package is used here, nor of minidit.attention: q, k, v, maps and slices are written out.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit_kernels.modulate import gated_residual, modulate
from minidit_kernels.qk_norm_rope import rms_norm, rope

Key = tuple[int, str]  # (block, sub-module)


@dataclass
class UnrolledRun:
    """One generation, branch by branch. sources, by_map: per sub-module and step, as the policy has them."""

    model: nn.Module
    context: object
    sources: dict[Key, tuple[int, ...]]
    by_map: dict[Key, tuple[bool, ...]] = field(default_factory=dict)
    slices: dict[Key, int] = field(default_factory=dict)  # width of what is sliced where it has to run
    bases: dict[Key, Tensor] = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)  # (block, sub-module, branch) -> output
    maps: dict = field(default_factory=dict)  # likewise -> what decides the map
    used: list = field(default_factory=list)  # what was reused: "out", "map", "slice"

    @torch.inference_mode()
    def latents(self, schedule, noise: Tensor, guidance: float) -> Tensor:
        x, state = noise, schedule.start()
        for step in schedule.steps(guidance):
            cond, uncond = (self.predict(x, step, branch) for branch in ("cond", "uncond"))
            x, state = schedule.step(step.i, x, uncond + guidance * (cond - uncond), state)
        return x

    def predict(self, x: Tensor, step, branch: str) -> Tensor:
        h, cond = self.model.embed(x, torch.tensor([step.t]), self.context.select((branch,)))
        for k, block in enumerate(self.model.blocks):
            has_time_text = hasattr(block, "t_cross")
            kv = cond.context.text[k]
            seen = cond.at(k)
            h = self.half("", block.mod, k, h, seen, kv[0] if has_time_text else kv, step.i, branch)
            if k == 0 and getattr(seen, "frame_positions", None) is not None:
                h = h + seen.frame_positions.repeat_interleave(h.shape[1] // seen.frames, 0)
            h = self.half("t_", block.t_mod, k, h, seen, kv[1] if has_time_text else None, step.i, branch)
        return self.model.head(h, cond)

    def half(self, prefix, table, k, h, cond, text_kv, i, branch) -> Tensor:
        block = self.model.blocks[k]
        shift1, scale1, gate1, shift2, scale2, gate2 = (table + cond.mod).unsqueeze(2).unbind(1)
        attn, cross, mlp = f"{prefix}attn", f"{prefix}cross", f"{prefix}mlp"
        x = modulate(h, scale1, shift1, eps=block.eps)
        h = gated_residual(
            h, gate1, self.run(k, attn, i, branch, lambda: self.attend(k, attn, x, cond, i, branch))
        )
        if text_kv is not None:
            h = h + self.run(k, cross, i, branch, lambda: self.text(k, cross, h, text_kv, i))
        return gated_residual(h, gate2, getattr(block, mlp)(modulate(h, scale2, shift2, eps=block.eps)))

    def run(self, k, name, i, branch, compute) -> Tensor:
        """The output that the map says, computed where it has to be."""
        source = self.sources.get((k, name), range(i + 1))[i]
        if source < i and not self.takes_map(k, name, i):
            self.used.append("out")
            return self.outputs[k, name, branch]
        self.outputs[k, name, branch] = out = compute()
        return out

    def takes_map(self, k, name, i) -> bool:
        return (k, name) in self.by_map and self.by_map[k, name][i]

    def attend(self, k, name, x, cond, i, branch) -> Tensor:
        module, (batch, tokens, width) = getattr(self.model.blocks[k], name), x.shape
        heads = lambda y: y.unflatten(-1, (module.heads, -1)).transpose(-2, -3)
        grouped = x.unflatten(1, (cond.frames, -1))  # (1, T, S, D)
        grouped = (grouped if name == "attn" else grouped.transpose(1, 2))[0]
        q, key, v = (heads(y) for y in module.qkv(grouped).chunk(3, dim=-1))
        scale = q.shape[-1] ** -0.5
        if hasattr(module, "q_norm"):
            q, key = (
                rms_norm(y, norm.weight, eps=1e-6) for y, norm in ((q, module.q_norm), (key, module.k_norm))
            )
            if name == "t_attn":
                q, key = rope(q, *cond.rope), rope(key, *cond.rope)
        if not self.takes_map(k, name, i):
            q, key = self.turned(k, name, i, q, key)
        if self.takes_map(k, name, i):
            self.used.append("map")
            probabilities = self.maps[k, name, branch]
        else:
            probabilities = self.maps[k, name, branch] = (q @ key.mT * scale).softmax(-1)
        out = module.out((probabilities @ v).transpose(-2, -3).flatten(-2))
        out = out if name == "attn" else out.transpose(0, 1)
        return out.reshape(batch, tokens, width)

    def text(self, k, name, h, text_kv, i) -> Tensor:
        module = getattr(self.model.blocks[k], name)
        q, (key, v) = module.q(h).unflatten(2, (module.heads, -1)).transpose(1, 2), text_kv
        q, key = self.turned(k, name, i, q, key)
        out = F.scaled_dot_product_attention(q, key, v, scale=v.shape[-1] ** -0.5)
        return module.out(out.transpose(1, 2).flatten(2))

    def turned(self, k, name, i, q, key) -> tuple[Tensor, Tensor]:
        """q and k by their bases, where the map has this step run and the policy slices it."""
        source = self.sources.get((k, name), range(i + 1))[i]
        if (k, name) not in self.slices or source < i:
            return q, key
        self.used.append("slice")
        width = self.slices[k, name]
        return tuple(y @ self.bases[k, f"{name}.{part}.{width}"] for y, part in ((q, "q"), (key, "k")))
