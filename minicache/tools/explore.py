"""One page with sliders for interval and branch: what DeepCache does to the same pictures, and what it saves.

python -m minicache explore --out explore.html      # a few minutes; then open it, with no server and no network
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minicache.checkpoints import load
from minicache.cost import plan_macs
from minicache.files import replacing
from minicache.images import grid, picture, to_uint8
from minicache.metrics import psnr
from minicache.plan import FORECASTS, uncached, uniform
from minicache.sampling import sample
from minicache.tools import Parser

INTERVALS = (1, 2, 3, 5, 7, 10, 15, 20)
BRANCHES = (1, 2, 3)


def explore(ckpt: str, steps: int, num: int) -> dict[str, Any]:
    """What the page shows: for each plan its pictures, cost, time and likeness; the seeds are 0 to num - 1."""
    unet = load(ckpt)
    keys = [(N, branch, forecast) for N in INTERVALS[1:] for branch in BRANCHES for forecast in FORECASTS]
    plans = {(1, 1, "hold"): uncached(steps), **{key: uniform(steps, *key) for key in keys}}
    reference, found = None, {}
    sample(unet, range(num), steps=2)  # the first passes prepare kernels
    for key, plan in tqdm(plans.items(), desc="plans", unit="plan", disable=None):
        began = time.perf_counter()
        images = sample(unet, range(num), plan=plan)
        seconds = time.perf_counter() - began
        reference = images if reference is None else reference
        file = io.BytesIO()
        picture(grid(to_uint8(images), pad=1, columns=num)).save(file, "png", optimize=True)
        mse = 4 / 10 ** (psnr(images, reference).double() / 10)
        found[",".join(map(str, key))] = {
            "png": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
            "gmacs": plan_macs(unet, plan) / 1e9,
            "ms": 1e3 * seconds / num,
            "psnr": None if plan == plans[1, 1, "hold"] else (10 * torch.log10(4 / mse.mean())).item(),
        }
    return {
        "about": f"checkpoint {ckpt}, DDIM with {steps} steps, seeds 0 to {num - 1}, float32, "
        f"{torch.get_num_threads()} CPU threads, times of one run; PSNR is of all pictures together",
        "intervals": INTERVALS,
        "branches": BRANCHES,
        "pairs": len(unet.D),
        "uncached": "1,1,hold",
        "plans": found,
    }


def main(args: argparse.Namespace) -> None:
    if not 1 <= args.num <= 16:
        raise ValueError(f"--num {args.num} is not in 1..16, what a page has room for")
    out = Path(args.out)
    if out.suffix != ".html":
        raise ValueError(f"--out {out} must end in .html")
    page = Path(__file__).with_suffix(".html").read_text()
    data = explore(args.ckpt, args.steps, args.num)
    with replacing(out) as temporary:
        temporary.write_text(page.replace("/*DATA*/", json.dumps(data)))
    print(f"{out}: {len(data['plans'])} plans, {out.stat().st_size / 1e6:.1f} MB")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache explore", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="tiny", help="a checkpoint's name or path (default: tiny)")
    add("--steps", type=int, default=100, help="of DDIM (default: 100)")
    add("--num", type=int, default=8, help="pictures, at most 16 (default: 8)")
    add("--out", default="explore.html", help="(default: explore.html)")
    return parser.parse_args(argv)
