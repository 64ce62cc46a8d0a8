"""CogVideoX on its recordings."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minidit.cache.policies.none import NoCache
from minidit.models.cogvideox import CogVideoX, rope_table, sincos_table
from minidit.presets import CogVideoXConfig, CogVideoXVAEConfig, ScheduleConfig, T5Config
from minidit.sampling import Forward, denoise
from minidit.schedules import dynamic_guidance, make_table_schedule, zero_snr_alphas
from minidit.text.t5 import T5Encoder
from minidit.vae.cogvideox import CogVideoXVAE
from tests.recordings.base import Capture, Outcome, Recording, load_upstream


def transformer_config(args: dict) -> CogVideoXConfig:
    width = args["num_attention_heads"] * args["attention_head_dim"]
    frames, side = args["patch_size_t"] or 1, args["patch_size"]
    rope = "rope" if args["patch_size_t"] else "rope-cropped"
    return CogVideoXConfig(
        width=width,
        mlp_width=4 * width,
        heads=args["num_attention_heads"],
        depth=args["num_layers"],
        positions=rope if args["use_rotary_positional_embeddings"] else "sincos",
        channels=args["in_channels"],
        text_width=args["text_embed_dim"],
        text_len=args["max_text_seq_length"],
        time_width=args["time_embed_dim"],
        patch=(frames, side, side),
        base_grid=(args["sample_height"] // side, args["sample_width"] // side),
        eps=args["norm_eps"],
    )


def vae_config(args: dict) -> CogVideoXVAEConfig:
    return CogVideoXVAEConfig(
        scale=args["scaling_factor"],
        widths=tuple(args["block_out_channels"]),
        res_blocks=args["layers_per_block"],
        latent=args["latent_channels"],
        groups=args["norm_num_groups"],
        tile=(args["sample_height"] // 2, args["sample_width"] // 2),
        eps=args["norm_eps"],
    )


def run_dit(recording: Recording) -> Outcome:
    io, config = recording.io, transformer_config(recording.config["constructor"])
    model = load_upstream(CogVideoX(config), config, recording.weights())
    capture = Capture(
        {
            "mid.time_embedding": model.time_mlp,
            **{f"mid.block_{k}": block for k, block in enumerate(model.blocks)},
            "mid.block_0.attn": model.blocks[0].attn,
            "mid.norm_final": model.head.norm1,
            "mid.norm_out": model.head.norm2,
            "mid.proj_out": model.head.out,
        }
    )
    x = io["in.hidden_states"].transpose(1, 2)  # (B, C, T, H, W)
    context = model.prepare(list(io["in.encoder_hidden_states"]), tuple(x.shape[2:]), branches=("a", "b"))
    outs = {"out.sample": model(x, io["in.timestep"], context).transpose(1, 2)}
    mids = {}
    for name, value in capture.joined().items():
        if "block" in name:
            mids[f"{name}.video"] = value[:, : context.video_tokens]
            mids[f"{name}.text"] = value[:, context.video_tokens :]
        else:
            mids[name] = value
    return Outcome(outs, mids)


def run_positions(recording: Recording) -> Outcome:
    """Rotations of real sizes and narrow heads, and the 2B table with its rows for text."""
    args, outs = recording.config["constructor"], {}
    for name, case in recording.config["cases"].items():
        h, w, t = case["latent h,w,T"]
        if name.startswith("sincos"):
            table = sincos_table((t, h // 2, w // 2), args["sincos"]["embed_dim"])
            outs[f"out.{name}"] = F.pad(table, (0, 0, args["sincos"]["max_text_seq_length"], 0))
            continue
        kind = args[name.split(".")[0]]
        frames = kind.get("patch_size_t", 1)
        config = CogVideoXConfig(
            width=kind["attention_head_dim"],
            mlp_width=64,
            heads=1,
            depth=1,
            positions="rope" if frames == 2 else "rope-cropped",
            base_grid=(kind["sample_height"] // 2, kind["sample_width"] // 2),
        )
        cos, sin = rope_table(config, (t // frames, h // 2, w // 2))  # one per pair of channels
        outs[f"out.{name}.cos"], outs[f"out.{name}.sin"] = (x.repeat_interleave(2, dim=1) for x in (cos, sin))
    return Outcome(outs, {})


def run_vae(recording: Recording) -> Outcome:
    io, config = recording.io, vae_config(recording.config["constructor"])
    vae = load_upstream(CogVideoXVAE(config), config, recording.weights())
    moments = lambda video, **how: torch.cat(vae.moments(video, **how), dim=1)
    decode = lambda z, **how: vae.decode(z * config.scale, **how)
    outs = {
        "out.moments": moments(io["in.x"]),
        "out.moments_b": moments(io["in.x_b"]),
        "out.moments_single_frame": moments(io["in.x"][:, :, :1]),
        "out.tiled_moments": moments(io["in.x_tile"], tiled=True),
        "out.decoded": decode(io["in.z"]),
        "out.decoded_even": decode(io["in.z_even"]),
        "out.decoded_single_frame": decode(io["in.z"][:, :, :1]),
        "out.tiled_decoded": decode(io["in.z_tile"], tiled=True),
    }
    return Outcome(outs, {})


def run_schedule(recording: Recording) -> Outcome:
    """Every recorded trajectory, stepped with the recorded toy model on its own samples."""
    io, outs, mids = recording.io, {}, {}
    solver = "dpm" if "dpm" in recording.name else "ddim"
    for case in recording.config["trajectory"]["cases"]:
        config = schedule_config(solver, case["snr_shift_scale"], case["dynamic_cfg"])
        schedule = make_table_schedule(config, case["steps"])
        x, state, xs = io["in.x"], schedule.start(), []
        for step in schedule.steps(case["guidance"]):
            phase = torch.cos(torch.tensor(step.t / 1000 * torch.pi))
            v_u = io["in.A_u"] * torch.tanh(x) * phase + io["in.B_u"]
            v_c = io["in.A_c"] * torch.tanh(x) * phase + io["in.B_c"]
            noise = [io["in.noise"][step.i]] if schedule.needs_noise else []
            x, state = schedule.step(step.i, x, v_u + step.guidance * (v_c - v_u), state, noise)
            xs.append(x)
        outs[f"out.x.{case['key']}"] = x
        mids[f"mid.x_after_step.{case['key']}"] = torch.stack(xs)
        name = f"steps{case['steps']}"
        outs[f"out.timesteps.{name}"] = torch.tensor(schedule.timesteps)
        table = dynamic_guidance(schedule.timesteps, 6.0)
        outs[f"out.dynamic_cfg.g6.{name}"] = torch.tensor(table, dtype=torch.float64)
    for shift in (1, 3):
        outs[f"out.alphas_cumprod.shift{shift}"] = zero_snr_alphas(float(shift))
    return Outcome(outs, mids)


def schedule_config(solver: str, shift: float, is_dynamic: bool) -> ScheduleConfig:
    return ScheduleConfig(
        solver, "trailing", shift, betas="zero-snr", prediction="v", dynamic_guidance=is_dynamic
    )


def run_e2e(recording: Recording) -> Outcome:
    """Text states and noise to a video, as the pipeline does it."""
    io, parts, call = recording.io, recording.config["constructor"], recording.config["call"]
    weights = recording.weights()
    configs = {"transformer": transformer_config(parts["transformer"]), "vae": vae_config(parts["vae"])}
    classes = {"transformer": CogVideoX, "vae": CogVideoXVAE}
    modules = {
        name: load_upstream(classes[name](config), config, part(weights, name))
        for name, config in configs.items()
    }
    noise = io["in.latents"].transpose(1, 2)  # (1, C, T, H, W)
    text, branches = [io["in.prompt_embeds"][0], io["in.negative_prompt_embeds"][0]], ("cond", "uncond")
    context = modules["transformer"].prepare(text, tuple(noise.shape[2:]), branches=branches)
    solver = "dpm" if "DPM" in parts["scheduler"]["_class"] else "ddim"
    config = schedule_config(solver, parts["scheduler"]["snr_shift_scale"], call["use_dynamic_cfg"])
    fresh = (x.transpose(1, 2) for x in io.get("in.noise", ()))
    outcome = denoise(
        Forward(modules["transformer"], context, is_batched=True, video_tokens=context.video_tokens),
        make_table_schedule(config, call["num_inference_steps"]),
        noise,
        NoCache(),
        guidance_scale=call["guidance_scale"],
        draw=lambda shape: next(fresh),
    )
    extra = noise.shape[2] - (1 + (call["num_frames"] - 1) // 4)
    video = modules["vae"].decode(outcome.latents[:, :, extra:])
    outs = {
        "out.latents": outcome.latents.transpose(1, 2),
        "out.video": (video / 2 + 0.5).clamp(0, 1).transpose(1, 2),
    }
    return Outcome(outs, {})


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one module in a file of several."""
    return {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}


def run_t5(recording: Recording) -> Outcome:
    args, io = recording.config["constructor"], recording.io
    config = T5Config(
        vocab=args["vocab_size"],
        width=args["d_model"],
        mlp_width=args["d_ff"],
        heads=args["num_heads"],
        head_width=args["d_kv"],
        depth=args["num_layers"],
        buckets=args["relative_attention_num_buckets"],
        max_distance=args["relative_attention_max_distance"],
        shared_positions=True,
        eps=args["layer_norm_epsilon"],
    )
    model = load_upstream(T5Encoder(config), config, recording.weights())
    ids, mask = io["in.input_ids"], io["in.attention_mask"]
    outs = {
        "out.last_hidden_state": model(ids, torch.ones_like(ids)),  # as the pipeline runs it: padding counts
        "out.last_hidden_state_masked": model(ids, mask),
    }
    return Outcome(outs, {})


RUNNERS: dict[str, Callable[[Recording], Outcome]] = {
    "cogvideox_2b_dit": run_dit,
    "cogvideox_5b_dit": run_dit,
    "cogvideox15_5b_dit": run_dit,
    "cogvideox_positions": run_positions,
    "cogvideox_vae": run_vae,
    "cogvideox_ddim_scheduler": run_schedule,
    "cogvideox_dpm_scheduler": run_schedule,
    "cogvideox_2b_e2e": run_e2e,
    "cogvideox_5b_e2e": run_e2e,
    "cogvideox15_5b_e2e": run_e2e,
    "t5_encoder": run_t5,
}
