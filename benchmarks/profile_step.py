"""Where does one guided step spend its time: which kernels, how often, and what share of the step each?

python -m benchmarks.profile_step --preset wan2.1-t2v-14b --size 832x480 [--compile] [--top 10]
"""

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import command_line, machine, results_folder, table, write_results
from benchmarks.models import Subject, find_subject
from benchmarks.timing import once
from minidit.compiled import CompiledBlock
from minidit.flags import size as parse_size
from minidit.presets import PRESETS
from minidit.settings import DTYPES

COLUMNS = {"kernel": "kernel", "ms": "ms", "share": "of the step", "calls": "calls", "us_each": "us each"}


def trace(subject: Subject, compiled: bool) -> tuple[profile, float]:
    """The profile of one step after two that warm up, and the seconds of a step that is not profiled."""
    forward = subject.forward()
    if compiled:
        forward = replace(forward, block_fn=CompiledBlock())
    for _ in range(2):
        seconds = once(lambda: subject.step(forward), subject.device)
    on_gpu = subject.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for _ in range(2):  # the first profile pays for starting the profiler
        with profile(activities=activities) as found:
            once(lambda: subject.step(forward), subject.device)
    return found, seconds


def rows_of(found: profile, seconds: float, on_gpu: bool, top: int) -> list[dict[str, Any]]:
    """The kernels (on a CPU the operations) that take most, and all others together."""
    own = lambda e: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3  # ms
    kernels = {torch.autograd.DeviceType.CUDA} if on_gpu else {torch.autograd.DeviceType.CPU}
    events = sorted((e for e in found.key_averages() if e.device_type in kernels), key=own, reverse=True)
    share = lambda ms: f"{ms / 1e3 / seconds:.1%}"
    rows = [
        {
            "kernel": e.key[:80],
            "ms": round(own(e), 3),
            "share": share(own(e)),
            "calls": e.count,
            "us_each": round(1e3 * own(e) / e.count, 1),
        }
        for e in events[:top]
    ]
    rest = sum(map(own, events[top:]))
    rows.append(
        {"kernel": f"{len(events[top:])} others", "ms": round(rest, 3), "share": share(rest), "calls": ""}
    )
    total = sum(map(own, events))
    rows.append({"kernel": "all, of a step without profiler", "ms": round(total, 3), "share": share(total)})
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["demo", *PRESETS], default="demo")
    parser.add_argument("--size", type=parse_size, default=(None, None))
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--depth", type=int, help="fewer blocks")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (1)")
    parser.add_argument("--chrome", action="store_true", help="also write the whole trace, tens of MB")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    subject = find_subject(args.preset, (*args.size, args.num_frames), args.device, dtype, args.depth)
    found, seconds = trace(subject, args.compile)
    rows = rows_of(found, seconds, args.device.startswith("cuda"), args.top)
    print(table(rows, COLUMNS))
    tflops = 2 * subject.macs / seconds / 1e12
    print(f"\n{subject.name} {dtype}: {seconds:.4g} s a step, {tflops:.3g} TFLOP/s · {machine()['card']}")
    name = f"profile-{args.preset}{'-compiled' if args.compile else ''}"
    print(write_results(name, command_line("profile_step"), rows, args.device))
    if args.chrome:
        found.export_chrome_trace(str(results_folder(args.device) / f"{name}.trace.json"))


if __name__ == "__main__":
    main()
