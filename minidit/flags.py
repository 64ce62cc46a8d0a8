"""Flags that several commands have, and how their values are read. Standard library only."""

import argparse
import re
from pathlib import Path

OFFLOAD_HELP = (
    "none; parts, the transformer goes before the video is decoded; blocks, its blocks visit the GPU in turn"
)
PROMPTS_HELP = """one prompt per line; generate leaves out the videos that are finished, and where one fails
(a full disk aside) makes the others all the same"""


def add_keep_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on with an unfinished run of the same settings, to the same video; without one, start",
    )
    p.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="keep the run after every N steps (as often as costs less than 1 %% of the time, every 10 s at "
        "most; 0: only when it is stopped)",
    )
    p.add_argument("--no-text-cache", action="store_true", help="keep and take no encoded prompts")
    p.add_argument(
        "--preview",
        type=Path,
        metavar="FILE",
        help="a .png of the middle frame as it is going to be; costs decoding one frame, and the memory of "
        "the autoencoder beside the transformer",
    )
    p.add_argument("--preview-every", type=int, default=5, metavar="N", help="steps (5)")


def add_rank_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--parallel",
        metavar="HOW",
        help="how the ranks of a torchrun share the work: ulysses, cfg or ulysses+cfg, one video among them; "
        "data, every rank its own prompts; auto (default): data where there is a video for every rank",
    )
    p.add_argument(
        "--check-plans", action="store_true", help="compare the caching plans of all ranks at every step"
    )


def add_weights_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--weights",
        metavar="KIND",
        help="of the transformer's blocks: full (default), int8 or fp8, which take half the memory of bf16; "
        "fp8-dynamic multiplies in fp8 too",
    )


def add_memory_flags(p: argparse.ArgumentParser) -> None:
    add_weights_flag(p)
    p.add_argument("--offload", default="auto", metavar="WHAT", help=f"{OFFLOAD_HELP}; auto (default)")
    budget = "the most that --cache may keep, such as 2GiB"
    p.add_argument("--cache-budget", type=byte_count, metavar="BYTES", help=budget)


def byte_count(text: str) -> int:
    """'2GiB', '512 MiB' or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]iB)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 2GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * 1024 ** (" KMG".index((match[2] or " ")[0])))


def add_tiled_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--tiled",
        action="store_true",
        default=None,  # as every choice that was not made
        help="CogVideoX: decode in blended tiles; less memory, other pixels",
    )


def add_engine_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", metavar="FOLDER", help="a folder from weights_convert, or demo (default)")
    p.add_argument("--device", help="cuda where there is one, else cpu")
    p.add_argument("--dtype", help="fp32, bf16 or fp16; bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--quiet", action="store_true", help="no progress bars")


def add_run_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--prompts", type=Path, metavar="FILE", help=PROMPTS_HELP)
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    p.add_argument("--seed", type=int, help="of the starting noise, the same on every device (0)")
    add_size_flags(p)
    p.add_argument("--steps", "--num-inference-steps", type=int, dest="steps", metavar="N")
    p.add_argument("--guidance-scale", type=float, metavar="S", help="1 turns guidance off")
    p.add_argument("--true-cfg", type=float, metavar="S", help="a second branch beside embedded guidance")
    p.add_argument(
        "--flow-shift", type=float, metavar="S", help="more than 1 spends more steps on high noise"
    )
    p.add_argument("--solver", help="unipc, dpm++ or euler; CogVideoX: ddim or dpm")
    p.add_argument(
        "--dynamic-cfg",
        action=argparse.BooleanOptionalAction,
        help="CogVideoX: guidance that changes from step to step, up to 1 + guidance scale",
    )
    p.add_argument("--sigma-grid", help="wan or diffusers: whose noise levels to visit")
    backends = "auto, flash, cudnn, efficient, math, triton, flash_attn or sage"
    p.add_argument("--attention", metavar="BACKEND", help=backends)
    p.add_argument("--residual", metavar="DTYPE", help="dtype between blocks; fp32 is the original's")


def add_size_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--size", type=size, metavar="WxH", action=SizeAction, help="width and height")
    p.add_argument("--width", type=int)
    p.add_argument("--height", type=int)
    p.add_argument("--num-frames", type=int, metavar="N")


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX*](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 832x480")
    return int(match[1]), int(match[2])


class SizeAction(argparse.Action):
    """--size WxH fills width and height."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.width, namespace.height = values
