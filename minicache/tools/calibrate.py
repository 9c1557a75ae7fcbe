"""Find the plan with the smallest error for a given cost, on this network.

    python -m minicache calibrate --ckpt tiny_cifar10 --budget 20 --out recipe.json
    python sample.py --ckpt tiny_cifar10 --plan recipe.json

Every plan is judged by the one thing that counts, the error of the final image (the protocol is that of `evaluate`), on
calibration seeds. The best plan then has to beat fewer steps on other seeds, or fewer steps are what is returned. The
error that is printed is on seeds held out from both. The search:
1. sweep: sampler x spacing x branch x 1:N, as many steps as the budget allows, with a linear forecast;
   uncached sampling is among the candidates, so that a plan is never worse than fewer steps;
2. ends: for the best few, how many of the first and of the last steps run in full;
3. climb: move each refresh of the best few by a step or two, as long as the error falls;
4. fit: one alpha a step, in closed form on uncached features, then by Gauss-Newton on the error itself.
With --steps, plans keep these steps, and the reference is the uncached run of as many steps and of the same noise: for
those who must have one sampler's pictures, and for ancestral sampling, whose alphas are fitted in closed form alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from minicache.checkpoints import fingerprint, load
from minicache.cost import full_passes, macs
from minicache.data import source
from minicache.placement import choose_device
from minicache.plan import CachePlan, from_refreshes, uncached, uniform
from minicache.recipe import Recipe
from minicache.tools import Parser
from minicache.tools.evaluate import HELD_OUT, SOLVERS, Benchmark, clock
from minicache.tools.judge import Judge, fit, gauss_newton
from minicache.unet import UNet

CALIBRATION = range(10_000, 10_008)  # seeds that are searched on
CHECK = range(10_008, 10_024)  # seeds on which what was found must beat fewer steps once more
BRANCHES = (1, 2, 3)  # that are searched
INTERVALS = (2, 3, 4, 6)
PAIRS = 2  # of sampler and spacing that the whole sweep is made for
ENDS = ((1, 2), (1, 1), (1, 3), (1, 4), (3, 2), (3, 4))  # first and last steps in full; the sweep is with the first
FINALISTS = 2  # of the sweep, whose ends are varied, and then of all, whose refreshes are moved
MOVES = 24  # of refreshes that are tried for each
UNITS = ("passes", "gmacs", "seconds")

Costs = Callable[[CachePlan], float]  # what a plan costs, in full passes


def error_of(recipe: Recipe) -> float:
    return recipe.error


def widest(
    budget: float, costs: Costs, interval: int, branch: int, most: int, ends: tuple[int, int] = (1, 2)
) -> CachePlan | None:
    """1:interval caching with a linear forecast and the most steps that the budget allows; None where there are none.

    ends: how many steps run in full at the beginning, where there is no past to forecast from, and at the end, where
    the network changes most from step to step.
    """
    first, last = ends
    plans = []
    for steps in range(first - 1 + interval + last, most + 1, interval):
        between = range(first - 1, steps - last, interval)
        refresh = sorted({*range(first), *between, *range(steps - last, steps)})
        plans.append(from_refreshes(steps, branch, refresh, "linear"))
        if costs(plans[-1]) > budget:
            return plans[-2] if plans[1:] else None
    return plans[-1] if plans else None


def search(judge: Judge, budget: float, costs: Costs, baseline: list[Recipe], bar: tqdm) -> Iterator[Recipe]:
    """Ever better recipes, each with its error on the judge's seeds; baseline: uncached ones, with theirs."""
    most, scored = judge.benchmark.limit, partial(judge.score, bar=bar)

    def best(recipes: list[Recipe]) -> Recipe:
        found = min(recipes, key=error_of)
        bar.set_postfix_str(f"error {found.error:.4f}")
        return found

    yield (found := best(baseline))

    probe = widest(budget, costs, 2, 1, most) or baseline[0].plan
    pairs = sorted([scored(replace(recipe, plan=probe)) for recipe in baseline], key=error_of)[:PAIRS]

    def tried(pair: Recipe, interval: int, branch: int, ends: tuple[int, int]) -> list[Recipe]:
        plan = widest(budget, costs, interval, branch, most, ends)
        return [scored(replace(pair, plan=plan))] if plan else []

    branches = BRANCHES[: len(judge.benchmark.unet.D)]
    grid = [(pair, interval, branch) for pair in pairs for branch in branches for interval in INTERVALS]
    swept = {point: recipe for point in grid for recipe in tried(*point, ENDS[0])}
    yield (found := best([found, *swept.values()]))

    if not swept:  # the budget is too small for full passes and a partial one
        return
    points = sorted(swept, key=lambda point: swept[point].error)[:FINALISTS]
    ended = [*swept.values(), *(recipe for point in points for ends in ENDS[1:] for recipe in tried(*point, ends))]
    yield (found := best([found, *ended]))

    finalists = sorted(ended, key=error_of)[:FINALISTS]
    climbed = best([climb(recipe, scored) for recipe in finalists])
    yield (found := best([found, climbed]))

    fitted = [scored(replace(climbed, plan=fit(judge, climbed))), climbed]
    yield best([found, gauss_newton(judge, best(fitted), bar)])


def search_alike(judge: Judge, budget: float, costs: Costs, whole: Recipe, bar: tqdm) -> Iterator[Recipe]:
    """Ever better recipes with the steps of `whole`, the uncached run that is the judge's reference; first, reuse."""
    steps, helds, scored = whole.plan.steps, [], partial(judge.score, bar=bar)
    for branch in BRANCHES[: len(judge.benchmark.unet.D)]:
        plans = (uniform(steps, interval, branch) for interval in range(2, steps + 1))
        helds += [replace(whole, plan=plan) for plan in plans if costs(plan) <= budget][:1]
    if not helds:
        raise ValueError(f"no plan of {steps} steps costs {budget:.3g} full passes or less")
    yield (found := min(map(scored, helds), key=error_of))
    for held in helds:
        linear = from_refreshes(steps, held.plan.branch, held.plan.refresh, "linear")
        for plan in (linear, fit(judge, held)):
            found = min(found, scored(replace(held, plan=plan)), key=error_of)
    yield found
    if whole.sampler != "ddpm":
        yield (found := climb(found, scored))
        yield gauss_newton(judge, found, bar)


def climb(recipe: Recipe, scored: Callable[[Recipe], Recipe]) -> Recipe:
    """Move refreshes, one at a time, while the error falls; MOVES tries, shared evenly among them."""
    steps, branch = recipe.plan.steps, recipe.plan.branch
    tries = [(k, by) for by in (-1, 1, -2, 2) for k in range(1, len(recipe.plan.refresh))]
    for k, by in tries[:: -(-len(tries) // MOVES)]:
        refresh = list(recipe.plan.refresh)
        refresh[k] += by
        if refresh == sorted(set(refresh)) and 0 < refresh[k] < steps:
            moved = scored(replace(recipe, plan=from_refreshes(steps, branch, refresh, "linear")))
            recipe = min(recipe, moved, key=error_of)
    return recipe


def checked(check: Judge, found: Recipe, baselines: list[Recipe]) -> Recipe:
    """The best on seeds that the search has not seen, with its error there."""
    return min(map(check.score, (found, *baselines)), key=error_of)


def report(found: Recipe, held_out: Judge, baselines: list[Recipe], costs: Costs) -> str:
    """A table of errors on held-out seeds, in Markdown."""
    lines = ["| held-out seeds | cost | mean error | median | worst |", "|---|---|---|---|---|"]
    for recipe in [*baselines, found]:
        e, plan = held_out.errors(recipe), recipe.plan
        name = f"{recipe.sampler}, {plan.steps} steps, {recipe.spacing}"
        if len(plan.refresh) < plan.steps:
            name += f", {len(plan.refresh)} in full, branch {plan.branch}"
        lines.append(f"| {name} | {costs(plan):.1f} | {e.mean():.4f} | {e.median():.4f} | {e.max():.4f} |")
    return "\n".join(lines)


def costs_of(unet: UNet, unit: str) -> tuple[Costs, float]:
    """What plans cost in full passes, by MACs or (seconds) by the clock; and the size of a full pass in this unit."""
    if unit == "seconds":
        seconds = clock(unet)
        whole = seconds(uncached(1))
        return lambda plan: seconds(plan) / whole, whole
    return partial(full_passes, unet), {"passes": 1.0, "gmacs": macs(unet) / 1e9}[unit]


def check(args: argparse.Namespace, unit: float) -> None:
    """Refuse what does not go together; unit: the size of a full pass, in --unit."""
    if args.sampler == ("ddpm" if args.steps is None else "auto"):
        raise ValueError(f"--sampler {args.sampler} {'needs' if args.steps is None else 'contradicts'} --steps")
    if args.out.endswith(".json") and len(args.budget) > 1:
        raise ValueError(f"--out {args.out}: {len(args.budget)} budgets need a folder, not a .json")
    for budget in args.budget:
        if not 2 * unit <= budget <= 1000 * unit:
            allowed = "" if args.unit == "passes" else f" ({2 * unit:.3g} to {1000 * unit:.4g} {args.unit})"
            raise ValueError(f"--budget {budget:g}: {args.ckpt} can be planned for 2 to 1000 full passes{allowed}")


def main(args: argparse.Namespace) -> None:
    unet = load(args.ckpt, device=choose_device(args.device))
    benchmark = Benchmark(unet, fingerprint(unet), args.start, args.data and source(args.data, unet.config.image_size))
    costs, unit = costs_of(unet, args.unit)
    check(args, unit)
    samplers = SOLVERS if args.sampler == "auto" else (args.sampler,)
    whole = None
    if args.steps is not None:
        spacing = None if args.start is None else "trailing"  # which begins where the noised images are
        whole = Recipe(uncached(args.steps), args.sampler, spacing, start=args.start, fingerprint=benchmark.fingerprint)
    folder = None if args.out.endswith(".json") else Path(args.out)
    (folder or Path(args.out).parent).mkdir(parents=True, exist_ok=True)

    @cache
    def on(seeds: range) -> Judge:  # its reference takes a while, and the search needs that of its own seeds alone
        return Judge.on(benchmark, seeds, whole)

    for budget in args.budget:
        out = folder / f"{Path(args.ckpt).stem}-{budget:g}.json" if folder else Path(args.out)
        judge, budget_passes, baselines = on(CALIBRATION), budget / unit, []
        with tqdm(desc=f"budget {budget:g}", unit="plan", disable=None) as bar:
            if whole:
                progress = search_alike(judge, budget_passes, costs, whole, bar)
            else:
                fewer = benchmark.fewer_steps(min(int(budget_passes), benchmark.limit), samplers)
                scored = [judge.score(recipe) for recipe in fewer]
                baselines = [min((r for r in scored if r.sampler == name), key=error_of) for name in samplers]
                progress = search(judge, budget_passes, costs, scored, bar)
            for found in progress:
                found.save(out)  # whoever interrupts the search keeps the best so far
                baselines = baselines or [found]
        found = checked(on(CHECK), found, baselines)
        found.save(out)
        print(report(found, on(HELD_OUT), baselines, costs))
        print(out, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache calibrate", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="tiny_cifar10", help="a checkpoint's name or path (default: tiny_cifar10)")
    add("--budget", type=float, nargs="+", default=[20.0], help="cost of an image, in --unit (default: 20)")
    add("--unit", choices=UNITS, default="passes", help="full passes (default), GMACs or seconds")
    add("--sampler", default="auto", choices=("auto", *SOLVERS, "ddpm"), help="default auto: the best without noise")
    add("--steps", type=int, help="be like uncached sampling with so many steps; with --sampler, and needed for ddpm")
    add("--data", help="begin from these images (shapes, cifar10, a folder or zip), noised to --start")
    add("--start", type=int, help="timesteps that are still to go from the noised images, as 700; with --data")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda or mps where there is one, else cpu")
    add("--out", default="recipe.json", help="a .json; or a folder, for one <ckpt>-<budget>.json a budget")
    return parser.parse_args(argv)
