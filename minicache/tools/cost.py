"""What a plan costs, for one image: every branch of the network, then the plan.

python -m minicache cost --ckpt ddpm_cifar10 --interval 5 --branch 3
"""

from __future__ import annotations

import argparse

from minicache.checkpoints import PRESETS, shape_of
from minicache.cost import cache_bytes, pass_cost, plan_macs, weight_bytes
from minicache.plan import FORECASTS, CachePlan, uniform
from minicache.sampling import STEPS
from minicache.tools import Parser
from minicache.unet import UNet


def table(unet: UNet, plan: CachePlan) -> str:
    """What a person reads: every branch of this network, then the plan."""
    cached = cache_bytes(unet, plan)  # refuses a branch that is not there before the slow counting
    whole, steps, refreshes = pass_cost(unet), plan.steps, len(plan.refresh)
    lines = [
        f"weights {weight_bytes(unet) / 1e6:.1f} MB; full pass {whole.macs / 1e9:.3f} GMACs (+ "
        f"{whole.attention_macs / 1e9:.3f} in attention's products), activations' peak {whole.peak_bytes / 1e6:.1f} MB",
        "",
        "branch  partial GMACs  + attention  of full  a step, by this plan  cache MB  peak MB",
    ]
    for branch in range(1, len(unet.D) + 1):
        part = pass_cost(unet, branch)
        average = (refreshes * whole.macs + (steps - refreshes) * part.macs) / steps
        size = cache_bytes(unet, CachePlan(2, branch, (0,))) / 1e6
        lines.append(
            f"{branch:6}  {part.macs / 1e9:13.3f}  {part.attention_macs / 1e9:11.3f}  {part.macs / whole.macs:7.1%}"
            f"  {average / 1e9:15.3f} GMACs  {size:8.3f}  {part.peak_bytes / 1e6:7.1f}" + " <" * (branch == plan.branch)
        )
    total = plan_macs(unet, plan)
    lines += [
        "",
        f"plan: {steps} steps, {refreshes} in full, the others at branch {plan.branch}: {total / 1e9:.1f} GMACs an "
        f"image, {total / steps / 1e9:.3f} a step, {steps * whole.macs / total:.2f}x fewer than uncached",
        f"      cache {cached / 1e6:.3f} MB an image",
        *["      guidance doubles them, as it takes two passes a step"] * bool(unet.config.context_dim),
    ]
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache cost", doc=__doc__)
    add = parser.add_argument
    which = f"a checkpoint (a published one need not be on disk), or one of {', '.join(PRESETS)} (default: emoji)"
    add("--ckpt", default="emoji", help=which)
    add("--steps", type=int, default=STEPS, help=f"(default: {STEPS})")
    add("--interval", type=int, default=5, help="N of 1:N (default: 5)")
    add("--branch", type=int, default=1, help="(default: 1)")
    add("--forecast", choices=FORECASTS, default="hold", help="(default: hold)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    print(table(shape_of(args.ckpt), uniform(args.steps, args.interval, args.branch, args.forecast)))
