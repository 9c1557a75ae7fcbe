"""How fast is it here? Passes and plans, beside diffusers and DeepCache's own helper on the same weights, in one run.

    python -m minicache bench                                  # Google's CIFAR-10 network, with random weights
    python -m minicache bench --arch sd15                      # Stable Diffusion's, or ldm_imagenet: a few minutes
    python -m minicache bench --ckpt tiny_cifar10 --out bench  # what 16 bits cost in the picture, too; bench.md, .json

Everything runs in turn, round after round, and medians are compared, so that what disturbs the machine disturbs all.
Times are milliseconds for one row of a batch; under guidance an image is two of them. diffusers is run as it comes: in
the same dtype, but contiguous (so are we, with --memory-format contiguous). DeepCache is the helper that the paper's
authors publish, around that network. Both are extras, pip install "minicache[bench]", and left out where they are not
installed. Schedules are worked out from the passes, beside the speed-ups that the paper measured on a GPU; plans are
run from noise to image. MACs leave out attention's two products, as the papers do; Stable Diffusion's are many.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minicache.checkpoints import PRESETS, load, shape_of
from minicache.cost import context_length, macs, plan_macs
from minicache.diffusion import Diffusion
from minicache.files import replacing
from minicache.formats.diffusers import save_diffusers
from minicache.metrics import psnr
from minicache.placement import DTYPES, MEMORY_FORMATS, Placement, choose_placement, cpu_capabilities, place
from minicache.plan import uniform
from minicache.sampling import sample
from minicache.tools import Parser, at_least, make_folder, markdown, refuse_others
from minicache.unet import UNet

Row = dict[str, Any]
Seconds = dict[tuple[str, str, Any], float]  # of (dtype, whose, branch); branch None is a full pass
PLANS = ((1, 1), (5, 3), (5, 2), (5, 1))  # interval and branch; the first is uncached
SMALL = {"batch": [1, 16], "rounds": 9, "steps": 20, "branch": [1, 2, 3], "dtype": ["float32", "auto"]}
LARGE = {"batch": [2], "rounds": 3, "steps": 0, "dtype": ["float32"]}  # above 50 GMACs: seconds a pass; paper's branch


class Paper(NamedTuple):
    """What DeepCache publishes of a network (Tables 1, 2 and 13): N -> the speed-up over as many full steps."""

    steps: int
    branch: int
    speed_ups: dict[int, float]


PAPER = {
    "cifar10": Paper(100, 3, {2: 1.40, 3: 1.61, 5: 1.85, 10: 2.07}),
    "lsun_256": Paper(100, 3, {2: 1.29, 3: 1.43, 5: 1.48}),
    "ldm_imagenet": Paper(250, 1, {2: 1.88, 3: 2.65, 5: 4.12, 10: 6.96, 20: 10.54}),
    "sd15": Paper(50, 2, {2: 1.50, 3: 1.68, 4: 1.89, 5: 2.11, 6: 2.21, 7: 2.34, 8: 2.46}),
}


def network(args: argparse.Namespace) -> UNet:
    """The checkpoint, or the architecture with random weights."""
    if args.ckpt:
        return load(args.ckpt)
    torch.manual_seed(0)
    unet = UNet(PRESETS[args.arch]).eval()
    for p in unet.parameters():
        if p.ndim > 1 and not p.any():  # a fresh network has zeros, which some devices multiply faster
            nn.init.normal_(p, std=0.02)
    unet.diffusion = Diffusion()
    return unet


@cache
def extra(name: str) -> ModuleType | None:
    """A package that only comparisons need; None, and a sentence, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"without {name}, which is not installed: pip install 'minicache[bench]'")


def diffusers_model(unet: UNet, placement: Placement) -> nn.Module | None:
    """The same weights as diffusers' network; None where it is not installed, or has no such network."""
    if not (diffusers := extra("diffusers")):
        return None
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    kind = diffusers.UNet2DConditionModel if unet.config.context_dim else diffusers.UNet2DModel
    settings = {"use_safetensors": False, "low_cpu_mem_usage": False, "torch_dtype": placement.dtype}
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_diffusers(Path(folder) / "unet", unet)
        except ValueError as error:
            print(f"without diffusers: {error}")
            return None
        return kind.from_pretrained(Path(folder) / "unet", **settings).eval().to(placement.device)


def helped(model: nn.Module, branch: int, ts: list[Tensor]) -> nn.Module:
    """The same network, sharing its weights, under DeepCache's helper: a full pass at ts[0], a partial one at ts[1].

    The helper asks a pipeline for its network and its timesteps, and counts branches from 0.
    """
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    helper = extra("DeepCache").DeepCacheSDHelper(SimpleNamespace(unet=twin, scheduler=SimpleNamespace(timesteps=ts)))
    helper.set_params(cache_interval=len(ts), cache_branch_id=branch - 1)
    helper.enable()
    return twin


def inputs(unet: UNet, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, t, and the context of a network that takes one."""
    c, like = unet.config, {"device": unet.conv_out.weight.device, "dtype": unet.conv_out.weight.dtype}
    x = torch.randn(batch, c.in_channels, c.image_size, c.image_size, **like)
    context = torch.randn(batch, context_length(unet), c.context_dim, **like) if c.context_dim else None
    return x, torch.tensor([500], device=x.device), context


def diffusers_ddim(model: nn.Module, batch: int, steps: int, context: Tensor | None) -> Tensor:
    """Its own scheduler; the state stays in float32, as ours does."""
    scheduler = extra("diffusers").DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    x = torch.randn(batch, model.config.in_channels, *[model.config.sample_size] * 2, device=model.device)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x.to(model.dtype), t, context).sample.float(), t, x).prev_sample
    return x


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
def time_passes(ours: dict[str, UNet], theirs: dict[str, nn.Module], batch: int, args: argparse.Namespace) -> Seconds:
    candidates = {}
    for label, unet in ours.items():
        x, t, context = inputs(unet, batch)
        candidates[label, "ours", None] = partial(unet.forward_full, x, t, args.branch[0], context)
        for b in args.branch:
            cached_U = unet.forward_full(x, t, b, context)[1]
            candidates[label, "ours", b] = partial(unet.forward_partial, x, t, cached_U, b, context)
        if label not in theirs:
            continue
        candidates[label, "diffusers", None] = partial(theirs[label], x, t, context)
        for b in args.branch if extra("DeepCache") else ():
            twin = helped(theirs[label], b, [t, t - 1])
            twin(x, t, context)  # keeps what its partial passes take
            candidates[label, "DeepCache", None] = partial(twin, x, t, context)
            candidates[label, "DeepCache", b] = partial(twin, x, t - 1, context)
    return timed(candidates, args.rounds, f"passes, batch {batch}", x.device)[0]


def pass_rows(unet: UNet, seconds: Seconds, batch: int) -> list[Row]:
    rows = []
    for label, b in [(label, b) for label, who, b in seconds if who == "ours"]:
        row = {"dtype": label, "batch": batch, "pass": f"branch {b}" if b else "full"}
        for who in ("ours", "diffusers", "DeepCache"):
            row[f"{who}, ms"] = 1e3 * seconds[label, who, b] / batch if (label, who, b) in seconds else None
        row["speed-up"] = seconds[label, "ours", None] / seconds[label, "ours", b]
        rows.append({**row, "by MACs": macs(unet) / macs(unet, b)})
    return rows


def schedule_rows(unet: UNet, paper: Paper, seconds: Seconds, batch: int) -> list[Row]:
    """What the paper's schedules bring by the passes timed here, and what they brought there."""
    rows, b = [], paper.branch
    for label, N in product(dict.fromkeys(label for label, _, _ in seconds), paper.speed_ups):
        plan = uniform(paper.steps, N, b)
        full, count = len(plan.refresh), plan_macs(unet, plan) / plan.steps
        row = {"dtype": label, "batch": batch, "schedule": f"{plan.steps} steps, N={N}, branch {b}"}
        row |= {"GMACs a step": count / 1e9, "by MACs": macs(unet) / count, "the paper": paper.speed_ups[N]}
        for who, uncached_by in (("ours", "ours"), ("DeepCache", "diffusers")):
            if (label, who, b) in seconds:
                cached = full * seconds[label, who, None] + (plan.steps - full) * seconds[label, who, b]
                row[f"{who}, here"] = plan.steps * seconds[label, uncached_by, None] / cached
        rows.append(row)
    return rows


@torch.no_grad()
def plan_rows(ours: dict[str, UNet], theirs: dict[str, nn.Module], batch: int, args: argparse.Namespace) -> list[Row]:
    """DDIM from noise to image, cached and not; diffusers uncached."""
    pairs, candidates = len(next(iter(ours.values())).D), {}
    there = [(N, b) for N, b in PLANS if b <= pairs]
    plans = {f"N={N}, branch {b}" if N > 1 else "uncached": uniform(args.steps, N, b) for N, b in there}
    drawn = inputs(next(iter(ours.values())), batch)[2]  # the same for all, as their pictures are compared
    for label, unet in ours.items():
        context = None if drawn is None else drawn.to(unet.conv_out.weight.dtype)
        for what, plan in plans.items():
            candidates[label, what] = partial(sample, unet, range(batch), plan=plan, context=context)
        if label in theirs:
            candidates[label, "diffusers"] = partial(diffusers_ddim, theirs[label], batch, args.steps, context)
    seconds, images = timed(candidates, 3, f"plans, batch {batch}", unet.conv_out.weight.device)

    rows = []
    for label, what in candidates:
        row = {"dtype": label, "batch": batch, "plan": f"DDIM-{args.steps}, {what}"}
        row |= {"ms": 1e3 * seconds[label, what] / batch, "speed-up": seconds[label, "uncached"] / seconds[label, what]}
        if what in plans:
            row["by MACs"] = args.steps * macs(unet) / plan_macs(unet, plans[what])
            if args.ckpt and label != "float32" and "float32" in ours:  # dB, the worst of the batch
                row["PSNR to float32"] = psnr(images[label, what], images["float32", what]).min().item()
        rows.append(row)
    return rows


def completed(args: argparse.Namespace) -> tuple[UNet, Paper, dict[str, Placement]]:
    """The shape, what is published of it, and the placements; what is not given is chosen by the network's size."""
    unet = shape_of(args.ckpt or args.arch)
    paper = next((PAPER[name] for name, config in PRESETS.items() if config == unet.config), Paper(100, 1, {}))
    for name, value in (SMALL if macs(unet) < 50e9 else {**LARGE, "branch": [paper.branch]}).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.branch = [branch for branch in args.branch if branch <= len(unet.D)]
    at_least(args, rounds=2, batch=1)
    at_least(args, most=(unet.diffusion or Diffusion()).num_timesteps, steps=2 if args.steps else 0)
    choose = partial(choose_placement, args.device, memory_format=args.memory_format)
    placements = {name: choose(name, compile="auto" if name == "auto" else False) for name in args.dtype}
    if str(placements.get("auto")) == str(placements.get("float32")):  # also where neither was asked for
        placements.pop("auto", None)
    return unet, paper, placements


def main(args: argparse.Namespace) -> None:
    shape, paper, placements = completed(args)
    if args.out is not None:
        refuse_others(args.out, ("bench.md", "bench.json"), lambda text: text.startswith(f"{args.ckpt or args.arch}, "))
        make_folder(Path(args.out))
    device = next(iter(placements.values())).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_capabilities().get("cpu_name")
    title = f"{args.ckpt or args.arch}, {macs(shape) / 1e9:.3f} GMACs a full pass; {name or platform.machine()}, "
    title += f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
    title += "\n".join(f"{label}: {placement}. {placement.why}".rstrip(" .") for label, placement in placements.items())
    print(title)
    ours, theirs = {}, {}
    for label, placement in placements.items():
        unet = network(args)
        if model := diffusers_model(unet, placement):
            theirs[label] = model
        ours[label] = place(unet, placement)
    tables: dict[str, list[Row]] = {"passes": [], "schedules": [], "plans": []}
    for batch in args.batch:
        seconds = time_passes(ours, theirs, batch, args)
        tables["passes"] += pass_rows(shape, seconds, batch)
        tables["schedules"] += schedule_rows(shape, paper, seconds, batch)
    for batch in args.batch if args.steps else ():
        tables["plans"] += plan_rows(ours, theirs, batch, args)
    report = "\n".join(markdown(rows) for rows in tables.values() if rows)
    print(report)
    if args.out:
        content = json.dumps({"conditions": title, **tables}, indent=1) + "\n"
        for name, text in (("bench.md", f"{title}\n\n{report}"), ("bench.json", content)):
            with replacing(Path(args.out) / name) as temporary:
                temporary.write_text(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache bench", doc=__doc__)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group().add_argument
    which("--arch", choices=PRESETS, default="cifar10", help="a network with random weights (default: cifar10)")
    which("--ckpt", help="a checkpoint instead")
    add("--batch", type=int, nargs="+", help="rows at a time (default: 1 16; of large networks 2)")
    add("--rounds", type=int, help="of passes; plans are run in 3 (default: 9; of large networks 3)")
    add("--steps", type=int, help="of whole plans; 0: none (default: 20; of large networks 0)")
    add("--dtype", nargs="+", choices=("auto", *DTYPES), help="(default: float32 auto; of large networks float32)")
    add("--memory-format", choices=("auto", *MEMORY_FORMATS), default="auto", help="ours (default: auto)")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda or mps where there is one, else cpu")
    add("--out", help="a folder for bench.md and bench.json")
    return parser.parse_args(argv)
