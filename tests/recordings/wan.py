"""Wan 2.1 on its recordings."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
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
from tests.recordings.base import Capture, Outcome, Recording, load_upstream, open_recording


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


def denoise_recorded(
    model: Wan, io: dict[str, Tensor], config: ScheduleConfig, steps: int, scale: float
) -> Tensor:
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
