"""The paper's Table 2 for any checkpoint, and what it lacks: better samplers at equal cost, and paired errors.

    python -m minicache table --ckpt tiny_cifar10 --real cifar10-test.zip --num 1000 --out table
    python -m minicache table --ckpt ddpm_cifar10_ema --real cifar10 --num 50000 --fid --spacing quad --out table

The second line is the paper's protocol, for a GPU and a day; both say how long they will take, and go on after a
crash when they are begun again. Every method's pictures are kept, in OUT/NAME.npz. Distances are Frechet distances to
the real images, in the features of the classifier that ships (32 x 32 pixels), or with --fid in Inception's (by
torch-fidelity). PSNR is to uncached DDIM with 100 steps, of the same seeds. Speed-ups are those of passes timed here.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import embedded_folder, load
from minicache.cost import Costs, plan_macs
from minicache.data import cifar10
from minicache.files import replacing
from minicache.images import to_uint8
from minicache.metrics import fid, frechet_distance, psnr, read_samples
from minicache.placement import COMPILE, DTYPES, choose_placement, place
from minicache.plan import full, nonuniform, uniform
from minicache.recipe import Recipe, recipes_in
from minicache.samplers import SPACINGS, sample
from minicache.shards import ImageSet, fill
from minicache.tools import Parser
from minicache.tools.classifier import classifier_features
from minicache.unet import UNet

STEPS = 100


def methods(unet: UNet, recipes: list[Recipe], spacing: str, ancestral: int) -> dict[str, Recipe]:
    """By name, which is also that of the file with its pictures; the first is what the others are compared with."""
    found = {f"ddim-{STEPS}": Recipe(full(STEPS), "ddim", spacing)}
    for sampler, its_spacing in (("ddim", spacing), ("dpm++2m", "trailing"), ("plms", "linspace")):
        for steps in (50, 20, 10):
            found[f"{sampler}-{steps}"] = Recipe(full(steps), sampler, its_spacing)
    for N in (2, 3, 5, 10):
        found[f"deepcache-n{N}-b3"] = Recipe(uniform(STEPS, N, 3), "ddim", spacing)
        found[f"deepcache-nonuniform-n{N}-b3"] = Recipe(nonuniform(STEPS, N, STEPS / 2, 1.2, 3), "ddim", spacing)
    for N in (2, 3, 5, 10):
        found[f"deepcache-n{N}-b1"] = Recipe(uniform(STEPS, N, 1), "ddim", spacing)
        found[f"linear-n{N}-b1"] = Recipe(uniform(STEPS, N, 1, "linear"), "ddim", spacing)
    for recipe in sorted(recipes, key=lambda recipe: plan_macs(unet, recipe.plan)):
        found[f"calibrated-{plan_macs(unet, recipe.plan) / plan_macs(unet, full(1)):.0f}"] = recipe
    if ancestral:
        found[f"ddpm-{ancestral}"] = Recipe(full(ancestral), "ddpm")
        for N, b in ((5, 3), (10, 1)):
            found[f"ddpm-{ancestral}-n{N}-b{b}"] = Recipe(uniform(ancestral, N, b), "ddpm")
    return found


def tensor_of(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> [N, 3, H, W] in [-1, 1]."""
    return rearrange(torch.from_numpy(images), "n h w c -> n c h w").float() / 127.5 - 1


def main(args: argparse.Namespace) -> None:
    for name, least in (("num", 2), ("batch_size", 1), ("ancestral", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    if args.real == "cifar10":
        real = rearrange(cifar10("train")[0], "n c h w -> n h w c").numpy()
    else:
        real = read_samples(args.real)
    placement = choose_placement(args.device, args.dtype, compile=COMPILE[args.compile])
    unet = place(load(args.ckpt), placement)
    size = unet.config.image_size
    if real.shape[1:] != (size, size, 3):
        raise ValueError(f"--real {args.real} has images of {real.shape[1:]}; need ({size}, {size}, 3)")
    features = None if args.fid else classifier_features(tensor_of(real))
    recipes = recipes_in(args.recipes or embedded_folder() / "recipes", unet.fingerprint)
    rows = methods(unet, recipes, args.spacing, args.ancestral)
    clock, count = Costs(unet, seconds=True), Costs(unet)
    hours = args.num * clock.unit * sum(clock(recipe.plan) for recipe in rows.values()) / 3600
    print(f"{len(rows)} methods, {args.num} pictures each, {placement}: about {hours:.1f} hours", flush=True)

    distance = "FID" if args.fid else "Frechet distance"
    lines = [
        f"| method | steps | in full | branch | GMACs | full passes | speed-up | PSNR | {distance} |",
        "|" + "---|" * 9,
    ]
    first = next(iter(rows.values())).plan
    reference = None
    for name, recipe in tqdm(rows.items(), desc="methods", unit="method", disable=None):
        settings, plan = recipe.settings(unet.fingerprint), recipe.plan
        manifest = {"weights": unet.fingerprint, **asdict(recipe), "num": args.num, "batch_size": args.batch_size,
                    "dtype": args.dtype}  # fmt: skip
        path = Path(args.out) / f"{name}.npz"
        fill(
            ImageSet(path, range(args.num), args.batch_size, manifest),
            lambda seeds, settings=settings: to_uint8(sample(unet, seeds, **settings)),
        )
        drawn = read_samples(path)
        images = tensor_of(drawn)
        reference = images if reference is None else reference
        near = psnr(images, reference)
        far = fid(drawn, real) if args.fid else frechet_distance(classifier_features(images), features)
        cached = len(plan.refresh) < plan.steps
        lines.append(
            f"| {name} | {plan.steps} | {len(plan.refresh)} | {plan.branch if cached else ''} "
            f"| {plan_macs(unet, plan) / 1e9:.2f} | {count(plan):.1f} | {clock(first) / clock(plan):.2f}x "
            f"| {near.mean():.1f} | {far:.3f} |"
        )
        with replacing(Path(args.out) / "table.md") as temporary:
            temporary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache table", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="tiny_cifar10", help="a checkpoint's name or path (default: tiny_cifar10)")
    add("--real", default="cifar10", help="cifar10 (the training set; default), or an npz, a folder or zip of images")
    add("--num", type=int, default=1000, help="pictures of each method (default: 1000)")
    add("--fid", action="store_true", help="Inception's features, by torch-fidelity, which downloads them once")
    add("--ancestral", type=int, default=0, metavar="STEPS", help="also ancestral sampling (DDPM) with so many steps")
    add("--spacing", default="uniform", choices=SPACINGS, help="of DDIM (default: uniform)")
    add("--recipes", help="folder of calibrated plans (default: those that ship)")
    add("--batch-size", type=int, default=100, help="(default: 100)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="(default: auto)")
    add("--compile", default="no", choices=COMPILE, help="torch.compile (default: no)")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda where there is one")
    add("--out", default="table", help="a folder (default: table)")
    return parser.parse_args(argv)
