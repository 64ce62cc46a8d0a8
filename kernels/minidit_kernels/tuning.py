"""How kernels are declared and launched: one place knows whether Triton is here, and how configs are chosen.

Triton is imported where a kernel can run: with a GPU build of torch, or under TRITON_INTERPRET=1, which runs
kernels on the CPU line by line; or where somebody has imported it already, as the compile check does. Else
`jit` leaves a function alone, and the launchers use the references.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# read once: a knob inside a compiled function would break its graph
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

if torch.version.cuda or INTERPRET or "triton" in sys.modules:
    import triton
    import triton.language as tl

    jit = triton.jit
else:
    triton = None
    jit = lambda function: function

    class tl:  # what the signatures of kernels name
        constexpr = None


IMPLS = ("auto", "triton", "reference")


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
