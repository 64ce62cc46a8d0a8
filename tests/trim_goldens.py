"""Make the recordings that ship: whole ones without what only helps to locate a difference.

    python -m tests.trim_goldens SOURCE tests/goldens COMPONENT...

Mid-states go, except those that a test reads; inputs, outputs, weights and configs stay as they are.
"""

import argparse
import fnmatch
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save

KEEP = {  # mid-states that tests compare with
    "umt5_encoder": ("mid.block_0.rel_bucket_by_offset",),
    "wan_denoise": ("mid.sigmas", "mid.timesteps", "mid.noise_pred", "dpmpp.mid.*"),
}


def is_mid(name: str) -> bool:
    return "mid" in name.split(".")


def trim(source: Path, out: Path) -> int:
    """Copy one recording without its mid-states; returns its bytes."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} is not a recording (no config.json)")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
    io = out / "io.safetensors"
    if io.is_file():
        kept = KEEP.get(source.name, ())
        wanted = lambda name: not is_mid(name) or any(fnmatch.fnmatch(name, pattern) for pattern in kept)
        io.write_bytes(save({name: x for name, x in load_file(io).items() if wanted(name)}))
    return sum(path.stat().st_size for path in out.iterdir())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.trim_goldens", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder of whole recordings and their tolerances.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("components", nargs="+", metavar="COMPONENT")
    args = parser.parse_args(argv)
    sizes = {name: trim(args.source / name, args.out / name) for name in args.components}
    shutil.copyfile(args.source / "tolerances.json", args.out / "tolerances.json")
    for name, size in (sizes | {"in all": sum(sizes.values())}).items():
        print(f"{name:<24} {size / 1e6:6.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
