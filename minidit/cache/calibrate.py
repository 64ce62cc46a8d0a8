"""What UniCP learns of a model on uncached runs: how outputs drift, bases for slicing, what slices cost.

Three passes over the same calibration prompts, each watched by a probe (run_blocks' `probe`): errors between
the steps' outputs, from which the windows follow; second moments of queries and keys where attention has to
run, from which the bases follow; and the loss of every slice width. All of it goes into a profile.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minidit.attention import FOLDABLE, AxisAttention, Sliced
from minidit.cache.policies.unicp import BASES, THRESHOLDS, WINDOWS, search_windows, threshold_value

RATIOS = (0.1, 0.2, 0.3, 0.4)  # shares of the directions that slices remove
SHARE = 1 / 16  # of the tokens that errors and covariances are taken of
LEAST_TOKENS = 256  # or all, where there are fewer
RIDGE = 1e-4  # added to a covariance's eigenvalues, in units of their mean
ATTENTIONS = ("attn", "cross", "t_attn", "t_cross")  # sub-modules whose outputs windows may serve
MAP_PLACES = 64  # frames or places, and queries in each, that a map's drift is taken of
POOLS = {"mean": lambda values: sum(values) / len(values), "max": max}  # over prompts

Found = dict[tuple, Tensor]  # (prompt, branch, ...) -> numbers
Pairs = set[tuple[int, int]]  # (step, block)


class SubmoduleProbe:
    """Watches the sub-modules of uncached runs. begin_step() has to be called before every step.

    A call is (branches, block, name, module, inputs, output), with a batch row for every branch.
    """

    def __init__(self):
        self.prompt = self.step = -1

    def begin_step(self, prompt: int, step: int) -> None:
        """prompt, step: counted from 0; a prompt's steps come in order"""
        self.prompt, self.step = prompt, step


class ErrorProbe(SubmoduleProbe):
    """First pass: the distance of every output from those of the `max_window` steps before it."""

    def __init__(self, kinds: Sequence[str], max_window: int, share: float = SHARE):
        super().__init__()
        self.kinds, self.max_window, self.share = kinds, max_window, share
        self.past: dict[tuple, deque[Tensor]] = {}  # newest first
        self.tokens = 0  # of one video
        self.foldable: dict[str, None] = {}  # sub-modules whose slices go into their projections, in order
        self.found: Found = {}

    def begin_step(self, prompt: int, step: int) -> None:
        if prompt != self.prompt:
            self.past.clear()
        super().begin_step(prompt, step)

    def __call__(self, branches, block, name, module, inputs, out) -> None:
        if isinstance(module, FOLDABLE):
            self.foldable[name] = None
        if name in self.kinds:
            self.tokens = out.shape[1]
            rows = out[:, pick_tokens(out.shape[1], self.share).to(out.device)].float()  # (B, picked, D)
            self.compare(branches, block, name, rows)
        if f"{name}.map" in self.kinds and isinstance(module, AxisAttention):
            self.compare(branches, block, f"{name}.map", some_of_map(module, inputs, len(out)))

    def compare(self, branches, block: int, kind: str, rows: Tensor) -> None:
        """rows: of this step, a batch row for every branch"""
        for row, branch in zip(rows, branches, strict=True):
            past = self.past.setdefault((branch, block, kind), deque(maxlen=self.max_window))
            where = (self.prompt, branch, kind, self.step, block)
            self.found[where] = (
                torch.stack([relative_l2(row, old) for old in past]) if past else row.new_empty(0)
            )
            past.appendleft(row)

    def table(self, pool: str = "mean") -> dict[str, list[list[list[float]]]]:
        """errors[kind][i][block][k - 1] between steps i and i + k; the last steps have shorter rows."""
        backward = pool_numbers(self.found, pool)  # (kind, i + k, block) -> by k
        steps, depth = (1 + max(where[n] for where in backward) for n in (1, 2))
        reach = lambda i: range(1, min(self.max_window, steps - 1 - i) + 1)
        return {
            kind: [
                [[backward[kind, i + k, block][k - 1] for k in reach(i)] for block in range(depth)]
                for i in range(steps)
            ]
            for kind in self.kinds
            if any(kind == where[0] for where in backward)  # not every model has every sub-module
        }


class CovarianceProbe(SubmoduleProbe):
    """Second pass: second moments of queries and keys, as they enter the scores, where attention has to run.

    Keys are centred per head over all tokens. What a constant adds to the scores of one query is the same for
    every key and drops out of the softmax, so nothing needs to be subtracted when the bases are used.
    """

    def __init__(self, uncachable: Pairs, share: float = SHARE, name: str = "attn"):
        super().__init__()
        self.uncachable, self.share, self.name = uncachable, share, name
        self.sums: dict[int, list[Tensor]] = {}  # block -> of q and k (N, K, K)
        self.tokens, self.folds = 0, False  # how many attend to each other, and whether slices cost nothing

    def __call__(self, branches, block, name, module, inputs, out) -> None:
        if name != self.name or (self.step, block) not in self.uncachable:
            return
        q, k, _ = module.queries_keys_values(*inputs)  # (B, N, L, K)
        self.tokens, self.folds = q.shape[2], isinstance(module, FOLDABLE)
        some = lambda x: x[:, :, pick_tokens(x.shape[2], self.share).to(x.device)].double()
        mean = k.mean(2, keepdim=True, dtype=torch.float64)
        moments = second_moment(some(q)), second_moment(some(k) - mean)
        sums = self.sums.setdefault(block, [torch.zeros_like(m) for m in moments])
        for total, moment in zip(sums, moments, strict=True):
            total += moment


class SliceProbe(SubmoduleProbe):
    """Third pass: what attention loses when it is sliced, at every step and block, for every width."""

    def __init__(self, tensors: Mapping[tuple[int, str], Tensor], widths: Sequence[int], name: str = "attn"):
        super().__init__()
        self.tensors, self.widths, self.name = tensors, widths, name
        self.found: Found = {}

    def __call__(self, branches, block, name, module, inputs, out) -> None:
        if name != self.name:
            return
        losses = []
        for width in self.widths:
            bases = (self.tensors[block, f"{name}.{part}.{width}"].to(out) for part in ("q", "k"))
            sliced = module(*inputs, how=Sliced(*bases))
            losses.append([relative_l2(row, full) for row, full in zip(sliced, out, strict=True)])
        for row, branch in enumerate(branches):
            self.found[self.prompt, branch, self.step, block] = torch.stack([loss[row] for loss in losses])

    def table(self, pool: str = "mean") -> list[list[list[float]]]:
        """losses[step][block][width]"""
        found = pool_numbers(self.found, pool)
        steps, depth = (1 + max(where[n] for where in found) for n in (0, 1))
        return [[found[i, block] for block in range(depth)] for i in range(steps)]


def some_of_map(module: AxisAttention, inputs: tuple[Any, ...], batch: int) -> Tensor:
    """A part of an attention map along an axis, chosen once for all. -> (B, ...) fp32"""
    q, k, _ = module.queries_keys_values(*inputs)  # (B * groups, N, L, K)
    q, k = q.unflatten(0, (batch, -1)), k.unflatten(0, (batch, -1))
    chosen, places = (pick_tokens(q.shape[n], 0, MAP_PLACES).to(q.device) for n in (1, 3))
    q, k = q[:, chosen][:, :, :, places].float(), k[:, chosen].float()
    return (q @ k.mT * module.scale).softmax(-1)


class Together(SubmoduleProbe):
    """Several probes in one pass."""

    def __init__(self, probes: Iterable[SubmoduleProbe]):
        super().__init__()
        self.probes = tuple(probes)

    def begin_step(self, prompt: int, step: int) -> None:
        for probe in self.probes:
            probe.begin_step(prompt, step)

    def __call__(self, *shown) -> None:
        for probe in self.probes:
            probe(*shown)


def pick_tokens(count: int, share: float, least: int = LEAST_TOKENS) -> Tensor:
    """A fixed random choice of token indices, the same for all steps, blocks and prompts."""
    wanted = min(count, max(least, round(count * share)))
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted].sort().values


def relative_l2(new: Tensor, old: Tensor) -> Tensor:
    """||new - old|| / ||old||, a 0-d tensor; from nothing to nothing is no distance"""
    new, old = new.float(), old.float()
    return (new - old).norm() / old.norm().clamp_min(1e-20)


def second_moment(x: Tensor) -> Tensor:
    """x (B, N, L, K) -> mean of x^T x per head (N, K, K)"""
    return (x.mT @ x).mean(0) / x.shape[2]


def pool_numbers(found: Found, pool: str) -> dict[tuple, list[float]]:
    """The larger number of the branches, then pooled over prompts, rounded to four digits."""
    by_prompt: dict[tuple, dict[int, list[float]]] = defaultdict(dict)
    for (prompt, _, *where), numbers in found.items():
        other = by_prompt[tuple(where)].get(prompt)
        numbers = numbers.tolist()
        by_prompt[tuple(where)][prompt] = list(map(max, numbers, other)) if other else numbers
    return {
        where: [float(f"{POOLS[pool](column):.4g}") for column in zip(*prompts.values(), strict=True)]
        for where, prompts in by_prompt.items()
    }


def two_sided_basis(c_q: Tensor, c_k: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The bases whose first n columns give the best rank-n scores q (T_q T_k^T) k^T, in the mean square.

    c_q, c_k: second moments (N, K, K) -> T_q = C_q^-1/2 U S^1/2 and T_k = C_k^-1/2 V S^1/2 (N, K, K), where
    U S V^T = C_q^1/2 C_k^1/2. All columns together are exact: T_q T_k^T = I. The ridge keeps directions that
    have no energy from being blown up.
    """
    (root_q, inverse_q), (root_k, inverse_k) = (square_roots(c, ridge) for c in (c_q, c_k))
    u, s, vh = torch.linalg.svd(root_q @ root_k)
    scale = s.sqrt().unsqueeze(-2)
    return inverse_q @ u * scale, inverse_k @ vh.mT * scale


def square_roots(c: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2 of symmetric matrices (N, K, K), after adding the ridge."""
    values, vectors = torch.linalg.eigh(c)
    values = values.clamp_min(0)
    values = (values + ridge * values.mean(-1, keepdim=True).clamp_min(1e-20)).unsqueeze(-2)
    return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT


def shared_basis(c_q: Tensor, c_k: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's basis: principal directions of queries and keys together, orthonormal, one for both."""
    basis = torch.linalg.eigh(c_q + c_k).eigenvectors.flip(-1)  # (N, K, K), most energy first
    return basis, basis


def slice_widths(head_width: int) -> tuple[int, ...]:
    """The widths that are tried, falling: those nearest to 0.1 .. 0.4 removed that the hardware likes.

    Multiples of 16, which is what matrix units take; of a sixteenth of heads narrower than 64.
    """
    unit = 16 if head_width >= 64 else max(1, head_width // 16)
    least = (1 - RATIOS[-1]) * head_width
    fitting = [width for width in range(unit, head_width, unit) if width >= least]
    nearest = {min(fitting, key=lambda width: abs(head_width * (1 - ratio) - width)) for ratio in RATIOS}
    return tuple(sorted(nearest, reverse=True))


def alone_or_together(probes: Mapping[str, SubmoduleProbe]) -> SubmoduleProbe:
    return next(iter(probes.values())) if len(probes) == 1 else Together(probes.values())


def make_bases(
    sums: Mapping[int, Sequence[Tensor]], basis: str, name: str = "attn"
) -> dict[tuple[int, str], Tensor]:
    """The slices' constants, (block, "attn.q.<width>") and "attn.k.<width>", (N, K, width) fp32 each."""
    tensors = {}
    for block, (c_q, c_k) in sums.items():
        pair = two_sided_basis(c_q, c_k) if basis == "two-sided" else shared_basis(c_q, c_k)
        for width in slice_widths(c_q.shape[-1]):
            for part, t in zip(("q", "k"), pair, strict=True):
                tensors[block, f"{name}.{part}.{width}"] = t[:, :, :width].float().contiguous()
    return tensors


def uncachable_pairs(errors: Sequence[Sequence[Sequence[float]]], threshold: float, window: str) -> Pairs:
    """The (step, block) at which attention has to run. errors: [i][block][k - 1]"""
    pairs = set()
    for block in range(len(errors[0])):
        sources = search_windows([row[block] for row in errors], threshold, window)
        pairs |= {(i, block) for i, source in enumerate(sources) if i == source}
    return pairs


def calibrate_unicp(
    run_once: Callable[[SubmoduleProbe], None],
    *,
    kinds: Sequence[str] = ATTENTIONS,
    max_window: int = 6,
    threshold: float | str = "E2",
    window: str = "strict",
    basis: str = "two-sided",
    pool: str = "mean",
    share: float = SHARE,
) -> tuple[dict[str, Any], dict[tuple[int, str], Tensor]]:
    """A UniCP profile's data and tensors. run_once is called three times.

    run_once(probe) makes all calibration videos uncached, with `probe` as run_blocks' probe (Forward has a
    place for it) and probe.begin_step(prompt, step) before every step. Errors and losses serve any threshold;
    `threshold` and `window` decide at which steps queries and keys are looked at for the bases.
    """
    if basis not in BASES or pool not in POOLS:
        raise ValueError(
            f"basis={basis!r}, pool={pool!r}; choose from {', '.join(BASES)}, {', '.join(POOLS)}"
        )
    maps = ("attn.map", "t_attn.map")  # where a model has attention along axes
    drift = ErrorProbe(tuple(dict.fromkeys(("attn", *kinds, *maps))), max_window, share)
    run_once(drift)
    if not drift.found:
        raise ValueError("run_once showed the probe no sub-module; pass it as probe= and begin every step")
    errors = drift.table(pool)
    map_errors = {name.removesuffix(".map"): errors.pop(name) for name in maps if name in errors}
    sliced = dict.fromkeys(("attn", *(name for name in drift.foldable if name in errors)))
    pairs = {name: uncachable_pairs(errors[name], threshold_value(threshold), window) for name in sliced}
    moments = {name: CovarianceProbe(pairs[name], share, name) for name in sliced}
    run_once(alone_or_together(moments))
    tensors: dict[tuple[int, str], Tensor] = {}
    for name, probe in moments.items():
        tensors |= make_bases(probe.sums, basis, name)
    covariance = moments["attn"]
    head_width = covariance.sums[0][0].shape[-1]
    losses = {name: SliceProbe(tensors, slice_widths(head_width), name) for name in sliced}
    run_once(alone_or_together(losses))
    data = {
        "steps": len(errors["attn"]),
        "depth": len(errors["attn"][0]),
        "prompts": len({where[0] for where in drift.found}),
        "tokens": covariance.tokens,
        "folds": covariance.folds,
        "pool": pool,
        "max_window": max_window,
        "errors": errors,  # [kind][i][block][k - 1]
        "map_errors": map_errors,  # likewise, of attention maps
        "basis": basis,
        "basis_threshold": threshold_value(threshold),
        "head_width": head_width,
        "widths": list(slice_widths(head_width)),
        "slice_losses": losses["attn"].table(pool),  # [step][block][width]
        "more_losses": {name: probe.table(pool) for name, probe in losses.items() if name != "attn"},
    }
    return data, tensors


def coverage(data: Mapping[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """How many of steps * depth outputs a window covers: [threshold][window][kind]"""
    count = lambda rows, *how: sum(i != source for i, source in enumerate(search_windows(rows, *how)))
    blocks = range(data["depth"])
    total = lambda errors, *how: sum(count([row[block] for row in errors], *how) for block in blocks)
    return {
        name: {
            window: {kind: total(errors, threshold, window) for kind, errors in data["errors"].items()}
            for window in WINDOWS
        }
        for name, threshold in THRESHOLDS.items()
    }


def drift_by_step(data: Mapping[str, Any], distance: int = 1) -> dict[str, list[float]]:
    """The redundancy curve of every kind: error between steps i and i + distance, mean over blocks."""
    mean: Callable[[Iterable[float]], float] = lambda values: POOLS["mean"](list(values))
    steps = range(data["steps"] - distance)
    return {
        kind: [mean(row[distance - 1] for row in errors[i]) for i in steps]
        for kind, errors in data["errors"].items()
    }
