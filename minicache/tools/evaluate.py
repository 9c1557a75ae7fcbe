"""Compare fewer steps, fitted samplers, DeepCache and forecasts: one table, one picture, error against cost.

    python -m minicache evaluate --ckpt tiny_cifar10 --out evaluation
    python -m minicache evaluate --ckpt emoji --guidance 7.5 --prompts FILE --out guided
    python -m minicache evaluate --ckpt tiny_cifar10 --ancestral 250 --real cifar10-test.zip --num 1000 --out ancestral
    python -m minicache evaluate --ckpt emoji --like pndm-50 --out pndm
    python -m minicache evaluate --ckpt ddpm_cifar10_ema --real cifar10 --num 50000 --fid --spacing quad --out table2

writes table.md, error.png (which needs matplotlib) and samples.png. It says how many hours it will take, and goes on
after a crash when it is begun again. The protocol is the same for every method:

Reference: fit.FINEST, many steps of DPM-Solver++(2M). Pictures of a sampler that draws noise (--ancestral, --eta)
depend on the number of steps. There it is the uncached run of the same steps and the same noise, and of a run with
fewer steps only the distance counts.
Seeds: calibrate's HELD_OUT, by which nothing is chosen, but the best sampler of the rows "uncached".
Error: relative L2 of the final, unclipped image to the reference of the same seed, with the standard error of the mean;
PSNR in dB likewise, of the clipped image. The row "floor" is the reference with half as many steps: errors near it say
nothing. "to whole" is the mean error to the row "whole" instead, for those who must have the pictures of --like.
Cost: MACs of convolutions and linear layers, in full passes of the network; guidance takes two a step. Speed-ups, over
the first row, are those of passes timed here.
Distance (--real): the Frechet distance to real images, in the features of the classifier that ships (32 x 32 pixels),
or with --fid in Inception's; of --num pictures, the first of which are those with errors. Of --sets equal parts of
them, it is the mean, with its standard error. It falls as sets grow: compare those of one size.

Methods. whole: the uncached run of --like. uncached-COST: the best deterministic sampler with the best of a few
spacings, as its row says; of all, those three are drawn that are best on four of calibrate's seeds. smaller: another
network (--smaller) in the steps of --like. It draws other pictures, so that only its distance and its cost count.
fitted-uncached-COST and fitted-cached-COST: what `calibrate` found for these weights and this guidance. In the steps of
--like: deepcache, 1:N reuse (Ma et al. 2024) at the paper's branch for DDPM, 3, and at 1; and forecasts at branch 1:
linear; l2p, with alphas fitted to features of other seeds, after L2P (2604.26365); spectrum, after Spectrum
(2603.01623). SAMPLER-COST: that of --like with fewer steps.

Kept: NAME.npz, uint8, as evaluators read it; and in pairs/ the first --pairs images of each method as float32, since
rounding to 8 bits alone is as large as the errors of the best methods.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import embedded_folder, fingerprint, load
from minicache.cost import pass_seconds, plan_macs
from minicache.files import replacing
from minicache.images import grid, save_png, to_uint8
from minicache.metrics import Samples, frechet_distance, inception, psnr, read_samples, relative_l2
from minicache.placement import COMPILE, DTYPES, choose_placement, place
from minicache.plan import uncached
from minicache.recipe import recipes_in
from minicache.sampling import sample
from minicache.shards import ImageSet, fill, packed_manifest
from minicache.tools import Parser, at_least, make_folder, markdown, refuse_others, refuse_unworded, tell_of_rest
from minicache.tools.calibrate import CHECK, HELD_OUT, Task, finest
from minicache.tools.classifier import classifier_features
from minicache.tools.methods import FLOOR, Method, chosen, draws_noise, methods, shortlisted, smaller, whole_run
from minicache.words import prompts_for

SHOWN = 8  # images a row of samples.png
LINES = {  # of error.png: its name, and how the names of its methods begin
    "best sampler, uncached": r"uncached-",
    "fitted sampler, uncached": r"fitted-uncached-",
    "fitted cache": r"\S+-cached-",
    "DeepCache, the better branch": r"deepcache-",
    "best of three forecasts": r"(linear|l2p|spectrum)-",
    "the sampler of --like, uncached": r"whole$|(?!uncached-)[a-z\d+]+-[\d.]+$",
}


def clock(task: Task) -> Callable[[Method], float]:
    """A function: method -> seconds for an image. Each kind of pass is timed once."""
    timed, passes_a_step = cache(pass_seconds), task.cost(uncached(1))

    def seconds(method: Method) -> float:
        unet, plan = (method.task or task).unet, method.recipe.plan
        partial_steps = plan.steps - len(plan.refresh)
        rest = partial_steps * timed(unet, plan.branch) if partial_steps else 0.0
        return passes_a_step * (len(plan.refresh) * timed(unet) + rest)

    return seconds


@dataclass(frozen=True)
class Pictures:
    """Every method's pictures, drawn once and kept in a folder."""

    folder: Path
    task: Task
    manifest: dict[str, Any]  # what all are drawn with
    pairs: int
    num: int
    batch_size: int

    def refuse_others(self, sets: Iterable[str]) -> None:
        """ValueError where pairs in the folder, or sets of these names, were drawn otherwise."""
        found = [(path, self.pairs) for path in sorted((self.folder / "pairs").glob("*.npz"))]
        found += [(path, self.num) for name in sets if (path := self.folder / f"{name}.npz").exists()]
        drawn_with = {**self.manifest, "guidance": self.task.prompts.guidance, "batch_size": self.batch_size}
        for path, num in found:
            theirs, ours = packed_manifest(path), {**drawn_with, "num": num}
            ImageSet(path, range(num), self.batch_size, ours).check(path, {name: theirs.get(name) for name in ours})

    def draw(self, method: Method, seeds: range) -> Tensor:
        """Final, unclipped images, float32 [len(seeds), C, H, W] on the CPU."""
        task = method.task or self.task
        settings = {**method.recipe.settings(task.fingerprint), **task.where(seeds)}
        return sample(task.unet, cache=method.cache, **settings).cpu()

    def keep(self, name: str, count: int, method: Method, draw: Callable[[range], np.ndarray]) -> Path:
        path, shards = self.folder / f"{name}.npz", {"num": count, "batch_size": self.batch_size}
        manifest = {**self.manifest, **asdict(method.recipe), **shards}
        fill(ImageSet(path, range(count), self.batch_size, manifest), draw)
        return path

    def paired(self, name: str, method: Method) -> Tensor:
        """The final, unclipped images of the first seeds: float32 [pairs, C, H, W]."""
        path = self.keep(f"pairs/{name}", self.pairs, method, lambda seeds: self.draw(method, seeds).numpy())
        return torch.from_numpy(np.load(path, allow_pickle=False)["arr_0"])

    def samples(self, name: str, method: Method, paired: Tensor) -> Samples:
        """`num` pictures, of which the first are those of `paired`."""

        def draw(seeds: range) -> np.ndarray:
            known = paired[seeds.start : seeds.stop]
            rest = seeds[len(known) :]
            return to_uint8(torch.cat([known, self.draw(method, rest)]) if rest else known)

        return read_samples(self.keep(name, self.num, method, draw))


def measured(name: str, method: Method, task: Task, images: Tensor, reference: Tensor) -> dict[str, Any]:
    """A row of the table."""
    recipe, plan = method.recipe, method.recipe.plan
    macs = plan_macs((method.task or task).unet, plan, recipe.guidance)
    errors, near = relative_l2(images, reference), psnr(images, reference)
    return {
        "method": name,
        "sampler": recipe.label,
        "steps": plan.steps,
        "in full": len(plan.refresh),
        "branch": plan.branch if len(plan.refresh) < plan.steps else "",
        "GMACs": macs / 1e9,
        "full passes": macs / plan_macs(task.unet, uncached(1)),
        "error": errors.mean().item(),
        "+-": errors.std().item() / len(errors) ** 0.5,
        "median": median(errors.tolist()),
        "worst": errors.max().item(),
        "PSNR": near.mean().item(),
        "median PSNR": median(near.tolist()),
    }


def draw_errors(path: Path, rows: list[dict[str, Any]], fields: list[str], title: str) -> None:
    """Each field (error, distance) against cost: down and to the left is better. Methods that others of the same line
    beat at a lower cost are left out."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no error.png: it needs matplotlib (pip install 'minicache[notebooks]')")
        return
    figure = Figure(figsize=(5.5 * len(fields), 5), layout="constrained")
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    for axis, field in zip(axes, fields):
        for (label, names), style in zip(LINES.items(), ("o--", "k*-", "D-", "s:", "^:", "x-.")):
            best: list[tuple[float, float]] = []
            for x, y in sorted((r["full passes"], r[field]) for r in rows if re.match(names, r["method"]) and r[field]):
                if not best or y < best[-1][1]:
                    best.append((x, y))
            if best:
                axis.plot(*zip(*best), style, label=label, markersize=5)
        axis.set(xscale="log", yscale="log", xlabel="cost in full passes", ylabel=field)
    for row in rows:
        if row["method"] == FLOOR:
            axes[0].axhline(row["error"], color="0.6", linewidth=1, label="the reference's floor")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title.replace("$", r"\$"))  # between two, it would be mathematics
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def prepared(args: argparse.Namespace) -> tuple[Pictures, dict[str, dict[str, Method]], Samples | None]:
    """The network and all else that the arguments ask for; ValueError for what cannot be had."""
    at_least(args, pairs=2, num=args.pairs, sets=1, batch_size=1, budgets=0)
    if args.real is None and (args.fid or args.num or args.sets > 1):
        raise ValueError("--fid, --num and --sets are for distances to real images: give --real")
    unet, placement = load(args.ckpt), choose_placement(args.device, args.dtype, compile=COMPILE[args.compile])
    weights, size = fingerprint(unet), unet.config.image_size  # before `place` rounds them
    if unet.config.in_channels != 3:
        raise ValueError(f"pictures of 3 channels are compared, and {args.ckpt} draws {unet.config.in_channels}")
    real = args.real and read_samples(args.real)
    if real and (real.shape[1:] != (size, size, 3) or not (size == 32 or args.fid)):
        raise ValueError(f"--real has images of {real.shape[1:]}; need {(size, size, 3)}, and --fid if not 32 x 32")
    num = args.num or max(1000, args.pairs) if real else args.pairs
    if num % args.sets or num < 2 * args.sets:
        raise ValueError(f"--num {num} cannot be parted into {args.sets} equal sets of two pictures or more")
    refuse_unworded(args.ckpt, unet)
    asked = {"prompts": args.prompts, "guidance": args.guidance, "num": max(num, CHECK.stop)}  # more than any seed
    prompts = prompts_for(args.ckpt, unet, unet.vocabulary, **asked)
    if args.prompts:
        tell_of_rest(prompts, num)
    task = Task(place(unet, placement), weights, prompts)
    whole = whole_run(task, args.like, args.spacing, args.eta)
    other = smaller(task, whole, args.smaller, placement) if args.smaller else {}
    recipes = recipes_in(args.recipes or embedded_folder() / "recipes", weights)
    if args.recipes and not recipes:
        raise ValueError(f"--recipes {args.recipes} holds no recipe for {args.ckpt}, the weights {weights}")
    found = chosen(methods(task, whole, args.budgets, recipes) | other, args.only)
    manifest = {"weights": weights, "prompts": prompts.texts, "dtype": str(placement.dtype).removeprefix("torch.")}

    pictures = Pictures(Path(args.out), task, manifest, args.pairs, num, args.batch_size)
    pictures.refuse_others(found if real else ())
    line = f"\n| whole | {whole.label} | {whole.plan.steps} |"
    refuse_others(args.out, ("table.md", "error.png", "samples.png"), lambda table: line in table, apart=args.real)
    make_folder(pictures.folder)
    return pictures, found, real


def hours(pictures: Pictures, found: dict[str, dict[str, Method]], seconds: Callable[[Method], float]) -> float:
    """What all pictures take, about; of the best of a row there are `num`."""
    time = pictures.pairs * sum(seconds(method) for row in found.values() for method in row.values())
    rest = sum(seconds(next(iter(row.values()))) for name, row in found.items() if name != FLOOR)
    return (time + (pictures.num - pictures.pairs) * rest) / 3600


def main(args: argparse.Namespace) -> None:
    pictures, found, real = prepared(args)
    field, features = ("FID", inception()) if args.fid else ("Frechet distance", classifier_features)
    real = real and real.moments(features)[0]
    task, out, seconds = pictures.task, pictures.folder, clock(pictures.task)
    found = shortlisted(task, found)
    print(f"{len(found)} methods, {pictures.num} pictures each: about {hours(pictures, found, seconds):.1f} hours")
    (name, first), *_ = next(iter(found.values())).items()
    whole, like = first.recipe, pictures.paired(name, first)
    noisy = draws_noise(whole)
    target = like if noisy else pictures.paired("reference", Method(finest(task)))
    rows, sheet, fresh = [], {"reference": target[:SHOWN]}, not (out / "table.md").exists()
    for name, row_methods in tqdm(found.items(), desc="methods", unit="method", disable=None):
        drawn = [(pictures.paired(each, method), method) for each, method in row_methods.items()]
        images, method = min(drawn, key=lambda pair: relative_l2(pair[0], target).mean())
        row = measured(name, method, task, images, target)
        if not noisy:
            row["to whole"] = relative_l2(images, like).mean().item()
        row["speed-up"] = seconds(first) / seconds(method)
        if real and name != FLOOR:
            sets = pictures.samples(name, method, images).moments(features, args.sets)
            distances = [frechet_distance(each, real) for each in sets]
            row[field] = mean(distances)
            if args.sets > 1:
                row[f"{field} +-"] = stdev(distances) / args.sets**0.5
        rows.append(row)
        if fresh or len(rows) == len(found):  # a part of a table replaces none that is whole
            with replacing(out / "table.md") as temporary:
                temporary.write_text(markdown(rows))
        if 18 <= row["full passes"] <= 22 or noisy:
            sheet[name] = images[:SHOWN]
    print(markdown(rows))
    title = f"{args.ckpt}, guidance {whole.guidance:g}, {args.pairs} held-out seeds"
    draw_errors(out / "error.png", rows, ["error", field] if real else ["error"], title)
    save_png(out / "samples.png", grid(to_uint8(torch.cat(list(sheet.values()))), columns=min(SHOWN, args.pairs)), 2)
    print(f"samples.png, row by row: {'; '.join(sheet)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache evaluate", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="tiny_cifar10", help="a checkpoint's name or path (default: tiny_cifar10)")
    add("--out", default="evaluation", help="a folder (default: evaluation)")
    add("--pairs", type=int, default=len(HELD_OUT), help="seeds whose images are compared one by one (default: 32)")
    add("--budgets", type=float, nargs="+", default=[5, 7, 10, 15, 20, 30, 50], help="of uncached rows, full passes")
    add("--guidance", type=float, help="of the prompts; two passes a step unless 1 (default: what suits the network)")
    add("--prompts", metavar="FILE", help="a prompt a line (default: the network's examples)")
    like = parser.add_mutually_exclusive_group().add_argument
    like("--like", default="ddim-100", metavar="SAMPLER-STEPS", help="the steps that are cached (default: ddim-100)")
    like("--ancestral", dest="like", type="ddpm-{}".format, metavar="STEPS", help="the same as --like ddpm-STEPS")
    add("--spacing", help="of the steps that are cached (default: the sampler's)")
    add("--eta", type=float, default=0.0, help="noise of the ddim whose steps are cached, 0 to 1 (default: 0)")
    add("--recipes", help="folder of calibrated recipes (default: those that ship)")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows, as deepcache-n?-b3 (default: all)")
    add("--smaller", metavar="CKPT", help="another network for such pictures, with fewer MACs, to compare with")
    add("--real", help="cifar10 (the training set), or an npz, a folder or zip of images: measure distances to them")
    add("--num", type=int, help="pictures of each method for the distance (default: 1000)")
    add("--sets", type=int, default=1, help="equal parts of them, for a standard error (default: 1)")
    add("--fid", action="store_true", help="Inception's features, by torch-fidelity, which downloads them once")
    add("--batch-size", type=int, default=100, help="(default: 100)")
    add("--dtype", default="float32", choices=("auto", *DTYPES), help="of the network (default: float32)")
    add("--compile", default="no", choices=COMPILE, help="torch.compile (default: no)")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda or mps where there is one, else cpu")
    return parser.parse_args(argv)
