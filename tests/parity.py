"""Compare minidit with outputs recorded from the original implementations.

    python -m tests.parity DIR...

Each DIR is a recording: config.json says which component it is, io.safetensors holds inputs and outputs.
The measure is max|a - b| / max|reference| over every recorded output; the bounds are in tolerances.json beside
the recordings. Exit code 1 where anything is beyond its bound, 3 where a component is not supported.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minidit.cache.policies.none import NoCache
from minidit.layers import timestep_sinusoid
from minidit.models.wan import Wan, rope_table
from minidit.presets import ScheduleConfig, T5Config, WanConfig, WanVAEConfig
from minidit.sampling import Forward, denoise
from minidit.schedules import make_schedule
from minidit.text.prompts import clean_prompt
from minidit.text.t5 import T5Encoder
from minidit.vae.wan import WanVAE
from minidit.video import to_frames
from minidit_kernels.qk_norm_rope import rope
from weights_convert.names import fit
from weights_convert.wan import LAYOUTS

DEFAULT_BOUND = 1e-4


@dataclass
class Recording:
    """One recorded component."""

    folder: Path
    config: dict
    io: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.config["component"]

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "weights.safetensors")


@dataclass
class Outcome:
    """What a run gave, under the recording's names: `mids` locate a difference, `outs` are judged."""

    outs: dict[str, Any]
    mids: dict[str, Tensor]


@dataclass
class Verdict:
    component: str
    error: float
    bound: float
    worst: str  # the output with the largest error, or what else is wrong
    first_mid: str = ""  # the first mid-state that differs

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        text = (
            f"{self.component:<24} {self.error:9.2e}  bound {self.bound:.0e}  {'ok' if self.ok else 'FAIL'}"
        )
        return (
            text
            if self.ok
            else f"{text}  ({self.worst}; first mid-state that differs: {self.first_mid or 'none'})"
        )


def open_recording(folder: Path) -> Recording:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a recording (no config.json)")
    io = folder / "io.safetensors"
    return Recording(folder, json.loads(path.read_text()), load_file(io) if io.is_file() else {})


def load_upstream(module: nn.Module, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """Fill a module from tensors under upstream names, through the converter's own tables."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    layout = next(item for item in LAYOUTS if all(sign in shapes for sign in item.signs))
    targets = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = fit(shapes, targets, layout.table(config, shapes), layout.drop)
    if found.problems:
        raise ValueError(f"recorded weights do not fit: {'; '.join(found.problems)}")
    state = {
        name: torch.cat([tensors[piece.upstream].reshape(piece.shape) for piece in pieces])
        for name, pieces in found.pieces.items()
    }
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


class Capture:
    """Collects the outputs of modules while they run; chunks of a stream are joined along time."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.parts: dict[str, list[Tensor]] = {}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda m, args, out, name=name: self.parts.setdefault(name, []).append(out)
            )

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(p, dim=2) if p[0].ndim == 5 else p[0] for name, p in self.parts.items()}


# Components


def wan_config(args: dict) -> WanConfig:
    return WanConfig(
        width=args["dim"],
        mlp_width=args["ffn_dim"],
        heads=args["num_heads"],
        depth=args["num_layers"],
        channels=args["in_dim"],
        text_width=args["text_dim"],
        text_len=args["text_len"],
        freq_width=args["freq_dim"],
        patch=tuple(args["patch_size"]),
        eps=args["eps"],
    )


def wan_transformer(recording: Recording) -> Wan:
    config = wan_config(recording.config["args"])
    return load_upstream(Wan(config), config, recording.weights())


def run_wan_dit(recording: Recording) -> Outcome:
    io, model = recording.io, wan_transformer(recording)
    first = model.blocks[0]
    capture = Capture(
        {
            "mid.patch_tokens": model.patch_in,
            "mid.text_embedding": model.text_mlp,
            "mid.time_embedding": model.time_mlp,
            "mid.time_projection": model.time_mod,
            "mid.block_0.self_attn": first.attn,
            "mid.block_0.cross_attn": first.cross,
            "mid.block_0.ffn": first.mlp,
            **{f"mid.block_{k}": block for k, block in enumerate(model.blocks)},
            "mid.head": model.head.out,
        }
    )
    text = [io["in.context_0"], io["in.context_1"]]
    context = model.prepare(text, tuple(io["in.x"].shape[2:]), branches=("first", "second"))
    outs = {"out.x": model(io["in.x"], io["in.t"], context)}
    mids = capture.joined()
    for i in range(2):  # recorded as one padded batch of two sizes; here each runs alone
        x = io[f"pad.in.x_{i}"][None]
        context = model.prepare([io[f"pad.in.context_{i}"]], tuple(x.shape[2:]))
        outs[f"pad.out.x_{i}"] = model(x, io["pad.in.t"][i : i + 1], context)[0]
    return Outcome(outs, mids)


def wan_vae(recording: Recording) -> WanVAE:
    args, io = recording.config["args"], recording.io
    config = WanVAEConfig(
        base=args["dim"],
        latent=args["z_dim"],
        mean=tuple(io["const.mean"].tolist()),
        std=tuple(io["const.std"].tolist()),
        multipliers=tuple(args["dim_mult"]),
        res_blocks=args["num_res_blocks"],
        temporal_down=tuple(args["temperal_downsample"]),
    )
    return load_upstream(WanVAE(config), config, recording.weights())


def vae_stages(vae: WanVAE, half: str, row: str, resample: str) -> Iterator[tuple[str, nn.Module]]:
    """The recording's numbering of a half: its blocks and resamplings in one row."""
    modules = []
    for level in getattr(vae, half).levels:
        modules += [*level.blocks, getattr(level, resample)]
    for i, module in enumerate(m for m in modules if m is not None):
        yield f"{half}.{row}.{i}", module


def run_wan_vae(recording: Recording) -> Outcome:
    io, vae = recording.io, wan_vae(recording)
    stages = dict(vae_stages(vae, "encoder", "downsamples", "down"))
    stages |= {f"encoder.middle.{i}": m for i, m in enumerate(middle(vae.encoder))}
    encoding = Capture({"encoder.conv1": vae.encoder.conv_in, **stages, "quant_conv1": vae.quant})
    outs = {"out.mu": vae.encode(io["in.video"])}
    mids = encoding.joined()
    stages = {"post_quant_conv2": vae.post_quant, "decoder.conv1": vae.decoder.conv_in}
    stages |= {f"decoder.middle.{i}": m for i, m in enumerate(middle(vae.decoder))}
    decoding = Capture(stages | dict(vae_stages(vae, "decoder", "upsamples", "up")))
    outs["out.decoded"] = vae.decode(io["in.z"])
    mids |= decoding.joined()
    outs["out.decoded_of_mu"] = vae.decode(io["out.mu"])
    named = {}
    for name, x in mids.items():
        named[f"mid.{name}"] = x
        named[f"sub.mid.{name}"] = x[..., ::2, ::3]
    return Outcome(outs, named)


def middle(half: nn.Module) -> tuple[nn.Module, ...]:
    return half.mid.block1, half.mid.attn, half.mid.block2


def run_umt5(recording: Recording) -> Outcome:
    args, io = recording.config["args"], recording.io
    config = T5Config(
        vocab=args["vocab"],
        width=args["dim"],
        mlp_width=args["dim_ffn"],
        heads=args["num_heads"],
        head_width=args["dim_attn"] // args["num_heads"],
        depth=args["num_layers"],
        buckets=args["num_buckets"],
        shared_positions=args["shared_pos"],
    )
    model = load_upstream(T5Encoder(config), config, recording.weights())
    capture = Capture({f"mid.block_{k}": block for k, block in enumerate(model.blocks)})
    outs = {"out.hidden": model(io["in.ids"], io["in.mask"])}
    return Outcome(outs, capture.joined())


SCHEDULES = {
    "wan_unipc": ("unipc", "wan"),
    "wan_dpmpp": ("dpm++", "wan"),
    "diffusers_unipc": ("unipc", "diffusers"),
    "diffusers_flowmatch_euler": ("euler", "diffusers"),
}


def run_schedules(recording: Recording) -> Outcome:
    """Every recorded solver, stepped with the recorded toy model on its own samples."""
    io, outs = recording.io, {}
    for name in (n.removesuffix(".x") for n in io if n.endswith(".x") and n.split(".")[0] in SCHEDULES):
        kind, steps, shift = name.split(".", 2)
        config = ScheduleConfig(*SCHEDULES[kind], shift=float(shift.removeprefix("shift")))
        schedule = make_schedule(config, int(steps.removeprefix("n")))
        x, state = io[f"{name}.x"][0], schedule.start()
        xs, corrected = [x], []
        for i, t in enumerate(schedule.timesteps):
            velocity = io["in.a"][0] * x + io["in.b"][0] * (t / 1000) + io["in.c"][0] * torch.tanh(2 * x)
            x, state = schedule.step(i, x, velocity, state)
            xs.append(x)
            corrected.append(state.corrected)
        outs[f"{name}.x"] = torch.stack(xs)
        outs[f"{name}.sigmas"] = torch.tensor(schedule.sigmas)
        outs[f"{name}.timesteps"] = torch.tensor(schedule.timesteps, dtype=io[f"{name}.timesteps"].dtype)
        if f"{name}.x_corrected" in io:
            outs[f"{name}.x_corrected"] = torch.stack(corrected)
    return Outcome(outs, {})


def run_rope(recording: Recording) -> Outcome:
    io = recording.io
    rotated = io["in.x"].clone()  # (B, L, N, K); rows past a sample's own grid stay as they are
    for i, grid in enumerate(io["in.grid_sizes"].tolist()):
        n = grid[0] * grid[1] * grid[2]
        cos, sin = rope_table(tuple(grid), io["in.x"].shape[-1])
        rotated[i, :n] = rope(io["in.x"][i : i + 1, :n].transpose(1, 2), cos, sin).transpose(1, 2)[0]
    return Outcome({"out.x": rotated, "out.t_sinusoid": timestep_sinusoid(io["in.t"], 256)}, {})


def denoise_recorded(model: Wan, io: dict[str, Tensor], config: ScheduleConfig, steps: int, scale: float) -> Tensor:
    """-> samples before each step and after the last (steps + 1, C, T, H, W)"""
    noise = io["in.noise"]
    text, branches = [io["in.context"], io["in.context_null"]], ("cond", "uncond")
    context = model.prepare(text, tuple(noise.shape[1:]), branches=branches)
    samples, schedule = [noise], make_schedule(config, steps)
    denoise(
        Forward(model, context, is_batched=False),
        schedule,
        noise[None],
        NoCache(),
        guidance_scale=scale,
        on_step=lambda record, x: samples.append(x[0]),
    )
    return torch.stack(samples)


def run_denoise(recording: Recording) -> Outcome:
    io, call = recording.io, recording.config["call"]
    model = wan_transformer(open_recording(recording.folder.parent / "wan_t2v_dit"))
    vae = wan_vae(open_recording(recording.folder.parent / "wan_vae"))
    config = ScheduleConfig(call["sample_solver"], "wan", call["shift"])
    latents = denoise_recorded(model, io, config, call["sampling_steps"], call["guide_scale"])
    second = recording.config["second_run"]["same inputs, changed"]
    other = denoise_recorded(
        model,
        io,
        replace(config, solver=second["solver"], shift=second["shift"]),
        second["steps"],
        second["guide"],
    )
    video = vae.decode(latents[-1][None])[0].clamp(-1, 1)
    outs = {
        "out.latents": latents,
        "dpmpp.out.latents": other,
        "out.video": video,
        "out.frames_uint8": torch.from_numpy(to_frames(video)),
    }
    return Outcome(outs, {})


def run_prompt_clean(recording: Recording) -> Outcome:
    cases = json.loads((recording.folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    recording.io = {f"out.{i}": want for i, (_, want) in enumerate(cases)}
    return Outcome({f"out.{i}": clean_prompt(text) for i, (text, _) in enumerate(cases)}, {})


RUNNERS: dict[str, Callable[[Recording], Outcome]] = {
    "wan_t2v_dit": run_wan_dit,
    "wan_vae": run_wan_vae,
    "umt5_encoder": run_umt5,
    "wan_schedulers": run_schedules,
    "wan_rope": run_rope,
    "wan_denoise": run_denoise,
    "wan_prompt_clean": run_prompt_clean,
}


# Judging


def difference(got: Any, wanted: Any) -> float:
    """Relative for floats, equality for the rest, one level for uint8 frames (tolerances.json)."""
    if isinstance(wanted, str):
        return 0.0 if got == wanted else float("inf")
    if got.shape != wanted.shape:
        return float("inf")
    if wanted.dtype == torch.uint8:
        return 0.0 if (got.int() - wanted.int()).abs().max() <= 1 else float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(got, wanted) else float("inf")
    error = ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
    return error if error == error else float("inf")  # NaN is a failure


def judged(name: str) -> bool:
    """Whether a recorded tensor is an output: out.*, or one of the solvers' tables and samples."""
    return "out" in name.split(".")[:2] or name.split(".")[-1] in ("x", "sigmas", "timesteps", "x_corrected")


def outputs_of(recording: Recording) -> list[str]:
    names = [n for n in recording.io if judged(n) and "in" not in n.split(".") and "mid" not in n.split(".")]
    if not names:
        raise ValueError(f"{recording.folder} records no outputs")
    return names


def bound_of(recording: Recording) -> float:
    """The bound of a component: its pattern's in tolerances.json, or the default there."""
    path = recording.folder.parent / "tolerances.json"
    table = (
        json.loads(path.read_text())
        if path.is_file()
        else {"default": {"rel": DEFAULT_BOUND}, "patterns": {}}
    )
    for pattern, bound in table["patterns"].items():
        if fnmatch.fnmatch(recording.name, pattern):
            return bound["rel"]
    return table["default"]["rel"]


def compare(recording: Recording) -> Verdict:
    """Run a component and compare every output that was recorded."""
    outcome, bound = RUNNERS[recording.name](recording), bound_of(recording)
    worst, error = "", -1.0
    for name in outputs_of(recording):
        e = difference(outcome.outs[name], recording.io[name]) if name in outcome.outs else float("inf")
        if e > error:
            worst, error = name, e
    verdict = Verdict(recording.name, error, bound, worst)
    if not verdict.ok:
        mids = ((n, difference(x, recording.io[n])) for n, x in outcome.mids.items() if n in recording.io)
        verdict.first_mid = next((f"{n} {e:.1e}" for n, e in mids if e > bound), "")
    return verdict


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument(
        "--skip-unsupported", action="store_true", help="exit 0 although some are not supported"
    )
    args = parser.parse_args(argv)
    failed = unsupported = False
    for folder in args.folders:
        try:
            recording = open_recording(folder)
        except ValueError as error:
            parser.error(str(error))
        if recording.name not in RUNNERS:
            print(f"{recording.name:<24} not supported")
            unsupported = True
            continue
        verdict = compare(recording)
        print(verdict)
        failed |= not verdict.ok
    return 1 if failed else 3 if unsupported and not args.skip_unsupported else 0


if __name__ == "__main__":
    sys.exit(main())
