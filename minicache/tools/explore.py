"""One page to play with DeepCache: interval, branch, the picture at every step, and what the same money buys uncached.

python -m minicache explore --out explore.html      # minutes; then open it, with no server and no network
python -m minicache explore --prompt "red apple twemoji" --prompt "cat face noto"
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import load
from minicache.cost import full_passes, macs_so_far, pass_seconds
from minicache.files import replacing
from minicache.fit import FINEST
from minicache.images import picture, to_uint8
from minicache.metrics import psnr, relative_l2
from minicache.plan import FORECASTS, CachePlan, uncached, uniform
from minicache.sampling import denoise, sample
from minicache.tools import Parser, prepare_out, refuse_unworded, tell_of_rest
from minicache.tools.diagram import rows
from minicache.unet import UNet
from minicache.words import Prompts, prompts_for

INTERVALS = (1, 2, 3, 5, 10)
BRANCHES = (1, 2, 3)
# Solvers without a cache, as settings of `denoise`: at each cost, the one nearest to the reference is the rival.
RIVALS: dict[str, dict[str, Any]] = {
    "DDIM": {"sampler": "ddim"},
    "DPM-Solver++(2M)": {"sampler": "dpm++2m"},
    "UniPC": {"sampler": "unipc"},
    "PLMS": {"sampler": "plms2"},
}
PICTURES = 6  # at most: what two rows on a phone have room for
TALLEST = 16383  # pixels of a WebP


@dataclass(frozen=True)
class Stage:
    """A network, what it is to draw (a picture a seed), and the pictures that it should come near to."""

    unet: UNet
    prompts: Prompts
    seeds: range
    reference: Tensor  # [B, C, H, W]
    seconds: dict[int | None, float]  # of a full pass (None), and of a partial one with so many pairs; for one image

    def run(self, plan: CachePlan, **settings: Any) -> tuple[Tensor, dict[str, Any]]:
        """The images [B, C, H, W], and what the page shows of each step: prediction, error, cost so far of an image."""
        guidance, context, frames = self.prompts.guidance, self.prompts.context(self.seeds), []
        for step in denoise(self.unet, self.seeds, plan=plan, guidance=guidance, **context, **settings):
            frames.append(step.x0)
        frames[-1] = step.x
        passes = [None if i in plan.refresh else plan.branch for i in range(plan.steps)]
        return step.x, {
            "full": [branch is None for branch in passes],
            "sheet": sheet(frames),
            "errors": [relative_l2(frame, self.reference).mean().item() for frame in frames],
            "gmacs": [cost / 1e9 for cost in macs_so_far(self.unet, plan, guidance)],
            "ms": sum(1e3 * self.seconds[branch] for branch in passes) * (1 if guidance == 1 else 2),
        }

    def rival(self, steps: int) -> dict[str, Any]:
        """The best of the uncached solvers with so many steps."""
        found = [{"name": name, **self.run(uncached(steps), **settings)[1]} for name, settings in RIVALS.items()]
        return min(found, key=lambda run: run["errors"][-1])


def sheet(frames: Sequence[Tensor]) -> str:
    """Pictures [B, C, H, W] of each step -> one: a row a step, a column a picture, 256 colours; as a data URI."""
    array = rearrange([to_uint8(frame) for frame in frames], "s b h w c -> (s h) (b w) c")
    few, file = picture(array).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE), io.BytesIO()
    few.convert("RGB").save(file, "webp", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def prepared(ckpt: str, asked: list[str] | None, num: int, steps: int) -> Stage:
    """The network, its prompts (those asked for, or its own examples), the times of its passes, and the reference."""
    unet = load(ckpt)
    T, side = unet.diffusion.num_timesteps, unet.config.image_size
    most = min(T, TALLEST // side)
    if not 10 <= steps <= most:
        raise ValueError(f"--steps {steps} is not in 10..{most}, for pictures of {side} pixels and {T} timesteps")
    if T < FINEST["steps"]:
        raise ValueError(f"the reference takes {FINEST['steps']} timesteps, and {ckpt} has {T}")
    if unet.config.in_channels not in (1, 3):
        raise ValueError(f"{ckpt} draws {unet.config.in_channels} channels, which are no picture")
    refuse_unworded(ckpt, unet)
    prompts = prompts_for(ckpt, unet, unet.vocabulary, prompt=asked)
    if asked:
        tell_of_rest(prompts, num)
    spread = 1 if asked else max(1, len(prompts.texts) // num)  # over all of its own examples
    seeds, batch = range(0, num * spread, spread), num if prompts.guidance == 1 else 2 * num
    seconds = {branch: pass_seconds(unet, branch, batch) for branch in (None, *branches_of(unet))}
    settings = {**FINEST, "guidance": prompts.guidance, **prompts.context(seeds)}
    reference = sample(unet, seeds, progress=True, **settings)
    return Stage(unet, prompts, seeds, reference, seconds)


def branches_of(unet: UNet) -> list[int]:
    return [branch for branch in BRANCHES if branch <= len(unet.D)]


def explore(stage: Stage, steps: int) -> dict[str, Any]:
    """What the page shows: `plans` by interval, branch and forecast, uncached first; `rivals` by their steps."""
    unet, branches = stage.unet, branches_of(stage.unet)
    intervals = [N for N in INTERVALS if 2 * N <= steps]  # two full steps at least
    keys = [(N, branch, forecast) for N in intervals[1:] for branch in branches for forecast in FORECASTS]
    plans = {(1, 1, "hold"): uncached(steps), **{key: uniform(steps, *key) for key in keys}}
    original, shown = None, {}
    for key, plan in tqdm(plans.items(), desc="plans", unit="plan", disable=None):
        images, run = stage.run(plan)
        original = images if original is None else original
        near = psnr(images.flatten()[None], original.flatten()[None]).item()  # of all pictures together
        rival = {"rival": int(full_passes(unet, plan)), "psnr": near if near < math.inf else None}
        shown[",".join(map(str, key))] = run | rival
    budgets = sorted({run["rival"] for run in shown.values()})
    return {
        "steps": steps,
        "timesteps": unet.diffusion.timesteps(steps),
        "labels": stage.prompts.labels(stage.seeds) or [f"seed {seed}" for seed in stage.seeds],
        "side": unet.config.image_size,
        "sides": rows(unet)[1],  # of what each D_i emits
        "intervals": intervals,
        "branches": branches,
        "plans": shown,
        "rivals": {k: stage.rival(k) for k in tqdm(budgets, desc="rivals", unit="rival", disable=None)},
    }


def conditions(ckpt: str, stage: Stage, steps: int) -> str:
    """What the figures are of, for the foot of the page."""
    guidance, seeds = stage.prompts.guidance, ", ".join(map(str, stage.seeds))
    guided = "" if guidance == 1 else f", guidance {guidance:g}"
    return (
        f"Checkpoint {Path(ckpt).name}, seeds {seeds}{guided}, float32. With the cache: DDIM, {steps} steps. "
        f"Error: relative L2 of the pictures, mean of {len(stage.seeds)}; the reference is {FINEST['steps']} steps of "
        f"DPM-Solver++(2M). MACs: convolutions and linear layers. Time: passes of each kind, times the median of "
        f"seven; CPU threads: {torch.get_num_threads()}."
    )


def main(args: argparse.Namespace) -> None:
    num, out = len(args.prompt or ()) or PICTURES if args.num is None else args.num, Path(args.out)
    if not 1 <= num <= PICTURES:
        raise ValueError(f"{num} pictures are not in 1..{PICTURES}, what two rows on a phone have room for")
    prepare_out(out, (".html",), folder=False)
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    stage = prepared(args.ckpt, args.prompt, num, args.steps)
    data = {"about": conditions(args.ckpt, stage, args.steps), **explore(stage, args.steps)}
    script = json.dumps(data).replace("<", "\\u003c")  # a prompt cannot end the script, or begin another
    with replacing(out) as temporary:
        temporary.write_text(template.replace("/*DATA*/", script), encoding="utf-8")
    print(f"{out}: {len(data['plans'])} plans, {len(data['rivals'])} rivals, {out.stat().st_size / 1e6:.1f} MB")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache explore", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="emoji", help="a checkpoint's name or path (default: emoji)")
    add("--prompt", action="append", help="what to draw; repeat it for more (default: its own examples)")
    add("--num", type=int, help=f"pictures, at most {PICTURES} (default: one a prompt, else {PICTURES})")
    add("--steps", type=int, default=30, help="of DDIM (default: 30)")
    add("--out", default="explore.html", help="(default: explore.html)")
    return parser.parse_args(argv)
