"""The command line: parse, call, print. One function per command; only those that need torch import it."""

import argparse
import os
import re
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from minidit import __version__
from minidit.errors import Parser, one_line, own_line, printable
from minidit.flags import (
    add_compare_flags,
    add_decode_flags,
    add_generate_flags,
    add_inspect_flags,
    add_profile_flags,
)
from minidit.presets import PRESETS
from minidit.stopping import FAILURES, Stopped, Unfinished, goes_on, on_signals, stop_now

EXAMPLE = 'example: python -m minidit generate "a red circle moves left to right" --output circle.mp4'


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code. A user's mistake is one line on stderr and exit code 2.

    Ctrl-C and SIGTERM are one line as well, and 130 and 143; a reader that has gone is no line, and 141.
    """
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(dashed(words), argparse.Namespace(words=words))
    try:
        if args.command is not generate and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("generate alone works on several ranks; start this command without torchrun")
        with on_signals(stop_now):
            args.command(args)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Unfinished, KeyboardInterrupt, *FAILURES) as error:
        reason = reason_of(error)
        if args.debug and not isinstance(reason, KeyboardInterrupt):
            raise
        print(f"minidit: {blame(reason, args)}{failure_line(error)}", file=sys.stderr)
        if isinstance(reason, KeyboardInterrupt):
            return reason.exit_code if isinstance(reason, Stopped) else 130
        return 2
    except Exception as error:
        if args.debug or not (blame(error, args) or own_line(error)):
            raise  # a bug of ours, to be seen as a whole
        print(f"minidit: {blame(error, args)}{one_line(error)}", file=sys.stderr)
        return 2
    return 0


def blame(error: BaseException, args: argparse.Namespace) -> str:
    """Begins the line of what a user's own policy brought about outside its file, such as an odd plan.

    What our own code refuses says enough.
    """
    specs = f"{getattr(args, 'cache', '')}{getattr(args, 'sweep', '')}"
    told = isinstance(error, ValueError | OSError | RuntimeError | MemoryError | KeyboardInterrupt)
    if ".py:" not in specs or told or own_line(error):
        return ""
    return f"{printable(specs)} asks for what cannot be done (--debug shows where): "


def reason_of(error: BaseException) -> BaseException:
    """Why a run ended."""
    return error.__cause__ if isinstance(error, Unfinished) else error


def failure_line(error: BaseException) -> str:
    """Why a run ended, and how it goes on."""
    reason = reason_of(error)
    if isinstance(reason, KeyboardInterrupt):
        kept = error if isinstance(error, Unfinished) else "nothing half-written was left"
        return f"interrupted; {kept}"
    return f"{one_line(reason)}; {error}" if isinstance(error, Unfinished) else one_line(reason)


def dashed(argv: list[str]) -> list[str]:
    """Flags written with underscores, as diffusers writes them: --num_frames is --num-frames."""
    return [
        re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), a) if a.startswith("--") else a for a in argv
    ]


def generate(args: argparse.Namespace) -> None:
    """Prompts to video files."""
    from minidit.parallel import joined
    from minidit.settings import check_types
    from minidit.video import check_output, read_settings

    past = read_settings(args.from_file) if args.from_file else {}
    check_types(past)
    jobs = list_jobs(args, past)
    for _, output, _ in jobs:
        check_output(output)
    check_logs(args, len(jobs))
    with joined(args.parallel, len(jobs), device=args.device, checks=args.check_plans) as world:
        if world is not None:
            check_ranks(args, world)
        own = jobs if world is None else world.own(jobs)
        failed = make_videos(args, past, own, world, len(jobs))
        count = len(failed) if world is None else world.count_failed(len(failed))
        if count:
            names = f": {', '.join(failed)}" if len(failed) == count else ""
            raise ValueError(f"{count} of {len(jobs)} videos failed{names}")


def check_ranks(args: argparse.Namespace, world) -> None:
    """Refuse what ranks that share a video do not do; draw bars on one rank alone, and of one video alone."""
    if world.shares_videos and (args.resume or args.checkpoint_every):
        raise ValueError(
            "ranks that share a video keep no checkpoints, as each has a part of the run; leave out --resume "
            "and --checkpoint-every"
        )
    args.quiet |= not (world.shares_videos and world.is_first)


def make_engine(args: argparse.Namespace, past: dict, world):
    """The engine of a run. past: settings of --from's file · world: the ranks that share its videos"""
    from minidit.generate import Engine
    from minidit.text.states import default_folder

    model, dtype = args.model or past.get("model", "demo"), args.dtype or past.get("dtype")
    engine = Engine(
        model,
        device=args.device,
        dtype=dtype,
        verify=args.verify,
        profiles=args.profiles,
        text_cache=None if args.no_text_cache else default_folder(),
        compile=past.get("compile", False) if args.compile is None else args.compile,
        weights=args.weights or past.get("weights", "full"),
        offload=args.offload,
        cache_budget=args.cache_budget,
        world=world,
    )
    if past and not args.model and past.get("model_id") != engine.model_id:
        raise ValueError(
            f"{args.from_file} was made by model {past.get('model_id')}, {model} is {engine.model_id}; "
            f"name a model with --model to use its settings all the same"
        )
    return engine


def chosen(args: argparse.Namespace, past: dict):
    """The choices of --from's file, and over them those of the command line."""
    from minidit.generate import Choices

    names = [f.name for f in fields(Choices)]
    found = {name: past[name] for name in names if name in past}
    found |= {name: value for name in names if (value := getattr(args, name)) is not None}
    if ".py:" in found.get("cache", "") and args.cache is None:
        raise ValueError(
            f"{args.from_file} was made with {found['cache']}, which is code; name it with --cache to run it"
        )
    return Choices(**found)


def left_to_make(args: argparse.Namespace, videos: list[tuple[Any, Path]], shared) -> list[tuple[Any, Path]]:
    """(settings, output) of the videos that are not finished; refuses outputs that cannot be written."""
    from minidit.video import check_output

    for settings, output in videos:
        check_output(output, settings.fps)
    left = videos
    if args.layout == "vbench":
        left = unfinished(videos)
    elif args.prompts or (args.resume and not (args.trace or args.timeline)):
        left = [(settings, path) for settings, path in videos if not is_finished(settings, path)]
    if shared:  # the first rank writes the files, and alone has to see them
        names = shared.told([str(path) for _, path in left])
        left = [(settings, path) for settings, path in videos if str(path) in names]
    return left


def make_videos(
    args: argparse.Namespace, past: dict, jobs: list[tuple[str, Path, int]], world, count: int
) -> list[str]:
    """The videos of this process -> the names of those that failed.

    past: settings of --from's file · world: this process is one of its ranks · count: videos of all ranks
    """
    from minidit.generate import Stopwatch
    from minidit.settings import set_threads

    shared = world if world is not None and world.shares_videos else None
    engine = make_engine(args, past, shared)
    choices = chosen(args, past)
    runs = [
        engine.resolve(prompt, replace(choices, seed=choices.seed + offset)) for prompt, _, offset in jobs
    ]
    videos = left_to_make(
        args, [(run, output) for run, (_, output, _) in zip(runs, jobs, strict=True)], shared
    )
    if len(videos) < len(jobs):
        print(f"{len(jobs) - len(videos)} of {len(jobs)} videos are finished")
    if not videos:
        return []
    set_threads(runs[0])
    engine.fit(runs[0])
    for line in engine.notes:
        print(line)
    watch = Stopwatch(engine.peaks)
    with watch.stage("text"):
        firsts = {settings.prompt: settings for settings, _ in videos}  # samples share their text
        texts = dict(zip(firsts, engine.encode_all(list(firsts.values())), strict=True))
    failed = []
    for number, (settings, output) in enumerate(videos, 1):
        if world is None or shared:  # else every rank says one line per video, when it is done
            print(f"[{number}/{len(videos)}] {output}: " if len(jobs) > 1 else "", end="")
            print(describe(settings) + (f" · {engine.layout(settings)}" if shared else ""), flush=True)
        try:
            make_video(engine, settings, texts[settings.prompt], output, watch, args)
        except (Unfinished, *FAILURES) as error:
            # one prompt's trouble is its own; a disk that is full, or Ctrl-C, ends them all
            is_last_word = shared or args.debug or (world is None and len(videos) == 1)
            if is_last_word or isinstance(reason_of(error), OSError | KeyboardInterrupt):
                raise
            print(f"minidit: {output}: {failure_line(error)}", file=sys.stderr)
            failed.append(output.name)
        if world is not None and not shared:
            print(f"{world.count_finished()} of {count} videos are done", flush=True)
    return failed


def make_video(engine, settings, text, output: Path, watch, args: argparse.Namespace) -> None:
    """One video, kept on disk at every stage. watch: has timed the text of all videos"""
    from minidit.checkpoint import Keeper, checkpoint_path, latents_path, remove_checkpoint
    from minidit.generate import load_latents, load_trace
    from minidit.memory import describe as describe_memory
    from minidit.video import sidecar_path, write_video

    if engine.world is not None and not engine.world.is_first:
        engine.denoise(settings, text)
        return
    latents_file, checkpoint = latents_path(output), checkpoint_path(output)
    step = find_unfinished(output, settings, resume=args.resume)
    every = args.checkpoint_every if engine.world is None else 0
    keeper = Keeper(checkpoint, settings, every, start=step)
    if step == settings.steps:
        latents, trace = load_latents(latents_file)[0], load_trace(latents_file)
    else:
        latents, trace = make_latents(engine, settings, text, output, keeper, watch, args)
    remove_checkpoint(checkpoint)
    finish = shlex.join(["python", "-m", "minidit", "decode", f"{latents_file}", "--output", f"{output}"])
    with goes_on(lambda error: f"latents are in {latents_file}; {finish} finishes"):
        keeper.stop_if_wanted()
        write_logs(trace, args)
        engine.make_room()
        with watch.stage("decode"):
            frames = engine.decode_stream(latents, tiled=settings.tiled, progress=not args.quiet)
            write_video(output, frames, fps=settings.fps, settings=asdict(settings))
            if args.layout == "vbench":
                sidecar_path(output).unlink()  # VBench takes the suffix of whatever is listed first
    latents_file.unlink()
    report_run(trace, output, watch.seconds, args)
    print(describe_memory(engine.stages, engine.peaks))


def make_latents(engine, settings, text, output: Path, keeper, watch, args: argparse.Namespace) -> tuple:
    """The latents of a video and their trace, saved. keeper: writes checkpoints, and has found the first"""
    from minidit.checkpoint import latents_path, load_checkpoint
    from minidit.generate import save_latents
    from minidit.preview import Preview

    start = load_checkpoint(keeper.path, settings) if keeper.saved else None
    schedule = engine.family.schedule(settings)
    preview = args.preview and Preview(args.preview, args.preview_every, schedule, engine.decode, settings)

    def wants(done: int) -> bool:
        return keeper.wants(done) or bool(preview and preview.wants(done))

    def after_step(checkpoint) -> None:
        if preview:
            preview.show(checkpoint.snapshot)
        if keeper.wants(keeper.done):
            keeper.keep(checkpoint)

    def how(error: BaseException) -> str:
        """The command that goes on; there is none where the numbers themselves were at fault."""
        again = ["python", "-m", "minidit", *args.words, *([] if args.resume else ["--resume"])]
        if not keeper.saved or isinstance(error, ValueError):
            return ""
        where = f"step {keeper.saved} of {settings.steps} is kept in {keeper.path}"
        return f"{where}; {shlex.join(again)} goes on"

    with watch.stage("load"):
        engine.module("transformer")
    # of ranks that share a video each has a part of the run alone: it is not kept
    with goes_on(how), on_signals(stop_now if engine.world is not None else keeper.on_signal):
        with watch.stage("denoise"):
            outcome = engine.denoise(
                settings, text, progress=not args.quiet, start=start, keep=after_step, wants=wants
            )
        trace = engine.trace(settings, outcome)
        save_latents(latents_path(output), outcome.latents, settings, trace)
    return outcome.latents, trace


def find_unfinished(output: Path, settings, *, resume: bool) -> int:
    """How many steps an earlier run has left of this video, all where its latents are finished; says so.

    Without --resume none: what is found is replaced, but not before there is something to replace it.
    """
    from minidit.checkpoint import check_same, find

    try:
        found = find(output)
    except ValueError as error:
        if resume:
            raise
        print(error)  # and goes on: this run puts another in its place, or removes it
        return 0
    if found is None:
        return 0
    where = f"step {found.done} of {found.settings['steps']} ({found.path})"
    if not resume:
        print(f"found an unfinished run at {where}; --resume would continue it")
        return 0
    check_same(found.path, found.settings, settings)
    print(f"going on after {where}")
    return found.done


def is_finished(settings, path: Path) -> bool:
    """Whether a file holds this very video; one that cannot be read does not."""
    from minidit.checkpoint import differing
    from minidit.video import read_settings

    try:
        return path.is_file() and not differing(read_settings(path), settings)
    except (ValueError, OSError):
        return False


def write_logs(trace: dict, args: argparse.Namespace) -> None:
    """The trace and the timeline, where they were asked for."""
    if args.trace:
        from minidit.cache.trace import write_trace
        from minidit.video import whole_file

        with whole_file(args.trace) as partial:
            write_trace(partial, trace)
    if args.timeline:
        from minidit.report import draw_timeline

        draw_timeline(args.timeline, trace)


def report_run(trace: dict, output: Path, seconds: dict[str, float], args: argparse.Namespace) -> None:
    """What a finished run says: what its cache came to, seconds by stage."""
    from minidit.cache.trace import acted, closing_line

    cache = trace["settings"]["cache"]
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
    frames = engine.decode_stream(latents, tiled=settings.tiled, progress=not args.quiet)
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
    options = dict(device=args.device, dtype=args.dtype, weights=args.weights or "full")
    engine = Engine(args.model or "demo", keep_text_encoder=True, **options)
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


def compare(args: argparse.Namespace) -> None:
    """Caching methods over prompts and seeds: what each saves and loses, and what fewer steps would do."""
    from minidit import compare as comparing
    from minidit.page import text_table, write_report
    from minidit.settings import Choices
    from minidit.tune import read_match, sweep

    specs = [*args.cache, *(spec for text in args.sweep for spec in sweep(text))]
    if not specs:
        raise ValueError("no method was named; give --cache SPEC, as often as you like, or --sweep")
    macs = None if args.match is None else read_match(args.match)
    tune_prompts = None if macs is None else read_prompts(args.tune_prompts) if args.tune_prompts else []
    folder = args.output or Path("compare")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"cannot write {args.json}: create its folder, {args.json.parent}, first")
    names = [f.name for f in fields(Choices) if f.name != "cache"]
    chosen = {name: value for name in names if (value := getattr(args, name)) is not None}
    bench = comparing.open_bench(
        args.model or "demo",
        Choices(**chosen),
        folder,
        prompts=read_prompts(args.prompts) if args.prompts else [],
        tune_prompts=tune_prompts,
        seeds=args.seeds,
        engine_options=dict(
            device=args.device,
            dtype=args.dtype,
            profiles=args.profiles,
            compile=args.compile,
            weights=args.weights or "full",
        ),
        say=(lambda line: None) if args.quiet else lambda line: print(line, flush=True),
    )
    print(describe(bench.plain[0]), flush=True)
    with goes_on(lambda error: f"finished videos are in {folder}; the same command goes on"):
        rows = comparing.compare(bench, specs, macs=macs, debug=args.debug)
    command = shlex.join(["python", "-m", "minidit", *args.words])
    about = comparing.describe_run(bench, command, macs)
    comparing.write_json(
        args.json or folder / "compare.json", {"about": about, "rows": [row.to_json() for row in rows]}
    )
    print(text_table(rows), flush=True)
    print(write_report(folder, about, rows))


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
    """The caching methods: what they do, their papers and what they reuse; of one by name, its options."""
    from minidit.cache.spec import METHODS, explain, summary

    if args.name:
        print(explain(args.name))
        return
    rows = [("name", "reuses", "acts on", "profile")]
    rows += [(name, method.levels, method.acts_on, method.profile) for name, method in METHODS.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if row[0] in METHODS:
            print(f"    {summary(row[0])[0]}")
    print(
        "\nOUTER+unicp: UniCP inside the blocks that OUTER runs. replay:FILE: the plans of a trace again. "
        "fewer-steps:\nshare=0.5, no cache but half the steps. my_policy.py:MyPolicy: your own. "
        "Options: python -m minidit caches NAME"
    )


def inspect(args: argparse.Namespace) -> None:
    """Parameters, multiply-adds and memory of a model, without running it."""
    from minidit.inspection import report

    size = args.width, args.height, args.num_frames
    options = dict(device=args.device, weights=args.weights or "full", cache=args.cache)
    options |= dict(ranks=args.ranks, parallel=args.parallel, tiled=bool(args.tiled))
    print(report(args.model, size, args.dtype, offload=args.offload, **options))


def list_jobs(args: argparse.Namespace, past: dict) -> list[tuple[str, Path, int]]:
    """(prompt, output file, what is added to the seed) of every video that was asked for."""
    if args.prompt is not None and args.prompts:
        raise ValueError("give a prompt or --prompts FILE, not both")
    if not args.prompts and (args.samples != 1 or args.layout != "numbered"):
        raise ValueError("--samples and --layout are for many videos; give --prompts FILE, one prompt a line")
    if args.samples < 1:
        raise ValueError(f"--samples {args.samples} makes no video; wanted 1 or more")
    if args.prompts:
        lines = read_prompts(args.prompts)
        folder = args.output or Path(".")
        folder.mkdir(parents=True, exist_ok=True)
        jobs: dict[Path, tuple[str, Path, int]] = {}
        for i, line in enumerate(lines):
            for sample in range(args.samples):
                path = folder / file_name(line, i, sample, args)
                jobs.setdefault(path, (line, path, 1000 * i + sample))  # VBench's list has prompts twice
        return list(jobs.values())
    prompt = args.prompt if args.prompt is not None else past.get("prompt")
    if prompt is None:
        raise ValueError(f"no prompt was given; {EXAMPLE}")
    return [(prompt, args.output or Path(f"{slug(prompt)}.mp4"), 0)]


def file_name(prompt: str, index: int, sample: int, args: argparse.Namespace) -> str:
    """Of a prompt file's video: 003-a-red-circle.mp4, or "a red circle-0.mp4", by which VBench finds it."""
    if args.layout == "numbered":
        return f"{index:03d}-{slug(prompt)}{f'-{sample}' if args.samples > 1 else ''}.mp4"
    name = f"{prompt}-{sample}.mp4"
    if "/" in prompt or "\0" in prompt or len(name.encode()) > 220:  # names of partial files are longer
        raise ValueError(
            f"prompt {index + 1}, {prompt[:60]!r}, cannot be a file name (it holds / or is too long), and "
            f"VBench finds videos by {{prompt}}-{{sample}}.mp4; reword it, or use --layout numbered"
        )
    return name


def unfinished(videos: list[tuple[Any, Path]]) -> list[tuple[Any, Path]]:
    """The (settings, file) that are still to be made; a file of other settings is refused, not replaced."""
    from minidit.video import read_settings

    left = []
    for settings, path in videos:
        if not path.exists():
            left.append((settings, path))
            continue
        past = read_settings(path)
        now = asdict(settings)
        if odd := [name for name in now if past.get(name) != now[name]]:
            raise ValueError(
                f"{path} was made with {odd[0]} {past.get(odd[0])!r}, now it is {now[odd[0]]!r}; "
                f"name another --output, or delete it"
            )
    return left


def check_logs(args: argparse.Namespace, videos: int) -> None:
    """Refuse a log that could not be written after the run."""
    for flag, path in (("--trace", args.trace), ("--timeline", args.timeline), ("--preview", args.preview)):
        if path and videos > 1 and flag != "--preview":
            raise ValueError(f"{flag} writes the log of one video; give one prompt")
        if path and path.is_dir():
            raise ValueError(f"cannot write {flag} {path}: it is a folder; name a file")
        if path and not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    if args.checkpoint_every is not None and args.checkpoint_every < 0:
        raise ValueError(f"--checkpoint-every {args.checkpoint_every}: wanted a number of steps, or 0")
    if args.preview and (args.preview.suffix.lower() != ".png" or args.preview_every < 1):
        came = f"--preview {args.preview} every {args.preview_every} steps"
        raise ValueError(f"{came}: wanted a .png, and a number of at least 1")
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
        f"cache {s.cache}{' · compiled' if s.compile else ''}"
    )


def parser() -> argparse.ArgumentParser:
    top = Parser("python -m minidit", description="Video generation with caching woven in.")
    top.add_argument("--version", action="version", version=f"minidit {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add = lambda name, run: add_command(commands, name, run)
    add_generate_flags(add("generate", generate))
    add_compare_flags(add("compare", compare))
    add_profile_flags(add("profile", profile))
    add_decode_flags(add("decode", decode))
    add("models", models)
    p = add("caches", caches)
    p.add_argument("name", nargs="?", metavar="NAME", help="explain this method, and list its options")
    add_inspect_flags(add("inspect", inspect))
    return top


def add_command(commands, name: str, run) -> argparse.ArgumentParser:
    # no abbreviations: --prompt would be --prompts, a file
    p = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
    p.set_defaults(command=run)
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


if __name__ == "__main__":
    sys.exit(main())
