"""Train a small U-Net to draw: procedural shapes (no download), CIFAR-10, your own images, or words, from captions.

examples:
  python train_tiny.py                                        # shapes, into runs/shapes; half an hour on 2 cores
  python train_tiny.py --data cifar10 --steps 50000           # downloads CIFAR-10 once
  python train_tiny.py --data my_photos.zip --image-size 64 --channel-mult 1,2,2,2 --device cuda
  python train_tiny.py --data my_folder                       # with a captions.csv: file, caption
  npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
  python train_tiny.py --data node_modules --out runs/emoji --beta-end 0.012    # emoji from words
  python train_tiny.py --resume                               # continue an interrupted run
  python sample.py --ckpt runs/shapes/last.pt                 # see what it draws, even while it trains
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minicache.captions import CATEGORIES, captioned
from minicache.checkpoints import load, read_file, save
from minicache.data import BUILT_IN, CaptionedSource, batch, source, wordless
from minicache.diffusion import Diffusion
from minicache.files import locked
from minicache.images import beside, enlargement, grid, labelled, save_png, to_uint8
from minicache.placement import choose_placement
from minicache.sampling import sample
from minicache.tools import Parser, at_least, interruptions, make_folder, run
from minicache.tools.log import claim, log
from minicache.unet import UNet, UNetConfig
from minicache.words import Vocabulary

SHAPE = UNetConfig(32, 64, (1, 1, 1, 1), attention_resolutions=(8,), context_dim=128, heads=4, pooled_context=True)
WORDLESS = {"context_dim": None, "heads": 1, "pooled_context": False}  # of the shape where there are no captions
BETA_END = 0.0075  # less noisy at the end than Ho et al.'s 0.02: weights/README.md says why
WARMUP = 500  # steps until the learning rate is at its peak
BINS = 20  # equal parts of the timesteps; each has a usual loss


def flag(default: Any, text: str, **more: Any) -> Any:
    """A field of Settings. text: what --help says of it; more: what else argparse needs to know."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Settings:
    """A training run. Each field is a flag: image_size is --image-size. ValueError for what no run can have."""

    data: str = flag("shapes", "shapes, cifar10, a folder or zip of images, or a folder with captions")
    categories: tuple[str, ...] = flag(CATEGORIES, "what to learn of emoji")
    out: str | None = flag(None, "folder of the checkpoint, the log and the previews (default: runs/<data>)")
    init: str | None = flag(None, "begin with these weights, and their shape, not with random ones", metavar="CKPT")
    resume: bool = flag(False, "continue from <out>/last.pt; another --lr and --steps are taken from there on")
    image_size: int | None = flag(None, "pixels a side")
    model_channels: int | None = flag(None, "width of the first level, a multiple of --groups; better twice that")
    channel_mult: tuple[int, ...] | None = flag(None, "width of each level, in model-channels")
    num_res_blocks: int | None = flag(None, "blocks of a level on the way down; one more on the way up")
    groups: int | None = flag(None, "groups of every GroupNorm")
    attention_resolutions: tuple[int, ...] | None = flag(None, "sides at which blocks attend")
    dropout: float | None = flag(None, "share of the features that each block drops")
    context_dim: int | None = flag(None, "width of a word, where there are captions")
    heads: int | None = flag(None, "of attention to words")
    pooled_context: bool | None = flag(None, "add the words' sum to the embedding of the timestep")
    beta_end: float | None = flag(None, f"of the noise; Ho et al.: 0.02 (default: {BETA_END}, or --init's)")
    steps: int = flag(5000, "training steps")
    batch_size: int = flag(32, "images a step")
    lr: float = flag(1e-3, f"peak learning rate, after {WARMUP} steps; it decays to 0 along a cosine")
    weight_decay: float = flag(0.0, "of AdamW")
    ema: float = flag(0.999, "decay of the averaged weights")
    jitter: float = flag(0.05, "how much the noise's amplitude varies from image to image")
    seed: int = flag(0, "of the first weights, the images and the noise")
    device: str = flag("auto", "cpu, cuda, mps; auto: cuda or mps where there is one, else cpu")
    dtype: str = flag("auto", "auto: bfloat16 where the hardware has it", choices=("auto", "float32", "bfloat16"))
    preview_every: int = flag(2000, "steps between sample grids")
    save_every: int = flag(500, "steps between checkpoints")

    def __post_init__(self):
        at_least(self, steps=1, batch_size=1, preview_every=1, save_every=1)
        at_least(self, most=2**32 - 1, seed=0)
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf and 0 <= self.ema < 1 > self.jitter >= 0):
            said = ", ".join(f"{name}={getattr(self, name)}" for name in ("lr", "weight_decay", "ema", "jitter"))
            raise ValueError(f"need finite lr > 0 and weight_decay >= 0, ema and jitter at least 0 and below 1: {said}")

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{Path(os.path.abspath(self.data)).stem}")

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"


def main(**flags: Any) -> Path:
    """Train with these `Settings`; the path of the checkpoint: averaged weights, and what a resumed run needs."""
    settings = Settings(**flags)
    words = None if settings.data in BUILT_IN else captioned(settings.data, settings.categories)
    training = Training(settings, words and words.vocabulary())
    unet, size = training.unet, training.unet.config.image_size
    draw = words.source(unet.vocabulary, size) if words else wordless(source(settings.data, size, settings.folder))
    make_folder(settings.folder)
    parameters = sum(p.numel() for p in unet.parameters())
    precision = "bf16" if training.low_precision else "float32"
    print(f"{parameters:,} parameters, {precision}, {training.device}, {torch.get_num_threads()} threads", flush=True)
    with locked(settings.folder, f"{settings.folder}: another run trains there"), interruptions() as interrupted:
        training.begin()  # again, as another run may have ended in the meantime
        claim(settings.folder)
        train(training, draw, interrupted)
    return settings.last


def train(training: Training, draw: CaptionedSource, interrupted: list[int]) -> None:
    """Take the steps that are left; log, save and preview on the way. Stop after a step that was interrupted."""
    settings, T = training.settings, training.unet.diffusion.num_timesteps
    print(f"steps {training.step}..{settings.steps}, --lr {settings.lr:g}, into {settings.folder}", flush=True)
    began, losses, noisy_losses = time.time(), [], []
    if not settings.last.exists():  # whatever ends the run, it can be resumed
        training.save()
    steps = range(training.step, settings.steps)
    for step in (bar := tqdm(steps, initial=steps.start, total=steps.stop, unit="step", disable=None)):
        if step and step % settings.preview_every == 0:  # here, as a resumed run may have to begin with it
            preview(training.average, settings.folder / f"preview_{step:06d}.png")
        x0, t, eps, context = batch(draw, settings.batch_size, T, settings.jitter, settings.seed, step)
        each = training.update(x0, t, eps, context)
        losses.append(each.mean().item())
        noisy_losses += each[t >= 0.9 * T].tolist()
        done = training.step
        last_one = done == settings.steps or interrupted
        if done % 100 == 0 or last_one:
            loss, noisy_loss = fmean(losses), fmean(noisy_losses) if noisy_losses else math.nan
            bar.set_postfix_str(f"loss {loss:.4f}, in the noisiest tenth {noisy_loss:.6f}")
            log(settings.folder / "log.csv", done, loss, noisy_loss, time.time() - began)
            losses, noisy_losses = [], []
        if done % settings.save_every == 0 or last_one:
            training.save()
        if interrupted:
            print(f"stopped after step {done}; --resume goes on from {settings.last}", file=sys.stderr)
            raise KeyboardInterrupt
    preview(training.average, settings.folder / f"preview_{training.step:06d}.png")


class Training:
    """What changes in a run: the weights, their average, the optimizer, the usual losses, the number of steps done."""

    def __init__(self, settings: Settings, vocabulary: Vocabulary | None = None):
        self.settings, self.step = settings, 0
        placement = choose_placement(settings.device, settings.dtype, compile=False)
        self.device, self.low_precision = placement.device, placement.dtype == torch.bfloat16
        torch.manual_seed(settings.seed)
        self.unet = network(settings, vocabulary).to(self.device, memory_format=placement.memory_format)
        self.average = copy.deepcopy(self.unet).eval().requires_grad_(False)
        decay = settings.weight_decay
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), betas=(0.9, 0.99), weight_decay=decay, fused=True)
        self.usual = [1.0] * BINS  # the running mean of the losses near each timestep, where there are words
        self.begin()

    def update(self, x0: Tensor, t: Tensor, eps: Tensor, context: Tensor | None = None) -> Tensor:
        """One training step; the loss of each image before it, [B] on the CPU. ValueError where it diverges.

        With words, each loss is divided by the running mean at similar timesteps (as EDM2's uncertainty, Karras et al.
        2024): else the noisiest ones, where words matter most, would hardly count.
        """
        bins = (t * BINS // self.unet.diffusion.num_timesteps).tolist()
        usual = torch.tensor([self.usual[k] for k in bins], device=self.device)
        x0, t, eps = (tensor.to(self.device) for tensor in (x0, t, eps))
        unet = partial(self.unet, context=None if context is None else context.to(self.device))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            each = self.unet.diffusion.loss(unet, x0, t, eps)
        self.optimizer.zero_grad(set_to_none=True)
        (each / usual).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        update_average(self.average, self.unet, min(self.settings.ema, (1 + self.step) / (10 + self.step)))
        self.step += 1
        each, loss = each.detach().cpu(), each.mean().item()
        if context is not None:
            for k, value in zip(bins, each.tolist()):
                self.usual[k] += 0.01 * (value - self.usual[k])
        norm = torch.stack(torch._foreach_norm(list(self.unet.parameters()))).norm().item()
        if not (math.isfinite(loss) and math.isfinite(norm)):  # before anything is saved or drawn
            told = f"the loss of step {self.step} is {loss}, and the norm of the weights after it {norm}"
            raise ValueError(f"{told}; lower --lr, and begin again, or --resume if last.pt is still good")
        return each

    def save(self) -> None:
        state = {"step": self.step, "unet": self.unet.state_dict(), "optimizer": self.optimizer.state_dict()}
        names = ("data", "categories", "batch_size", "weight_decay", "ema", "jitter", "seed")
        state |= {"usual": self.usual, "arguments": {name: getattr(self.settings, name) for name in names}}
        save(self.settings.last, self.average, training=state)

    def begin(self) -> None:
        """Put everything back as last.pt has it, if asked to. ValueError where it does not fit, or is in the way."""
        if (last := self.settings.last).exists() and not self.settings.resume:
            raise ValueError(f"{last} exists: add --resume to go on with it, or choose another --out")
        if not self.settings.resume:
            return
        content = read_file(last)
        if "training" not in content:
            raise ValueError(f"{last} holds weights alone, and no state of a training run; begin a run with --init")
        try:
            state, words = content["training"], self.unet.vocabulary and self.unet.vocabulary.words
            if words != content.get("vocabulary", {}).get("words"):
                raise ValueError(f"{last} was trained with other words than the captions' in {self.settings.data}")
            here = {**asdict(self.settings), **asdict(self.unet.config), **asdict(self.unet.diffusion)}
            there = {**content["config"], **content["diffusion"], **state["arguments"]}
            for name, value in there.items():
                if (now := here.get(name)) != value:
                    raise ValueError(f"{last} was trained with {name}={value!r}, not {now!r}: use the same flags")
            if state["step"] > self.settings.steps:
                raise ValueError(f"{last} has taken {state['step']} steps, more than --steps {self.settings.steps}")
            self.average.load_state_dict(content["state_dict"])
            self.unet.load_state_dict(state["unet"])
            self.optimizer.load_state_dict(state["optimizer"])  # by position, and unchecked
            begun = [*self.unet.parameters()] if state["step"] else []  # before the first step, it has no state
            fits = all(self.optimizer.state[p]["exp_avg"].shape == p.shape for p in begun)
            if not fits or type(state["step"]) is not int or state["step"] < 0:
                raise ValueError(f"{last} is of another version, or damaged: begin anew, with --init {last}")
            self.step, self.usual = state["step"], [float(state.get("usual", self.usual)[k]) for k in range(BINS)]
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            said = f"{last} cannot be resumed from: {type(error).__name__}, {error}".partition("\n")[0]
            raise ValueError(said) from None


def network(settings: Settings, vocabulary: Vocabulary | None) -> UNet:
    """The network to train, in training mode: --init's, with its own vocabulary, or one of random weights."""
    said = {name: value for name, value in asdict(settings).items() if name in vars(SHAPE) and value is not None}
    if settings.init:
        config = (unet := load(settings.init).train()).config
        if (unet.vocabulary is None) != (vocabulary is None):
            knows, has = ("has" if words else "has no" for words in (unet.vocabulary, vocabulary))
            raise ValueError(f"--init {settings.init} {knows} words, and --data {settings.data} {has} captions")
        if config.in_channels != 3 or (config.context_dim and unet.vocabulary is None):
            raise ValueError(f"--init {settings.init}: need 3 channels, and a context of words or none")
        for name, value in said.items():
            if value != (its := getattr(config, name)):
                raise ValueError(f"--{name.replace('_', '-')} {value} contradicts --init {settings.init}: it has {its}")
    else:
        rest = {"num_tokens": 1 + len(vocabulary.words)} if vocabulary else WORDLESS
        unet = UNet(replace(SHAPE, **{**said, **rest}))
        unet.diffusion, unet.vocabulary = Diffusion(beta_end=BETA_END), vocabulary
    if settings.beta_end is not None:
        unet.diffusion = replace(unet.diffusion, beta_end=settings.beta_end)
    return unet


def learning_rate(settings: Settings, step: int) -> float:
    """Rises over WARMUP steps to the peak, and falls along a cosine to 0."""
    return settings.lr * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


@torch.no_grad()
def update_average(average: UNet, unet: UNet, decay: float) -> None:
    """average = decay * average + (1 - decay) * unet. It draws better than the weights of any single step."""
    torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)


def preview(unet: UNet, path: Path) -> None:
    """Left: DDPM, clipped. Right: DDIM, not clipped, which shows errors of colour that clipping hides. Where there is a
    vocabulary, its examples are drawn, under its guidance."""
    scale, sheets, T = enlargement(unet.config.image_size), [], unet.diffusion.num_timesteps
    shown = unet.vocabulary.examples if unet.vocabulary else ()
    words = {"context": unet.vocabulary.encode(*shown), "guidance": unet.vocabulary.guidance} if shown else {}
    for sampler, steps in (("ddpm", 100), ("ddim", 50)):
        images = to_uint8(sample(unet, range(len(shown) or 16), steps=min(steps, T), sampler=sampler, **words))
        sheets.append(labelled(images, shown, scale=scale) if shown else grid(images))
    save_png(path, beside(*sheets), 1 if shown else scale)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="train_tiny.py", doc=__doc__)
    kinds = {"int": int, "float": float, "tuple[int, ...]": integers, "tuple[str, ...]": lambda s: tuple(s.split(","))}
    for each in fields(Settings):
        about, kind, usual = dict(each.metadata), each.type.removesuffix(" | None"), each.default
        if (shown := getattr(SHAPE, each.name, usual)) is not None:
            shown = ",".join(map(str, shown)) if isinstance(shown, tuple) else shown
            about["help"] += f" (default: {shown}{', or that of --init' * (usual is None)})"
        about |= {"action": argparse.BooleanOptionalAction} if kind == "bool" else {"type": kinds.get(kind, str)}
        parser.add_argument(f"--{each.name.replace('_', '-')}", default=each.default, **about)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run("train_tiny.py", lambda: print(main(**vars(parse()))))
