"""How kernels are declared and launched: one place knows whether Triton is here, and how configs are chosen.

Triton is imported where a kernel can run: with a GPU build of torch, or under TRITON_INTERPRET=1, which runs
kernels on the CPU line by line; or where somebody has imported it already, as the compile check does. Else
`jit` leaves a function alone, and the launchers use the references.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# read once: a knob inside a compiled function would break its graph
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

WANTED = torch.version.cuda or INTERPRET or "triton" in sys.modules
try:
    triton = import_module("triton") if WANTED else None
except ImportError:  # there is none for this system
    triton = None

if triton is not None:
    import triton.language as tl

    jit, Config = triton.jit, triton.Config
else:
    jit, Config = lambda function: function, lambda constants, **options: None

    class tl:  # what kernel files name outside of function bodies
        constexpr = staticmethod(lambda value: value)


IMPLS = ("auto", "triton", "reference")
ARCHES = (80, 90, 100)  # compute capabilities that the compile check knows


@dataclass(frozen=True)
class Case:
    """One way in which a kernel is launched, as the compile check (resources.py) wants it."""

    name: str  # kernel and variant, such as "mix bf16 depth 3"
    kernel: Any  # the jitted or autotuned function
    types: dict[str, str]  # of the arguments at run time: "*bf16", "fp32", "i32"; "i32:16": a multiple of 16
    constants: dict[str, Any]  # constexpr arguments, and those that Triton makes so (None, the integer 1)
    configs: tuple[Any, ...] = ()  # the shipped ones; () is kernel.configs, those of autotune
    arches: tuple[int, ...] = ARCHES  # on which these configs are used


def runs_kernel(x: Tensor, impl: str = "auto") -> bool:
    """Whether the Triton kernel takes this tensor: `auto` on a GPU, "triton" there or under the interpreter.

    A forced choice that cannot run raises RuntimeError: there is no silent fallback.
    """
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose one of {', '.join(IMPLS)}")
    if impl == "reference":
        return False
    if impl == "auto":
        return x.is_cuda and triton is not None
    if triton is None or not (x.is_cuda or INTERPRET):
        raise RuntimeError(
            f"impl='triton' cannot run on {x.device}: it needs a CUDA tensor, or TRITON_INTERPRET=1 in the "
            f"environment before the first import"
        )
    return True


def autotune(configs: Sequence[Any], key: Sequence[str]) -> Callable:
    """triton.autotune; under the interpreter the first config alone, as there is nothing to time with.

    A kernel's configs are also what the compile check compiles: kernel.configs.
    """
    if triton is None:
        return lambda kernel: kernel
    return triton.autotune(configs[:1] if INTERPRET else list(configs), key=list(key))
