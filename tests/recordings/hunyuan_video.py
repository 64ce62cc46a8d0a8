"""HunyuanVideo on its recordings."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from minidit.cache.policies.none import NoCache
from minidit.models.hunyuan_video import HunyuanVideo
from minidit.presets import (
    CLIPTextConfig,
    HunyuanVAEConfig,
    HunyuanVideoConfig,
    LlamaConfig,
    ScheduleConfig,
)
from minidit.sampling import Forward, denoise
from minidit.schedules import make_schedule
from minidit.text.clip import CLIPText
from minidit.text.hunyuan_video import template_length, video_ids
from minidit.text.llama import UNUSED_LAYERS, LlamaEncoder
from minidit.text.tokenizers import CLIPTokenizer, LlamaTokenizer
from minidit.vae.hunyuan_video import HunyuanVAE
from tests.recordings.base import Capture, Outcome, Recording, load_upstream

EXCERPTS = Path(__file__).parents[1] / "text"


def transformer(args: dict, weights: dict[str, Tensor]) -> HunyuanVideo:
    config = HunyuanVideoConfig(
        width=args["hidden_size"],
        mlp_width=args["mlp_width_ratio"] * args["hidden_size"],
        heads=args["heads_num"],
        double=args["mm_double_blocks_depth"],
        single=args["mm_single_blocks_depth"],
        channels=args["in_channels"],
        text_width=args["text_states_dim"],
        pooled_width=args["text_states_dim_2"],
        patch=tuple(args["patch_size"]),
        rope_widths=tuple(args["rope_dim_list"]),
    )
    return load_upstream(HunyuanVideo(config), config, weights)


def rows_of(io: dict[str, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """The text of a batch row without its padding, as prepare() takes it."""
    return io["in.text_states"][row, io["in.text_mask"][row].bool()], io["in.text_states_2"][row]


def dit_stages(model: HunyuanVideo) -> dict[str, nn.Module]:
    """What is recorded of a double or single block: rows of video, then of text."""
    double = model.config.double
    names = {
        k: f"mid.double_{k}" if k < double else f"mid.single_{k - double}" for k in range(len(model.blocks))
    }
    refiner = {f"mid.refiner.{i}": block for i, block in enumerate(model.refiner.blocks)}
    return {"mid.img_in": model.patch_in, **refiner, **{names[k]: b for k, b in enumerate(model.blocks)}}


def run_dit(recording: Recording) -> Outcome:
    """Every recorded row alone: they differ in text length, and padding is not run here."""
    io, args = recording.io, recording.config["constructor"]
    model = transformer(args, recording.weights())
    capture, outs, mids = Capture(dit_stages(model)), [], {}
    for row in range(len(io["in.x"])):
        x, t = io["in.x"][row : row + 1], io["in.t"][row : row + 1]
        guidance = io["in.guidance"][row].item() / 1000
        context = model.prepare([rows_of(io, row)], tuple(x.shape[2:]), guidance=guidance)
        outs.append(model(x, t, context))
    tokens = len(context.rope[0])
    for name, value in ((n, parts[0]) for n, parts in capture.parts.items()):  # of the first row
        if "double" in name:
            mids |= {f"{name}.img": value[:, :tokens], f"{name}.txt": value[:, tokens:]}
        else:
            mids[name] = value
    for name in set(mids) & set(io):  # the recording's padding rows mean nothing
        io[name] = io[name][:1, : mids[name].shape[1]]
    return Outcome({"out.x": torch.cat(outs)}, mids)


def vae(args: dict, weights: dict[str, Tensor]) -> HunyuanVAE:
    config = HunyuanVAEConfig(
        widths=tuple(args["block_out_channels"]),
        res_blocks=args["layers_per_block"],
        latent=args["latent_channels"],
        groups=args["norm_num_groups"],
        scale=args["scaling_factor"],
        tile=args["sample_size"],
        tile_frames=args["sample_tsize"],
    )
    return load_upstream(HunyuanVAE(config), config, weights)


def vae_stages(model: HunyuanVAE) -> dict[str, nn.Module]:
    stages = {"mid.enc.conv_in": model.encoder.conv_in, "mid.dec.conv_in": model.decoder.conv_in}
    stages |= {f"mid.enc.down_{i}": level for i, level in enumerate(model.encoder.levels)}
    stages |= {f"mid.dec.up_{i}": level for i, level in enumerate(model.decoder.levels)}
    return stages | {"mid.enc.mid_block": model.encoder.mid, "mid.dec.mid_block": model.decoder.mid}


def run_vae(recording: Recording) -> Outcome:
    io = recording.io
    model = vae(recording.config["constructor"], recording.weights())
    scale, capture = model.config.scale, Capture(vae_stages(model))
    moments = lambda video: torch.cat(model.moments(video), dim=1)
    mean, logvar = model.moments(io["in.x"])
    decoded = model.decode(io["in.z"] * scale)
    mids = {name: parts[0] for name, parts in capture.parts.items()}
    outs = {
        "out.moments": torch.cat((mean, logvar), dim=1),
        "out.mean": mean,
        "out.std": (logvar.clamp(-30, 20) / 2).exp(),
        "out.moments_single_frame": moments(io["in.x"][:, :, :1]),
        "out.decoded": decoded,
        "out.decoded_single_frame": model.decode(io["in.z"][:, :, :1] * scale),
        "out.tiled_moments": moments(io["in.x_tile"]),
        "out.tiled_decoded": model.decode(io["in.z_tile"] * scale),
        "out.spatial_tiled_decoded": model.decode(io["in.z_tile"][:, :, :2] * scale),
    }
    return Outcome(outs, mids)


def run_llama(recording: Recording) -> Outcome:
    """Padding rows mean nothing; the runner puts the recorded ones in their place."""
    io, args = recording.io, recording.config["constructor"]
    config = LlamaConfig(
        vocab=args["vocab_size"],
        width=args["hidden_size"],
        mlp_width=args["intermediate_size"],
        heads=args["num_attention_heads"],
        kv_heads=args["num_key_value_heads"],
        depth=args["num_hidden_layers"] - UNUSED_LAYERS,
        theta=args["rope_theta"],
        eps=args["rms_norm_eps"],
    )
    model = load_upstream(LlamaEncoder(config), config, recording.weights())
    crop, out = recording.config["crop_start"], io["out.prompt_embeds"].clone()
    for row, mask in enumerate(io["in.attention_mask"].bool()):
        states = model(io["in.input_ids"][row, mask][None])[0, crop:]
        out[row, : len(states)] = states
    return Outcome({"out.prompt_embeds": out, "out.prompt_mask": io["in.attention_mask"][:, crop:]}, {})


def run_clip(recording: Recording) -> Outcome:
    io, args = recording.io, recording.config["constructor"]
    config = CLIPTextConfig(
        vocab=args["vocab_size"],
        width=args["hidden_size"],
        mlp_width=args["intermediate_size"],
        heads=args["num_attention_heads"],
        depth=args["num_hidden_layers"],
        positions=args["max_position_embeddings"],
        eps=args["layer_norm_eps"],
    )
    model = load_upstream(CLIPText(config), config, recording.weights())
    states, mask = model.states(io["in.input_ids"]), io["in.attention_mask"].bool()
    states[~mask] = io["out.last_hidden_state"][~mask]  # padding, which the recording masks
    return Outcome({"out.pooled": model(io["in.input_ids"]), "out.last_hidden_state": states}, {})


def run_schedule(recording: Recording) -> Outcome:
    io, outs = recording.io, {}
    for name in (n.removeprefix("out.sigmas.") for n in io if n.startswith("out.sigmas.")):
        shift, steps = (part.lstrip("shiftep") for part in name.split("."))
        schedule = make_schedule(ScheduleConfig("euler", "wan", float(shift)), int(steps))
        outs[f"out.sigmas.{name}"] = torch.tensor(schedule.sigmas)
        outs[f"out.timesteps.{name}"] = torch.tensor(schedule.timesteps)
    schedule = make_schedule(ScheduleConfig("euler", "wan", 7.0), 10)
    x, state = io["in.x"], schedule.start()
    for i, t in enumerate(schedule.timesteps):
        velocity = io["in.A"] * torch.tanh(x) * torch.cos(torch.tensor(t) / 1000 * torch.pi) + io["in.B"]
        x, state = schedule.step(i, x, velocity, state)
    return Outcome(outs | {"out.x": x}, {})


def run_pipeline(recording: Recording) -> Outcome:
    io, call, parts = recording.io, recording.config["call"], recording.config["constructor"]
    weights = recording.weights()
    part = lambda name: {k.removeprefix(name): w for k, w in weights.items() if k.startswith(name)}
    model = transformer(parts["transformer"], part("transformer."))
    noise = io["in.latents"]
    context = model.prepare(
        [rows_of(io, 0)], tuple(noise.shape[2:]), guidance=call["embedded_guidance_scale"]
    )
    samples = []
    outcome = denoise(
        Forward(model, context, is_batched=False),
        make_schedule(
            ScheduleConfig("euler", "wan", parts["scheduler"]["shift"]), call["num_inference_steps"]
        ),
        noise,
        NoCache(),
        guidance_scale=call["guidance_scale (true CFG)"],
        on_step=lambda record, x: samples.append(x),
    )
    video = vae(parts["vae"], part("vae.")).decode(outcome.latents)
    mids = {f"mid.latents_after_step.{i}": x for i, x in enumerate(samples)}
    return Outcome({"out.latents": outcome.latents, "out.video": (video / 2 + 0.5).clamp(0, 1)}, mids)


def run_tokens(recording: Recording) -> Outcome:
    """With an excerpt of the vocabularies: what the recorded prompts need (tests/text/excerpt.py)."""
    cases = json.loads((recording.folder / "tokens.json").read_text(encoding="utf-8"))["prompts"]
    llama = LlamaTokenizer(EXCERPTS / "llama3_excerpt.json")
    clip = CLIPTokenizer(EXCERPTS / "clip_excerpt.json")
    outs = {}
    for i, case in enumerate(cases):
        got = {
            "llama_video": video_ids(case["prompt"], llama, 256),
            "clip": clip.encode(case["prompt"], 77),
        }
        got["n_valid_after_crop"] = len(got["llama_video"]) - template_length(llama)
        for key, value in got.items():
            outs[f"out.{i}.{key}"] = torch.tensor(value)
            recording.io[f"out.{i}.{key}"] = torch.tensor(case[key])
    return Outcome(outs, {})


RUNNERS: dict[str, Callable[[Recording], Outcome]] = {
    "hunyuan_dit": run_dit,
    "hunyuan_vae": run_vae,
    "hunyuan_llama_text": run_llama,
    "hunyuan_clip_text": run_clip,
    "hunyuan_flow_scheduler": run_schedule,
    "hunyuan_e2e": run_pipeline,
    "hunyuan_tokens": run_tokens,
}
