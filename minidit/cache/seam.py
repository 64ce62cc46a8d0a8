"""The seam inside a block: what a sub-module does under a code, and what it leaves behind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minidit.attention import FULL, Keeping, Watched

Codes = tuple[tuple[str, str], ...]  # (sub-module, what to do); static under torch.compile
Probe = Callable[[tuple[str, ...], int, str, Callable[..., Tensor], tuple[Any, ...], Tensor], None]


@dataclass(frozen=True)
class Picked:
    """The tokens that a sub-module runs for, and the output that the others keep."""

    old: Tensor  # (B, L, D)
    rows: Tensor  # (B, picked), indices of tokens


class BlockCache:
    """The seam inside a block: every sub-module (attn, cross, mlp) is called through run().

    codes: what to do with which sub-module, all others just run: "run", "keep" its attention map too, "watch"
    what a window would leave out, "reuse", run for some "tokens"; "<name>.share" runs it for the first row
    and copies, "<name>.input" shows what enters it
    stored: for "reuse" the output, for "tokens" Picked, for "watch" the window, else the way in which
    attention is to run, if it is not the full one
    """

    def __init__(self, codes: Codes = (), stored: dict[str, Any] | None = None):
        self.codes, self.stored = dict(codes), stored or {}
        self.outputs: dict[str, Tensor] = {}  # of the sub-modules that ran under a code

    def run(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """The output of `module`, before its gate. name: the sub-module as plans know it"""
        if f"{name}.input" in self.codes:
            self.outputs[f"{name}.input"] = inputs[0]
        if name not in self.codes:
            return module(*inputs)
        if self.codes[name] == "reuse":
            return self.stored[name]
        if f"{name}.share" not in self.codes:
            found = self.execute(name, module, *inputs)
        else:
            found = self.execute(name, module, inputs[0][:1], *inputs[1:])
            found = {key: t.expand(len(inputs[0]), *t.shape[1:]) for key, t in found.items()}
        self.outputs |= found
        return found[name]

    def execute(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> dict[str, Tensor]:
        """Run a sub-module as its code says -> its output, by name, and what else there is to keep of it."""
        code, stored = self.codes[name], self.stored.get(name)
        if code == "keep":
            how = Keeping(stored or FULL)
            return {name: module(*inputs, how=how), f"{name}.map": how.pattern}
        if code == "watch":
            how = Watched(stored.width)
            out = module(*inputs, how=how)
            return {name: out, f"{name}.rest": how.rest.reshape(out.shape)}
        if code == "tokens":
            x, *others = inputs
            index = stored.rows[..., None].expand(-1, -1, x.shape[-1])
            new = module(x.gather(1, index), *others)  # (B, picked, D)
            return {name: stored.old.scatter(1, index, new.to(stored.old.dtype))}
        return {name: module(*inputs) if stored is None else module(*inputs, how=stored)}


class Peeked(Exception):
    """Ends a block before its first sub-module."""


class PeekingCache(BlockCache):
    """A BlockCache that takes what enters a block's first sub-module and stops there."""

    def run(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        self.name, self.input = name, inputs[0]
        raise Peeked


class ProbedCache(BlockCache):
    """A BlockCache that shows every sub-module, its inputs and its output to a probe (cache/calibrate.py)."""

    def __init__(self, branches: tuple[str, ...], block: int, probe: Probe):
        super().__init__()
        self.branches, self.block, self.probe = branches, block, probe

    def run(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        out = super().run(name, module, *inputs)
        self.probe(self.branches, self.block, name, module, inputs, out)
        return out


def run_block(
    block: nn.Module, h: Tensor, cond: Any, codes: Codes, stored: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One block under its codes -> h after it, and the outputs of the sub-modules that ran under a code.

    A pure function of its arguments: this is what torch.compile compiles, once per distinct row of codes.
    """
    cache = BlockCache(codes, stored)
    return block(h, cond, cache), cache.outputs
