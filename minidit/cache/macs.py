"""Multiply-adds of a plan, exactly: what ran, and what would have run without caching."""

from collections.abc import Callable

from minidit.cache.plan import Freeze, Mix, Plan, Share, Slice, Sub, SubOp, Tokens, Window, runs

Table = dict[Sub, int]  # a model's macs(): (block, sub-module) -> multiply-adds of one branch
TableAt = Callable[[int | None], Table]  # of a width: the table with attention sliced to it, None as it is


def with_text(table: Table, macs: int) -> Table:
    """A table where every cross-attention makes the text's keys and values anew. macs: that this takes"""
    return {key: n + macs * key[1].endswith("cross") for key, n in table.items()}


def plan_macs(plan: Plan, branches: tuple[str, ...], table_at: TableAt) -> int:
    """Multiply-adds of one step. A gate's look at a block's first input is no product and not counted."""
    full, subs = table_at(None), dict(plan.subs)
    blocks, names = runs(plan, 1 + max(block for block, _ in full)), plan.branches or branches
    rests = {(site.first, site.name): Window(site.last, site.of) for site in plan.keep if site.kind == "rest"}
    total = 0
    for key in (key for key in full if key[0] in blocks):
        how = subs.get(key)
        times = 1 if isinstance(how, Share) else len(names)
        how = how.how if isinstance(how, Share) else how
        macs = sub_macs(key, how, table_at)
        if how is None and key in rests:  # a window's attention beside the full one
            macs += window_macs(key, rests[key], table_at)
        total += times * macs
    return total


def sub_macs(key: Sub, how: SubOp | None, table_at: TableAt) -> int:
    """Multiply-adds of one sub-module of one branch."""
    full = table_at(None)[key]
    if how is None:
        return full
    if isinstance(how, Mix):
        return 0
    if isinstance(how, Freeze):
        return table_at(0)[key]  # queries and keys of no width
    if isinstance(how, Slice):
        return table_at(how.width)[key]
    if isinstance(how, Tokens):
        return full * (how.count + how.text) // (how.of + how.text)  # every row costs the same
    return full - attention_core(key, table_at) + window_macs(key, how, table_at)


def window_macs(key: Sub, how: Window, table_at: TableAt) -> int:
    """Of scores and values within the window; what a kernel computes and masks beside them is not counted."""
    pairs = how.of * (2 * how.width + 1) - how.width * (how.width + 1)
    return attention_core(key, table_at) // how.of**2 * pairs


def attention_core(key: Sub, table_at: TableAt) -> int:
    """Multiply-adds of scores and values alone, read off what no width of queries and keys leaves.

    That is values and their projections where all tokens attend to each other. In models with attention along
    axes it is everything but the projections of queries and keys, which are half of the projections.
    """
    full, rest = table_at(None)[key], table_at(0)[key]
    return 2 * rest - full if (key[0], "t_attn") in table_at(None) else 2 * (full - rest)


def full_macs(branches: tuple[str, ...], table_at: TableAt) -> int:
    """Multiply-adds of one uncached step."""
    return sum(table_at(None).values()) * len(branches)
