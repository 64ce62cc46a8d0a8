"""The flags of every command, and how their values are read. Standard library only."""

import argparse
import re
from pathlib import Path

OFFLOAD_HELP = (
    "none; parts, the transformer goes before the video is decoded; blocks, its blocks visit the GPU in turn"
)
PROMPTS_HELP = """one prompt per line; generate leaves out the videos that are finished, and where one fails
(a full disk aside) makes the others all the same"""


def add_generate_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", nargs="?", help="what the video shows")
    p.add_argument(
        "--from", dest="from_file", type=Path, metavar="FILE", help="make a video of minidit's again"
    )
    add_engine_flags(p)
    p.add_argument("--verify", action="store_true", help="compare the model's files with their sha256 first")
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the transformer's blocks: a minute at first; on a CPU it needs a C++ compiler",
    )
    add_memory_flags(p)
    add_run_flags(p)
    p.add_argument(
        "--output", type=Path, metavar="FILE", help=".mp4, .gif, .png or .npz (a folder for --prompts)"
    )
    p.add_argument("--samples", type=int, default=1, metavar="N", help="videos of every prompt of --prompts")
    p.add_argument(
        "--layout",
        choices=("numbered", "vbench"),
        default="numbered",
        help="vbench: files are PROMPT-SAMPLE.mp4, as VBench looks for them; finished ones are skipped",
    )
    p.add_argument("--fps", type=float, help="of the file; the model does not see it")
    add_tiled_flag(p)
    method = p.add_mutually_exclusive_group()
    method.add_argument("--cache", metavar="SPEC", help="caching method, such as mixcache:eff (none)")
    p.add_argument("--profiles", type=Path, metavar="DIR", help="caching profiles, if not the model's own")
    add_keep_flags(p)
    add_rank_flags(p)
    p.add_argument("--allow-inert", action="store_true", help="a cache that never acts is no error")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write a log of every step as JSON")
    p.add_argument(
        "--timeline", type=Path, metavar="FILE", help="draw what every step ran and reused, a .png"
    )
    again = "force the plans of a trace again"
    method.add_argument("--replay", dest="cache", type="replay:{}".format, metavar="FILE", help=again)


def add_compare_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--cache", action="append", default=[], metavar="SPEC", help="a method; once for each")
    p.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="SPEC",
        help="a method over a range of one option: NAME:OPTION=LOW..HIGH/N is N of them",
    )
    p.add_argument(
        "--match", metavar="macs=S", help="tune every method to this share of the uncached multiply-adds"
    )
    add_engine_flags(p)
    p.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    add_weights_flag(p)
    add_run_flags(p)
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="videos of every prompt")
    p.add_argument(
        "--tune-prompts", type=Path, metavar="FILE", help="prompts for --match, one per line; not the table's"
    )
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder (compare) of report.html, videos, pictures, and of what a second call takes from it",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="all numbers (DIR/compare.json)")
    p.add_argument("--fps", type=float, help="of the files; the model does not see it")
    p.add_argument("--profiles", type=Path, metavar="DIR", help="caching profiles, if not the model's own")
    add_tiled_flag(p)


def add_profile_flags(p: argparse.ArgumentParser) -> None:
    methods = "mixcache, unicp, planned, teacache, magcache, adacache, ditfastattn; else mixcache+unicp"
    p.add_argument("--cache", default="mixcache+unicp", metavar="METHOD", help=methods)
    add_engine_flags(p)
    add_weights_flag(p)
    add_run_flags(p)
    p.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the profiles, if not the model's own"
    )
    p.add_argument("--figure", type=Path, metavar="FILE", help="draw redundancy and impact, a .png")


def add_decode_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("latents", type=Path, help="a .latents.safetensors that generate left behind")
    p.add_argument("--output", type=Path, metavar="FILE", help=".mp4, .gif, .png or .npz")
    add_engine_flags(p)
    add_tiled_flag(p)


def add_inspect_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model", default="demo", help="a model folder, demo (default), or a release such as wan2.1-t2v-14b"
    )
    add_size_flags(p)
    p.add_argument("--dtype", default="bf16", help="bf16 (default), fp32 or fp16")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="that it would run on (cuda)")
    p.add_argument("--cache", default="none", metavar="SPEC", help="caching method (none)")
    add_weights_flag(p)
    p.add_argument("--offload", default="none", choices=("none", "parts", "blocks"), help=OFFLOAD_HELP)
    p.add_argument("--ranks", type=int, default=1, metavar="N", help="that share the video; of one of them")
    modes = ("auto", "ulysses", "cfg", "ulysses+cfg")
    p.add_argument("--parallel", default="auto", choices=modes, help="how the ranks share it, as generate's")
    add_tiled_flag(p)


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
    budget = """the most that may be kept from step to step, such as 2GiB: the text's keys and values go first
(exact), then a method's larger parts, by name; what does not fit then is refused"""
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
        help="decode in blended tiles; less memory, other pixels (HunyuanVideo always does)",
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
