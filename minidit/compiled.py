"""The block function under torch.compile: one graph per distinct row, none of them broken, none run eagerly.

A row is what a graph is specialised to: the block's class, the shape of h (a batch of branches, or one), what
the block does with its sub-modules, and the shapes of what it is given for that. Weights, stored tensors and
coefficients are inputs, so that all blocks of a class share a graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minidit.cache.seam import Codes, run_block

MOST_ROWS = 32  # per engine: some seconds each to compile; more mean that a method has a row for every step
Row = tuple[Any, ...]


class CompiledBlock:
    """run_block, compiled at the first call of every row. Make one per model, and keep it: it has the graphs.

    backend: torch.compile's; inductor wants a C++ compiler on a CPU
    """

    def __init__(self, backend: str | Callable = "inductor", most_rows: int = MOST_ROWS):
        self.rows: set[Row] = set()
        self.most_rows = most_rows
        self.compiled = torch.compile(run_block, fullgraph=True, dynamic=False, backend=backend)
        # torch counts the graphs of all engines together; rows are counted here, by engine
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit

    def __call__(
        self, block: nn.Module, h: Tensor, cond: Any, codes: Codes, stored: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.count(row_of(block, h, codes, stored))
        return self.compiled(block, h, cond, codes, stored)

    def count(self, row: Row) -> None:
        """Refuse one row too many: compiling it would take longer than it can save."""
        if row in self.rows:
            return
        if len(self.rows) == self.most_rows:
            raise ValueError(
                f"compile: this run has more than {self.most_rows} distinct rows of codes, the next one is "
                f"{dict(row[2])}; leave out --compile, or choose a method that acts alike in all blocks"
            )
        self.rows.add(row)


def row_of(block: nn.Module, h: Tensor, codes: Codes, stored: dict[str, Any]) -> Row:
    """What the graph of this call is specialised to, as far as it changes within a run."""
    return type(block).__name__, h.shape, codes, tuple((name, shapes(how)) for name, how in stored.items())


def shapes(how: Any) -> tuple:
    """A stored output's shape, or the kind of attention, its tensors' shapes and its numbers."""
    if isinstance(how, Tensor):
        return tuple(how.shape)
    parts = (tuple(part.shape) if isinstance(part, Tensor) else part for part in vars(how).values())
    return type(how).__name__, *parts
