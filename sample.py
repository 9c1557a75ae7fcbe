"""Draw pictures from noise, with DeepCache.

examples:
  python sample.py                                                  # 16 emoji, into samples.png
  python sample.py --interval 4 --compare                           # with the same pictures uncached on the left
  python sample.py --ckpt ddpm_cifar10_ema --steps 100 --spacing quad --interval 5 --branch 3
  python sample.py --prompt "red apple" --prompt "cat face" --guidance 3 --interval 5 --branch 1 --compare
  python sample.py --sampler dpm++2m --steps 25 --interval 3 --branch 1 --forecast linear
  python sample.py --ckpt tiny_cifar10 --budget 20                  # the best plan known for 20 full passes
  python sample.py --ckpt sd15 --prompt "a red apple" --steps 50 --interval 5 --branch 2 --num 4
  python sample.py --ckpt ldm_imagenet --class 207 --steps 250 --interval 10 --branch 1
  python sample.py --num 16 --out denoise.gif                       # watch the pictures emerge
  python sample.py --num 50000 --dtype auto --out samples.npz       # for an evaluator; after a crash, run it again
  torchrun --nproc-per-node 2 -- sample.py --num 50000 --out pngs   # a folder, drawn by two processes or GPUs;
                                                                    # without the -- torchrun takes --num for its own
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicache import CachePlan, Recipe, denoise, load, sample, uncached
from minicache.checkpoints import REGISTRY, fingerprint, locate
from minicache.cost import cache_bytes, full_passes, plan_macs
from minicache.diffusion import SPACINGS, VARIANCES
from minicache.images import beside, enlargement, grid, labelled, save_gif, save_png, to_tensor, to_uint8
from minicache.latents import around, suits
from minicache.metrics import psnr
from minicache.placement import COMPILE, DTYPES, MEMORY_FORMATS, Placement, choose_placement, place
from minicache.plan import FORECASTS
from minicache.recipe import recipe_from, recipe_from_file, shipped_recipe
from minicache.samplers import SAMPLERS
from minicache.sampling import STEPS
from minicache.shards import ImageSet, fill, rank_and_world
from minicache.tools import Parser, at_least, prepare_out, run, tell_of_rest
from minicache.unet import UNet
from minicache.words import Prompts, prompts_for

FLAGS = ("sampler", "steps", "spacing", "eta", "variance", "branch", "interval", "center", "power", "forecast")
ASKED = ("prompt", "prompts", "label", "negative", "guidance", "seed", "num")
FRAMES = 50  # of an animation, at most
SHEET, FILM = 2_500, 100  # pictures on a sheet and in an animation, all of whose frames are in memory, at most
Finish = Callable[[Tensor], np.ndarray]  # what sampling leaves behind -> uint8 [B, H, W, C]


def main(args: argparse.Namespace) -> None:
    at_least(args, num=1, batch_size=1)
    at_least(args, most=2**32 - args.num, seed=0)
    seeds, out = range(args.seed, args.seed + args.num), Path(args.out)
    recipe = chosen_recipe(args)
    rank, world = rank_and_world()
    one_picture = out.suffix in (".png", ".gif")
    if one_picture and args.num > (most := FILM if out.suffix == ".gif" else SHEET):
        raise ValueError(f"--num {args.num}: a {out.suffix} holds {most} pictures at most; an .npz or a folder, more")
    if args.compare and not one_picture:
        raise ValueError(f"--compare is for pictures to look at, .png or .gif, not for --out {out}")
    if world > 1 and one_picture:
        raise ValueError(f"--out {out}: {world} processes share the work of an .npz or a folder, not of one picture")
    placement = choose_placement(args.device, args.dtype, args.memory_format.replace("-", "_"), COMPILE[args.compile])
    path = locate(args.ckpt)
    unet = load(path)
    weights = fingerprint(unet)  # before they change their dtype
    words, finish, parts, C = unet.vocabulary, to_uint8, None, unet.config.in_channels
    if C not in (1, 3) and not unet.config.adm and out.suffix != ".npz":
        raise ValueError(f"--out {out}: {args.ckpt} draws {C} channels, as no picture has; an .npz holds them")
    if unet.config.adm:  # it draws in latents
        recipe = recipe if args.plan or args.budget else chosen_recipe(args, suits(unet.config, args.sampler))
        words, finish, parts = around(path, unet.config, placement.device)
    asked = {name: getattr(args, name) for name in ASKED}
    if args.plan and unet.config.context_dim:
        asked["guidance"] = recipe.guidance
    prompts = prompts_for(args.ckpt, unet, words, **asked)
    if args.prompt or args.prompts or args.label:
        tell_of_rest(prompts, args.num)
    recipe = recipe or recipe_within(args, unet, weights, prompts.guidance)
    recipe = recipe if args.plan else replace(recipe, guidance=prompts.guidance)
    recipe = recipe if args.clip is None else replace(recipe, clip_x0=args.clip)
    settings = recipe.settings(weights)
    unet = place(unet, placement)
    denoise(unet, seeds[-1:], **prompts.context(seeds[-1:]), **settings)  # refuses now what it would refuse later
    unet.cached_shape(recipe.plan.branch, *[unet.config.image_size] * 2)
    prepare_out(out, (".png", ".gif", ".npz"))
    if rank == 0:
        describe(args, unet, settings, placement)
    if one_picture:
        show(args, unet, seeds, prompts, settings, finish, out)
        return
    made_with = {"weights": weights, **asdict(recipe), "seed": args.seed, "num": args.num, "prompts": prompts.texts,
                 "batch_size": args.batch_size, "torch": torch.__version__,
                 "placement": str(replace(placement, device=torch.device(placement.device.type)))}  # fmt: skip
    others = {"negative": args.negative, "first stage and text encoder": parts}  # which older sets do not have
    made_with |= {name: value for name, value in others.items() if value is not None}
    fill_set(ImageSet(out, seeds, args.batch_size, made_with), unet, prompts, settings, finish)


def chosen_recipe(args: argparse.Namespace, suited: Mapping[str, Any] = MappingProxyType({})) -> Recipe | None:
    """What the flags (else what is suited) or the --plan file say; None for --budget, which needs the network."""
    flags = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if args.budget is None and args.plan:
        fixed = {"guidance": args.guidance, "clip_x0": args.clip}
        return recipe_from_file(args.plan, **flags, **{k: v for k, v in fixed.items() if v is not None})
    if args.budget is None:
        return recipe_from(**{**suited, **flags})
    if not 0 < args.budget < math.inf:
        raise ValueError(f"--budget {args.budget:g} must be positive and finite")
    if args.plan or flags:
        name = "plan" if args.plan else next(iter(flags))
        raise ValueError(f"--{name} contradicts --budget, which chooses the sampler and the plan")
    return None


def recipe_within(args: argparse.Namespace, unet: UNet, weights: str, guidance: float = 1.0) -> Recipe:
    """The calibrated plan for these weights, of those that ship, whose cost is nearest to --budget."""
    try:
        return shipped_recipe(unet, weights, args.budget, guidance)
    except ValueError as error:
        too_small = args.budget < full_passes(unet, uncached(2), guidance)  # for calibrate, too
        if too_small or (unet.config.context_dim and not unet.vocabulary):
            raise
        strength = f" --guidance {guidance:g}" if unet.vocabulary else ""
        what = f"--ckpt {args.ckpt}{strength} --budget {args.budget:g}"
        command = f"python -m minicache calibrate {what} --out recipe.json"
        raise ValueError(f"{error}: make one with {command}, and use it with --plan recipe.json") from None


def describe(args: argparse.Namespace, unet: UNet, settings: dict[str, Any], placement: Placement) -> None:
    """Print what is going to be drawn, and what it costs."""
    plan = settings["plan"]
    print(f"{args.ckpt}: {sum(p.numel() for p in unet.parameters()):,} parameters, {placement}")
    if placement.why:
        print(f"  auto: {placement.why}")
    if args.ckpt in REGISTRY and REGISTRY[args.ckpt].note:
        print(f"  {REGISTRY[args.ckpt].note}")
    eta = f", eta {settings['eta']}" if settings["eta"] else ""
    spacing = f" ({settings['spacing']})" if settings["spacing"] else ""
    line = f"{settings['sampler']}{eta}, {plan.steps} steps{spacing}: {len(plan.refresh)} in full"
    guidance = settings["guidance"]
    macs, whole = plan_macs(unet, plan, guidance), plan_macs(unet, uncached(plan.steps), guidance)
    cost = f"{macs / 1e9:.2f} GMACs an image, {full_passes(unet, plan, guidance):.1f} full passes"
    if partial_steps := plan.steps - len(plan.refresh):
        line += f", {partial_steps} at branch {plan.branch} of {len(unet.D)}"
        cost += f", instead of {whole / 1e9:.2f}: a speed-up of {whole / macs:.2f}x, if every MAC took as long; "
        cost += f"cache {cache_bytes(unet, plan, guidance) * min(args.num, args.batch_size) / 1e6:.1f} MB a batch"
    line += f"; guidance {guidance:g}, which takes two passes a step" if guidance != 1 else ""
    print(f"{line}\n{cost}")


def show(
    args: argparse.Namespace,
    unet: UNet,
    seeds: range,
    prompts: Prompts,
    settings: dict[str, Any],
    finish: Finish,
    out: Path,
) -> None:
    """Save a grid or an animation, a prompt under each picture; with --compare, the uncached one on its left."""
    plan, film = settings["plan"], out.suffix == ".gif"
    if args.compare:  # the first pass of each kind prepares kernels, and is not what should be compared
        warm_up = {"plan": CachePlan(3, plan.branch, (0,)), "guidance": settings["guidance"]}
        for count in {min(args.num, args.batch_size), args.num % args.batch_size} - {0}:  # kernels go by the size, too
            draw(unet, seeds[:count], count, prompts, warm_up, finish)
    frames, seconds = draw(unet, seeds, args.batch_size, prompts, settings, finish, film)
    print(f"{args.num} images (seeds {seeds[0]}..{seeds[-1]}) in {seconds:.1f} s: {args.num / seconds:.2f} images/s")
    scale, labels = enlargement(frames[0].shape[1]), prompts.labels(seeds)
    sheets = [sheet_of(frame, labels, scale) for frame in frames]
    if args.compare:
        whole = {**settings, "plan": uncached(plan.steps)}
        others, longer = draw(unet, seeds, args.batch_size, prompts, whole, finish, film)
        macs = f"{plan.steps / full_passes(unet, plan):.2f}x by MACs"
        print(f"uncached: {longer:.1f} s; measured speed-up {longer / seconds:.2f}x ({macs})")
        print(difference(frames[-1], others[-1]))
        sheets = [beside(sheet_of(other, labels, scale), sheet) for other, sheet in zip(others, sheets)]
    scale = 1 if labels else scale
    save_gif(out, sheets, scale) if film else save_png(out, sheets[-1], scale)
    print(f"{out} (left: uncached, right: as above)" if args.compare else out)


def difference(images: np.ndarray, uncached: np.ndarray) -> str:
    """How far 8-bit pictures are from the uncached ones of the same seeds."""
    x, reference = to_tensor(images), to_tensor(uncached)
    decibels, largest = psnr(x, reference), (x - reference).abs().max() * 127.5
    pooled = psnr(x[None].flatten(1), reference[None].flatten(1)).item()
    single = f"{median(decibels.tolist()):.1f} dB (median), {decibels.min():.1f} dB (worst)"
    psnrs = f"of all pixels together {pooled:.1f} dB; of single pictures {single}"
    return f"PSNR to uncached, {psnrs}; largest difference {largest:.0f} of 255"


def sheet_of(images: np.ndarray, labels: list[str], scale: int) -> np.ndarray:
    """A grid; where there are labels, enlarged already, with each picture over its own."""
    return labelled(images, labels, scale=scale) if labels else grid(images)


def fill_set(images: ImageSet, unet: UNet, prompts: Prompts, settings: dict[str, Any], finish: Finish) -> None:
    """Draw what is missing of a folder or an .npz: what an earlier run of the same line has drawn is kept."""
    began = time.perf_counter()
    drawn = fill(images, lambda shard: draw(unet, shard, len(shard), prompts, settings, finish)[0][-1])
    seconds, seeds, (rank, world) = time.perf_counter() - began, images.seeds, rank_and_world()
    if rank == 0:
        share = f" by the first of {world} processes" if world > 1 else ""
        if drawn:
            print(f"{drawn} images drawn{share} in {seconds:.1f} s: {drawn / seconds:.2f} images/s")
        before = "" if drawn else ", all drawn before"
        print(f"{images.out}: {len(seeds)} images (seeds {seeds[0]}..{seeds[-1]}){before}")


def draw(
    unet: UNet,
    seeds: range,
    batch_size: int,
    prompts: Prompts,
    settings: dict[str, Any],
    finish: Finish,
    film: bool = False,
) -> tuple[list[np.ndarray], float]:
    """Pictures uint8 [num, H, W, C] in a list (film: of FRAMES states or fewer, the finished ones last); seconds."""
    began = time.perf_counter()
    if film:
        steps = settings["plan"].steps
        shown = range(steps - 1, -1, -math.ceil(steps / FRAMES))
        batches = [seeds[k : k + batch_size] for k in range(0, len(seeds), batch_size)]
        films = [
            [finish(step.x) for step in denoise(unet, b, **prompts.context(b), **settings) if step.i in shown]
            for b in batches
        ]
        frames = [np.concatenate(parts) for parts in zip(*films)]
    else:
        settings = {**settings, **prompts.context(seeds)}
        frames = [finish(sample(unet, seeds, batch_size=batch_size, progress=True, **settings))]
    return frames, time.perf_counter() - began


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="sample.py", doc=__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", default="emoji", help="a name (python -m minicache list shows them), file or folder; default emoji")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: cuda or mps where there is one, else cpu")
    add("--dtype", default="float32", choices=("auto", *DTYPES), help="of the network; default float32")
    formats = ("auto", *(name.replace("_", "-") for name in MEMORY_FORMATS))
    add("--memory-format", default="auto", choices=formats, help="default auto: channels-last")
    add("--compile", default="no", choices=COMPILE, help="torch.compile; auto: on a GPU; default no")
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", action="append", help="may stand several times: picture i shows prompt i modulo their number")
    add("--prompts", metavar="FILE", help="a prompt a line")
    add("--negative", metavar="PROMPT", help="what guidance leads away from; default: from no prompt")
    add("--class", dest="label", type=int, action="append", metavar="N", help="for networks of classes; like --prompt")
    add(
        "--guidance", type=float, help="how strictly to follow it, 0 to 100; 1 is none; default: what suits the network"
    )
    add = parser.add_argument_group("sampler").add_argument
    add("--sampler", choices=SAMPLERS, help="default ddim")
    add("--steps", type=int, help=f"default {STEPS}")
    add("--spacing", help=f"of the timesteps: {', '.join(SPACINGS)}, or rho7 or another; default: the sampler's own")
    add("--eta", type=float, help="ddim's noise, 0 to 1; default 0")
    add("--variance", choices=VARIANCES, help="ddpm's; default: the checkpoint's")
    add(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="clip the predicted image to [-1, 1]; default: as the sampler does",
    )
    add = parser.add_argument_group("DeepCache").add_argument
    add("--interval", type=int, metavar="N", help="one step in N runs in full; 1 is uncached; default 5")
    add("--branch", type=int, help="outermost pairs of blocks that run at the other steps; default 1")
    add("--center", type=float, help="non-uniform: full steps are densest about this one; default steps / 2")
    add("--power", type=float, help="non-uniform: how dense, at least 1; default 1.2")
    add(
        "--forecast", choices=FORECASTS, help="deep features at the other steps: the last ones, or a line; default hold"
    )
    add("--budget", type=float, help="cost of an image in full passes: the nearest calibrated plan that ships")
    add("--plan", metavar="FILE", help="a recipe (JSON): sampler, guidance, and what is cached")
    add = parser.add_argument_group("output").add_argument
    add("--num", type=int, default=16, help="images; default 16")
    add("--seed", type=int, default=0, help="of the first image; each next image has the next seed; default 0")
    add("--batch-size", type=int, default=64, help="images at a time; default 64")
    add("--compare", action="store_true", help="also draw uncached; say and (png, gif) show the difference")
    add("--out", default="samples.png", help=".png: grid, .gif: animation, .npz: arr_0 uint8, else a folder of PNGs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run("sample.py", lambda: main(parse()))
