"""How near do the kernels come to what the card copies and multiplies, at the shapes of the releases?

Every operation is first compared with its definition in plain torch, then timed with a cold cache, beside a
large copy and a large matrix product of the same run: a line ends in the share of these. --tune also tries
other tiles of each kernel and prints the fastest per shape, as a line to commit. Without a GPU the same runs
at small shapes on the definitions, which times nothing of interest, but shows that all of it works.

    python -m benchmarks.kernels [--shape wan-14b-480p ...] [--op pca_attention ...] [--tune] [--device cpu]
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import minidit_kernels.modulate as modulate_file
import minidit_kernels.pca_attention as attention_file
import minidit_kernels.qk_norm_rope as rope_file
from benchmarks.common import command_line, machine, write_results
from benchmarks.timing import Times, copy_bandwidth, matmul_ceiling, short
from minidit.attention import attention, card
from minidit.attention_table import Case
from minidit_kernels.mix import mix, mix_reference
from minidit_kernels.modulate import gated_residual, gated_residual_reference, modulate, modulate_reference
from minidit_kernels.pca_attention import Tile, pca_attention_reference
from minidit_kernels.qk_norm_rope import norm_rope, norm_rope_reference
from minidit_kernels.rel_l1 import Pair, distance_sums, pair_sums_reference

TOLERANCE = 0.01  # relative L2, of bf16: one rounding is 0.002, attention rounds its weights too
BACKENDS = ("triton", "cudnn", "flash", "efficient")  # of the attention table, beside math, which is last


@dataclass(frozen=True)
class Shape:
    """What a block of a release works on, one branch. Attention: of `groups` frames, each on its own."""

    tokens: int  # L, text rows of a joint sequence included
    turned: int  # rows that rope turns
    heads: int
    head_width: int
    norm: str  # of queries and keys: full width, head, or layer: with a bias, per head
    widths: tuple[int, ...]  # R, of queries and keys after slicing
    groups: int = 1

    @property
    def width(self) -> int:
        return self.heads * self.head_width


SHAPES = {
    "wan-14b-480p": Shape(32760, 32760, 40, 128, "full", (112, 96, 80, 64)),  # 832x480, 81 frames
    "hunyuan-544p": Shape(
        67576, 67320, 24, 128, "head", (112, 96, 80, 64)
    ),  # 960x544, 129 frames; 256 of text
    "cogvideox-5b": Shape(17776, 17550, 48, 64, "layer", (56, 48, 40, 32)),  # 720x480, 49 frames; 226 of text
    "open-sora": Shape(23850, 1590, 16, 72, "head", (64, 56, 48, 40), groups=15),  # 848x480, 51 frames
}
TILES = [
    Tile(queries, keys, warps, stages)
    for queries, warps in ((64, 4), (128, 8))
    for keys in (64, 128)
    for stages in (2, 3)
]  # each takes seconds to compile, at every width


def small(shape: Shape) -> Shape:
    """The shape with few tokens and heads, for a CPU."""
    return replace(shape, tokens=60, turned=min(shape.turned, 52), heads=2, groups=min(shape.groups, 3))


@dataclass(frozen=True)
class Op:
    """An operation at a shape: the fast form, its definition, and what it moves or multiplies at least."""

    name: str
    what: str  # the shape in words
    run: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    seen: Callable[[Tensor], Tensor] = lambda out: out  # the part of run's output that reference gives
    bytes: int = 0
    flops: int = 0
    way: str = ""  # backend
    widths: tuple[int, int] | None = None  # of attention: R, K


def normal(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def state_ops(shape: Shape, device: str) -> Iterator[Op]:
    """What passes over whole states h (1, L, D): distances, mixes, modulation, gated residuals."""
    L, D = shape.tokens, shape.width
    what, size = f"L{L} D{D} bf16", 2 * L * D
    new, old = (normal(device, 1, L, D) for _ in range(2))
    rows = [normal(device, 1, 1, D, dtype=torch.float32) for _ in range(2)]
    pair, kept = Pair(new, old, norms=("l1",)), Pair(new, old.clone(), torch.empty_like(new), norms=("l1",))
    columns = lambda sums: sums[:, [0, 3]]  # of abs_difference and abs_old: others are left open
    yield Op(
        "rel_l1",
        what,
        lambda: distance_sums([pair]),
        lambda: columns(pair_sums_reference([pair])),
        columns,
        2 * size,
    )
    yield Op(
        "rel_l1 and store", what, lambda: distance_sums([kept]), lambda: columns(pair_sums_reference([kept])),
        columns, 3 * size,
    )  # fmt: skip
    for coefficients in ((1.0,), (2.0, -1.0), (3.0, -3.0, 1.0)):
        slots, name = [new, old, new][: len(coefficients)], f"mix of {len(coefficients)}"
        run = lambda slots=slots, c=coefficients: mix(slots, c)
        yield Op(
            name,
            what,
            run,
            lambda slots=slots, c=coefficients: mix_reference(slots, c),
            bytes=size * (len(slots) + 1),
        )
    yield Op(
        "modulate", what, lambda: modulate(new, *rows, eps=1e-6),
        lambda: modulate_reference(new, *rows, eps=1e-6), bytes=2 * size,
    )  # fmt: skip
    yield Op(
        "gated_residual", what, lambda: gated_residual(new, rows[0], old),
        lambda: gated_residual_reference(new, rows[0], old), bytes=3 * size,
    )  # fmt: skip


def rope_ops(shape: Shape, device: str) -> Iterator[Op]:
    """Queries from the projection into the scores, unsliced and with a basis; strided, as in a fused qkv."""
    L, D, N, K = shape.tokens // shape.groups, shape.width, shape.heads, shape.head_width
    x = normal(device, shape.groups, L, 3 * D)[..., :D]
    weight = normal(device, D if shape.norm == "full" else K, dtype=torch.float32)
    bias = torch.zeros_like(weight) if shape.norm == "layer" else None
    angle = torch.randn(min(shape.turned, L), K // 2, device=device)
    for R in (K, shape.widths[2]):
        basis = normal(device, N, K, R) if R < K else None
        options = dict(heads=N, eps=1e-6, rope=(angle.cos(), angle.sin()), basis=basis)
        yield Op(
            "qk_norm_rope", f"B{shape.groups} L{L} N{N} K{K} R{R} bf16",
            lambda o=options: norm_rope(x, weight, bias, **o),
            lambda o=options: norm_rope_reference(x, weight, bias, **o),
            bytes=2 * shape.groups * L * (D + N * R) + 8 * angle.numel(),
        )  # fmt: skip


def attention_ops(shape: Shape, device: str) -> Iterator[Op]:
    """Attention of every width through our kernel and through torch's, which are asked for by name."""
    B, N, L, K = shape.groups, shape.heads, shape.tokens // shape.groups, shape.head_width
    v, scale = normal(device, B, L, N, K).transpose(1, 2), K**-0.5  # as the projection leaves it
    few = (slice(1), slice(1), slice(256))  # all scores of all heads would not fit into memory
    for R in (K, *shape.widths):
        q, k = (normal(device, B, L, N, R).transpose(1, 2) for _ in range(2))  # as norm_rope leaves them
        reference = lambda q=q, k=k: pca_attention_reference(q[few], k[:1, :1], v[:1, :1], scale=scale)
        for way in BACKENDS if device != "cpu" else ("auto",):
            run = lambda q=q, k=k, way=way: attention(q, k, v, scale=scale, backend=way)
            what, flops = f"B{B} N{N} L{L} R{R} K{K} bf16", 2 * B * N * L * L * (R + K)
            yield Op(
                "pca_attention",
                what,
                run,
                reference,
                lambda out: out[few],
                flops=flops,
                way=way,
                widths=(R, K),
            )


def error_of(op: Op) -> float:
    """Relative L2 from the definition."""
    got, want = op.seen(op.run()).double(), op.reference().double()
    return ((got - want).norm() / want.norm()).item()


def measure(op: Op, device: str, copy: float, matmul: float, budget_ms: int) -> dict[str, Any]:
    """One row; SystemExit where the fast form is not what it should be."""
    row = {"op": op.name, "what": op.what}
    row |= {"way": op.way, "widths": op.widths} if op.way else {}
    try:
        error = error_of(op)
    except (RuntimeError, ValueError) as problem:  # a backend says so where it does not take the widths
        if not op.way:
            raise
        return row | {"cannot": str(problem).splitlines()[0][:80]}
    if not error < TOLERANCE:
        raise SystemExit(f"{op.name} {op.what} {op.way} differs by {error:.2e}, wanted below {TOLERANCE}")
    times = short(op.run, device, budget_ms)
    row |= {
        "ms": round(1e3 * times.median, 4),
        "spread_ms": round(1e3 * times.spread, 4),
        "n": len(times.seconds),
    }
    row |= {"reference_ms": round(1e3 * short(op.reference, device, 20).median, 4)} if op.bytes else {}
    return row | yardstick(op, times, copy, matmul) | {"rel_l2": float(f"{error:.2e}")}


def yardstick(op: Op, times: Times, copy: float, matmul: float) -> dict[str, float]:
    if op.bytes:
        speed = op.bytes / times.median
        return {"gb_per_s": round(speed / 1e9, 1), "share_of_copy": round(speed / copy, 3)}
    speed = op.flops / times.median
    return {"tflops": round(speed / 1e12, 3), "share_of_matmul": round(speed / matmul, 3)}


def say(row: dict[str, Any]) -> str:
    name = f"{row['op']} {row['what']}" + (f" · {row['way']}" if "way" in row else "")
    if "cannot" in row:
        return f"{name}: cannot ({row['cannot']})"
    if "share_of_copy" in row:
        share = (
            f"{row['reference_ms'] / row['ms']:.1f}x plain torch · {row['gb_per_s']} GB/s, "
            f"{row['share_of_copy']:.0%} of a copy"
        )
    else:
        share = f"{row['tflops']} TFLOP/s, {row['share_of_matmul']:.0%} of a matrix product"
    return (
        f"{name}: {row['ms']} ms ± {row['spread_ms']} (n={row['n']}) · {share} · rel L2 {row['rel_l2']:.1e}"
    )


def fastest(rows: list[dict[str, Any]]) -> list[str]:
    """Of every width the fastest backend, and what slicing gains over the best unsliced one."""
    best: dict[str, dict] = {}
    for row in sorted((row for row in rows if "widths" in row and "ms" in row), key=lambda row: row["ms"]):
        best.setdefault(row["what"], row)
    if not best:
        return []
    whole = min(
        (row for row in best.values() if row["widths"][0] == row["widths"][1]), key=lambda row: row["ms"]
    )
    gain = lambda row: f"{whole['ms'] / row['ms']:.2f}x the best unsliced ({whole['way']})"
    return [f"{what}: {row['way']} is fastest, {gain(row)}" for what, row in best.items()]


def table_rows(rows: list[dict[str, Any]], shape: Shape, card: str) -> list[str]:
    """Rows for minidit/attention_table.py: backends in order of their time, unsliced and over all slices."""
    L, K, found = shape.tokens // shape.groups, shape.head_width, []
    kind = Case(card, "bf16", shape.groups, L, L, K, K).shape
    for is_sliced in (False, True):
        timed = [row for row in rows if "widths" in row and (row["widths"][0] < K) == is_sliced]
        widths = {row["widths"] for row in timed}
        sums = {w: [row["ms"] for row in timed if row["way"] == w and "ms" in row] for w in BACKENDS}
        order = sorted((w for w in BACKENDS if len(sums[w]) == len(widths) > 0), key=lambda w: sum(sums[w]))
        evidence = ", ".join(f"{w} {sum(sums[w]):.2f} ms" for w in order)
        over = f"R {'/'.join(str(R) for R, _ in sorted(widths, reverse=True))}"
        if order:
            found.append(
                f'Row(("{card}",), {(*order, "math")}, shapes=("{kind}",), widths=({K},), dtypes=HALF, '
                f'is_sliced={is_sliced}, measured=True,\n    evidence="{over} K{K} L{L}: {evidence}"),'
            )
    return found


def tune(op: Op, owner: Any, name: str, candidates: list[Any], device: str) -> tuple[Any, Times]:
    """The fastest of what `owner.name`, a function that chooses a tile, might answer."""
    found: list[tuple[Times, Any]] = []
    for candidate in candidates:
        with patch.object(owner, name, lambda *_, answer=candidate: answer):
            try:
                if error_of(op) < TOLERANCE:
                    found.append((short(op.run, device, 50), candidate))
            except Exception as problem:  # as many kinds as Triton and its compilers have: too large a tile
                print(f"  {candidate}: {type(problem).__name__} {str(problem).splitlines()[0][:80]}")
    times, candidate = min(found, key=lambda pair: pair[0].median)
    return candidate, times


def tunable(op: Op, shape: Shape) -> tuple[Any, str, list[Any]] | None:
    """Where an operation's tile is chosen, and between which."""
    match op.name, op.way:
        case "pca_attention", "triton" | "auto":
            return attention_file, "tile", TILES
        case "qk_norm_rope", _:  # as launch_of answers
            sizes = [(n, w) for n in (4, 8, 16, 32, 64) for w in (4, 8)]
            return rope_file, "launch_of", [(n, {"num_warps": w, "num_stages": 1}) for n, w in sizes]
        case "modulate" | "gated_residual", _:  # as blocks_of answers
            block = modulate_file.blocks_of(shape.width)["BLOCK_D"]
            return modulate_file, "blocks_of", [{"BLOCK_L": n, "BLOCK_D": block} for n in (1, 2, 4, 8)]
    return None


def ops(shape: Shape, device: str) -> Iterator[Op]:
    yield from state_ops(shape, device)
    yield from rope_ops(shape, device)
    yield from attention_ops(shape, device)


def run(
    names: list[str], wanted: list[str], device: str, tuned: bool, budget_ms: int
) -> list[dict[str, Any]]:
    """All rows, printed as they come."""
    copy, matmul = copy_bandwidth(device), matmul_ceiling(device, torch.bfloat16)
    print(f"copy {copy / 1e9:.0f} GB/s read and written, bf16 matrix product {matmul / 1e12:.1f} TFLOP/s")
    rows = []
    for name in names:
        shape = small(SHAPES[name]) if device == "cpu" else SHAPES[name]
        print(f"\n{name}")
        found = []
        for op in ops(shape, device):
            if wanted and op.name.split()[0] not in wanted:
                continue
            row = {"shape": name} | measure(op, device, copy, matmul, budget_ms)
            print(say(row), flush=True)
            if tuned and (place := tunable(op, shape)):
                best, times = tune(op, *place, device)
                row |= {"tuned": str(best), "tuned_ms": round(1e3 * times.median, 4)}
                print(f"  best {place[1]}: {best}, {row['tuned_ms']} ms", flush=True)
            found.append(row)
        print("\n".join(fastest(found) + table_rows(found, shape, card(torch.device(device)))))
        rows += found
    return rows + [{"copy_gb_per_s": round(copy / 1e9, 1), "matmul_tflops": round(matmul / 1e12, 2)}]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    kinds = ("rel_l1", "mix", "modulate", "gated_residual", "qk_norm_rope", "pca_attention")
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--op", nargs="*", choices=kinds, default=[], help="all of them, if none is named")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tune", action="store_true", help="try other tiles too (minutes)")
    parser.add_argument("--budget-ms", type=int, default=200, help="of timed runs per line")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = run(args.shape, args.op, args.device, args.tune, args.budget_ms)
    about = machine()
    print(f"\n{about['card']}, torch {about['torch']}")
    name = "kernels-tuned" if args.tune else "kernels"
    print(write_results(name, command_line("kernels"), rows, args.device))


if __name__ == "__main__":
    main()
