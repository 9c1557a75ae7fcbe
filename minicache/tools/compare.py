"""One run, one table, one picture: error against cost for fewer steps, DeepCache, forecasts and calibrated plans.

    python -m minicache compare --ckpt tiny --out comparison

writes comparison/table.csv, table.md, error.png (matplotlib, an extra) and samples.png: the same seeds, a row a method.
The protocol is that of minicache.protocol, on its held-out seeds; the row "half the reference's steps" is the
reference's floor: errors near it say nothing. The Frechet distance is that of the network's own
features (minicache.metrics.unet_features) to those of the reference's images: it ranks methods on one network, with one
number of images, and nothing else.

    python -m minicache compare --ckpt tiny_cifar10 --ancestral 1000 --out ancestral

compares plans for ancestral sampling. The reference is the uncached run of the same steps and noise, and the Frechet
distance is that to an uncached run of other seeds, which the row "uncached" shows the size of; "uncached, more seeds"
is a third run, and tells how much of a difference is chance.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import embedded_folder, fingerprint, load
from minicache.cost import full_passes, plan_macs
from minicache.data import source
from minicache.files import replacing
from minicache.images import grid, save_png, to_uint8
from minicache.metrics import frechet_distance, psnr, relative_l2, unet_features
from minicache.placement import choose_device
from minicache.plan import full, nonuniform, uniform
from minicache.recipe import Recipe, recipes_in
from minicache.tools import Parser
from minicache.tools.protocol import Trial, finest, trial, uncached
from minicache.unet import UNet

SHOWN = 8  # images a row of samples.png
FLOOR = "half the reference's steps"


class Row(NamedTuple):
    """One method at one cost; errors are relative L2 to the reference."""

    method: str
    sampler: str
    spacing: str
    steps: int
    full_steps: int
    branch: int | None
    passes: float  # cost in full passes
    gmacs: float  # an image
    error: float
    median: float
    worst: float
    psnr: float  # dB, mean
    frechet: float


def measure(trial: Trial, method: str, recipe: Recipe, features: Tensor, images: Tensor) -> Row:
    """features: of the images that the Frechet distance is to."""
    plan, errors = recipe.plan, relative_l2(images, trial.reference)
    return Row(
        method,
        recipe.sampler,
        recipe.spacing,
        plan.steps,
        len(plan.refresh),
        plan.branch if len(plan.refresh) < plan.steps else None,
        full_passes(trial.unet, plan),
        plan_macs(trial.unet, plan) / 1e9,
        errors.mean().item(),
        errors.median().item(),
        errors.max().item(),
        psnr(images, trial.reference).mean().item(),
        frechet_distance(unet_features(trial.unet, images), features),
    )


def methods(unet: UNet, budgets: list[int], recipes: list[Recipe], start: int | None) -> list[tuple[str, Recipe]]:
    """What is compared, by name: fewer steps, DeepCache as published, a forecast, and calibrated plans."""

    def ddim(plan) -> Recipe:
        return Recipe(plan, spacing="uniform" if start is None else "trailing", start=start)

    found = [
        (f"fewer steps, {recipe.sampler}", recipe) for steps in budgets for recipe in uncached(unet, steps, start=start)
    ]
    found.append(("uncached, ddim", ddim(full(100))))
    for branch in (3, 1):
        for interval in (2, 3, 5, 10):
            found += [
                (f"DeepCache, branch {branch}", ddim(uniform(100, interval, branch))),
                (f"DeepCache, non-uniform, branch {branch}", ddim(nonuniform(100, interval, 50, 1.2, branch))),
                (f"linear forecast, branch {branch}", ddim(uniform(100, interval, branch, "linear"))),
            ]
    found += [("calibrated", recipe) for recipe in sorted(recipes, key=lambda recipe: full_passes(unet, recipe.plan))]
    reference = finest(unet, start)
    return [*found, (FLOOR, replace(reference, plan=full(reference.plan.steps // 2)))]


def ancestral(unet: UNet, steps: int, recipes: list[Recipe]) -> list[tuple[str, Recipe]]:
    """What is compared in ancestral sampling: reuse and forecast about a fifth of the cost, and calibrated plans."""
    plans = [
        (f"{name}, branch {branch}", uniform(steps, interval, branch, forecast))
        for branch in (1, 2, 3)
        for interval in (3, 5, 10, 20)
        for name, forecast in (("DeepCache", "hold"), ("linear forecast", "linear"))
    ]
    found = [(name, Recipe(plan, "ddpm")) for name, plan in plans if 0.15 <= full_passes(unet, plan) / steps <= 0.25]
    mine = [recipe for recipe in recipes if (recipe.sampler, recipe.plan.steps) == ("ddpm", steps)]
    return found + [("calibrated", recipe) for recipe in mine]


def best_spacings(rows: list[tuple[Row, Tensor]]) -> list[tuple[Row, Tensor]]:
    """Of rows that differ in the spacing alone, the one with the smallest error."""
    best: dict[tuple, tuple[Row, Tensor]] = {}
    for row, images in rows:
        key = row.method, row.steps, row.full_steps, row.passes
        if key not in best or row.error < best[key][0].error:
            best[key] = row, images
    return list(best.values())


def as_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Row._fields, *rows])
    return text.getvalue()


def as_markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(Row._fields) + " |", "|" + "---|" * len(Row._fields)]
    for row in rows:
        cells = (f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_errors(path: Path, rows: list[Row], title: str) -> None:
    """Error, and Frechet distance, against cost: down and to the left is better."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no error.png: it needs matplotlib (pip install 'minicache[notebooks]')")
        return
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    floors = [row.error for row in rows if row.method == FLOOR]
    for name in dict.fromkeys(row.method for row in rows if row.method != FLOOR):
        points = sorted((row for row in rows if row.method == name), key=lambda row: row.passes)
        style = {"calibrated": "k*-"}.get(name, "o--" if name.startswith("fewer") else "s:")
        for axis, field in zip(axes, ("error", "frechet")):
            values = [getattr(point, field) for point in points]
            axis.plot([point.passes for point in points], values, style, label=name, markersize=5)
    for floor in floors:
        axes[0].axhline(floor, color="0.6", linewidth=1, label=f"the reference's floor: {FLOOR}")
    for axis, label in zip(axes, ("mean relative L2 to the reference", "Frechet distance of the network's features")):
        axis.set(xscale="log", yscale="log", xlabel="cost in full passes", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(args: argparse.Namespace) -> None:
    unet = load(args.ckpt, device=choose_device(args.device))
    draw = args.data and source(args.data, unet.config.image_size)
    if args.num < 2:
        raise ValueError(f"--num {args.num} must be at least 2")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    recipes = recipes_in(args.recipes or embedded_folder() / "recipes", fingerprint(unet), args.start)
    print(f"{len(recipes)} calibrated plans for this checkpoint")
    if args.ancestral:
        whole = Recipe(full(args.ancestral), "ddpm")
        held_out, others, more = (
            trial(unet, range(k * args.num, (k + 1) * args.num), whole, progress=True) for k in range(3)
        )
        features, names = unet_features(unet, others.reference), ancestral(unet, args.ancestral, recipes)
    else:
        held_out = trial(unet, range(args.num), draw=draw, start=args.start, progress=True)
        features, names = unet_features(unet, held_out.reference), methods(unet, args.budgets, recipes, args.start)
    measured = []
    if args.ancestral:  # three runs that are there already; the last one's errors would say nothing
        row = measure(more, "uncached, more seeds", whole, features, more.reference)
        measured.append((measure(held_out, "uncached", whole, features, held_out.reference), held_out.reference))
        measured.append((row._replace(error=math.nan, median=math.nan, worst=math.nan, psnr=math.nan), more.reference))
    for name, recipe in tqdm(names, desc="methods", unit="plan", disable=None):
        images = held_out.images(recipe)
        measured.append((measure(held_out, name, recipe, features, images), images))
    measured = best_spacings(measured)
    rows = [row for row, _ in measured]
    for name, text in (("table.csv", as_csv(rows)), ("table.md", as_markdown(rows))):
        with replacing(out / name) as temporary:
            temporary.write_text(text)
    where = "pure noise" if args.start is None else f"images noised to t = {args.start - 1}"
    if not args.ancestral:
        draw_errors(out / "error.png", rows, f"{args.ckpt}, from {where}, {args.num} held-out seeds")
    near = [(row, images) for row, images in measured if 18 <= row.passes <= 22 or row.steps == args.ancestral]
    sheet = [("reference", held_out.reference)] + [(row.method, images) for row, images in near]
    save_png(out / "samples.png", grid(to_uint8(torch.cat([images[:SHOWN] for _, images in sheet])), columns=SHOWN), 2)
    print(as_markdown(rows))
    print("samples.png, row by row: " + "; ".join(f"{name}" for name, _ in sheet))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache compare", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="tiny", help="a checkpoint's name or path (default: tiny)")
    add("--out", default="comparison", help="a folder (default: comparison)")
    add("--budgets", type=int, nargs="+", default=[10, 15, 20, 30, 50], help="steps of uncached sampling")
    add("--recipes", help="folder of calibrated plans (default: those that ship)")
    add("--num", type=int, default=32, help="held-out seeds (default: 32)")
    add("--data", help="begin from these images (shapes, cifar10, a folder or zip), noised to --start")
    add("--start", type=int, help="timesteps that are still to go from the noised images, as 700; with --data")
    add("--ancestral", type=int, metavar="STEPS", help="compare plans for ancestral sampling (DDPM) of so many steps")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda where there is one")
    return parser.parse_args(argv)
