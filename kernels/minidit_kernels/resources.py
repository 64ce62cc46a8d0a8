"""What the shipped kernels take of a GPU, found without one: registers, shared memory, spills.

Every launch that a kernel file ships is compiled for each architecture. Shared memory is in the compiler's
metadata; registers and stack are in the binary, read with the cuobjdump inside Triton's package. A config
that spills registers or wants more shared memory than a block may have is an error.

A kernel file takes part by a function cases() -> list[Case] and its name in FILES:

    def cases() -> list[Case]:
        pointers = {"x_ptr": "*bf16", "y_ptr": "*bf16"}  # aligned to 16 bytes, as torch's allocations are
        sizes = {"L": "i32", "row_stride": "i32:16"}  # ":16": a multiple of 16 at run time, as widths are
        return [Case("scale bf16 D5120", _scale_kernel, pointers | sizes, {"D": 5120, "BLOCK_D": 8192})]

Its configs are those of @autotune, or Case(configs=(Config({...}, num_warps=4, num_stages=1),)) where there
is no autotuning; a case for some architectures only says arches=(80,). Every argument of the kernel is in
types, in constants or in a config's constants. Needs no GPU, and no TRITON_INTERPRET in the environment.

    python -m minidit_kernels.resources --arch sm_90 --kernel mix
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("triton"):  # imported before any kernel file, so that their kernels are declared
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

from minidit_kernels.tuning import ARCHES, INTERPRET, Case, triton

FILES = ("rel_l1", "mix", "pca_attention", "modulate", "qk_norm_rope")
SHARED_KIB = {80: 163, 90: 227, 100: 227}  # per block. CUDA C programming guide, "compute capabilities"
TENSOR_COLUMNS = 512  # of a multiprocessor. PTX ISA, "tensor memory"
UNITS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma"}  # PTX instructions


@dataclass(frozen=True)
class Usage:
    """What one config of a case takes on one architecture."""

    kernel: str
    config: str
    arch: str
    shared_kib: float
    registers: int
    stack_bytes: int
    tensor_columns: int  # of tensor memory, on sm_100
    unit: str  # of matrix products: mma, wgmma, tcgen05, or "" where there are none

    def complaints(self) -> list[str]:
        """Why this config should not be shipped."""
        limit = SHARED_KIB[int(self.arch.removeprefix("sm_"))]
        said = []
        if self.stack_bytes:
            said.append(f"spills: {self.stack_bytes} bytes of stack")
        if self.shared_kib > limit:
            said.append(f"wants {self.shared_kib:g} KiB of shared memory, a block has {limit}")
        if self.tensor_columns > TENSOR_COLUMNS:  # the compiler says nothing and makes an empty kernel
            said.append(f"wants {self.tensor_columns} columns of tensor memory, there are {TENSOR_COLUMNS}")
        return said


def compile_case(case: Case, config: Any, arch: int) -> Any:
    """Triton's compiled kernel of one config."""
    function = case.kernel.fn if isinstance(case.kernel, triton.runtime.Autotuner) else case.kernel
    constants = case.constants | config.kwargs
    kinds = {name: "constexpr" for name in constants} | case.types
    names = function.arg_names
    if set(kinds) != set(names):
        wrong = ", ".join(sorted(set(kinds) ^ set(names)))
        raise ValueError(f"{case.name}: its types and constants do not fit the kernel's arguments in {wrong}")
    signature = {name: kinds[name].removesuffix(":16") for name in names}
    aligned = [i for i, n in enumerate(names) if kinds[n].endswith(":16") or kinds[n].startswith("*")]
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def usage(case: Case, config: Any, arch: int) -> Usage:
    """Compile one config and read what it takes."""
    compiled = compile_case(case, config, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [dump, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if found is None:
        raise ValueError(f"{case.name}: cuobjdump says nothing of registers: {said.stdout.strip()!r}")
    unit = next((unit for word, unit in UNITS.items() if word in compiled.asm["ptx"]), "")
    taken = compiled.metadata.shared / 1024, int(found[1]), int(found[2]), compiled.metadata.tmem_size
    return Usage(case.name, config_name(config), f"sm_{arch}", *taken, unit)


def config_name(config: Any) -> str:
    """A config in short, such as "BLOCK_M 128, BLOCK_N 64, warps 8, stages 3"."""
    parts = config.kwargs | {"warps": config.num_warps, "stages": config.num_stages}
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def shipped(files: Sequence[str] = FILES) -> list[Case]:
    """The cases of these kernel files."""
    return [case for file in files for case in import_module(f"minidit_kernels.{file}").cases()]


def check(cases: Sequence[Case], arches: Sequence[int] = ARCHES, *, every: bool = True) -> list[Usage]:
    """Compile cases for the architectures they name. every=False: of each kernel the first config alone"""
    rows, seen = [], set()
    for case in cases:
        configs = case.configs or case.kernel.configs
        for arch in (a for a in arches if a in case.arches):
            if every:
                rows += [usage(case, config, arch) for config in configs]
            elif (case.kernel, arch) not in seen:
                rows.append(usage(case, configs[0], arch))
                seen.add((case.kernel, arch))
    return rows


def table(rows: Sequence[Usage]) -> str:
    """The rows as text, with complaints behind them."""
    head = ("kernel", "config", "arch", "shared KiB", "registers", "stack bytes", "tensor columns", "unit")
    words = lambda row: (f"{v:.3g}" if isinstance(v, float) else str(v) for v in vars(row).values())
    cells = [head, *(tuple(words(row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    said = [""] + ["; ".join(row.complaints()) for row in rows]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(f"{line}  {words}".rstrip() for line, words in zip(lines, said, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line -> 1 where a shipped config complains"""
    parser = argparse.ArgumentParser(prog="minidit_kernels.resources", description=__doc__.split("\n")[0])
    names = [f"sm_{arch}" for arch in ARCHES]
    parser.add_argument("--arch", nargs="+", choices=names, default=names)
    parser.add_argument("--kernel", nargs="+", choices=FILES, default=FILES, help="kernel files")
    parser.add_argument("--all", action="store_true", help="every case and config, not each kernel's first")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the table there too")
    args = parser.parse_args(arguments)
    if INTERPRET or triton is None:
        raise SystemExit("nothing can be compiled: wanted Triton, and no TRITON_INTERPRET in the environment")
    arches = [int(name.removeprefix("sm_")) for name in args.arch]
    rows = check(shipped(args.kernel), arches, every=args.all)
    print(table(rows))
    if args.json:
        found = {"triton": triton.__version__, "configs": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row.complaints() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
