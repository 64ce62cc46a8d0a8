"""Command lines with something wrong in them, or nothing: one function per kind."""

import json
import os
import shutil
from pathlib import Path
from random import Random

from minidit.cache.spec import METHODS, options_of, show
from tests.fuzz.damage import (
    TEXTS,
    mutate_bytes,
    mutate_json_file,
    mutate_tensors,
    read_header,
    write_header,
)
from tests.fuzz.runner import Case

RUN = ["--size", "16x16", "--num-frames", "1", "--steps", "2", "--device", "cpu", "--quiet", "--allow-inert"]
SAME = ["--size", "16x16", "--num-frames", "1", "--steps", "3", "--device", "cpu", "--quiet"]  # as the assets
NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "3",
    "nan",
    "inf",
    "-inf",
    "1e-9",
    "1e300",
    "1e999",
    "0.5",
    "",
    "x",
    "9" * 25,
    "٣",
)
FLAGS = {
    "--negative-prompt": ("", "x", "\0", "\ud800", "x" * 5000),
    "--seed": (*NUMBERS, str(2**63 - 1), str(2**63), "7"),
    "--size": ("16x16", "32X16", "0x0", "17x16", "-16x16", "16", "x", "", "16x", "9" * 20 + "x16", "٣٢x١٦"),
    "--width": ("16", "32", "0", "-16", "8", "15", "1e2", "9" * 20),
    "--height": ("16", "48", "0", "-16", "9" * 30),
    "--num-frames": ("1", "5", "0", "-3", "2", "4", "9" * 22),
    "--steps": ("1", "2", "4", "0", "-1", "9" * 20, "1e2", "2.0"),
    "--guidance-scale": (*NUMBERS, "1", "4"),
    "--true-cfg": NUMBERS,
    "--flow-shift": NUMBERS,
    "--solver": ("unipc", "dpm++", "euler", "ddim", "dpm", "heun", "", "Euler", "\n"),
    "--sigma-grid": ("wan", "diffusers", "trailing", "", "exact", "leading"),
    "--attention": ("auto", "math", "flash", "triton", "flash_attn", "sage", "", "x\ny"),
    "--residual": ("fp32", "bf16", "fp16", "fp8", ""),
    "--dtype": ("fp32", "bf16", "fp16", "fp8", "", "FP32"),
    "--device": ("cpu", "cuda", "cuda:9", "tpu", "", "meta", "cpu:0", "mps", "\0"),
    "--fps": (*NUMBERS, "16", "23.976"),
    "--output": (
        "out.npz", "out.mp4", "out.gif", "out.png", "out", "out.avi", "", ".", "..", "/", "a/b.mp4",
        "\0.npz",
        "x" * 300 + ".npz", ".npz", "mine.py", "é\u2028.npz", "\ud800.npz", "-.npz", "new\nline.npz",
        "~/x.npz",
    ),
    "--cache": (
        "none", "fora", "fora:interval=2", "everything", "", ":", "+", "a+b+c", "none+none", "replay",
        "replay:",
        "fewer-steps", "fewer-steps:steps=1", "fewer-steps:share=nan", "fewer-steps:x", "mixcache", "unicp",
        "mixcache:impact=uniform", "mixcache:impact=uniform,blocks=1/2", "x.py", "x.py:", "mine.py:Mine",
        "mine.py:Mine:every=0", "mine.py:Yours", "mine.py", "\0.py:X", "fora:interval", "fora:=1",
        "fora:interval=",
        "fora+unicp", "none:x", "replay:trace.json", "replay:mine.py", "replay:.", "replay:\0",
    ),
    "--replay": ("trace.json", "mine.py", ".", "", "nothing.json", "\0"),
    "--trace": ("t.json", "a/t.json", "", ".", "x" * 300, "\0", "trace.json"),
    "--timeline": ("t.png", "a/t.png", "t.txt", "", "."),
    "--preview": ("p.png", "p.jpg", "", ".", "a/p.png", "\0.png"),
    "--preview-every": ("1", "0", "-1", "x"),
    "--checkpoint-every": ("0", "1", "2", "-1", "x", "9" * 20),
    "--prompts": ("prompts.txt", ".", "", "nothing.txt", "video.mp4", "\0"),
    "--samples": ("1", "0", "-1", "2", "x"),
    "--layout": ("numbered", "vbench", "x"),
    "--model": ("demo", "model", "", ".", "nothing", "wan2.1-t2v-1.3b", "\0", "video.mp4", "x" * 5000),
    "--profiles": ("profiles", ".", "", "nothing", "video.mp4", "\0"),
    "--from": ("video.npz", "video.mp4", "video.npz.json", "trace.json", ".", "", "nothing.mp4", "\0",
    "mine.py"),
    "--resume": (), "--verify": (), "--no-text-cache": (), "--allow-inert": (), "--tiled": (),
    "--dynamic-cfg": (),
    "--weights": ("bf16", "fp8", "int8", "fp32", "plain", "", "x"),
    "--offload": ("none", "auto", "blocks", "encoder", "", "x"),
    "--cache-budget": (*NUMBERS, "1GiB", "1MiB", "1 KiB", "-1GiB", "GiB", "auto"),
    "--parallel": ("ulysses", "cfg", "ulysses=2", "auto", "data", "", "x"), "--check-plans": (),
    "--no-dynamic-cfg": (), "--colour": ("red",), "--help": (),
}  # fmt: skip
PLANES = ("\u0041", "\u0416", "\u4e00", "\ue000", "\uffff", "\U00010000", "\U0001f600", "\U00020000",
          "\U00030000",
          "\U000e0001", "\U000f0000", "\U0010ffff")  # fmt: skip


def give(folder: Path, assets: Path, *names: str) -> None:
    """Copies of assets in the case's folder, which may be broken."""
    for name in names:
        source, target = assets / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)  # many files, and few are broken
        else:
            shutil.copy(source, target)


def own(path: Path) -> Path:
    """A file that may be changed: no longer one with the asset that it was linked to."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return path


def options(rng: Random, folder: Path, assets: Path) -> Case:
    """Up to four flags with good and bad values, over a small run."""
    give(
        folder,
        assets,
        "mine.py",
        "trace.json",
        "video.npz",
        "video.npz.json",
        "video.mp4",
        "profiles",
        "model",
    )
    (folder / "prompts.txt").write_text("a\nb\n")
    argv = ["generate", rng.choice(("a", "", "a blue star")), *RUN, "--output", "out.npz"]
    if rng.random() < 0.2:
        argv.pop(1)
    flags = rng.choices(sorted(FLAGS), k=rng.choice((1, 1, 1, 2, 4)))
    for flag in flags:
        argv += [flag, rng.choice(FLAGS[flag])] if FLAGS[flag] else [flag]
    many = "--prompts" in flags
    return Case("options", argv, lines=5 if many else 1)


def prompt(rng: Random, folder: Path, assets: Path) -> Case:
    """Text of every plane, control characters, JSON at its end, nothing, or very much."""
    pieces = (*PLANES, *map(chr, range(33)), "\x7f", "\x85", "\u202e", "\ud800", "a red circle", "{", "}",
              '{"a": 1}',
              "|0|", "&amp;amp;", "<br>", "▁", "</s>", "<extra_id_0>", "﷽", "e\u0301" * 50)  # fmt: skip
    text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
    if rng.random() < 0.1:
        text *= rng.choice((100, 3000))
    if text.startswith("-"):
        text = "a" + text
    where = rng.choice((["--output", "out.npz"], []))
    if rng.random() < 0.5:
        return Case("prompt", ["generate", text, *RUN, *where])
    return Case("prompt", ["generate", "a", "--negative-prompt=" + text, *RUN, *where])


def prompt_file(rng: Random, folder: Path, assets: Path) -> Case:
    """A file of prompts that is no text, or odd text."""
    good = b"a red circle\n\n  two  \n"
    data = rng.choice(
        (mutate_bytes(rng, good), rng.choice(TEXTS[:12]), b"\xff", good.decode().encode("utf-16"))
    )
    if len(data) > 200 and b"\n" not in data:
        data = data[:200]
    (folder / "p.txt").write_bytes(data[:400])
    layout = rng.choice((["--layout", "vbench"], []))
    argv = ["generate", "--prompts", "p.txt", *RUN, "--output", "out", *layout]
    return Case("prompt_file", argv, lines=20)


def cache(rng: Random, folder: Path, assets: Path) -> Case:
    """Every method, with good and bad values of its own options."""
    give(folder, assets, "profiles")
    name = rng.choice(sorted(set(METHODS) - {"replay", "mixcache+unicp"}))
    cls = METHODS[name].load()
    known = options_of(cls)
    values = (
        *NUMBERS,
        "true",
        "none",
        "1/2",
        "1/2/3",
        "uniform",
        "profile",
        "0.1",
        "0.1/0.2",
        "attn",
        "cross/mlp",
    )
    names = rng.choices(sorted(known), k=rng.randint(0, 3)) if known else []
    value = lambda name: rng.choice((rng.choice(values), show(known[name].default)))
    pairs = [f"{name}={value(name)}" for name in names]
    parts = [name, rng.choice(("", "", "", *getattr(cls, "variants", {}), "x")), ",".join(pairs)]
    spec = ":".join(part for part in parts if part) + rng.choice(("", "", "", "", "+unicp", "+none", "+fora"))
    argv = ["generate", "a", *SAME, "--cache", spec, "--output", "out.npz", "--profiles", "profiles"]
    argv += rng.choice(([], [], ["--cache-budget", rng.choice(("0", "1KiB", "20KiB", "1MiB"))]))
    return Case("cache", [*argv, "--allow-inert", "--steps", rng.choice(("1", "3", "3", "4"))])


def model(rng: Random, folder: Path, assets: Path) -> Case:
    """A model folder with a damaged file; its size in model.json may be put right again."""
    give(folder, assets, "model")
    manifest = own(folder / "model" / "model.json")
    content = json.loads(manifest.read_text())
    part = rng.choice(("transformer", "text_encoder", "vae", "tokenizer", "manifest", "manifest", "link"))
    codes = (0, 2)
    if part == "manifest":
        mutate_json_file(rng, manifest)
    elif part == "link":
        target = content["components"][rng.choice(("vae", "tokenizer"))]["files"][0]
        path = folder / "model" / target["name"]
        name = rng.choice((target["name"], "../elsewhere", str(folder / "elsewhere"), "a/../../elsewhere"))
        shutil.copy(path, folder / "elsewhere")
        path.unlink()
        path.symlink_to(folder / "elsewhere")
        target["name"], codes = name, (2,)
        manifest.write_text(json.dumps(content))
    else:
        entry = content["components"][part]["files"][0]
        path = own(folder / "model" / entry["name"])
        if part == "tokenizer" or rng.random() < 0.4:
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        else:
            mutate_tensors(rng, path)
        if rng.random() < 0.8:
            entry["bytes"] = path.stat().st_size
            manifest.write_text(json.dumps(content))
    flags = ["--no-text-cache"] + (["--verify"] if rng.random() < 0.1 else [])
    return Case(
        "model", ["generate", "a", *RUN, *flags, "--model", "model", "--output", "out.npz"], codes=codes
    )


def profiles(rng: Random, folder: Path, assets: Path) -> Case:
    """A profile that is damaged, of another model, or of another method."""
    give(folder, assets, "profiles")
    path = own(rng.choice(sorted((folder / "profiles").iterdir())))
    if path.suffix == ".json":
        mutate_json_file(rng, path)
    elif rng.random() < 0.5:
        mutate_tensors(rng, path)
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    name = path.name.partition("-")[0]
    spec = rng.choice((name, f"{name}:theta=profile" if name == "mixcache" else name, "mixcache+unicp"))
    argv = ["generate", "a", *SAME, "--cache", spec, "--profiles", "profiles", "--output", "out.npz"]
    return Case("profiles", [*argv, "--allow-inert"])


def trace(rng: Random, folder: Path, assets: Path) -> Case:
    """Replay of a trace that is damaged or of another run."""
    give(folder, assets, "trace.json")
    if rng.random() < 0.9:
        mutate_json_file(rng, folder / "trace.json")
    steps = rng.choice(("2", "3", "3", "3"))
    guidance = rng.choice(("1", "4", "4", "4"))
    argv = ["generate", "a", *SAME, "--steps", steps, "--guidance-scale", guidance, "--output", "out.npz"]
    return Case("trace", [*argv, "--replay", "trace.json"])


def again(rng: Random, folder: Path, assets: Path) -> Case:
    """--from of a file that is damaged, or whose settings were changed."""
    suffix = rng.choice(("mp4", "gif", "png", "npz", "npz.json", "npz.json", "npz.json"))
    name = f"video.{suffix}"
    give(folder, assets, name)
    if suffix == "npz.json":
        mutate_json_file(rng, folder / name)
    else:
        (folder / name).write_bytes(mutate_bytes(rng, (folder / name).read_bytes()))
        if rng.random() < 0.2:
            shutil.copy(assets / "video.npz.json", folder / f"{name}.json")
    flags = rng.choice(([], [], ["--model", "demo"], ["--steps", "2"]))
    return Case(
        "again", ["generate", "--from", name, "--quiet", "--output", "out.npz", "--allow-inert", *flags]
    )


def latents(rng: Random, folder: Path, assets: Path) -> Case:
    """decode of damaged latents."""
    name = "video.latents.safetensors"
    give(folder, assets, name)
    damage(rng, folder / name)
    return Case(
        "latents", ["decode", name, "--quiet", *rng.choice(([], ["--output", "out.npz"], ["--tiled"]))]
    )


def damage(rng: Random, path: Path) -> None:
    if rng.random() < 0.3:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    else:
        mutate_tensors(rng, path)


def resume(rng: Random, folder: Path, assets: Path) -> Case:
    """--resume of what is damaged or of another run, or a run beside it without --resume."""
    names = ("video.npz.partial.safetensors", "video.latents.safetensors")
    name = rng.choice((*names, names[0]))
    give(folder, assets, name)
    if rng.random() < 0.9:
        damage(rng, folder / name)
    flags = rng.choice((["--resume"], ["--resume"], ["--resume"], [], ["--resume", "--seed", "1"]))
    spec = rng.choice(("fora:interval=2", "fora:interval=2", "fora:interval=2", "none"))
    argv = ["generate", "a red circle", *SAME, "--cache", spec, "--output", "video.npz", *flags]
    return Case("resume", argv)


BROKEN_POLICIES = (
    ("class Mine:", "def f(:"), ("every: int = 2", "every: int"), ("(Need(self.site),)", "None"),
    ("(Need(self.site),)", "(self.site,)"), ("(Need(self.site),)", "()"), ("(Need(self.site),)", "1 / 0"),
    ("self.every = every", "raise KeyError('x')"), ("self.every = every", "self.every = None"),
    ("        pass", "        values['x']"), ("        pass", "        raise RuntimeError('a\\nb')"),
    ("        pass", "        raise AssertionError"),
    ("        return Plan(path", "        return None or (path"),
    ("        return Plan(path", "        return 7 if step.i else Plan(path"),
    ("        return Plan(path", "        return undefined if step.i else Plan(path"),
    ("Add(self.site),", "Add(7),"), ("Add(self.site),", "self.site,"), ("Add(self.site),", "Run(0, 99),"),
    ("Add(self.site),", ""), ("Add(self.site),", "Run('a'),"), ("path=(Add(self.site),)", "path=7"),
    ("path=(Add(self.site),)", "paths=7"), ("keep=(self.site,)", "keep=7"),
    ("keep=(self.site,)", "keep=('x',)"),
    ("keep=(self.site,)", "measure=(1,)"), ("keep=(self.site,)", "branches=('x',)"),
    ("keep=(self.site,)", "branches=('uncond',)"), ("keep=(self.site,)", "subs=((1, 2),)"),
    ("keep=(self.site,)", "subs=(((0, 'x'), None),)"), ("keep=(self.site,)", "gate=1"),
    ("keep=(self.site,)", "output=1"), ("keep=(self.site,)", "fill=1, branches=('cond',)"),
    ("keep=(self.site,)", "label=None"), ("residual(0, run.depth)", "residual(0, 99)"),
    ("residual(0, run.depth)", "residual(5, 2)"), ("class Mine", "class Other"),
    ("class Mine", "Mine = 7\nclass X"),
    ("    def tell", "    def tells"), ("import Add", "import Subtract"), ("step.i % self.every", "step.x"),
    ("class Mine", "import does_not_exist\nclass Mine"),
    ("self.every = every", "self.every = f(f)\ndef f(x): return f(x)"),
)  # fmt: skip


def policy(rng: Random, folder: Path, assets: Path) -> Case:
    """A user's own policy with a mistake in it, or a file that is no Python."""
    text = (assets / "mine.py").read_text()
    if rng.random() < 0.1:
        (folder / "mine.py").write_bytes(mutate_bytes(rng, text.encode()))
        return Case("policy", ["generate", "a", *SAME, "--cache", "mine.py:Mine", "--output", "out.npz"])
    old, new = rng.choice(BROKEN_POLICIES)
    (folder / "mine.py").write_text(text.replace(old, new))
    spec = rng.choice(("mine.py:Mine", "mine.py:Mine", "mine.py:Mine:every=1", "./mine.py:Mine:every=3"))
    return Case("policy", ["generate", "a", *SAME, "--cache", spec, "--output", "out.npz"])


SPY = "open('witness', 'w')\n"


def planted(rng: Random, folder: Path, assets: Path) -> Case:
    """Code that a file names and the command line does not."""
    (folder / "spy.py").write_text(SPY + (assets / "mine.py").read_text())
    spec = rng.choice(
        ("spy.py:Mine", "./spy.py:Mine", "spy.py:Mine:every=2", " spy.py:Mine", "none+spy.py:Mine")
    )
    give(folder, assets, "video.npz.json", "trace.json", "video.latents.safetensors", "model", "profiles")
    match rng.randrange(5):
        case 0:
            edit(folder / "video.npz.json", lambda c: c | {"cache": spec})
            return Case(
                "planted",
                ["generate", "--from", "video.npz.json", "--output", "out.npz", "--quiet"],
                codes=(2,),
            )
        case 1:
            edit(folder / "trace.json", lambda c: c | {"settings": c["settings"] | {"cache": spec}})
            return Case(
                "planted",
                ["generate", "a", *SAME, "--replay", "trace.json", "--output", "out.npz"],
                codes=(0,),
            )
        case 2:
            header, rest = read_header(folder / "video.latents.safetensors")
            settings = json.loads(header["__metadata__"]["settings"]) | {"cache": spec}
            header["__metadata__"]["settings"] = json.dumps(settings)
            write_header(folder / "video.latents.safetensors", header, rest)
            return Case("planted", ["decode", "video.latents.safetensors", "--quiet"], codes=(0,))
        case 3:
            edit(
                own(folder / "model" / "model.json"),
                lambda c: c | {"defaults": c["defaults"] | {"cache": spec}},
            )
            return Case(
                "planted", ["generate", "a", *RUN, "--model", "model", "--output", "out.npz"], codes=(2,)
            )
        case _:
            path = own(next((folder / "profiles").glob("mixcache*.json")))
            edit(path, lambda c: c | {"policy": spec})
            argv = [
                "generate",
                "a",
                *SAME,
                "--cache",
                "mixcache",
                "--profiles",
                "profiles",
                "--output",
                "out.npz",
            ]
            return Case("planted", argv, codes=(2,))


def edit(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def convert(rng: Random, folder: Path, assets: Path) -> Case:
    """A download that is damaged, hostile, or not one at all."""
    give(folder, assets, "source")
    argv = ["source", "out"]
    found = sorted(path for path in (folder / "source").rglob("*") if path.is_file())
    match rng.randrange(6):
        case 0:
            shutil.copy(rng.choice(sorted(assets.glob("hostile-*.pth"))), folder / "source" / "extra.pth")
            return Case("convert", argv, "weights_convert", codes=(2,))
        case 1:
            values = {"components": {"transformer": {"config": {"text_len": 24, "eps": 1e-6}}},
                      "schedule": {"solver": "unipc", "shift": 3.0}, "defaults": {"width": 64}}  # fmt: skip
            (folder / "c.json").write_text(json.dumps(values))
            mutate_json_file(rng, folder / "c.json")
            argv += ["--config", "c.json"]
        case 2:
            (folder / "layout.json").write_text(
                json.dumps({"blocks.0.norm3.weight": [48], "head.head.weight": [1, 2]})
            )
            mutate_json_file(rng, folder / "layout.json")
            return Case("convert", ["--check-layout", "layout.json"], "weights_convert", codes=(0, 1, 2))
        case 3:
            argv = rng.choice((["source"], ["nothing", "out"], ["source", "source"], ["source",
            "source/out"],
                               ["source", "."], ["source/config.json", "out"], ["", ""], ["\0", "out"],
                               ["source", "\0"],
                               ["source", "out", "--dtype", "fp8"], ["source", "out", "--config",
                               "nothing"],
                               ["source/Wan2.1_VAE.pth", "out", "--dtype", "bf16"], ["--bogus"],
                               []))  # fmt: skip
        case _:
            path = own(rng.choice(found))
            if path.suffix == ".json":
                mutate_json_file(rng, path)
            elif path.suffix == ".safetensors" and rng.random() < 0.7:
                mutate_tensors(rng, path)
            else:
                path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    return Case("convert", argv, "weights_convert")


def other(rng: Random, folder: Path, assets: Path) -> Case:
    """The other commands, mostly with mistakes."""
    give(folder, assets, "model", "profiles")
    value = rng.choice(("demo", "model", "wan2.1-t2v-1.3b", "wan-2b", "", ".", "\0", "\x1b[2J", "profiles"))
    size = rng.choice(FLAGS["--size"])
    return Case(
        "other",
        rng.choice(
            (
                [],
                ["paint"],
                ["--version"],
                ["models", "x"],
                ["models"],
                ["caches"],
                ["caches", rng.choice((*METHODS, "", "x", "x.py:Y", "\0.py:Z", "a:b"))],
                ["inspect", "--model", value],
                ["inspect", "--model", value, "--size", size],
                [
                    "inspect",
                    "--ranks",
                    rng.choice((*NUMBERS, "6", "40", "1000")),
                    "--parallel",
                    rng.choice(("auto", "ulysses", "cfg", "ulysses+cfg", "data", "", "x")),
                    "--cache",
                    rng.choice(FLAGS["--cache"]),
                    *rng.choice(([], ["--tiled"], ["--model", "hunyuan-video", "--tiled"])),
                ],
                [
                    "inspect",
                    "--num-frames",
                    rng.choice(FLAGS["--num-frames"]),
                    "--dtype",
                    rng.choice(FLAGS["--dtype"]),
                ],
                ["compare"],
                [
                    "compare",
                    "--cache",
                    rng.choice(("x", "fora:interval=nan", "", "none+")),
                    *SAME,
                    "--prompts",
                    "x",
                ],
                [
                    "compare",
                    "--sweep",
                    rng.choice(("x", "fora:interval=1..", "fora:interval=2..3/x", "fora", "")),
                ],
                [
                    "compare",
                    "--cache",
                    "fora",
                    "--match",
                    rng.choice(("x", "macs=2", "macs=nan", "macs=", "")),
                ],
                ["profile", "--cache", rng.choice(("x", "", "fora", "none", "mixcache+x", "\0"))],
                ["profile", "--size", rng.choice(("0x0", "17x16", "16", "x", "")), "--device", "cpu"],
                ["decode"],
                [
                    "decode",
                    rng.choice(("", ".", "nothing", "\0", "model/vae.safetensors", "model/model.json")),
                ],
            )
        ),
    )


KINDS = {
    options: 6, prompt: 2, prompt_file: 1, cache: 4, model: 4, profiles: 2, trace: 3, again: 3, latents: 2,
    resume: 3, policy: 3, planted: 1, convert: 4, other: 4,
}  # fmt: skip


def make_case(seed: int, number: int, folder: Path, assets: Path) -> Case:
    """Case `number` of a seed: the same folder and command line every time."""
    rng = Random(seed * 1_000_003 + number)
    kind = rng.choices(list(KINDS), KINDS.values())[0]
    return kind(rng, folder, assets)
