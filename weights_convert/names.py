"""Name tables, one line per upstream tensor name, and the check that a table accounts for everything.

A line reads `"upstream name": "our name"`. `{}` stands for one part of a dotted name and is carried over in
order. A note in brackets says what happens on the way:

    "time_projection.1.{}": "time_mod.{}"                         as it is
    "blocks.{}.self_attn.k.{}": "blocks.{}.attn.qkv.{} (2 of 3)"  the second of three parts on dimension 0
    "blocks.{}.norm1.linear.{}": "blocks.{}.mod.{} (1+3 of 4)"    its two halves are the first and the third
    "blocks.{}.modulation": "blocks.{}.mod (squeeze)"             (1, 6, D) -> (6, D): dimensions of size 1 go
    "patch_embedding.weight": "patch_in.weight (flat)"            (D, C, ...) -> (D, C * ...): a patch a row
    "linear1.{}": ("attn.qkv.{} (rows 0:9)", "mlp.up.{} (rows 9:21)")  cut into several
    "proj_out.weight": "mlp.down.weight (columns 3:15)"           a part of every row
    "layers.30.{}.{}.weight": "drop: not needed"                  what is dropped depends on the config
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from minidit.weights import listing

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Table = dict[str, str | tuple[str, ...]]  # a tuple where an upstream tensor is cut into several


@dataclass(frozen=True)
class Layout:
    """How one kind of upstream file names its tensors, and how a config follows from it."""

    component: str  # transformer, text_encoder, vae
    family: str
    class_name: str  # a key of weights.CONFIGS
    origin: str  # original, diffusers or transformers
    signs: tuple[str, ...]  # tensor names; a file with all of them has this layout
    build: Callable[[Any], nn.Module]
    config: Callable[
        [Shapes, dict], dict
    ]  # (shapes, config.json or {}) -> fields of our config, as far as known
    table: Callable[[Any, Shapes], "Table"]  # (config, shapes) -> lines
    is_config: str = ""  # a key of this layout's config.json; "": it has none
    drop: dict[str, str] = field(default_factory=dict)  # upstream name, or its start and a * -> reason
    unsaid: tuple[str, ...] = ()  # fields of the config that no file of the component tells, but the release


@dataclass(frozen=True)
class Piece:
    """An upstream tensor on its way to (a part of) one of ours."""

    upstream: str
    shape: Shape  # after the cut and the reshape
    part: int  # from 0
    parts: int
    share: tuple[int, int] = (0, 1)  # which of how many equal shares of the upstream tensor, on dimension 0
    cut: tuple[int, int, int] | None = None  # dimension, start and end of what is taken at all; None: all

    def take(self, tensor: Tensor) -> Tensor:
        """The piece out of its upstream tensor."""
        if self.cut is not None:
            dim, start, end = self.cut
            tensor = tensor.narrow(dim, start, end - start)
        which, count = self.share
        return tensor.chunk(count)[which].reshape(self.shape)


@dataclass(frozen=True)
class Fit:
    """Where everything goes; `problems` is empty when every tensor on both sides has exactly one partner."""

    pieces: dict[str, list[Piece]]  # our name -> its parts in order
    dropped: dict[str, str]
    problems: list[str]


PART, RESHAPE = r"(?P<part>\d(?:\+\d)*) of (?P<parts>\d)", r"(?P<reshape>flat|squeeze)"
CUT = r"(?P<side>rows|columns) (?P<start>\d+):(?P<end>\d+)"
LINE = re.compile(rf"(?P<name>\S+)(?: \((?:{PART}|{RESHAPE}|{CUT})\))?")
DROP = "drop: "


def fit(shapes: Shapes, targets: Shapes, table: Table, drop: dict[str, str]) -> Fit:
    """Send each upstream tensor to its target by the table, and compare all names and shapes.

    shapes: upstream name -> shape · targets: our name -> shape
    """
    patterns = [(re.compile(re.escape(k).replace(r"\{\}", r"([^.]+)")), v) for k, v in table.items()]
    pieces, dropped, unmatched = {}, {}, []
    for upstream, shape in shapes.items():
        lines = next((_lines(v, m) for p, v in patterns if (m := p.fullmatch(upstream))), ())
        reason = why_dropped(upstream, drop)
        if lines and lines[0].startswith(DROP):
            lines, reason = (), lines[0].removeprefix(DROP)
        matches = [LINE.fullmatch(line) for line in lines]
        if not lines and reason is not None:
            dropped[upstream] = reason
        elif not lines or any(line["name"] not in targets for line in matches):
            unmatched.append(upstream)
        else:
            for line in matches:
                pieces.setdefault(line["name"], []).extend(_pieces(upstream, shape, line))
    for parts in pieces.values():
        parts.sort(key=lambda piece: piece.part)
    problems = [
        listing("tensors have no place in the model", unmatched),
        listing("parameters are not in the checkpoint", [name for name in targets if name not in pieces]),
        listing(
            "tensors do not fit", [w for name in pieces if (w := _misfit(name, pieces[name], targets[name]))]
        ),
    ]
    return Fit(pieces, dropped, [p for p in problems if p])


def _lines(value: str | tuple[str, ...], match: re.Match) -> tuple[str, ...]:
    """Where a matched upstream name goes."""
    values = (value,) if isinstance(value, str) else value
    return tuple(match.expand(_template(one)) for one in values)


def why_dropped(upstream: str, drop: dict[str, str]) -> str | None:
    """The reason to leave a tensor out, None if there is none."""
    return next((why for name, why in drop.items() if fnmatchcase(upstream, name)), None)


def _template(line: str) -> str:
    """The line as a template for Match.expand: the n-th {} becomes group n."""
    first, *rest = line.split("{}")
    return first + "".join(rf"\g<{i}>{text}" for i, text in enumerate(rest, 1))


def _pieces(upstream: str, shape: Shape, line: re.Match) -> list[Piece]:
    if line["reshape"] == "flat":
        shape = (shape[0], math.prod(shape[1:]))
    elif line["reshape"] == "squeeze":
        shape = tuple(n for n in shape if n != 1)
    cut = None
    if line["side"]:
        cut = dim, start, end = int(line["side"] == "columns"), int(line["start"]), int(line["end"])
        shape = (*shape[:dim], end - start, *shape[dim + 1 :])
    numbers, parts = [int(n) - 1 for n in (line["part"] or "1").split("+")], int(line["parts"] or 1)
    if len(numbers) > 1:
        shape = (shape[0] // len(numbers), *shape[1:])
    return [Piece(upstream, shape, n, parts, (i, len(numbers)), cut) for i, n in enumerate(numbers)]


def _misfit(name: str, pieces: list[Piece], target: Shape) -> str:
    """What is wrong with the parts of one parameter, or ''."""
    parts = pieces[0].parts
    if [piece.part for piece in pieces] != list(range(parts)):
        return f"{name} wants {parts} parts, got {', '.join(piece.upstream for piece in pieces)}"
    wanted = (target[0] // parts, *target[1:])
    odd = [f"{p.upstream} gives {p.shape}, {name} wants {wanted}" for p in pieces if p.shape != wanted]
    return odd[0] if odd else ""


def under(upstream: str, ours: str, lines: Table) -> Table:
    """The lines of a repeated part, below two prefixes."""
    place = lambda v: f"{ours}.{v}" if isinstance(v, str) else tuple(f"{ours}.{one}" for one in v)
    return {f"{upstream}.{k}": place(v) for k, v in lines.items()}
