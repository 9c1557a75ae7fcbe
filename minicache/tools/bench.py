"""How fast is it here? Passes and whole plans, beside diffusers on the same weights, in one run.

    python -m minicache bench                                  # Google's CIFAR-10 network, with random weights
    python -m minicache bench --ckpt tiny_cifar10 --out bench  # what 16 bits cost in the picture, too; bench.md, .json

Everything runs in turn, round after round, and medians are compared, so that what disturbs the machine disturbs all.
Two placements: float32, and what `auto` chooses here. Efficiency is the speed-up over uncached that is measured, over
the one that MACs promise. The ceiling is the product of two 2048 x 2048 matrices in the same dtype. diffusers is run
as it comes (float32, contiguous), and alike; it is an extra, and left out where it is not installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import PRESETS, load
from minicache.cost import macs, plan_macs
from minicache.diffusion import Diffusion
from minicache.files import replacing
from minicache.formats.diffusers import save_diffusers
from minicache.metrics import psnr
from minicache.placement import Placement, choose_placement, cpu_capabilities, place
from minicache.plan import uncached, uniform
from minicache.sampling import sample
from minicache.tools import Parser, at_least
from minicache.unet import UNet

BRANCHES = (1, 2, 3)
PLANS = ((1, 1), (5, 3), (5, 2), (5, 1))  # interval and branch; the first is uncached
DEFAULT = "as it comes"
SIDE = 2048  # of the ceiling's matrices


class Row(NamedTuple):
    """One pass or plan, in one placement and batch; times are medians, for one image."""

    placement: str
    batch: int
    what: str
    ms: float
    speed_up: float | None = None  # over the same uncached
    by_macs: float | None = None
    efficiency: float | None = None  # the former over the latter
    of_ceiling: float | None = None
    over_diffusers: float | None = None  # uncached, as it comes: float32, contiguous
    over_diffusers_alike: float | None = None  # uncached in the same dtype and memory format
    psnr: float | None = None  # dB, of the image to that in float32; the worst of the batch


def network(name: str) -> UNet:
    """A checkpoint, or a shape of PRESETS with random weights."""
    if name not in PRESETS:
        return load(name)
    torch.manual_seed(0)
    unet = UNet(PRESETS[name]).eval()
    for p in unet.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    unet.diffusion = Diffusion()
    return unet


def diffusers_models(unet: UNet, placements: dict[str, Placement]) -> dict[str, torch.nn.Module]:
    """The same weights as diffusers' UNet2DModel, as it comes and placed alike; none where it is not installed."""
    if unet.config.context_dim:  # UNet2DModel takes none
        return {}
    try:
        from diffusers import UNet2DModel
        from diffusers.utils import logging
    except ImportError:
        return {}
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_diffusers(Path(folder) / "unet", unet)
        model = UNet2DModel.from_pretrained(Path(folder) / "unet", use_safetensors=False, low_cpu_mem_usage=False)
    default = model.eval().to(placements["float32"].device)
    alike = {
        label: copy.deepcopy(default).to(placement.dtype, memory_format=placement.memory_format)
        for label, placement in placements.items()
    }
    return {DEFAULT: default, **alike}


def diffusers_ddim(model: torch.nn.Module, batch: int, steps: int) -> Tensor:
    """Its own scheduler; the state stays in float32, as ours does."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    x = torch.randn(batch, model.config.in_channels, *[model.config.sample_size] * 2, device=model.device)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x.to(model.dtype), t).sample.float(), t, x).prev_sample
    return x.cpu()


def timed(
    candidates: dict[Any, Callable[[], Any]], rounds: int, what: str, device: torch.device
) -> tuple[dict[Any, float], dict[Any, Any]]:
    """Median seconds, and last result, of each; a first round, which prepares kernels, does not count.

    Before each look at the clock, all that was given to the device is done: cuda and mps take work without doing it.
    """
    synchronize = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}
    wait = synchronize.get(device.type, lambda: None)
    seconds, results = {name: [] for name in candidates}, {}
    with tqdm(total=(rounds + 1) * len(candidates), desc=what, unit="run", disable=None) as bar:
        for _ in range(rounds + 1):
            for name, candidate in candidates.items():
                wait()
                began = time.perf_counter()
                results[name] = candidate()
                wait()
                seconds[name].append(time.perf_counter() - began)
                bar.update()
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}, results


@torch.no_grad()
def bench_passes(ours: dict[str, UNet], theirs: dict[str, torch.nn.Module], batch: int, rounds: int) -> list[Row]:
    unet, candidates = ours["float32"], {}
    for label, placed in ours.items():
        weight = placed.conv_out.weight
        x = torch.randn(batch, unet.config.in_channels, *[unet.config.image_size] * 2, device=weight.device)
        t = torch.tensor([500], device=weight.device)
        matrix = torch.randn(SIDE, SIDE, device=weight.device).to(weight.dtype)
        candidates[label, "ceiling"] = lambda A=matrix: A @ A
        candidates[label, "full pass"] = lambda f=placed.forward_full, x=x, t=t: f(x, t, 1)
        for b in BRANCHES:
            cached_U = placed.forward_full(x, t, b)[1]
            partial = placed.forward_partial
            candidates[label, f"branch {b}"] = lambda f=partial, x=x, t=t, cached_U=cached_U, b=b: f(x, t, cached_U, b)
    for label, model in theirs.items():
        candidates[label, "diffusers"] = lambda model=model, x=x, t=t: model(x.to(model.dtype), t)
    seconds, _ = timed(candidates, rounds, f"passes, batch {batch}", x.device)

    rows = []
    counts = {"full pass": macs(unet), **{f"branch {b}": macs(unet, b) for b in BRANCHES}}
    for label in ours:
        whole = seconds[label, "full pass"]
        rate = SIDE**3 / seconds[label, "ceiling"]  # MACs a second
        for what, count in counts.items():
            mine = seconds[label, what]
            row = Row(label, batch, what, 1e3 * mine / batch, of_ceiling=count * batch / mine / rate)
            if what == "full pass":
                rows.append(over_diffusers(row, seconds, (label, what)))
            else:
                rows.append(over_uncached(row, whole / mine, macs(unet) / count))
    return rows


@torch.no_grad()
def bench_plans(
    ours: dict[str, UNet], theirs: dict[str, torch.nn.Module], batch: int, rounds: int, steps: int, trained: bool
) -> list[Row]:
    """DDIM from noise to image, cached and not; diffusers uncached."""
    unet, candidates = ours["float32"], {}
    for label, placed in ours.items():
        for N, b in PLANS:
            plan = uniform(steps, N, b)
            candidates[label, plan] = lambda placed=placed, plan=plan: sample(placed, range(batch), plan=plan).cpu()
    for label, model in theirs.items():
        candidates[label, "diffusers"] = lambda model=model: diffusers_ddim(model, batch, steps)
    seconds, images = timed(candidates, rounds, f"plans, batch {batch}", unet.conv_out.weight.device)

    rows, all_macs = [], plan_macs(unet, uncached(steps))
    for label in ours:
        for N, b in PLANS:
            plan = uniform(steps, N, b)
            what = f"DDIM-{steps}, N={N}, branch {b}" if N > 1 else f"DDIM-{steps}, uncached"
            row = Row(label, batch, what, 1e3 * seconds[label, plan] / batch)
            row = over_diffusers(row, seconds, (label, plan))
            if N > 1:
                whole = seconds[label, uniform(steps, *PLANS[0])]
                row = over_uncached(row, whole / seconds[label, plan], all_macs / plan_macs(unet, plan))
            if trained and label != "float32":
                row = row._replace(psnr=psnr(images[label, plan], images["float32", plan]).min().item())
            rows.append(row)
    return rows


def over_uncached(row: Row, measured: float, by_macs: float) -> Row:
    return row._replace(speed_up=measured, by_macs=by_macs, efficiency=measured / by_macs)


def over_diffusers(row: Row, seconds: dict[tuple[str, Any], float], key: tuple[str, Any]) -> Row:
    if (DEFAULT, "diffusers") not in seconds:
        return row
    default, alike = (seconds[label, "diffusers"] / seconds[key] for label in (DEFAULT, key[0]))
    return row._replace(over_diffusers=default, over_diffusers_alike=alike)


def as_markdown(rows: list[Row]) -> str:
    lines = [
        "| " + " | ".join(field.replace("_", " ") for field in Row._fields) + " |",
        "|---" * len(Row._fields) + "|",
    ]
    for row in rows:
        cells = ("" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    at_least(args, rounds=2, steps=2)
    if min(args.batch) < 1:
        raise ValueError(f"--batch {min(args.batch)} must be at least 1")
    placements = {
        "float32": choose_placement(args.device, "float32", compile=False),
        "auto": choose_placement(args.device),
    }
    if placements["auto"].dtype == torch.float32 and not placements["auto"].compile:
        del placements["auto"]
    unet = network(args.ckpt)
    where = placements["float32"].device
    machine = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else cpu_capabilities().get("cpu_name", platform.machine())
    )
    title = f"{args.ckpt}, {macs(unet) / 1e9:.3f} GMACs a full pass; {machine}, {torch.get_num_threads()} threads, "
    title += f"torch {torch.__version__}\n"
    title += "\n".join(f"{label}: {placement}. {placement.why}".rstrip(" .") for label, placement in placements.items())
    print(title)
    ours = {label: place(copy.deepcopy(unet), placement) for label, placement in placements.items()}
    theirs = diffusers_models(unet, placements)
    rows: list[Row] = []
    for batch in args.batch:
        rows += bench_passes(ours, theirs, batch, args.rounds)
    for batch in args.batch:
        rows += bench_plans(ours, theirs, batch, 3, args.steps, args.ckpt not in PRESETS)
    print(as_markdown(rows))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        content = json.dumps({"conditions": title, "rows": [row._asdict() for row in rows]}, indent=1) + "\n"
        for name, text in (("bench.md", f"{title}\n\n{as_markdown(rows)}"), ("bench.json", content)):
            with replacing(Path(args.out) / name) as temporary:
                temporary.write_text(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache bench", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="cifar10", help="a checkpoint, or cifar10 or lsun_256 with random weights (default: cifar10)")
    add("--batch", type=int, nargs="+", default=[1, 16], help="images at a time (default: 1 16)")
    add("--rounds", type=int, default=9, help="of passes; plans are run in 3 (default: 9)")
    add("--steps", type=int, default=20, help="of the plans (default: 20; time is proportional)")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda or mps where there is one, else cpu")
    add("--out", help="a folder for bench.md and bench.json")
    return parser.parse_args(argv)
