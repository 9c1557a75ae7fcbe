"""Train a small U-Net to draw: on procedural shapes (no download), on CIFAR-10, or on a folder or zip of images.

examples:
  python train_tiny.py                                        # shapes, into runs/shapes; half an hour on 2 cores
  python train_tiny.py --data cifar10 --steps 50000           # downloads CIFAR-10 once
  python train_tiny.py --data my_photos.zip --image-size 64 --channel-mult 1,2,2,2 --device cuda
  python train_tiny.py --resume                               # go on where an interrupted run stopped
  python sample.py --ckpt runs/shapes/last.pt                 # look at what it draws, also while it trains
"""

from __future__ import annotations

import argparse
import copy
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import load
from minicache.convert import read_file, save
from minicache.data import Source, source
from minicache.diffusion import Diffusion
from minicache.images import beside, enlargement, grid, save_png, to_uint8
from minicache.placement import DTYPES, choose_device, fastest_dtype
from minicache.samplers import sample
from minicache.tools import Parser, run
from minicache.unet import UNet, UNetConfig

BETA_END = 0.0075  # less noisy at the end than Ho et al.'s 0.02: weights/README.md says why
WARMUP = 500  # steps until the learning rate is at its peak


def main(
    data: str = "shapes",
    out: str | None = None,
    image_size: int = 32,
    model_channels: int = 64,
    channel_mult: tuple[int, ...] = (1, 1, 1, 1),
    num_res_blocks: int = 2,
    groups: int = 32,
    attention_resolutions: tuple[int, ...] = (8,),
    dropout: float = 0.0,
    beta_end: float | None = None,
    steps: int = 5000,
    batch_size: int = 32,
    lr: float = 1e-3,
    ema: float = 0.999,
    jitter: float = 0.05,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    preview_every: int = 2000,
    save_every: int = 500,
    resume: bool = False,
    init: str | None = None,
) -> Path:
    """Train, and return the path of the checkpoint (EMA weights, and all that a resumed run needs)."""
    for name, value in {"steps": steps, "batch_size": batch_size, "preview_every": preview_every,
                        "save_every": save_every}.items():  # fmt: skip
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not (lr > 0 and 0 <= ema < 1 and 0 <= jitter < 1):
        raise ValueError(f"need lr > 0, 0 <= ema < 1 and 0 <= jitter < 1, not {lr}, {ema} and {jitter}")
    device = choose_device(device)
    folder = Path(out or f"runs/{Path(data).stem}")
    last = folder / "last.pt"
    if last.exists() and not resume:
        raise ValueError(f"{last} exists: add --resume to go on with it, or choose another --out")
    torch.manual_seed(seed)
    if init:
        unet = load(init).train()
    else:
        shape = (image_size, model_channels, channel_mult, num_res_blocks, attention_resolutions)
        unet = UNet(UNetConfig(*shape, dropout=dropout, groups=groups))
    unet = unet.to(device)
    draw = source(data, unet.config.image_size)
    if beta_end is not None or not init:
        unet.diffusion = Diffusion(beta_end=BETA_END if beta_end is None else beta_end)
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    arguments = {"data": data, "batch_size": batch_size, "ema": ema, "jitter": jitter, "seed": seed}
    start = restore(last, unet, average, optimizer, arguments) if resume else 0
    low_precision = (fastest_dtype(device)[0] if dtype == "auto" else DTYPES[dtype]) == torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    parameters, precision = sum(p.numel() for p in unet.parameters()), "bf16" if low_precision else "float32"
    print(f"{parameters:,} parameters, {precision}, {device}, {torch.get_num_threads()} threads", flush=True)
    print(f"steps {start}..{steps}, into {folder}", flush=True)

    began, losses, noisy_losses = time.time(), [], []
    with interruptions() as interrupted:
        for step in (bar := tqdm(range(start, steps), initial=start, total=steps, unit="step", disable=None)):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            x0, t, eps = batch(draw, batch_size, unet.diffusion.num_timesteps, jitter, seed, step)
            with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
                each = unet.diffusion.loss(unet, x0.to(device), t.to(device), eps.to(device))
            optimizer.zero_grad(set_to_none=True)
            each.mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            update_average(average, unet, min(ema, (1 + step) / (10 + step)))

            done, each = step + 1, each.detach().cpu()
            losses.append(each.mean().item())
            if not (math.isfinite(losses[-1]) and finite(unet)):
                spoilt = ", and its update leaves weights that are not finite" if math.isfinite(losses[-1]) else ""
                raise ValueError(
                    f"the loss of step {done} is {losses[-1]}{spoilt}; {last} is as it was: lower --lr, and --resume"
                )
            noisy_losses += each[t >= 0.9 * unet.diffusion.num_timesteps].tolist()
            last_one = done == steps or interrupted
            if done % 100 == 0 or last_one:
                loss, noisy_loss = fmean(losses), fmean(noisy_losses) if noisy_losses else math.nan
                bar.set_postfix_str(f"loss {loss:.4f}, in the noisiest tenth {noisy_loss:.6f}")
                log(folder / "log.csv", done, loss, noisy_loss, time.time() - began)
                losses, noisy_losses = [], []
            if done % save_every == 0 or last_one:
                state = {"step": done, "unet": unet.state_dict(), "optimizer": optimizer.state_dict()}
                save(last, average, training={**state, "arguments": arguments})
            if interrupted:
                print(f"stopped after step {done}; --resume goes on from {last}", file=sys.stderr)
                raise KeyboardInterrupt
            if done % preview_every == 0 or last_one:
                preview(average, folder / f"preview_{done:06d}.png")
    return last


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, so that a step is never cut in two; the second Ctrl-C is an ordinary one."""
    interrupted: list[int] = []

    def note(number: int, frame: object) -> None:
        interrupted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def batch(
    draw: Source, size: int, num_timesteps: int, jitter: float, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, t, eps) of a step, a function of the seed and the step alone; dropout goes on with the same generator.

    t: one random timestep from each of `size` equal parts of 0..T-1, so that no step goes without the noisiest ones.
    eps: each image's is scaled by 1 + jitter * N(0, 1). The norm of plain noise varies by 1% alone, too little for a
    network full of normalisations to notice soon; what it does not see of it stays in the picture as grain.
    """
    generator = torch.manual_seed(seed * 1_000_003 + step)  # the global one
    x0 = draw(size, generator)
    t = ((torch.arange(size) + torch.rand(size, generator=generator)) * num_timesteps / size).long()
    eps = torch.randn(x0.shape, generator=generator) * (1 + jitter * torch.randn(size, 1, 1, 1, generator=generator))
    return x0, t.clamp(max=num_timesteps - 1), eps


@torch.no_grad()
def update_average(average: UNet, unet: UNet, decay: float) -> None:
    """average = decay * average + (1 - decay) * unet: sampled from, as the last iterates are noisy."""
    torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)


def finite(unet: UNet) -> bool:
    """Whether all weights are finite: a norm is not where one of its numbers is not."""
    return torch.stack(torch._foreach_norm(list(unet.parameters()))).isfinite().all().item()


def restore(last: Path, unet: UNet, average: UNet, optimizer: torch.optim.Optimizer, arguments: dict) -> int:
    """Put everything back as the checkpoint has it; the number of steps done. Only steps and lr may be others."""
    if not last.exists():
        raise ValueError(f"nothing to resume: there is no {last}")
    content = read_file(last)
    if "training" not in content:
        raise ValueError(f"{last} holds weights alone, and no state of a training run; begin a run with --init")
    here = {**asdict(unet.config), **asdict(unet.diffusion), **arguments}
    there = {**content["config"], **content["diffusion"], **content["training"]["arguments"]}
    for name, value in there.items():
        if here.get(name) != value:
            raise ValueError(f"{last} was trained with {name}={value!r}, not {here.get(name)!r}: use the same flags")
    average.load_state_dict(content["state_dict"])
    unet.load_state_dict(content["training"]["unet"])
    optimizer.load_state_dict(content["training"]["optimizer"])
    return content["training"]["step"]


def preview(unet: UNet, path: Path) -> None:
    """Left: DDPM, clipped. Right: DDIM, unclipped, which shows errors of colour that clipping hides."""
    grids = [
        grid(to_uint8(sample(unet, range(16), steps=steps, sampler=sampler)))
        for sampler, steps in (("ddpm", 100), ("ddim", 50))
    ]
    save_png(path, beside(*grids), enlargement(unet.config.image_size))


def log(path: Path, step: int, *values: float) -> None:
    with open(path, "a") as file:
        if file.tell() == 0:
            file.write("step,loss,loss_noisiest_tenth,seconds\n")
        file.write(",".join([str(step), *(f"{value:.6g}" for value in values)]) + "\n")


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="train_tiny.py", doc=__doc__)
    add = parser.add_argument
    add("--data", default="shapes", help="shapes, cifar10, or a folder or zip of images (default: shapes)")
    add("--out", help="folder of the checkpoint, the log and the previews (default: runs/<data>)")
    add("--init", metavar="CKPT", help="begin with these weights, and their shape, instead of random ones")
    add("--resume", action="store_true", help="go on from <out>/last.pt")
    for name, kind, default, text in (
        ("image-size", int, 32, "pixels a side"),
        ("model-channels", int, 64, "width of the first level, a multiple of --groups; twice it at least"),
        ("channel-mult", whole_numbers, (1, 1, 1, 1), "width of each level, in model-channels"),
        ("num-res-blocks", int, 2, "blocks of a level, on the way down; one more on the way up"),
        ("groups", int, 32, "of every GroupNorm"),
        ("attention-resolutions", whole_numbers, (8,), "sides at which blocks attend"),
        ("dropout", float, 0.0, ""),
        ("steps", int, 5000, "training steps"),
        ("batch-size", int, 32, ""),
        ("lr", float, 1e-3, "peak learning rate; decays to 0 along a cosine"),
        ("ema", float, 0.999, "decay of the averaged weights"),
        ("jitter", float, 0.05, "spread of the noise's amplitude, from image to image"),
        ("seed", int, 0, ""),
        ("device", str, "auto", "cpu, cuda, mps; auto: cuda where there is one"),
        ("preview-every", int, 2000, "steps between sample grids"),
        ("save-every", int, 500, "steps between checkpoints"),
    ):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        add(f"--{name}", type=kind, default=default, help=f"{text} (default: {shown})".strip())
    add(
        "--beta-end",
        type=float,
        help=f"the schedule's last beta; Ho et al. have 0.02 (default: {BETA_END}, or --init's)",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 where the hardware has it",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run("train_tiny.py", lambda: print(main(**vars(parse()))))
