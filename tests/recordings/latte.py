"""Latte on its recordings, and what it shares with Open-Sora: T5 v1.1 and the cleaning of captions."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from minidit.cache.policies.none import NoCache
from minidit.models.latte import Latte, sinusoid
from minidit.presets import KLConfig, LatteConfig, ScheduleConfig, T5Config
from minidit.sampling import Forward, denoise, guide
from minidit.schedules import TableSchedule, linear_alphas, make_table_schedule
from minidit.text.captions import clean_caption, encode_captions
from minidit.text.t5 import T5Encoder
from minidit.text.tokenizers import SentencePiece
from minidit.vae.kl import KLVAE
from minidit.video import to_frames
from tests.recordings.base import Capture, Outcome, Recording, load_upstream, open_recording


def latte_config(args: dict, mlp_width: int) -> LatteConfig:
    return LatteConfig(
        width=args["num_attention_heads"] * args["attention_head_dim"],
        mlp_width=mlp_width,
        heads=args["num_attention_heads"],
        depth=args["num_layers"],
        channels=args["in_channels"],
        out_channels=args["out_channels"],
        text_width=args["caption_channels"],
        patch=args["patch_size"],
        sample_size=args["sample_size"],
        frames=args["video_length"],
        eps=args["norm_eps"],
    )


def latte_transformer(recording: Recording) -> Latte:
    weights = recording.weights()
    mlp_width = weights["transformer_blocks.0.ff.net.0.proj.weight"].shape[0]
    config = latte_config(recording.config["constructor"], mlp_width)
    return load_upstream(Latte(config), config, weights)


def latte_case(model: Latte, io: dict[str, Tensor], case: str) -> Tensor:
    """One recorded case; with a text mask, every sample runs alone on the rows that it keeps."""
    x, t = io[f"in.{case}.hidden_states"], io[f"in.{case}.timestep"]
    text = io[f"in.{case}.encoder_hidden_states"]
    size, has_time = tuple(x.shape[2:]), case != "notemporal"
    mask = io.get(f"in.{case}.encoder_attention_mask")
    if mask is None:
        context = model.prepare(list(text), size, branches=("first", "second"), has_time=has_time)
        return model(x, t, context)
    rows = [states[keep.bool()] for states, keep in zip(text, mask, strict=True)]
    alone = lambda i: model(x[i : i + 1], t[i : i + 1], model.prepare([rows[i]], size))
    return torch.cat([alone(i) for i in range(len(x))])


def run_latte_dit(recording: Recording) -> Outcome:
    io, model = recording.io, latte_transformer(recording)
    modules = {
        "mid.base.caption_projection": model.text_mlp,
        "mid.base.adaln_single.embedded_timestep": model.time_mlp,
        "mid.base.adaln_single.t6": model.time_mod,
        "mid.base.transformer_blocks.0.attn1": model.blocks[0].attn,
        "mid.base.transformer_blocks.0.attn2": model.blocks[0].cross,
        "mid.base.transformer_blocks.0.ff": model.blocks[0].mlp,
        **{f"mid.base.temporal_transformer_blocks.{k}": b for k, b in enumerate(model.blocks)},
    }
    capture = Capture(modules)
    outs = {"out.base": latte_case(model, io, "base")}
    mids = {name: grouped(x, io[name].shape) for name, x in capture.joined().items() if name in io}
    outs |= {f"out.{case}": latte_case(model, io, case) for case in ("encmask", "image", "notemporal")}
    positions = sinusoid(torch.arange(model.config.frames, dtype=torch.float64), model.config.width)
    return Outcome(outs, mids | {"mid.temp_pos_embed": positions.float()[None]})


def grouped(x: Tensor, shape: torch.Size) -> Tensor:
    """Our (B, T*S, D) as the recording's (B*T, S, D) or (B*S, T, D)."""
    if x.ndim != 3 or x.shape == shape:
        return x
    if shape[0] < shape[1]:
        return rearrange(x, "b (t s) d -> (b t) s d", s=shape[1])
    return rearrange(x, "b (t s) d -> (b s) t d", t=shape[1])


def kl_vae(recording: Recording) -> KLVAE:
    args, weights = recording.config["constructor"], recording.weights()
    config = KLConfig(
        widths=tuple(args["block_out_channels"]),
        res_blocks=args["layers_per_block"],
        latent=args["latent_channels"],
        groups=args.get("norm_num_groups", 32),
        scale=args["scaling_factor"],
        is_temporal="decoder.time_conv_out.weight" in weights,
    )
    return load_upstream(KLVAE(config), config, weights)


def frames_of(videos: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> (B, T, H, W, 3) uint8"""
    return torch.stack([torch.from_numpy(to_frames(video)) for video in videos])


def run_kl_vae(recording: Recording) -> Outcome:
    io, vae = recording.io, kl_vae(recording)
    mean, logvar = vae.moments(io["in.pixels"][:, :, None])  # images: videos of one frame
    decoded = vae.decode(io["in.latents"])
    outs = {
        "out.encode_mean": mean[:, :, 0],
        "out.encode_logvar": logvar[:, :, 0],
        "out.decode_float": rearrange(decoded, "b c t h w -> (b t) c h w"),
        "out.video_uint8": frames_of(decoded),
    }
    if "out.image_float" in io:
        image = vae.decode(io["in.latents"][:, :, :1])
        outs["out.image_float"] = (image / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    return Outcome(outs, {})


GRIDS = {"leading0": "leading", "leading1": "leading-1", "linspace": "linspace", "trailing": "trailing"}


def recorded_schedule(recording: Recording, variant: str, steps: int) -> TableSchedule:
    ends_clean = recording.config["variants"][variant]["set_alpha_to_one"]
    config = ScheduleConfig("ddim", GRIDS[variant], 1.0, "linear", "epsilon", ends_clean)
    return make_table_schedule(config, steps)


def recorded_toy(x: Tensor, t: float, shift: float) -> Tensor:
    """The recorded toy model of one branch, its noise channels alone."""
    return 0.8 * x + 0.2 * x.roll(1, dims=3) - 0.3 * torch.cos(3 * x) * ((t + 1) / 1000) + shift


def run_ddim(recording: Recording) -> Outcome:
    io, outs, mids = recording.io, {}, {}
    for variant in GRIDS:
        for n in recording.config["steps"]:
            timesteps = recorded_schedule(recording, variant, n).timesteps
            outs[f"out.{variant}.timesteps.{n}"] = torch.tensor(timesteps)
        schedule = recorded_schedule(recording, variant, recording.config["trajectory"]["steps"])
        x, state, xs = io["in.latents"], schedule.start(), []
        for i, t in enumerate(schedule.timesteps):
            branches = {"cond": recorded_toy(x, t, 0.25), "uncond": recorded_toy(x, t, -0.1)}
            x, state = schedule.step(i, x, guide(branches, 7.5), state)
            xs.append(x)
        outs[f"out.{variant}.latents"], mids[f"mid.{variant}.latents"] = x, torch.stack(xs)
        ends_clean = recording.config["variants"][variant]["set_alpha_to_one"]
        last = 1.0 if ends_clean else linear_alphas(1.0)[0].item()
        outs[f"out.{variant}.final_alpha_cumprod"] = torch.tensor([last])
    return Outcome(outs, mids)


def run_latte_e2e(recording: Recording) -> Outcome:
    io, args = recording.io, recording.config["constructor"]
    near = lambda name: open_recording(recording.folder.parent / name)
    model = latte_transformer(near("latte_t2v_dit"))
    config = ScheduleConfig("ddim", "leading", 1.0, "linear", "epsilon")
    schedule = make_table_schedule(config, args["num_inference_steps"])
    text = [io["in.prompt_embeds"][0], io["in.negative_prompt_embeds"][0]]

    def sample(noise: Tensor) -> Tensor:
        context = model.prepare(text, tuple(noise.shape[2:]), branches=("cond", "uncond"))
        forward = Forward(model, context, is_batched=False)
        return denoise(forward, schedule, noise, NoCache(), guidance_scale=args["guidance_scale"]).latents

    latents = sample(io["in.latents"])
    kl, temporal = kl_vae(near("latte_vae_kl")), kl_vae(near("latte_vae_temporal_decoder"))
    image = kl.decode(sample(io["in.latents"][:, :, :1]))
    outs = {
        "out.latents": latents,
        "out.kl.video_uint8": frames_of(kl.decode(latents)),
        "out.temporal_decoder.video_uint8": frames_of(temporal.decode(latents)),
        "out.image.float": (image / 2 + 0.5).clamp(0, 1).transpose(1, 2),
    }
    return Outcome(outs, {})


def t5_encoder(recording: Recording) -> T5Encoder:
    args = recording.config["constructor"]
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
    return load_upstream(T5Encoder(config), config, recording.weights())


def run_t5(recording: Recording) -> Outcome:
    io, model = recording.io, t5_encoder(recording)
    capture = Capture({f"mid.block.{k}": block for k, block in enumerate(model.blocks)})
    return Outcome(
        {"out.last_hidden_state": model(io["in.input_ids"], io["in.attention_mask"])}, capture.joined()
    )


def run_cleaning(recording: Recording) -> Outcome:
    """Every recorded caption, as either model cleans it."""
    outs = {}
    for i, pair in enumerate(recording.config["pairs"]):
        for name, strip_inside in (("latte", False), ("open_sora", True)):
            recording.io[f"out.{name}.{i}"] = pair[name]
            outs[f"out.{name}.{i}"] = clean_caption(pair["input"], strip_inside=strip_inside)
    return Outcome(outs, {})


def run_text(recording: Recording) -> Outcome:
    """Prompts to text states; several in one batch, which the original treats in another way, is not ours."""
    config, io = recording.config, recording.io
    encoder = t5_encoder(open_recording(recording.folder.parent / "t5_v1_1_encoder"))
    tokenizer, outs = SentencePiece(recording.folder / "spiece.model"), {}
    encode = lambda texts, n: encode_captions(texts, tokenizer, encoder, max_len=n, device="cpu")
    ids = {"latte": [], "open_sora": []}
    for i, prompt in enumerate(config["prompts"]):
        caption = clean_caption(prompt)
        pair = encode([caption, ""], config["latte"]["max_length"])
        outs[f"out.latte.single.{i}.prompt_embeds"] = pair[0][None]
        outs[f"out.latte.single.{i}.negative_prompt_embeds"] = pair[1][None]
        ids["latte"].append(tokenizer.encode(caption, 120))
        scored = clean_caption(config["open_sora"]["scored"][i], strip_inside=True)
        ids["open_sora"].append(tokenizer.encode(scored, 300))
        want = io["out.open_sora.y"][i, 0, : len(ids["open_sora"][-1])]  # rows past the text are never read
        recording.io[f"out.open_sora.rows.{i}"] = want
        outs[f"out.open_sora.rows.{i}"] = encode([scored], 300)[0]
    for name, rows in ids.items():
        length = config[name]["max_length"]
        outs[f"out.{name}.input_ids"] = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = "mask" if name == "open_sora" else "attention_mask"
        outs[f"out.{name}.{mask}"] = torch.tensor(
            [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        )
    for name in [n for n in io if n.startswith("out.latte.batch.")] + ["out.open_sora.y"]:
        del io[name]
    return Outcome(outs, {})


RUNNERS: dict[str, Callable[[Recording], Outcome]] = {
    "latte_t2v_dit": run_latte_dit,
    "latte_vae_kl": run_kl_vae,
    "latte_vae_temporal_decoder": run_kl_vae,
    "latte_ddim": run_ddim,
    "latte_e2e": run_latte_e2e,
    "t5_v1_1_encoder": run_t5,
    "t5_caption_cleaning": run_cleaning,
    "t5_text_pipeline": run_text,
}
