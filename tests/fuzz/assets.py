"""Good files of every kind, made once: what the cases copy and break."""

import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from minidit.cache.trace import write_trace
from minidit.checkpoint import checkpoint_path, save_checkpoint
from minidit.components import DEMO
from minidit.generate import Choices, Engine, save_latents
from minidit.profiles import Profile, write_profile
from minidit.settings import profile_match
from minidit.video import SUFFIXES, write_video
from tests.weights_convert.tiny import save_original

PROMPT = "a red circle"
SMALL = dict(width=16, height=16, num_frames=1, steps=3)
POLICY = """
from minidit.cache.plan import Add, Need, Plan, Run, residual


class Mine:
    def __init__(self, every: int = 2):
        self.every = every

    def reset(self, run):
        self.site = residual(0, run.depth)
        return (Need(self.site),)

    def plan(self, step):
        return Plan(path=(Add(self.site),)) if step.i % self.every else Plan(keep=(self.site,))

    def tell(self, step, values):
        pass
"""


class Hostile:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ("touch witness",)


def make_assets(folder: Path) -> Path:
    """video.* · video.latents.safetensors · video.npz.partial.safetensors · trace.json · profiles/ · model/ ·
    source/ and hostile.pth for weights_convert · mine.py"""
    folder.mkdir(parents=True)
    engine = Engine("demo", device="cpu", dtype="fp32")
    settings = engine.resolve(PROMPT, Choices(**SMALL, cache="fora:interval=2"))
    text, checkpoints = engine.encode(settings), []
    outcome = engine.denoise(settings, text, keep=checkpoints.append)
    frames, trace = engine.decode(outcome.latents), engine.trace(settings, outcome)
    for suffix in SUFFIXES:
        write_video(folder / f"video{suffix}", frames, fps=8, settings=asdict(settings))
    save_latents(folder / "video.latents.safetensors", outcome.latents, settings, trace)
    save_checkpoint(checkpoint_path(folder / "video.npz"), settings, half_way(engine, settings, text))
    write_trace(folder / "trace.json", trace)
    for name in ("mixcache", "unicp", "planned", "teacache"):
        for other in (DEMO / "profiles").glob(f"{name}-*-30-*.json"):
            write_small_profile(folder / "profiles", other, engine, settings)
    shutil.copytree(DEMO, folder / "model")
    save_original(folder / "source")
    for is_zip in (True, False):
        torch.save({"x": Hostile()}, folder / f"hostile-{is_zip}.pth", _use_new_zipfile_serialization=is_zip)
    (folder / "hostile-plain.pth").write_bytes(pickle.dumps({"x": Hostile()}, protocol=4))
    (folder / "mine.py").write_text(POLICY)
    return folder


def half_way(engine: Engine, settings, text):
    """A checkpoint after the second step."""
    found = []

    def keep(checkpoint):
        found.append(checkpoint)
        raise InterruptedError

    try:
        engine.denoise(settings, text, keep=keep, wants=lambda done: done == 2)
    except InterruptedError:
        return found[0]


def write_small_profile(folder: Path, path: Path, engine: Engine, settings) -> None:
    """A profile of the embedded model, as if it had been made for these settings."""
    from minidit.profiles import read_profile

    profile = read_profile(path)
    write_profile(folder, Profile(profile.policy, profile_match(settings), profile.data, profile.tensors))
