"""Train the embedded model: data drawn on the fly, VAE, then text encoder and transformer jointly.

    python -m benchmarks.demo_model.train --out DIR             # all of it; stop and start it as you like
    python -m benchmarks.demo_model.train --out DIR --hours 3   # the same, fitted into three hours
    python -m benchmarks.demo_model.train --out DIR --smoke     # every stage in miniature, within a minute

DIR holds one checkpoint per stage, the latents, the tokenizer and, at the end, the model folder DIR/model.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.demo_model import dit_stage, vae_stage
from benchmarks.demo_model.captions import TEXT_LEN, train_tokenizer
from benchmarks.demo_model.data import FRAMES, SIZE
from benchmarks.demo_model.latents import Statistics, encode_clips, normalise, statistics, training_clips
from benchmarks.demo_model.state import Stage, load_ema, make_stage, resume
from minidit.generate import Engine
from minidit.models.wan import Wan
from minidit.presets import Defaults, ScheduleConfig, T5Config, WanConfig, WanVAEConfig
from minidit.text.t5 import T5Encoder
from minidit.text.tokenizers import SentencePiece
from minidit.vae.wan import WanVAE
from minidit.weights import save_model_folder

SCHEDULE = ScheduleConfig(shift=3.0)
DEFAULTS = Defaults(width=SIZE, height=SIZE, num_frames=FRAMES, steps=30, guidance_scale=4.0, fps=8)
VAE_SHARE = 0.4  # of --hours; the latents are encoded in about a tenth


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training."""

    width: int = 192
    mlp_width: int = 512
    heads: int = 6
    depth: int = 8
    text_width: int = 128
    vae_base: int = 16
    latent: int = 8
    vae_frames: int = 600_000  # frames the VAE sees, most of them crops
    clips: int = 7040  # whose latents the transformer sees
    samples: int = 300_000  # the transformer sees, captions worded anew each time
    batch: int = 48


SMOKE = Recipe(48, 64, 2, 2, 32, vae_base=4, latent=4, vae_frames=100, clips=16, samples=64, batch=8)


def vae_config(recipe: Recipe, stats: Statistics | None = None) -> WanVAEConfig:
    """Unit statistics while it trains; those of its latents afterwards."""
    mean, std = stats or ((0.0,) * recipe.latent, (1.0,) * recipe.latent)
    return WanVAEConfig(recipe.vae_base, recipe.latent, mean, std, res_blocks=1)


def vae_stage_of(recipe: Recipe, args: argparse.Namespace) -> Stage:
    """The VAE with its optimiser: new, continued from --init-vae, or as its checkpoint left it."""
    torch.manual_seed(args.seed)
    vae = WanVAE(vae_config(recipe)).to(args.device)
    vae_stage.initialise(vae)
    if args.init_vae:
        vae.load_state_dict(Engine(args.init_vae, device=args.device).module("vae").state_dict())
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant.requires_grad_(False)
    vae_stage.channels_last(vae)
    lr = vae_stage.TUNE_LR if args.init_vae else vae_stage.LR
    stage = make_stage(nn.ModuleDict({"vae": vae}), lr=lr, decay=0.0, total=recipe.vae_frames, seed=args.seed)
    if (args.out / "vae.pt").exists():
        resume(stage, args.out / "vae.pt", total=args.vae_frames)
    return stage


def dit_stage_of(recipe: Recipe, args: argparse.Namespace, tokenizer: SentencePiece) -> Stage:
    """Transformer and text encoder with their optimiser: new, or as their checkpoint left them."""
    torch.manual_seed(args.seed)
    model = Wan(transformer_config(recipe)).to(args.device)
    encoder = T5Encoder(text_config(recipe, tokenizer)).to(args.device)
    dit_stage.initialise(model, encoder)
    modules = nn.ModuleDict({"transformer": model, "text_encoder": encoder})
    stage = make_stage(modules, lr=dit_stage.LR, decay=0.01, total=recipe.samples, seed=args.seed)
    if (args.out / "dit.pt").exists():
        resume(stage, args.out / "dit.pt", total=args.samples)
    return stage


def transformer_config(recipe: Recipe) -> WanConfig:
    sizes = dict(width=recipe.width, mlp_width=recipe.mlp_width, heads=recipe.heads, depth=recipe.depth)
    return WanConfig(**sizes, channels=recipe.latent, text_width=recipe.text_width, text_len=TEXT_LEN)


def text_config(recipe: Recipe, tokenizer: SentencePiece) -> T5Config:
    width = recipe.text_width
    return T5Config(tokenizer.vocab, width, mlp_width=2 * width, heads=width // 32, head_width=32, depth=2)


def train_vae(recipe: Recipe, args: argparse.Namespace) -> WanVAE:
    """The trained VAE, in eval mode; trains what is left to train."""
    stage = vae_stage_of(recipe, args)
    budget_s = args.hours and args.hours * 3600 * VAE_SHARE
    vae_stage.train_vae(stage, args.out / "vae.pt", tuned=bool(args.init_vae), budget_s=budget_s)
    load_ema(stage)
    return stage.modules["vae"].eval().requires_grad_(False)


def train_dit(recipe: Recipe, args: argparse.Namespace, latents: Tensor) -> tuple[Wan, T5Encoder]:
    """The trained transformer and text encoder. latents (n, C, t, h, w), normalised"""
    tokenizer = SentencePiece(args.out / "spiece.model")
    stage = dit_stage_of(recipe, args, tokenizer)
    dit_stage.train_dit(
        stage,
        args.out / "dit.pt",
        latents.to(args.device),
        training_clips(recipe.clips, args.seed),
        tokenizer,
        batch=recipe.batch,
        compiled=args.compile,
        budget_s=args.hours and args.hours * 3600 * (0.9 - VAE_SHARE),
    )
    load_ema(stage)
    return stage.modules["transformer"], stage.modules["text_encoder"]


def export(recipe: Recipe, out: Path, vae: WanVAE, model: Wan, encoder: T5Encoder, stats: Statistics) -> None:
    """Write the model folder, in fp16: half the bytes, and a thousandth of the error that training left."""
    save_model_folder(
        out / "model",
        family="wan",
        components={
            "transformer": ("Wan", model.config, model),
            "text_encoder": ("T5Encoder", encoder.config, encoder),
            "vae": ("WanVAE", vae_config(recipe, stats), vae),
            "tokenizer": ("SentencePiece", None, out / "spiece.model"),
        },
        schedule=SCHEDULE,
        defaults=DEFAULTS,
        source="trained by benchmarks/demo_model on drawn clips",
        dtype=torch.float16,
        overwrite=True,
    )


def run(args: argparse.Namespace) -> None:
    """The stages, one after the other; each goes on where its checkpoint ends."""
    recipe = SMOKE if args.smoke else Recipe()
    samples, vae_frames = args.samples or recipe.samples, args.vae_frames or recipe.vae_frames
    recipe = replace(recipe, samples=samples, vae_frames=vae_frames)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    if not (args.out / "spiece.model").exists():
        train_tokenizer(args.out / "spiece.model", seed=args.seed)
    vae = train_vae(recipe, args)
    if args.stage == "vae":
        return
    raw = encode_clips(vae, training_clips(recipe.clips, args.seed), args.out / "latents.pt")
    stats = statistics(raw)
    model, encoder = train_dit(recipe, args, normalise(raw, *stats))
    export(recipe, args.out, vae, model, encoder, stats)
    model_folder = args.out / "model"
    print(f"wrote {model_folder}; scores: python -m benchmarks.demo_model.check --model {model_folder}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        help="checkpoints, latents, tokenizer and the model folder DIR/model",
    )
    add("--stage", choices=("all", "vae"), default="all", help="vae: stop after the VAE")
    add("--smoke", action="store_true", help="a miniature of every stage")
    add("--hours", type=float, help="fit the run into this time, as measured on its first steps")
    add("--samples", type=int, help="clips the transformer sees; may be changed on resuming")
    add("--vae-frames", type=int, help="frames the VAE sees; may be changed on resuming")
    add("--init-vae", help="start the VAE from a model folder's instead of from nothing")
    add("--decoder-only", action="store_true", help="with --init-vae: keep the encoder, and so the latents")
    add("--threads", type=int, help="one is best beside any other busy process")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="compile the block: a quarter faster, needs a compiler")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(parse())
