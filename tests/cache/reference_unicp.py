"""UniCP by hand, to hold the policy against: a plain loop over Wan's blocks and a dict for a cache.

Nothing of the cache package is used here. The outer method is a script, one word per step: "full"; "step",
which takes the last guided prediction; "cfg", which runs cond alone and takes the last difference of the two;
"block", which takes the last full hidden state before block FIRST and runs on from there.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minidit.models.wan import BlockCond, Context, Wan, WanBlock
from minidit.schedules import Schedule
from minidit_kernels.modulate import gated_residual, modulate
from minidit_kernels.qk_norm_rope import rope

FIRST = 2
Key = tuple[int, str]  # (block, sub-module)


@dataclass
class UnrolledRun:
    """One generation. sources: per sub-module the step that every step's output is taken from."""

    model: Wan
    context: Context
    sources: dict[Key, tuple[int, ...]]
    widths: dict[int, int] = field(default_factory=dict)  # of sliced blocks
    bases: dict[Key, Tensor] = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)  # (block, sub-module, branch) -> (step, output)
    states: dict = field(default_factory=dict)  # branch -> h before block FIRST at the last full step
    branches: tuple[str, ...] = ()

    @torch.inference_mode()
    def latents(self, schedule: Schedule, noise: Tensor, guidance: float, script: list[str]) -> Tensor:
        x, state, guided, delta = noise, schedule.start(), None, None
        for step, mode in zip(schedule.steps(guidance), script, strict=True):
            if mode != "step":
                self.branches = ("cond",) if mode == "cfg" else ("cond", "uncond")
                out = {branch: self.predict(x, step, branch, mode) for branch in self.branches}
                if mode == "cfg":
                    out["uncond"] = out["cond"] + delta
                else:
                    delta = out["uncond"] - out["cond"]
                guided = out["uncond"] + guidance * (out["cond"] - out["uncond"])
            x, state = schedule.step(step.i, x, guided, state)
        return x

    def predict(self, x: Tensor, step, branch: str, mode: str) -> Tensor:
        h, cond = self.model.embed(x, torch.tensor([step.t]), self.context.select((branch,)))
        first = FIRST if mode == "block" else 0
        h = self.states[branch] if mode == "block" else h
        for k in range(first, len(self.model.blocks)):
            if k == FIRST and mode == "full":
                self.states[branch] = h
            h = self.block(k, self.model.blocks[k], h, cond.at(k), step.i, branch)
        return self.model.head(h, cond)

    def block(self, k: int, block: WanBlock, h: Tensor, cond: BlockCond, i: int, branch: str) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.mod.float() + cond.mod).unsqueeze(2).unbind(1)
        x = modulate(h, scale1, shift1, eps=block.eps, dtype=cond.dtype)
        out = self.reused(k, "attn", i, branch)
        if out is None:
            sliced = k in self.widths and self.sources[k, "attn"][i] == i
            out = self.self_attention(k, block, x, cond, self.widths[k] if sliced else None)
            self.outputs[k, "attn", branch] = i, out
        h = gated_residual(h, gate1, out)
        out = self.reused(k, "cross", i, branch)
        if out is None:
            out = self.cross_attention(block, block.norm3(h, cond.dtype), cond)
            self.outputs[k, "cross", branch] = i, out
        h = h + out
        return gated_residual(
            h, gate2, block.mlp(modulate(h, scale2, shift2, eps=block.eps, dtype=cond.dtype))
        )

    def reused(self, k: int, name: str, i: int, branch: str) -> Tensor | None:
        """The stored output, if the map allows it and no branch of this step has only an older one."""
        source = self.sources[k, name][i]
        if source == i:
            return None
        # a branch that has already run this step may hold this step's own output
        ages = [self.outputs.get((k, name, other), (-1, None))[0] for other in self.branches]
        return self.outputs[k, name, branch][1] if all(source <= age < i for age in ages) else None

    def self_attention(
        self, k: int, block: WanBlock, x: Tensor, cond: BlockCond, width: int | None
    ) -> Tensor:
        heads = lambda y: y.unflatten(2, (block.attn.heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, N, L, K)
        q, key, v = block.attn.qkv(x).chunk(3, dim=-1)
        q, key = (rope(heads(y), *cond.rope) for y in (block.attn.q_norm(q), block.attn.k_norm(key)))
        scale = q.shape[-1] ** -0.5
        if width is not None:
            q, key = q @ self.bases[k, f"attn.q.{width}"], key @ self.bases[k, f"attn.k.{width}"]
        out = F.scaled_dot_product_attention(q, key, heads(v), scale=scale)
        return block.attn.out(out.transpose(1, 2).flatten(2))

    def cross_attention(self, block: WanBlock, x: Tensor, cond: BlockCond) -> Tensor:
        q = block.cross.q_norm(block.cross.q(x)).unflatten(2, (block.cross.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, *cond.text)
        return block.cross.out(out.transpose(1, 2).flatten(2))
