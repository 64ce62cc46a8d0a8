"""Open-Sora 1.2 on its recordings."""

from collections.abc import Callable

import torch
from torch import Tensor

from minidit.cache.policies.none import NoCache
from minidit.given import paste, read_strategy
from minidit.models.open_sora import OpenSora, Video
from minidit.presets import OpenSoraConfig, OpenSoraVAEConfig, ScheduleConfig
from minidit.sampling import Forward, denoise, guide
from minidit.schedules import MaskedSchedule, make_schedule, size_shift
from minidit.vae.open_sora import OpenSoraVAE
from minidit.video import to_frames
from tests.recordings.base import Capture, Outcome, Recording, load_upstream, open_recording
from tests.recordings.latte import grouped


def open_sora_transformer(recording: Recording) -> OpenSora:
    args, weights = recording.config["constructor"], recording.weights()
    config = OpenSoraConfig(
        width=args["hidden_size"],
        mlp_width=int(args["hidden_size"] * args["mlp_ratio"]),
        heads=args["num_heads"],
        depth=args["depth"],
        channels=args["in_channels"],
        out_channels=2 * args["in_channels"],
        text_width=args["caption_channels"],
        text_len=args["model_max_length"],
        patch=args["patch_size"][2],
        base_size=args["input_sq_size"],
    )
    return load_upstream(OpenSora(config), config, weights)


def open_sora_case(model: OpenSora, io: dict[str, Tensor], case: str) -> Tensor:
    """One recorded case, its samples one by one: their texts have different lengths."""
    given = lambda name: io.get(f"in.{case}.{name}")
    x, mask = given("x"), given("mask")
    outs = []
    for i in range(len(x)):
        length = int(mask[i % len(mask)].sum()) if mask is not None else given("y").shape[2]
        # the original reads the picture's size off the first sample
        video = Video(given("height")[0].item(), given("width")[0].item(), given("fps")[i].item())
        frame_mask = None if given("x_mask") is None else given("x_mask")[i].float()
        context = model.prepare(
            [given("y")[i, 0, :length]], tuple(x.shape[2:]), video=video, frame_mask=frame_mask
        )
        outs.append(model(x[i : i + 1], given("timestep")[i : i + 1], context))
    return torch.cat(outs)


def run_open_sora_dit(recording: Recording) -> Outcome:
    io, model = recording.io, open_sora_transformer(recording)
    first = model.blocks[0]
    modules = {
        "mid.base.t_emb": model.time_mlp,
        "mid.base.fps_emb": model.fps_mlp,
        "mid.base.t_mlp": model.time_mod,
        "mid.base.spatial_blocks.0.attn": first.attn,
        "mid.base.spatial_blocks.0.cross_attn": first.cross,
        "mid.base.spatial_blocks.0.mlp": first.mlp,
        "mid.base.temporal_blocks.0.attn": first.t_attn,
        **{f"mid.base.temporal_blocks.{k}": block for k, block in enumerate(model.blocks)},
    }
    capture = Capture(modules)  # of the first sample
    outs = {"out.base": open_sora_case(model, io, "base")}
    mids = {}
    for name, x in capture.joined().items():
        want = io[name][: len(io[name]) // 2]
        io[name], mids[name] = want, grouped(x, want.shape)
    for case in ("cfgmask", "image", "notextmask"):
        outs[f"out.{case}"] = open_sora_case(model, io, case)
    # what the original predicts of given frames, norming them twice, is never read
    is_noisy = io["in.xmask.x_mask"][:, None, :, None, None]
    outs["out.xmask"] = open_sora_case(model, io, "xmask") * is_noisy
    io["out.xmask"] = io["out.xmask"] * is_noisy
    return Outcome(outs, mids)


def open_sora_vae(recording: Recording) -> OpenSoraVAE:
    args = recording.config["constructor"]
    image, time = args["vae_2d"], args["vae_temporal"]
    config = OpenSoraVAEConfig(
        widths=tuple(image["block_out_channels"]),
        res_blocks=image["layers_per_block"],
        groups=image["norm_num_groups"],
        latent=image["latent_channels"],
        time_base=time["filters"],
        time_multipliers=tuple(time["channel_multipliers"]),
        time_blocks=time["num_res_blocks"],
        time_groups=time["num_groups"],
        temporal_down=tuple(time["temporal_downsample"]),
        chunk=args["micro_frame_size"],
        mean=tuple(args["shift"]),
        std=tuple(args["scale"]),
    )
    return load_upstream(OpenSoraVAE(config), config, recording.weights())


def run_open_sora_vae(recording: Recording) -> Outcome:
    io, vae, outs = recording.io, open_sora_vae(recording), {}
    for clip, about in recording.config["clips"].items():
        video, z, frames = io[f"in.{clip}.x"], io[f"in.{clip}.z"], about["num_frames"]
        spatial = io[f"in.{clip}.noise_spatial"].unflatten(0, (len(video), frames)).transpose(1, 2)
        outs[f"out.{clip}.encode_mode"] = vae.encode(video)
        outs[f"out.{clip}.encode_sample"] = vae.encode(
            video, noise=(spatial, io[f"in.{clip}.noise_temporal"])
        )
        outs[f"out.{clip}.decode"] = vae.decode(z, num_frames=frames)
    return Outcome(outs, {})


def run_rflow(recording: Recording) -> Outcome:
    """Timesteps of many sizes, and three runs of the recorded toy model, sample by sample."""
    io, config, outs = recording.io, recording.config, {}
    for case in config["timesteps"]:
        for name, dtype in (("fp32args", torch.float32), ("bf16args", torch.bfloat16)):
            shift = size_shift(*case["image_size"], case["num_frames"], dtype=dtype)
            schedule = make_schedule(ScheduleConfig("euler", "wan", shift), case["steps"])
            outs[f"out.timesteps.{case['index']}.{name}"] = torch.tensor(schedule.timesteps)
    for case in ("t2v", "t2v_ones", "refcond"):
        outs[f"out.{case}"] = torch.cat([toy_run(recording, case, i) for i in range(len(io["in.z0"]))])
    return Outcome(outs, {})


def toy_run(recording: Recording, case: str, i: int) -> Tensor:
    """One sample of a recorded run. The recorded noise of a step is drawn before it, ours after the last."""
    io, about = recording.io, recording.config["trajectory"]
    shift = size_shift(*about["image_size"], about["num_frames"])
    schedule = make_schedule(ScheduleConfig("euler", "wan", shift), about["steps"])
    x, length, mask = io["in.z0"][i : i + 1], int(io["in.mask"][i].sum()), io.get(f"in.{case}.frame_mask")
    if mask is not None:
        strategy = about["mask_strategy"][i] if case == "refcond" else ""
        references = [io[f"in.ref.{i}"]]
        given = paste(read_strategy(strategy), references, x)
        assert torch.equal(given.mask, mask[i])
        x, schedule = given.latents, MaskedSchedule(schedule, given.mask)
    state, y = schedule.start(), {"cond": io["in.y"][i, 0], "uncond": io["in.y_null"]}
    for step in schedule.steps(about["cfg_scale"]):
        outputs = {name: -recorded_toy(x, step.t, text[:length].mean()) for name, text in y.items()}
        if mask is not None:  # the toy is told which frames are given; the sampler drops what it says there
            outputs = {name: out * toy_factor(schedule, step.i) for name, out in outputs.items()}
        drawn = io.get(f"in.{case}.noise")
        noise = [drawn[step.i + 1, i : i + 1]] if drawn is not None and step.i + 1 < step.n else None
        x, state = schedule.step(step.i, x, guide(outputs, step.guidance), state, noise)
    return x


def toy_factor(schedule: MaskedSchedule, i: int) -> Tensor:
    return torch.where(schedule.is_noisy(i), 1.0, 0.5)


def recorded_toy(x: Tensor, t: float, text: Tensor) -> Tensor:
    """The recorded toy model of one branch, its velocity channels alone."""
    return 0.6 * x + 0.25 * x.roll(1, dims=2) + 0.4 * torch.sin(2 * x) * (t / 1000) + 0.3 * text


def run_open_sora_e2e(recording: Recording) -> Outcome:
    io, about = recording.io, recording.config["constructor"]
    near = lambda name: open_recording(recording.folder.parent / name)
    model, vae = open_sora_transformer(near("open_sora_dit")), open_sora_vae(near("open_sora_vae"))
    height, width = about["args_image_size"]
    shift = size_shift(height, width, about["num_frames"])
    plain = make_schedule(ScheduleConfig("euler", "wan", shift), about["num_sampling_steps"])
    text = [io["in.y"][0, 0, : int(io["in.mask"].sum())], None]
    outs = {}
    for case in ("t2v", "i2v"):
        strategy = read_strategy("0,0,0,0,1,0" if case == "i2v" else "")
        given = paste(strategy, [io["in.i2v.ref"]], io["in.z"])
        assert torch.equal(given.mask[None], io[f"in.{case}.frame_mask"])
        context = model.prepare(
            text,
            tuple(about["latent_size"]),
            video=Video(height, width, about["fps"]),
            branches=("cond", "uncond"),
            frame_mask=given.mask,
        )
        forward = Forward(model, context, is_batched=True)
        schedule = MaskedSchedule(plain, given.mask)
        run = denoise(forward, schedule, given.latents, NoCache(), guidance_scale=about["cfg_scale"])
        outs[f"out.{case}.latent"] = run.latents
        outs[f"out.{case}.video"] = vae.decode(run.latents, num_frames=about["num_frames"])
    frames = to_frames(outs["out.t2v.video"][0], rounds=True)
    return Outcome(outs | {"out.t2v.video_uint8": torch.from_numpy(frames)}, {})


RUNNERS: dict[str, Callable[[Recording], Outcome]] = {
    "open_sora_dit": run_open_sora_dit,
    "open_sora_vae": run_open_sora_vae,
    "open_sora_rflow": run_rflow,
    "open_sora_e2e": run_open_sora_e2e,
}
