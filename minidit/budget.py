"""A byte budget for caching methods: what was asked for, a smaller form of it, or a refusal by name."""

from collections.abc import Callable

from minidit.cache.spec import METHODS, smaller_specs
from minidit.memory import readable

SizeOf = Callable[[str], float]  # of a --cache argument: what it keeps, in bytes; inf where it cannot act


def within_budget(cache: str, budget: int, size_of: SizeOf) -> str:
    """The method itself where it keeps no more than the budget, else the first smaller form that does not.

    cache: as --cache has it · ValueError where there is none, with the method that makes most of the budget
    """
    for spec in (cache, *smaller_specs(cache)):
        if size_of(spec) <= budget:
            return spec
    raise ValueError(
        f"cache {cache} keeps {readable(size_of(cache))}, and the budget is {readable(budget)}; "
        f"{largest_within(budget, size_of)}"
    )


def largest_within(budget: int, size_of: SizeOf) -> str:
    """Which of all methods keeps most within a budget, as a hint."""
    found = []
    for name, method in METHODS.items():
        for spec in (name, *(f"{name}:{variant}" for variant in getattr(method.load(), "variants", {}))):
            found += [(size, spec)] if 0 < (size := size_of(spec)) <= budget else []
    if not found:
        return "no method keeps less"
    size, spec = max(found)
    return f"{spec} keeps {readable(size)}"
