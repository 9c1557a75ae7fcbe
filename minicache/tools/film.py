"""A film of the same pictures emerging three ways on one clock: uncached, with DeepCache, by the best plan known.

python -m minicache film                             # emoji, four of its examples: film.gif, in half a minute
python -m minicache film --prompt "red apple twemoji" --prompt "cat face noto" --steps 30 --interval 3

A frame is the same amount of computation for all three, so that the cheap ones finish first, and wait.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from minicache.checkpoints import fingerprint, load
from minicache.cost import full_passes, macs, macs_so_far
from minicache.files import replacing
from minicache.images import BAND, default_font, fitted, grid, picture, to_uint8
from minicache.plan import CachePlan, uncached, uniform
from minicache.recipe import Recipe, recipe_from_file, shipped_recipe
from minicache.sampling import STEPS, denoise
from minicache.tools import Parser, at_least, prepare_out, refuse_unworded, tell_of_rest
from minicache.tools.methods import draws_noise
from minicache.unet import UNet
from minicache.words import prompts_for

FRAMES, MILLISECONDS, PAUSE = 100, 100, 2600  # after the first; each; the last
COLORS, STILL = 95, 8  # a pixel stands still until it changes by more, of 255; both keep the file small
PICTURES = 8  # in a row, at most; those of all steps are held at once
SIDE, LEFT, BOTTOM = 128, 250, 34  # pixels: of a picture; beside and below all of them
INK, MUTED, TRACK, GREY, BLUE, RED = "#1c2026", "#626973", "#e3e0d9", "#7d8590", "#2563c9", "#c33d2b"


class Row(NamedTuple):
    """One of the ways to draw: its name, what it is, its colour; pictures and cost after 0, 1, 2, ... steps."""

    name: str
    what: str
    color: str
    pictures: list[np.ndarray]  # uint8 [B, H, W, C]
    spent: list[float]  # full passes


def emerging(unet: UNet, seeds: range, **settings: Any) -> tuple[list[np.ndarray], list[float]]:
    """The noise, then each step's predicted pictures, at last the pictures themselves; and what each cost."""
    shape = (unet.config.in_channels, *[unet.config.image_size] * 2)
    x_T = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    pictures = [to_uint8(x_T)]
    for step in denoise(unet, seeds, x_T=x_T, **settings):
        pictures.append(to_uint8(step.x0))
    pictures[-1] = to_uint8(step.x)
    for before, after in pairwise(pictures[:-1]):
        np.copyto(after, before, where=abs(after.astype(int) - before).max(-1, keepdims=True) <= STILL)
    costs = macs_so_far(unet, settings["plan"], settings["guidance"])
    return pictures, [0.0, *(cost / macs(unet) for cost in costs)]


def frame(rows: Sequence[Row], labels: Sequence[str], cost: float, said: str) -> Image.Image:
    """What each row shows when it has been given so much computation, its words on the left."""
    steps = [bisect_right(row.spent, cost + 1e-6) - 1 for row in rows]
    scale = max(1, SIDE // rows[0].pictures[0].shape[1])
    sheets = [picture(grid(row.pictures[step], 2, len(labels)), scale) for row, step in zip(rows, steps)]
    width, height = sheets[0].size
    canvas = Image.new("RGB", (LEFT + width, BAND + len(rows) * height + BOTTOM), "white")
    draw = ImageDraw.Draw(canvas)
    for k, label in enumerate(labels):
        lines, font, _ = fitted(label, SIDE)
        center = LEFT + scale + (k + 0.5) * (width - 2 * scale) / len(labels)
        draw.multiline_text((center, BAND), "\n".join(lines), MUTED, font, "md", align="center")
    for k, (row, step, sheet) in enumerate(zip(rows, steps, sheets)):
        canvas.paste(sheet, (LEFT, BAND + k * height))
        panel(draw, row, row.spent[step], max(each.spent[-1] for each in rows), BAND + k * height + height // 2)
    draw.text((16, canvas.height - 14), said, MUTED, default_font(13), "ls")
    return canvas


def panel(draw: ImageDraw.ImageDraw, row: Row, spent: float, whole: float, y: int) -> None:
    """A row's words, around the height y, and a bar of what it has spent; whole: what the dearest row spends."""
    total, large, small = row.spent[-1], default_font(26), default_font(13)
    fewer = f"passes, {whole / total:.1f}x fewer" if total < whole else "passes"
    draw.text((16, y - 26), row.name, INK, default_font(20), "ls")
    draw.text((16, y - 6), row.what, MUTED, small, "ls")
    draw.text((16, y + 28), f"{spent:.1f}", row.color, large, "ls")
    beside = 24 + large.getlength(f"{whole:.1f}")
    draw.text((beside, y + 28), fewer if spent == total else f"of {total:.1f} passes", MUTED, small, "ls")
    for length, color in ((total, TRACK), (spent, row.color)):
        draw.rectangle((16, y + 40, 16 + (LEFT - 48) * length / whole, y + 46), color)


def save(path: Path, frames: Sequence[Image.Image]) -> None:
    """An endless GIF, in the colours of a few frames and, above all, of the last."""
    few = [*frames[:: max(1, len(frames) // 5)], *[frames[-1]] * 3]
    palette = Image.fromarray(np.concatenate([np.asarray(each) for each in few])).quantize(COLORS)
    colors = np.array(palette.getpalette()).reshape(-1, 3)
    palette.putpalette(np.where(colors.min(1, keepdims=True) >= 248, 255, colors).flatten().tolist())  # white paper
    first, *others = [each.quantize(palette=palette, dither=Image.Dither.NONE) for each in frames]
    durations = [MILLISECONDS] * len(others) + [PAUSE]
    with replacing(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


def best_plan(unet: UNet, weights: str, guidance: float, cached: CachePlan) -> Recipe:
    """What ships for this network, and costs most nearly what the cached plan does."""
    try:
        return shipped_recipe(unet, weights, full_passes(unet, cached, guidance), guidance)
    except ValueError as error:
        raise ValueError(f"{error} at guidance {guidance:g}; `minicache calibrate` makes one, for --plan") from None


def main(args: argparse.Namespace) -> None:
    at_least(args, most=PICTURES, num=1)
    at_least(args, most=2**32 - args.num, seed=0)
    prepare_out(args.out, (".gif",), folder=False)
    unet, seeds = load(args.ckpt), range(args.seed, args.seed + args.num)
    if unet.config.adm or unet.config.in_channels not in (1, 3):
        raise ValueError(f"{args.ckpt} draws latents, or other channels than a picture's 1 or 3")
    refuse_unworded(args.ckpt, unet)
    weights, asked = fingerprint(unet), {"prompt": args.prompt, "guidance": args.guidance, "seed": args.seed}
    if args.plan:
        plan = Recipe.load(args.plan)
        plan.settings(weights)  # is it for this network?
        if args.guidance is None and unet.config.context_dim:
            asked["guidance"] = plan.guidance
    prompts = prompts_for(args.ckpt, unet, unet.vocabulary, **asked)
    if args.prompt:
        tell_of_rest(prompts, args.num)
    cached = uniform(args.steps, args.interval, args.branch)
    if args.plan:
        best = recipe_from_file(args.plan, guidance=prompts.guidance)
        if draws_noise(best):
            raise ValueError(f"--plan {args.plan} draws noise at each step, and so other pictures than DDIM")
    else:
        best = best_plan(unet, weights, prompts.guidance, cached)
    ddim, refreshes = f"DDIM, {args.steps} steps", len(best.plan.refresh)
    some = f", {refreshes} in full" if refreshes < best.plan.steps else ""
    ways = (
        ("Uncached", ddim, GREY, {"plan": uncached(args.steps)}),
        ("DeepCache", f"{ddim}, 1 in {args.interval} in full", BLUE, {"plan": cached}),
        ("Best plan", f"{best.label} solver, {best.steps} steps" + some, RED, best.settings(weights)),
    )
    for *_, settings in ways:  # refuse now what would be refused later
        denoise(unet, seeds[:1], **{**settings, "guidance": prompts.guidance, **prompts.context(seeds[:1])})
        unet.cached_shape(settings["plan"].branch, *[unet.config.image_size] * 2)
    asked = {"guidance": prompts.guidance, **prompts.context(seeds)}
    rows = [Row(*said, *emerging(unet, seeds, **{**settings, **asked})) for *said, settings in ways]
    pace = max(row.spent[-1] for row in rows) / FRAMES
    worth = f"{pace:.3g} full pass{'es' * (pace != 1)} of the network"
    said = f"Same prompts, same noise, one clock: each frame is worth {worth}."
    labels = prompts.labels(seeds) or [f"seed {seed}" for seed in seeds]
    save(args.out, [frame(rows, labels, pace * k, said) for k in range(FRAMES + 1)])
    spent = ", ".join(f"{row.name} {row.spent[-1]:.1f}" for row in rows)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB; full passes: {spent}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache film", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="emoji", help="a checkpoint's name or path (default: emoji)")
    add("--prompt", action="append", help="may stand several times, as for sample.py (default: its own examples)")
    add("--guidance", type=float, help="how strictly to follow it (default: --plan's, or what suits the network)")
    add("--num", type=int, default=4, help=f"pictures, at most {PICTURES} (default: 4)")
    add("--seed", type=int, default=0, help="of the first picture (default: 0)")
    add("--steps", type=int, default=STEPS, help=f"of DDIM, uncached and with DeepCache (default: {STEPS})")
    add("--interval", type=int, default=5, help="DeepCache: one step in so many runs in full (default: 5)")
    add("--branch", type=int, default=1, help="DeepCache: pairs that run at the other steps (default: 1)")
    add("--plan", type=Path, help="the best plan, a recipe (default: of those that ship, by DeepCache's cost)")
    add("--out", type=Path, default=Path("film.gif"), help="(default: film.gif)")
    return parser.parse_args(argv)
