"""Multiply-adds of a plan, exactly: what ran, and what would have run without caching."""

from collections.abc import Callable

from minidit.cache.plan import Freeze, Mix, Plan, Run, Slice, Sub

Table = dict[Sub, int]  # a model's macs(): (block, sub-module) -> multiply-adds of one branch


def plan_macs(plan: Plan, branches: tuple[str, ...], table_at: Callable[[int | None], Table]) -> int:
    """Multiply-adds of one step. table_at(width) is the model's table with attention sliced to `width`."""
    if plan.output is not None:
        return 0
    full, subs = table_at(None), dict(plan.subs)
    depth = 1 + max(block for block, _ in full)
    per_branch = 0
    for item in plan.path:
        if isinstance(item, Run):
            span = range(item.first, depth if item.last is None else item.last)
            per_branch += sum(
                sub_macs(key, n, subs.get(key), table_at) for key, n in full.items() if key[0] in span
            )
    return per_branch * len(plan.branches or branches)


def sub_macs(
    key: Sub, full: int, how: Mix | Slice | Freeze | None, table_at: Callable[[int | None], Table]
) -> int:
    if isinstance(how, Mix):
        return 0
    if isinstance(how, Freeze):
        return table_at(0)[key]  # queries and keys of no width
    return table_at(how.width)[key] if isinstance(how, Slice) else full


def full_macs(branches: tuple[str, ...], table_at: Callable[[int | None], Table]) -> int:
    """Multiply-adds of one uncached step."""
    return sum(table_at(None).values()) * len(branches)
