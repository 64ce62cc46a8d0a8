"""The command line: parse, call, print. One function per command; only those that need torch import it."""

import argparse
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from minidit import __version__
from minidit.presets import PRESETS

EXAMPLE = 'example: python -m minidit generate "a red circle moves left to right" --output circle.mp4'


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code. A user's mistake is one line on stderr and exit code 2."""
    args = parser().parse_args(dashed(sys.argv[1:] if argv is None else argv))
    try:
        args.command(args)
    except KeyboardInterrupt:
        print("minidit: interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        if args.debug:
            raise
        print(f"minidit: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def dashed(argv: list[str]) -> list[str]:
    """Flags written with underscores, as diffusers writes them: --num_frames is --num-frames."""
    return [
        re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), a) if a.startswith("--") else a for a in argv
    ]


def one_line(error: BaseException) -> str:
    """The first line of an error's message, with its type where the message alone says too little."""
    text = (str(error).strip().splitlines() or [""])[0]
    if "out of memory" in text.lower() or "allocate memory" in text or isinstance(error, MemoryError):
        return f"{text or 'out of memory'}; try a smaller --size, fewer --num-frames, or --dtype bf16"
    return f"{type(error).__name__}: {text}" if isinstance(error, RuntimeError) or not text else text


def generate(args: argparse.Namespace) -> None:
    """Prompts to video files."""
    from minidit.generate import Choices, Engine, Stopwatch
    from minidit.settings import set_threads
    from minidit.video import check_output, read_settings

    past = read_settings(args.from_file) if args.from_file else {}
    jobs = list_jobs(args, past)
    for _, output in jobs:
        check_output(output)
    check_logs(args, len(jobs))
    model, dtype = args.model or past.get("model", "demo"), args.dtype or past.get("dtype")
    engine = Engine(
        model,
        device=args.device,
        dtype=dtype,
        verify=args.verify,
        profiles=args.profiles,
    )
    if past and not args.model and past.get("model_id") != engine.model_id:
        raise ValueError(
            f"{args.from_file} was made by model {past.get('model_id')}, {model} is {engine.model_id}; "
            f"name a model with --model to use its settings all the same"
        )
    names = [f.name for f in fields(Choices)]
    chosen = {name: past[name] for name in names if name in past}
    chosen |= {name: value for name in names if (value := getattr(args, name)) is not None}
    if ".py:" in chosen.get("cache", "") and args.cache is None:
        raise ValueError(
            f"{args.from_file} was made with {chosen['cache']}, which is code; name it with --cache to run it"
        )
    choices = Choices(**chosen)
    runs = [
        engine.resolve(prompt, replace(choices, seed=choices.seed + 1000 * index))
        for index, (prompt, _) in enumerate(jobs)
    ]
    for settings, (_, output) in zip(runs, jobs, strict=True):
        check_output(output, settings.fps)
    set_threads(runs[0])
    watch = Stopwatch()
    with watch.stage("text"):
        texts = engine.encode_all(runs)
    for number, (settings, text, (_, output)) in enumerate(zip(runs, texts, jobs, strict=True), 1):
        print(f"[{number}/{len(jobs)}] {output}: " if len(jobs) > 1 else "", end="")
        print(describe(settings), flush=True)
        make_video(engine, settings, text, output, watch, args)


def make_video(engine, settings, text, output: Path, watch, args: argparse.Namespace) -> None:
    """One video, its latents saved before they are decoded. watch: has timed the text of all videos"""
    from minidit.generate import save_latents
    from minidit.video import write_video

    quiet = args.quiet
    latents_path = output.with_name(output.stem + ".latents.safetensors")
    with watch.stage("load"):
        engine.module("transformer")
    with watch.stage("denoise"):
        outcome = engine.denoise(settings, text, progress=not quiet)
    save_latents(latents_path, outcome.latents, settings)
    try:
        with watch.stage("decode"):
            frames = engine.decode(outcome.latents, tiled=settings.tiled, progress=not quiet)
        with watch.stage("write"):
            write_video(output, frames, fps=settings.fps, settings=asdict(settings))
    except BaseException:
        finish = f"python -m minidit decode {latents_path}"
        print(f"latents are in {latents_path}; {finish} finishes", file=sys.stderr)
        raise
    latents_path.unlink()
    report_run(engine.trace(settings, outcome), output, watch.seconds, args)


def report_run(trace: dict, output: Path, seconds: dict[str, float], args: argparse.Namespace) -> None:
    """What a finished run says: its logs, what its cache came to, seconds by stage."""
    from minidit.cache.trace import acted, closing_line, write_trace

    cache = trace["settings"]["cache"]
    if args.trace:
        write_trace(args.trace, trace)
    if args.timeline:
        from minidit.report import draw_timeline

        draw_timeline(args.timeline, trace)
    if cache != "none":
        print(closing_line(trace))
    print(f"{output}  " + "  ".join(f"{name} {s:.2f} s" for name, s in seconds.items()))
    is_inert = cache != "none" and not cache.startswith("replay:") and not acted(trace)
    if is_inert and not args.allow_inert:
        raise ValueError(
            f"cache {cache} never acted: every step ran in full; loosen its threshold, take more "
            f"steps, or say --allow-inert ({output} is written)"
        )


def decode(args: argparse.Namespace) -> None:
    """Saved latents to a video file."""
    from minidit.generate import Engine, load_latents
    from minidit.video import check_output, write_video

    latents, settings = load_latents(args.latents)
    output = args.output or args.latents.with_name(
        args.latents.name.removesuffix(".latents.safetensors") + ".mp4"
    )
    check_output(output)
    engine = Engine(args.model or settings.model, device=args.device, dtype=args.dtype or settings.dtype)
    if engine.model_id != settings.model_id and not args.model:
        raise ValueError(f"{args.latents} is of model {settings.model_id}; name its folder with --model")
    settings = replace(settings, tiled=bool(args.tiled or settings.tiled))
    frames = engine.decode(latents, tiled=settings.tiled, progress=not args.quiet)
    write_video(output, frames, fps=settings.fps, settings=asdict(settings))
    print(output)


def profile(args: argparse.Namespace) -> None:
    """Measure on uncached runs what a caching method needs to know of a model, into its profiles."""
    from minidit.cache import profile as profiling
    from minidit.generate import Choices, Engine
    from minidit.profiles import write_profile
    from minidit.report import draw_curves, import_pyplot
    from minidit.settings import set_threads

    methods = profiling.methods_to_profile(args.cache)
    if args.figure:
        if "mixcache" not in methods:
            raise ValueError(f"--figure draws mixcache's curves, and --cache is {args.cache}; leave it out")
        import_pyplot()  # missing, it is missed before the work
    engine = Engine(args.model or "demo", device=args.device, dtype=args.dtype, keep_text_encoder=True)
    names = [f.name for f in fields(Choices)]
    chosen = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    settings = engine.resolve("", Choices(**{k: v for k, v in chosen.items() if k != "cache"}))
    prompts = profiling.SHAPE_PROMPTS if engine.name == "demo" else profiling.SCENE_PROMPTS
    if args.prompts:
        prompts = read_prompts(args.prompts)
    set_threads(settings)
    print(describe(settings), flush=True)
    folder = args.output or engine.folder / "profiles"
    for name, method in methods.items():
        found = profiling.make_profile(method, engine, settings, prompts)
        path = write_profile(folder, found)
        print(profiling.describe(found))
        if args.figure and name == "mixcache":
            draw_curves(args.figure, found.data, f"{engine.name}, {settings.steps} steps")
        print(path)
    engine.profile_folders = [folder]
    for line in profiling.closed_loop(engine, settings, args.cache, prompts[:2]):
        print(line)


def models(args: argparse.Namespace) -> None:
    """What can be run: the embedded model and the releases that weights_convert turns into model folders."""
    rows = [("name", "family", "width x depth", "size", "frames", "steps")]
    for name, preset in PRESETS.items():
        t, d = preset.transformer, preset.defaults
        size = f"{d.width}x{d.height}"
        shape = f"{t.width} x {t.depth}"
        rows.append((name, preset.family, shape, size, str(d.num_frames), str(d.steps)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(
        "demo is the embedded model; the releases run from a folder that python -m weights_convert makes.\n"
    )
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def caches(args: argparse.Namespace) -> None:
    """The caching methods, their options and the papers they are from."""
    from minidit.cache.spec import METHODS, find_class, summary

    for name in METHODS:
        first, options = summary(name)
        variants = "".join(f"  {name}:{variant}" for variant in getattr(find_class(name), "variants", {}))
        shown = "replay:FILE" if name == "replay" else name
        print(f"{shown}{variants}\n    {first}" + (f"\n    options: {options}" if options else ""))
    print(
        "\nNAME+NAME lets the second act inside the blocks of the first; my_policy.py:MyPolicy is your own."
    )


def inspect(args: argparse.Namespace) -> None:
    """Parameters, multiply-adds and memory of a model, without running it."""
    from minidit.costs import report

    print(report(args.model, (args.width, args.height, args.num_frames), args.dtype))


def list_jobs(args: argparse.Namespace, past: dict) -> list[tuple[str, Path]]:
    """(prompt, output file) of every video that was asked for."""
    if args.prompt is not None and args.prompts:
        raise ValueError("give a prompt or --prompts FILE, not both")
    if args.prompts:
        lines = read_prompts(args.prompts)
        folder = args.output or Path(".")
        folder.mkdir(parents=True, exist_ok=True)
        return [(line, folder / f"{i:03d}-{slug(line)}.mp4") for i, line in enumerate(lines)]
    prompt = args.prompt if args.prompt is not None else past.get("prompt")
    if prompt is None:
        raise ValueError(f"no prompt was given; {EXAMPLE}")
    return [(prompt, args.output or Path(f"{slug(prompt)}.mp4"))]


def check_logs(args: argparse.Namespace, videos: int) -> None:
    """Refuse a log that could not be written after the run."""
    for flag, path in (("--trace", args.trace), ("--timeline", args.timeline)):
        if path and videos > 1:
            raise ValueError(f"{flag} writes the log of one video; give one prompt")
        if path and not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    if args.timeline:
        from minidit.report import import_pyplot

        import_pyplot()  # missing, it is missed before the run


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one per line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as such") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompts; write one per line")
    return lines


def slug(prompt: str) -> str:
    """A file name from a prompt: letters and digits of any script, joined by dashes, at most 60."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "video"


def describe(settings) -> str:
    """The resolved settings, one line to read before the run starts."""
    s = settings
    negative = f" negative={s.negative_prompt!r}" if s.negative_prompt else ""
    return (
        f"{s.prompt!r}{negative}\n"
        f"  {s.width}x{s.height}, {s.num_frames} frames at {s.fps:g} fps · seed {s.seed} · {s.steps} steps "
        f"{s.solver} ({s.sigma_grid} grid), shift {s.flow_shift:g}, guidance {s.guidance_scale:g}"
        f"{f' (embedded), true cfg {s.true_cfg:g}' if s.true_cfg else ''}"
        f"{' (dynamic)' if s.dynamic_cfg else ''}\n"
        f"  {s.model} ({s.model_id}) · {s.dtype} on {s.device} · residual {s.residual} · "
        f"attention {s.attention} · {'batched' if s.batched_guidance else 'sequential'} guidance · "
        f"cache {s.cache}"
    )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m minidit", description="Video generation with caching woven in.")
    top.add_argument("--version", action="version", version=f"minidit {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add = lambda name, run: add_command(commands, name, run)

    p = add("generate", generate)
    p.add_argument("prompt", nargs="?", help="what the video shows")
    p.add_argument(
        "--from", dest="from_file", type=Path, metavar="FILE", help="make a video of minidit's again"
    )
    add_engine_flags(p)
    p.add_argument("--verify", action="store_true", help="compare the model's files with their sha256 first")
    add_run_flags(p)
    p.add_argument(
        "--output", type=Path, metavar="FILE", help=".mp4, .gif, .png or .npz (a folder for --prompts)"
    )
    p.add_argument("--fps", type=float, help="of the file; the model does not see it")
    add_tiled_flag(p)
    method = p.add_mutually_exclusive_group()
    method.add_argument("--cache", metavar="SPEC", help="caching method, such as mixcache:eff (none)")
    p.add_argument("--profiles", type=Path, metavar="DIR", help="caching profiles, if not the model's own")
    p.add_argument("--allow-inert", action="store_true", help="a cache that never acts is no error")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write a log of every step as JSON")
    p.add_argument(
        "--timeline", type=Path, metavar="FILE", help="draw what every step ran and reused, a .png"
    )
    again = "force the plans of a trace again"
    method.add_argument("--replay", dest="cache", type="replay:{}".format, metavar="FILE", help=again)

    p = add("profile", profile)
    p.add_argument("--cache", default="mixcache+unicp", help="mixcache, unicp or mixcache+unicp (default)")
    add_engine_flags(p)
    add_run_flags(p)
    p.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the profiles, if not the model's own"
    )
    p.add_argument("--figure", type=Path, metavar="FILE", help="draw redundancy and impact, a .png")

    p = add("decode", decode)
    p.add_argument("latents", type=Path, help="a .latents.safetensors that generate left behind")
    p.add_argument("--output", type=Path, metavar="FILE", help=".mp4, .gif, .png or .npz")
    add_engine_flags(p)
    add_tiled_flag(p)

    add("models", models)
    add("caches", caches)

    p = add("inspect", inspect)
    p.add_argument(
        "--model", default="demo", help="a model folder, demo (default), or a release such as wan2.1-t2v-14b"
    )
    add_size_flags(p)
    p.add_argument("--dtype", default="bf16", help="bf16 (default), fp32 or fp16")
    return top


def add_command(commands, name: str, run) -> argparse.ArgumentParser:
    # no abbreviations: --prompt would be --prompts, a file
    p = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
    p.set_defaults(command=run)
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


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
    p.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line")
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
    p.add_argument("--attention", metavar="BACKEND", help="auto, flash, cudnn, efficient or math")
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


if __name__ == "__main__":
    sys.exit(main())
