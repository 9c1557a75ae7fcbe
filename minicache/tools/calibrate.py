"""Fit a sampler to a network: the nearest images to uncached sampling's limit, for a given cost.

    python -m minicache calibrate --ckpt tiny_cifar10 --budget 10 --out recipe.json
    python -m minicache calibrate --ckpt emoji --guidance 3 --budget 10 20 30 --prompts FILE    # into recipes
    python sample.py --plan recipe.json

1. Fit (minicache/fit.py) the weights and the timesteps of uncached steps, on 8 seeds, from the best of a few spacings.
2. The same with a cache: one full step less, and for its price partial steps between the others, with alphas.
3. Check both, and the samplers that need no fit, on other seeds: the best there is what is saved. The table that is
   printed is on seeds held out from all of this.
A search that is interrupted leaves the best so far.
With --steps, the sampler and its steps are fixed, and only a cache is fitted: the reference is then the uncached run of
the same steps and the same noise. That is for those who must have one sampler's pictures, and for ancestral sampling.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import fingerprint, load
from minicache.cost import full_passes
from minicache.fit import FINEST, fitted, forecast, nested, search
from minicache.fit import Path as FinePath
from minicache.metrics import relative_l2
from minicache.placement import choose_placement, place
from minicache.plan import CachePlan, from_refreshes, uncached, uniform
from minicache.recipe import Recipe
from minicache.samplers import SAMPLERS, passes
from minicache.sampling import sample
from minicache.tools import Parser, at_least, markdown, prepare_out, refuse_older, refuse_unworded
from minicache.unet import UNet
from minicache.words import Prompts, prompts_for

CALIBRATION = range(10_000, 10_008)  # seeds that are fitted on
CHECK = range(10_008, 10_024)  # seeds that choose
HELD_OUT = range(32)  # seeds that nothing is chosen by, as sample.py's own
SHORTLIST = CHECK[:4]  # seeds that say which samplers, and with which spacings, are checked
BATCH = 16
CACHED_FROM = 15  # steps: with fewer, a full step is worth more than the partial ones for its price
RHOS = (3, 4, 5, 7)  # spacings that a fit begins with
RIVALS = tuple(name for name, entry in SAMPLERS.items() if entry.noise != "variance" and not entry.twice)
SPACINGS = (None, "rho3", "rho5", "rho7")  # of a rival; None: its own
LISTED = 3  # rivals that are checked


class Task(NamedTuple):
    """A network and what it is asked for."""

    unet: UNet
    fingerprint: str
    prompts: Prompts

    def where(self, seeds: range) -> dict[str, Any]:
        """What `denoise` is told of some seeds."""
        return {"seeds": seeds, **self.prompts.context(seeds), "guidance": self.prompts.guidance}

    def recipe(self, plan: CachePlan, sampler: Any, **settings: Any) -> Recipe:
        return Recipe(plan, sampler, guidance=self.prompts.guidance, fingerprint=self.fingerprint, **settings)

    def images(self, recipe: Recipe, seeds: range) -> Tensor:
        settings = {**recipe.settings(self.fingerprint), **self.where(seeds)}
        return sample(self.unet, batch_size=BATCH, progress=True, **settings)

    def cost(self, plan: CachePlan) -> float:
        return full_passes(self.unet, plan, self.prompts.guidance)


def finest(task: Task, part: int = 1) -> Recipe:
    """The reference of all samplers without noise, or the like with a part of its steps. ValueError for a network of
    fewer timesteps."""
    T = task.unet.diffusion.num_timesteps
    if T < FINEST["steps"]:
        raise ValueError(f"the reference takes {FINEST['steps']} timesteps, and the network has {T}")
    return task.recipe(uncached(FINEST["steps"] // part), FINEST["sampler"], spacing=FINEST["spacing"])


def off_the_shelf(task: Task, steps: int) -> list[Recipe]:
    """Uncached sampling by the deterministic samplers, each with a few spacings."""
    found = (task.recipe(uncached(steps), name, spacing=spacing) for name in RIVALS for spacing in SPACINGS)
    return [*dict.fromkeys(found)]


def nearest(task: Task, found: Iterable[Recipe], target: Tensor) -> list[Recipe]:
    """Of each sampler its best spacing, and of these the LISTED nearest to the target, which is the SHORTLIST's."""
    ranked = sorted(found, key=lambda each: (relative_l2(task.images(each, SHORTLIST), target).mean(), each.label))
    best: dict[str, Recipe] = {}
    for each in ranked:
        best.setdefault(each.sampler, each)
    return [*best.values()][:LISTED]


def fits(task: Task, path: FinePath, budget: float) -> Iterator[Recipe]:
    """Ever better recipes, uncached, then cached ones; each with its error on the seeds of the path."""
    unet, step = task.unet, task.cost(uncached(1))
    plan = uncached(int(budget / step + 1e-9))
    starts = {rho: fitted(unet, path, unet.diffusion.timesteps(plan.steps, f"rho{rho}"), plan).error for rho in RHOS}
    rho = min(starts, key=starts.get)
    plans = [plan]
    if plan.steps >= CACHED_FROM:
        partial_step, rest = task.cost(CachePlan(2, 1, (0,))) - step, budget - step * (plan.steps - 1)
        plans.append(nested(plan.steps - 1, min(int(rest / partial_step + 1e-9), plan.steps - 3)))
    for plan in plans:
        for fit in search(unet, path, plan, rho):
            yield task.recipe(fit.plan, fit.solver, error=fit.error)


def fixed(task: Task, whole: Recipe, budget: float) -> Iterator[Recipe]:
    """Caches for the steps of `whole`, within the budget, at each branch: reuse, linear forecasts and fitted ones."""
    steps = whole.plan.steps
    for branch in range(1, min(3, len(task.unet.D)) + 1):
        plans = [uniform(steps, N, branch) for N in range(2, steps + 1)]
        for plan in [plan for plan in plans if task.cost(plan) <= budget][:1]:
            linear = from_refreshes(steps, branch, plan.refresh, "linear")
            settings = {**whole.settings(task.fingerprint), **task.where(CALIBRATION), "plan": plan}
            yield from (replace(whole, plan=each) for each in (plan, linear, forecast(task.unet, **settings)))


def refuse_budgets(task: Task, budgets: list[float], whole: Recipe | None) -> None:
    """ValueError for a budget that pays for too few steps, or for all, where a cache has nothing to save."""
    if whole is None:
        least, most = task.cost(uncached(2)), task.cost(uncached(FINEST["steps"]))
        if wrong := [budget for budget in budgets if not least <= budget <= most]:
            raise ValueError(f"--budget {wrong[0]:g}: a sampler can be fitted for {least:g} to {most:g} full passes")
    else:
        steps = whole.plan.steps
        least, most = task.cost(uniform(steps, steps, 1)), task.cost(whole.plan)
        if wrong := [budget for budget in budgets if not least <= budget < most]:
            said = f"at least {least + 5e-4:.3f} full passes with a cache, and {most:g} without"
            raise ValueError(f"--budget {wrong[0]:g}: the {steps} steps cost {said}")


def best_for(task: Task, args: argparse.Namespace, budget: float, out: Path, known: Any) -> tuple[Recipe, list[Recipe]]:
    """The recipe that is best on CHECK, and the others that it was compared with; the best so far is kept in `out`."""
    found: dict[bool, Recipe] = {}  # the best fit with a cache, and without
    if args.steps is None:
        shelf = off_the_shelf(task, int(budget / task.cost(uncached(1)) + 1e-9))
        rivals = nearest(task, shelf, known("short"))
        with tqdm(fits(task, known("path"), budget), desc=f"budget {budget:g}", unit="fit", disable=None) as bar:
            for recipe in bar:
                bar.set_postfix_str(f"error {recipe.error:.4f}")
                if not found:  # nothing is saved yet, and another process may have been quicker
                    refuse_older(out)
                if all(recipe.error <= other.error for other in found.values()):
                    recipe.save(out)  # whoever interrupts the search keeps the best so far
                found[len(recipe.plan.refresh) < recipe.plan.steps] = recipe
        candidates = [*found.values(), *rivals]
    else:
        candidates = list(fixed(task, known("whole"), budget))
    target = known("check")
    scored = [replace(r, error=relative_l2(task.images(r, CHECK), target).mean().item()) for r in candidates]
    best = min(scored, key=lambda recipe: recipe.error)
    if not found:
        refuse_older(out)
    best.save(out)
    shelf = sorted((r for r in scored if isinstance(r.sampler, str)), key=lambda r: r.error)
    return best, [*(r for r in scored if not isinstance(r.sampler, str)), *shelf[: 3 if args.steps else 1]]


def report(task: Task, compared: list[Recipe], target: Tensor) -> str:
    """A table of errors on held-out seeds, in Markdown. The gain is that of the same seeds, which tells small ones."""

    def spread(values: Tensor) -> str:
        return f"{values.mean():.5f} +- {values.std() / len(values) ** 0.5:.5f}"

    rows, errors = [], [relative_l2(task.images(recipe, HELD_OUT), target) for recipe in compared]
    for recipe, e in zip(compared, errors):
        plan = recipe.plan
        partial_steps = plan.steps - len(plan.refresh)
        steps = f"{len(plan.refresh)} full, {partial_steps} partial" + f" at branch {plan.branch}" * bool(partial_steps)
        rows.append({"sampler": recipe.label, "steps": steps,
                     "cost": task.cost(plan), "error": spread(e),
                     "median": median(e.tolist()), "worst": e.max().item(),
                     "gain over the first": spread(errors[0] - e) if rows else ""})  # fmt: skip
    return markdown(rows)


def main(args: argparse.Namespace) -> None:
    if args.out.endswith(".json") and len(args.budget) > 1:
        raise ValueError(f"--out {args.out}: {len(args.budget)} budgets need a folder, not a .json")
    if (args.sampler is None) != (args.steps is None):
        raise ValueError("--sampler and --steps go together: they fix what is cached")
    at_least(args, steps=2)
    placement, unet = choose_placement(args.device, "float32"), load(args.ckpt)
    weights = fingerprint(unet)
    refuse_unworded(args.ckpt, unet)
    asked = {"prompts": args.prompts, "guidance": args.guidance, "num": CHECK.stop}  # more than any seed
    prompts = prompts_for(args.ckpt, unet, unet.vocabulary, **asked)
    task = Task(place(unet, placement), weights, prompts)
    whole = None if args.steps is None else task.recipe(uncached(passes(args.steps, args.sampler)), args.sampler)
    refuse_budgets(task, args.budget, whole)
    limit = whole or finest(task)
    limit.timesteps(unet.diffusion)  # refuses now what it would refuse later
    out, stem = Path(args.out), Path(args.ckpt).stem + (f"-g{prompts.guidance:g}" if prompts.texts else "")
    outs = [out if out.suffix else out / f"{stem}-{budget:g}.json" for budget in args.budget]
    for each in (out, *outs):
        prepare_out(each, (".json",))
        refuse_older(each)
    if len({*outs}) < len(outs):
        raise ValueError(f"two of --budget {args.budget} would have one name in {out}")

    @cache
    def known(name: str) -> Any:  # each takes a while, and is needed for all budgets
        if name == "path":
            return FinePath(task.unet, **task.where(CALIBRATION))
        if name == "whole":
            return whole
        return task.images(limit, {"short": SHORTLIST, "check": CHECK, "held out": HELD_OUT}[name])

    for budget, out in zip(args.budget, outs):
        best, compared = best_for(task, args, budget, out, known)
        print(report(task, compared, known("held out")))
        print(f"{out}: {best.sampler}, {best.plan.steps} steps, {len(best.plan.refresh)} in full", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache calibrate", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="emoji", help="a checkpoint's name or path (default: emoji)")
    add("--budget", type=float, nargs="+", default=[20.0], help="cost of an image in full passes (default: 20)")
    add("--guidance", type=float, help="of the prompts; two passes a step unless 1 (default: what suits the network)")
    add("--prompts", metavar="FILE", help="a prompt a line; each seed takes one (default: the network's examples)")
    add("--steps", type=int, help="be like uncached sampling with so many steps of --sampler")
    add("--sampler", choices=SAMPLERS, help="with --steps")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda or mps where there is one, else cpu")
    add("--out", default="recipes", help="a .json; or a folder (default: recipes), for a <ckpt>-<budget>.json a budget")
    return parser.parse_args(argv)
