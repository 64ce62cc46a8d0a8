"""The vocabulary of caching: what a policy says about one step, as frozen data. Standard library only.

A policy answers every step with a Plan; cache/loop.py carries it out. Blocks are numbered 0 .. depth-1; h
before block k is h(k), and h(depth) enters the head.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Run blocks first .. last-1; last=None runs to the end."""

    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class Plan:
    """One step: the path from h(0) to h(depth), one item after the other."""

    path: tuple[Run, ...] = (Run(),)


RUN_ALL = Plan()
