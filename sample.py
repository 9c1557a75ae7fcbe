"""Draw pictures from noise, with DeepCache.

examples:
  python sample.py                                                  # the embedded network, into samples.png
  python sample.py --interval 4 --compare                           # and the same pictures uncached beside them
  python sample.py --ckpt ddpm_cifar10_ema --steps 100 --spacing quad --interval 5
  python sample.py --sampler dpm++2m --steps 25 --interval 3 --branch 1 --forecast linear
  python sample.py --budget 20                                      # the best plan known for 20 full passes
  python sample.py --num 16 --out denoise.gif                       # watch them emerge
  python sample.py --num 50000 --dtype auto --out samples.npz       # for an evaluator; begin again after a crash
  torchrun --nproc-per-node 2 -- sample.py --num 50000 --out pngs   # a folder, drawn by two processes or GPUs;
                                                                    # without the -- torchrun takes --num for its own
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minicache import CachePlan, Recipe, denoise, full, load, nonuniform, sample, uniform
from minicache.checkpoints import REGISTRY, embedded_folder
from minicache.cost import cache_bytes, full_passes, plan_macs
from minicache.diffusion import VARIANCES
from minicache.images import beside, enlargement, grid, save_gif, save_png, to_uint8
from minicache.placement import COMPILE, DTYPES, MEMORY_FORMATS, Placement, choose_placement, place
from minicache.plan import FORECASTS
from minicache.recipe import recipes_in
from minicache.samplers import SAMPLERS, SPACINGS, STEPS
from minicache.shards import ImageSet, fill, rank_and_world
from minicache.tools import Parser, run
from minicache.unet import UNet

ENDINGS = (".png", ".gif", ".npz")
FRAMES = 50  # of an animation, at most


def main(args: argparse.Namespace) -> None:
    for name, least in (("num", 1), ("batch_size", 1), ("seed", 0)):
        if not least <= getattr(args, name) < 2**62:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(args, name)} must be at least {least}, and below 2**62")
    seeds = range(args.seed, args.seed + args.num)
    recipe, out = recipe_from(args), Path(args.out)
    rank, world = rank_and_world()
    shown = out.suffix in (".png", ".gif")
    if args.compare and not shown:
        raise ValueError(f"--compare is for pictures to look at, .png or .gif, not for --out {out}")
    if world > 1 and shown:
        raise ValueError(f"--out {out}: {world} processes share the work of an .npz or a folder, not of one picture")
    placement = choose_placement(args.device, args.dtype, args.memory_format.replace("-", "_"), COMPILE[args.compile])
    unet = place(load(args.ckpt), placement)
    recipe = recipe or recipe_within(args, unet)
    settings = {**recipe.settings(unet.fingerprint), "clip_x0": args.clip}
    denoise(unet, seeds[-1:], **settings)  # refuses, before anything is written, what it would refuse later
    unet.cached_shape(settings["plan"].branch, *[unet.config.image_size] * 2)
    prepare_out(out)
    if rank == 0:
        describe(args, unet, settings, placement)
    if shown:
        show(args, unet, seeds, settings, out)
    else:
        fill_set(args, unet, seeds, recipe, settings, placement, out)


def show(args: argparse.Namespace, unet: UNet, seeds: range, settings: dict[str, Any], out: Path) -> None:
    """A grid, or an animation; beside the uncached one where that is asked for."""
    plan, film = settings["plan"], out.suffix == ".gif"
    uncached = {**settings, "plan": full(plan.steps)}
    if args.compare:  # the first pass of each kind prepares kernels, which is no part of what is compared
        denoise_once(unet, min(args.num, args.batch_size), plan.branch)
    frames, seconds = draw(unet, seeds, args.batch_size, settings, film)
    print(f"{args.num} images (seeds {seeds[0]}..{seeds[-1]}) in {seconds:.1f} s: {args.num / seconds:.2f} images/s")
    if args.compare:
        frames_full, seconds_full = draw(unet, seeds, args.batch_size, uncached, film)
        predicted = plan_macs(unet, uncached["plan"]) / plan_macs(unet, plan)
        compare(frames[-1], frames_full[-1], seconds, seconds_full, predicted)
    scale = enlargement(frames[0].shape[1])
    sheets = [grid(frame) for frame in frames]
    if args.compare:
        sheets = [beside(grid(uncached), sheet) for uncached, sheet in zip(frames_full, sheets)]
    if film:
        save_gif(out, sheets, scale)
    else:
        save_png(out, sheets[-1], scale)
    print(f"{out} (left: uncached, right: as above)" if args.compare else out)


def fill_set(
    args: argparse.Namespace,
    unet: UNet,
    seeds: range,
    recipe: Recipe,
    settings: dict[str, Any],
    placement: Placement,
    out: Path,
) -> None:
    """An .npz or a folder, in shards: what an earlier run of the same line has drawn is not drawn again."""
    manifest = {
        "weights": unet.fingerprint,
        **asdict(recipe),
        "clip": args.clip,
        "seed": args.seed,
        "num": args.num,
        "batch_size": args.batch_size,
        "placement": str(replace(placement, device=torch.device(placement.device.type))),
        "torch": torch.__version__,
    }
    images = ImageSet(out, seeds, args.batch_size, manifest)
    began = time.perf_counter()
    drawn = fill(images, lambda shard: draw(unet, shard, args.batch_size, settings, film=False)[0][-1])
    seconds, (rank, world) = time.perf_counter() - began, rank_and_world()
    if rank == 0:
        share = f" by the first of {world} processes" if world > 1 else ""
        if drawn:
            print(f"{drawn} images drawn{share} in {seconds:.1f} s: {drawn / seconds:.2f} images/s")
        before = "" if drawn else ", all drawn before"
        print(f"{out}: {args.num} images (seeds {seeds[0]}..{seeds[-1]}){before}")


def prepare_out(out: Path) -> None:
    """Refuse, before the work, what could not be written after it."""
    folder = out.suffix == ""
    if not out.name:
        raise ValueError(f"--out {out} needs a name: a file, or a folder of its own for the pictures")
    if not folder and out.suffix not in ENDINGS:
        raise ValueError(f"--out {out}: the ending must be {', '.join(ENDINGS)}, or none, for a folder of PNGs")
    if (folder and out.exists() and not out.is_dir()) or (not folder and out.is_dir()):
        raise ValueError(f"--out {out}: there is a {'folder' if out.is_dir() else 'file'} of that name")
    try:
        place = out if folder else out.parent
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"--out {out}: its folder cannot be made or written to ({error.strerror})") from None


def recipe_within(args: argparse.Namespace, unet: UNet) -> Recipe:
    """Of the calibrated plans that ship for these weights, the one whose cost is the nearest to --budget."""
    make_one = (
        f"make one with python -m minicache calibrate --ckpt {args.ckpt} --budget {args.budget:g} "
        "--out recipe.json, and use it with --plan recipe.json"
    )
    costs = {
        full_passes(unet, recipe.plan): recipe for recipe in recipes_in(embedded_folder() / "recipes", unet.fingerprint)
    }
    if not costs:
        raise ValueError(f"no calibrated plan ships for {args.ckpt}: {make_one}")
    nearest = min(costs, key=lambda cost: abs(cost - args.budget))
    if nearest > 1.25 * args.budget:
        raise ValueError(f"the cheapest plan that ships for {args.ckpt} costs {nearest:.1f} full passes: {make_one}")
    return costs[nearest]


def recipe_from(args: argparse.Namespace) -> Recipe | None:
    """What the flags say; or the --plan file, which they may repeat but not contradict; None for --budget."""
    if args.budget is not None:
        if not 0 < args.budget < math.inf:
            raise ValueError(f"--budget {args.budget:g} must be positive and finite")
        for name in ("plan", "sampler", "steps", "spacing", "eta", "variance", "branch", "interval", "center", "power",
                     "forecast"):  # fmt: skip
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} contradicts --budget, which chooses the sampler and the plan")
        return None
    if args.plan:
        recipe = Recipe.load(args.plan)
        if recipe.start is not None:
            raise ValueError(f"{args.plan} is for images noised to t = {recipe.start - 1}, not for pure noise")
        fixed = {**recipe.settings(recipe.fingerprint), "steps": recipe.plan.steps, "branch": recipe.plan.branch}
        for name in ("sampler", "steps", "spacing", "eta", "variance", "branch"):
            if getattr(args, name) not in (None, fixed[name]):
                raise ValueError(f"--{name} {getattr(args, name)} contradicts {args.plan}, which has {fixed[name]}")
        for name in ("interval", "center", "power", "forecast"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} contradicts {args.plan}, which says itself which steps run in full")
        return recipe
    steps = STEPS if args.steps is None else args.steps
    interval = 5 if args.interval is None else args.interval
    branch, forecast = 3 if args.branch is None else args.branch, args.forecast or "hold"
    if args.center is None and args.power is None:
        plan = uniform(steps, interval, branch, forecast)
    else:
        center, power = (steps / 2 if args.center is None else args.center), args.power
        plan = nonuniform(steps, interval, center, 1.2 if power is None else power, branch, forecast)
    return Recipe(plan, args.sampler or "ddim", args.spacing or "uniform", args.eta or 0.0, args.variance)


def describe(args: argparse.Namespace, unet: UNet, settings: dict[str, Any], placement: Placement) -> None:
    plan = settings["plan"]
    print(f"{args.ckpt}: {sum(p.numel() for p in unet.parameters()):,} parameters, {placement}")
    if placement.why:
        print(f"  auto: {placement.why}")
    if args.ckpt in REGISTRY and REGISTRY[args.ckpt].note:
        print(f"  {REGISTRY[args.ckpt].note}")
    eta = f", eta {settings['eta']}" if settings["eta"] else ""
    partial = plan.steps - len(plan.refresh)
    cached = f", {partial} at branch {plan.branch} of {len(unet.D)}" if partial else ""
    print(
        f"{settings['sampler']}{eta}, {plan.steps} steps ({settings['spacing']}): {len(plan.refresh)} in full{cached}"
    )
    total, uncached = plan_macs(unet, plan), plan_macs(unet, full(plan.steps))
    cost = f"{total / 1e9:.2f} GMACs an image, {full_passes(unet, plan):.1f} full passes"
    if partial:
        cache = cache_bytes(unet, plan) * min(args.num, args.batch_size)
        cost += f", instead of {uncached / 1e9:.2f}: a speed-up of {uncached / total:.2f}x, if every MAC took as long; "
        cost += f"cache {cache / 1e6:.1f} MB a batch"
    print(cost)


def denoise_once(unet: UNet, batch: int, branch: int) -> None:
    for _ in denoise(unet, range(batch), plan=CachePlan(2, branch, (0,))):
        pass


def draw(
    unet: UNet, seeds: range, batch_size: int, settings: dict[str, Any], film: bool
) -> tuple[list[np.ndarray], float]:
    """Pictures as uint8 [num, H, W, C], in a list that ends with the finished ones, and the seconds it took."""
    began = time.perf_counter()
    if film:
        steps = settings["plan"].steps
        shown = range(steps - 1, -1, -math.ceil(steps / FRAMES))[::-1]
        batches = [seeds[k : k + batch_size] for k in range(0, len(seeds), batch_size)]
        films = [[step.x for step in denoise(unet, batch, **settings) if step.i in shown] for batch in batches]
        states = [torch.cat(parts) for parts in zip(*films)]
    else:
        states = [sample(unet, seeds, batch_size=batch_size, progress=True, **settings)]
    if not torch.isfinite(states[-1]).all():
        raise ValueError("the pictures hold NaN or infinity; a wider --dtype may help")
    return [to_uint8(x) for x in states], time.perf_counter() - began


def compare(images: np.ndarray, uncached: np.ndarray, seconds: float, seconds_full: float, predicted: float) -> None:
    """PSNR in dB: of all pixels together, and of the picture that differs most."""
    difference = images.astype(float) - uncached.astype(float)
    mse = (difference**2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        together, worst = 10 * np.log10(255**2 / np.array([mse.mean(), mse.max()]))
    print(f"uncached: {seconds_full:.1f} s; measured speed-up {seconds_full / seconds:.2f}x ({predicted:.2f}x by MACs)")
    print(f"PSNR to uncached {together:.1f} dB, {worst:.1f} for the worst picture; "
          f"largest difference {abs(difference).max():.0f} of 255")  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="sample.py", doc=__doc__)
    add = parser.add_argument_group("model").add_argument
    add(
        "--ckpt",
        default="tiny",
        help="a name (python -m minicache checkpoints lists them), file or folder; default tiny",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: cuda where there is one")
    add("--dtype", default="float32", choices=("auto", *DTYPES), help="of the network; default float32")
    add(
        "--memory-format",
        default="auto",
        choices=("auto", *(name.replace("_", "-") for name in MEMORY_FORMATS)),
        help="default auto: channels-last",
    )
    add("--compile", default="no", choices=COMPILE, help="torch.compile; auto: on a GPU; default no")
    add = parser.add_argument_group("sampler").add_argument
    add("--sampler", choices=SAMPLERS, help="default ddim")
    add("--steps", type=int, help=f"default {STEPS}")
    add("--spacing", choices=SPACINGS, help="of the timesteps; default uniform")
    add("--eta", type=float, help="ddim's noise, 0 to 1; default 0")
    add("--variance", choices=VARIANCES, help="ddpm's; default: the checkpoint's")
    add("--clip", action=argparse.BooleanOptionalAction, help="clip the predicted image to [-1, 1]; default: for ddpm")
    add = parser.add_argument_group("DeepCache").add_argument
    add("--interval", type=int, metavar="N", help="one step in N runs in full; 1 is uncached; default 5")
    add("--branch", type=int, help="outermost pairs of blocks that run at the other steps; default 3")
    add("--center", type=float, help="non-uniform: full steps are densest about this one; default steps / 2")
    add("--power", type=float, help="non-uniform: how dense, at least 1; default 1.2")
    add(
        "--forecast",
        choices=FORECASTS,
        help="what stands in for the deep features: the last ones, or a line; default hold",
    )
    add("--budget", type=float, help="cost of an image in full passes: the nearest calibrated plan that ships")
    add("--plan", metavar="FILE", help="a recipe (JSON) that sets the sampler and what is cached")
    add = parser.add_argument_group("output").add_argument
    add("--num", type=int, default=16, help="images; default 16")
    add("--seed", type=int, default=0, help="of the first image; the next has the next; default 0")
    add("--batch-size", type=int, default=64, help="images at a time; default 64")
    add("--compare", action="store_true", help="also draw uncached; say and (png, gif) show the difference")
    add(
        "--out", default="samples.png", help=".png: grid, .gif: the denoising, .npz: arr_0 uint8, else a folder of PNGs"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run("sample.py", lambda: main(parse()))
