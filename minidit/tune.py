"""Knobs: an option of a caching method swept over a range, or set for a share of the uncached multiply-adds.

A policy names its main one in a class attribute, knob = (option, low, high).
"""

import math
import re
from collections.abc import Callable

from minidit.cache.spec import find_class, parse

TOLERANCE = 0.02  # relative, of the share of multiply-adds that a knob is set for
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


def tuned(spec: str, macs: float, share: Callable[[str], float] | None) -> tuple[str, str]:
    """A method with its knob set for a share of the uncached multiply-adds -> its spec, what was reached

    share(spec): what a method takes on the prompts for tuning; None where there are none.
    """
    outer = parse(spec)[0]
    knob = getattr(find_class(outer.name), "knob", None)
    if knob is None:
        return spec, "not tuned: it has no knob"
    name, low, high = knob
    if name in outer.options:
        return spec, f"not tuned: {name} was given"
    if share is None:
        raise ValueError("nothing to tune on: every tuning prompt is in the table too; give --tune-prompts")
    value, reached = find_knob(lambda value: share(with_option(spec, name, value)), low, high, macs)
    missed = "" if abs(reached - macs) <= TOLERANCE * macs else f", the nearest to {macs:g} that it can"
    note = f"{name}={value:g} takes {reached:.3f} of the MACs on the prompts for tuning{missed}"
    return with_option(spec, name, value), note


def find_knob(
    share: Callable[[float], float], low: float, high: float, target: float, rounds: int = 9
) -> tuple[float, float]:
    """Bisect a knob -> the value whose share is nearest to the target, and that share.

    share(value): of the uncached MACs, rising or falling. Whole bounds: the knob is a whole number.
    """
    is_whole = isinstance(low, int) and isinstance(high, int)
    found = {value: share(value) for value in (low, high)}
    is_rising = found[high] > found[low]
    nearest = lambda: min(found, key=lambda value: abs(found[value] - target))
    for _ in range(rounds):
        if abs(found[nearest()] - target) <= TOLERANCE / 4 * target:
            break
        middle = (low + high) // 2 if is_whole else float(f"{math.sqrt(low * high):.4g}")
        if middle in found:
            break  # nothing lies between
        found[middle] = share(middle)
        low, high = (middle, high) if (found[middle] < target) == is_rising else (low, middle)
    return nearest(), found[nearest()]


def with_option(spec: str, name: str, value: float) -> str:
    """A spec with one more option of its outer method."""
    outer, plus, inner = spec.partition("+")
    joint = "," if "=" in outer.rsplit(":", 1)[-1] else ":"
    return f"{outer}{joint}{name}={value:g}{plus}{inner}"


def sweep(text: str) -> list[str]:
    """The specs of NAME:OPTION=LOW..HIGH/N: N values (5) evenly from low to high, all of whole numbers."""
    match = re.search(rf"=({NUMBER})\.\.({NUMBER})(?:/(\d+))?(?=[,+]|$)", text)
    if not match or not float(match[1]) < float(match[2]):
        raise ValueError(f"sweep {text!r} has no rising range; write one as teacache:threshold=0.05..0.3/6")
    low, high, count = float(match[1]), float(match[2]), int(match[3] or 0)
    is_whole = match[1].isdigit() and match[2].isdigit()
    count = count or (int(high - low) + 1 if is_whole else 5)
    if count < 2:
        raise ValueError(f"sweep {text!r}: {count} is no range of values; wanted 2 or more")
    values = [low + (high - low) * i / (count - 1) for i in range(count)]
    values = dict.fromkeys(round(value) for value in values) if is_whole else values
    return [f"{text[: match.start()]}={value:g}{text[match.end() :]}" for value in values]


def read_match(text: str) -> float:
    """The share in macs=S."""
    key, _, value = text.partition("=")
    try:
        share = float(value)
        if key != "macs" or not 0 < share < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"match {text!r} is not macs=S with S between 0 and 1, such as macs=0.5") from None
    return share
