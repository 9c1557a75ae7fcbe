"""Compare fewer steps, DeepCache, forecasts and calibrated plans: one table, one picture, error against cost.

    python -m minicache evaluate --ckpt tiny_cifar10 --out evaluation
    python -m minicache evaluate --ckpt tiny_cifar10 --real cifar10-test.zip --num 1000 --out evaluation
    python -m minicache evaluate --ckpt ddpm_cifar10_ema --real cifar10 --num 50000 --fid --spacing quad --out table2
    python -m minicache evaluate --ckpt tiny_cifar10 --ancestral 250 --out ancestral

writes table.md, error.png (which needs matplotlib) and samples.png. It says how many hours it will take, and goes on
after a crash when it is begun again. The protocol is the same for every method, and was fixed before any search:

Reference: DPM-Solver++(2M) with as many steps as there are timesteps, trailing. An ancestral sampler's images depend on
the number of steps, so there it is the uncached run of the same steps and the same noise.
Seeds: HELD_OUT, among which are sample.py's own pictures; `calibrate` searches on others.
Error: relative L2 of the final, unclipped image to the reference of the same seed; PSNR in dB likewise, of the clipped
image. Fewer steps have, at each cost, the spacing with the smallest error. The row "floor" is the reference with half
as many steps: errors near it say nothing.
Distance (--real): the Frechet distance to real images, in the features of the classifier that ships (32 x 32 pixels),
or with --fid in Inception's; of --num pictures, the first of which are those with errors. Compare equal counts.
Cost: MACs of convolutions and linear layers, in full passes of the network; speed-ups are those of passes timed here.

Kept: NAME.npz, uint8, as evaluators read it; and in pairs/ the first --pairs images of each method as float32, since
rounding to 8 bits alone is as large as the errors of the best methods.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import embedded_folder, fingerprint, load
from minicache.cost import full_passes, pass_seconds, plan_macs
from minicache.data import Source, source
from minicache.diffusion import Diffusion
from minicache.files import replacing
from minicache.images import grid, save_png, to_uint8
from minicache.metrics import Samples, frechet_distance, inception, psnr, read_samples, relative_l2
from minicache.placement import COMPILE, DTYPES, choose_placement, place
from minicache.plan import CachePlan, nonuniform, uncached, uniform
from minicache.recipe import Recipe, recipes_in
from minicache.sampling import sample
from minicache.shards import ImageSet, fill
from minicache.tools import Parser, at_least, markdown
from minicache.tools.classifier import classifier_features
from minicache.unet import UNet

HELD_OUT = range(32)
SOLVERS = ("ddim", "dpm++2m", "plms")  # have one limit as steps grow
SPACINGS = ("uniform", "quad", "trailing", "linspace")  # that are tried with each
STEPS = 100  # of the plans that are published
SHOWN = 8  # images a row of samples.png
FLOOR = "floor"


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What all methods have in common: the network, and where its trajectories begin: in pure noise (start None), or in
    images from `draw` noised to t = start - 1: a weakly trained network is better there than at pure noise."""

    unet: UNet
    fingerprint: str
    start: int | None = None
    draw: Source | None = None

    def __post_init__(self):
        if (self.draw is None) != (self.start is None):
            raise ValueError("images and start go together: the images are noised to t = start - 1")
        if self.unet.config.context_dim:
            raise ValueError("plans are compared on unconditional networks alone so far, and this one takes a context")

    @property
    def limit(self) -> int:
        """The most steps that can be taken."""
        return self.start or self.unet.diffusion.num_timesteps

    @property
    def spacings(self) -> list[str]:
        """From pure noise all; from noised images those that begin where the noise is."""
        first = {name: Diffusion(self.limit).timesteps(2, name)[0] for name in SPACINGS}
        return [name for name in SPACINGS if self.start is None or first[name] == self.limit - 1]

    @property
    def finest(self) -> Recipe:
        """The reference of all samplers without noise."""
        return Recipe(uncached(self.limit), "dpm++2m", "trailing", start=self.start)

    def fewer_steps(self, steps: int, samplers: Sequence[str] = SOLVERS) -> list[Recipe]:
        """The baseline that matters: no cache, but fewer steps, by each sampler with every spacing."""
        recipe = partial(Recipe, uncached(steps), start=self.start, fingerprint=self.fingerprint)
        return [recipe(sampler, spacing) for sampler in samplers for spacing in self.spacings]

    def x_T(self, seeds: Sequence[int]) -> Tensor | None:
        """Images noised to t = start - 1, image and noise from the seed: [len(seeds), C, H, W]; None: pure noise."""
        if self.draw is None:
            return None
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x0 = torch.cat([self.draw(1, generator) for generator in generators])
        noise = torch.cat([torch.randn(1, *x0.shape[1:], generator=generator) for generator in generators])
        return self.unet.diffusion.q_sample(x0, torch.tensor([self.start - 1]), noise)

    def images(self, recipe: Recipe, seeds: Sequence[int], **settings: Any) -> Tensor:
        """Final, unclipped images [len(seeds), C, H, W]; settings: batch_size and progress of `sample`."""
        return sample(self.unet, seeds, x_T=self.x_T(seeds), **settings, **recipe.settings(self.fingerprint))


def clock(unet: UNet) -> Callable[[CachePlan], float]:
    """A function: plan -> seconds for an image. Each kind of pass is timed once."""
    timed = cache(partial(pass_seconds, unet))
    return lambda plan: len(plan.refresh) * timed() + (plan.steps - len(plan.refresh)) * timed(plan.branch)


def methods(args: argparse.Namespace, benchmark: Benchmark, recipes: list[Recipe]) -> dict[str, list[Recipe]]:
    """Name -> recipes of one cost, of which the best counts; speed-ups are those over the first."""
    sampler, steps = ("ddpm", args.ancestral) if args.ancestral else ("ddim", min(STEPS, benchmark.limit))
    plans = {f"{sampler}-{steps}": uncached(steps)}
    for N in (2, 3, 5, 10):
        plans[f"deepcache-n{N}-b3"] = uniform(steps, N, 3)
        plans[f"deepcache-nonuniform-n{N}-b3"] = nonuniform(steps, N, steps / 2, 1.2, 3)
        plans[f"deepcache-n{N}-b1"] = uniform(steps, N, 1)
        plans[f"linear-n{N}-b1"] = uniform(steps, N, 1, "linear")
    spacing = args.spacing or benchmark.spacings[0]
    found = {name: [Recipe(plan, sampler, spacing, start=args.start)] for name, plan in plans.items()}
    for recipe in recipes:  # the calibrated ones
        if (recipe.plan.steps if recipe.sampler == "ddpm" else None) == args.ancestral:
            found.setdefault(f"calibrated-{full_passes(benchmark.unet, recipe.plan):.0f}", []).append(recipe)
    if not args.ancestral:
        found |= {f"{name}-{S}": benchmark.fewer_steps(S, (name,)) for name in SOLVERS for S in args.budgets}
        found[FLOOR] = [replace(benchmark.finest, plan=uncached(benchmark.limit // 2))]
    for recipe in (recipe for recipes in found.values() for recipe in recipes):
        recipe.timesteps(benchmark.unet.diffusion)  # refuses now what it would refuse later
    return found


@dataclass(frozen=True)
class Pictures:
    """Every method's pictures, drawn once and kept in a folder."""

    folder: Path
    benchmark: Benchmark
    manifest: dict[str, Any]  # what all are drawn with
    pairs: int
    num: int
    batch_size: int

    def keep(self, name: str, count: int, recipe: Recipe, draw: Callable[[range], np.ndarray]) -> Path:
        path, shards = self.folder / f"{name}.npz", {"num": count, "batch_size": self.batch_size}
        fill(ImageSet(path, range(count), self.batch_size, {**self.manifest, **asdict(recipe), **shards}), draw)
        return path

    def paired(self, name: str, recipe: Recipe) -> Tensor:
        """The final, unclipped images of the first seeds: float32 [pairs, C, H, W]."""
        draw = lambda seeds: self.benchmark.images(recipe, seeds).cpu().numpy()  # noqa: E731
        path = self.keep(f"pairs/{name}", self.pairs, recipe, draw)
        return torch.from_numpy(np.load(path, allow_pickle=False)["arr_0"])

    def samples(self, name: str, recipe: Recipe, paired: Tensor) -> Samples:
        """`num` pictures, of which the first are those of `paired`."""

        def draw(seeds: range) -> np.ndarray:
            known = paired[seeds.start : seeds.stop]
            rest = seeds[len(known) :]
            return to_uint8(torch.cat([known, self.benchmark.images(recipe, rest).cpu()]) if rest else known)

        return read_samples(self.keep(name, self.num, recipe, draw))


def measured(name: str, recipe: Recipe, unet: UNet, images: Tensor, reference: Tensor) -> dict[str, Any]:
    """A row of the table."""
    plan = recipe.plan
    errors, near = relative_l2(images, reference), psnr(images, reference)
    return {
        "method": name,
        "sampler": recipe.label,
        "steps": plan.steps,
        "in full": len(plan.refresh),
        "branch": plan.branch if len(plan.refresh) < plan.steps else "",
        "GMACs": plan_macs(unet, plan) / 1e9,
        "full passes": full_passes(unet, plan),
        "error": errors.mean().item(),
        "median": errors.median().item(),
        "worst": errors.max().item(),
        "PSNR": near.mean().item(),
        "median PSNR": near.median().item(),
    }


def draw_errors(path: Path, rows: list[dict[str, Any]], fields: list[str], title: str) -> None:
    """Each field (error, distance) against cost: down and to the left is better."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no error.png: it needs matplotlib (pip install 'minicache[notebooks]')")
        return
    families: dict[str, list[dict[str, Any]]] = {}  # "deepcache-b1": the rows of all N
    for row in sorted(rows, key=lambda row: row["full passes"]):
        families.setdefault(re.sub(r"-n?\d+", "", row["method"], count=1), []).append(row)
    floor = families.pop(FLOOR, [])
    figure = Figure(figsize=(5.5 * len(fields), 5.5), layout="constrained")
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    for axis, field in zip(axes, fields):
        for name, family in families.items():
            style = "k*-" if name == "calibrated" else "o--" if name in SOLVERS else "s:"
            axis.plot(*zip(*[(row["full passes"], row[field]) for row in family]), style, label=name, markersize=5)
        axis.set(xscale="log", yscale="log", xlabel="cost in full passes", ylabel=field)
    for row in floor:
        axes[0].axhline(row["error"], color="0.6", linewidth=1, label="the reference's floor")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def prepared(args: argparse.Namespace) -> tuple[Pictures, dict[str, list[Recipe]], Samples | None]:
    """The network and all else that the arguments ask for; ValueError for what cannot be had."""
    at_least(args, pairs=2, num=args.pairs, batch_size=1, ancestral=1)
    if args.real is None and (args.fid or args.num):
        raise ValueError("--fid and --num are for distances to real images: give --real")
    unet, placement = load(args.ckpt), choose_placement(args.device, args.dtype, compile=COMPILE[args.compile])
    weights, size = fingerprint(unet), unet.config.image_size  # before `place` rounds them
    real = args.real and read_samples(args.real)
    if real and real.shape[1:] != (size, size, 3):
        raise ValueError(f"--real {args.real} has images of {real.shape[1:]}; need ({size}, {size}, 3)")
    benchmark = Benchmark(place(unet, placement), weights, args.start, args.data and source(args.data, size))
    found = methods(args, benchmark, recipes_in(args.recipes or embedded_folder() / "recipes", weights, args.start))
    manifest = {"weights": weights, "data": args.data, "dtype": str(placement.dtype).removeprefix("torch.")}
    num = args.num or max(1000, args.pairs) if real else args.pairs
    return Pictures(Path(args.out), benchmark, manifest, args.pairs, num, args.batch_size), found, real


def main(args: argparse.Namespace) -> None:
    pictures, found, real = prepared(args)
    benchmark, out, seconds = pictures.benchmark, pictures.folder, clock(pictures.benchmark.unet)
    whole = next(iter(found.values()))[0]  # the uncached run of as many steps as the cached ones
    reference = whole if args.ancestral else benchmark.finest
    time = args.pairs * sum(seconds(recipe.plan) for recipes in [[reference], *found.values()] for recipe in recipes)
    rest = (recipes[0].plan for name, recipes in found.items() if name != FLOOR)
    time += (pictures.num - args.pairs) * sum(map(seconds, rest))
    print(f"{len(found)} methods, {pictures.num} pictures each: about {time / 3600:.1f} hours", flush=True)

    field, features = ("FID", inception()) if args.fid else ("Frechet distance", classifier_features)
    real = real and real.moments(features)
    target = pictures.paired("reference", reference)
    rows, sheet = [], {"reference": target[:SHOWN]}
    for name, recipes in tqdm(found.items(), desc="methods", unit="method", disable=None):
        drawn = [(pictures.paired(f"{name}-{k}", recipe), recipe) for k, recipe in enumerate(recipes)]
        images, recipe = min(drawn, key=lambda pair: relative_l2(pair[0], target).mean())
        row = measured(name, recipe, benchmark.unet, images, target)
        row["speed-up"] = seconds(whole.plan) / seconds(recipe.plan)
        if real and name != FLOOR:
            row[field] = frechet_distance(pictures.samples(name, recipe, images).moments(features), real)
        rows.append(row)
        with replacing(out / "table.md") as temporary:
            temporary.write_text(markdown(rows))
        if 18 <= row["full passes"] <= 22 or args.ancestral:
            sheet[name] = images[:SHOWN]
    print(markdown(rows))
    title = f"{args.ckpt}, from t = {benchmark.limit - 1}, {args.pairs} held-out seeds"
    draw_errors(out / "error.png", rows, ["error", field] if real else ["error"], title)
    save_png(out / "samples.png", grid(to_uint8(torch.cat(list(sheet.values()))), columns=min(SHOWN, args.pairs)), 2)
    print(f"samples.png, row by row: {'; '.join(sheet)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache evaluate", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="tiny_cifar10", help="a checkpoint's name or path (default: tiny_cifar10)")
    add("--out", default="evaluation", help="a folder (default: evaluation)")
    add("--pairs", type=int, default=32, help="seeds whose images are compared one by one (default: 32)")
    add("--real", help="cifar10 (the training set), or an npz, a folder or zip of images: measure distances to them")
    add("--num", type=int, help="pictures of each method for the distance (default: 1000)")
    add("--fid", action="store_true", help="Inception's features, by torch-fidelity, which downloads them once")
    add("--budgets", type=int, nargs="+", default=[10, 15, 20, 30, 50], help="steps of uncached sampling")
    add("--spacing", help=f"of the {STEPS} steps that are cached (default: uniform)")
    add("--ancestral", type=int, metavar="STEPS", help="compare plans for ancestral sampling (DDPM) of so many steps")
    add("--recipes", help="folder of calibrated plans (default: those that ship)")
    add("--data", help="begin from these images (shapes, cifar10, a folder or zip), noised to --start")
    add("--start", type=int, help="timesteps that are still to go from the noised images, as 700; with --data")
    add("--batch-size", type=int, default=100, help="(default: 100)")
    add("--dtype", default="float32", choices=("auto", *DTYPES), help="of the network (default: float32)")
    add("--compile", default="no", choices=COMPILE, help="torch.compile (default: no)")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda or mps where there is one, else cpu")
    return parser.parse_args(argv)
