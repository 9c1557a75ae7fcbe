"""Find the plan with the smallest error for a given cost, on this network.

    python -m minicache calibrate --ckpt tiny --budget 20 --out recipe.json
    python sample.py --ckpt tiny --plan recipe.json

Every plan is judged by the one thing that counts, the error of the final image (see minicache.protocol), on calibration
seeds; then the best one has to beat fewer steps on other seeds, or fewer steps are what is returned; what is printed
is the error on seeds held out from both. The search:
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

import torch
from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import load
from minicache.cost import Costs
from minicache.data import source
from minicache.placement import choose_device
from minicache.plan import CachePlan, from_refreshes, full, uniform
from minicache.recipe import Recipe
from minicache.samplers import denoise
from minicache.tools import Parser
from minicache.tools.protocol import CALIBRATION, CHECK, HELD_OUT, SOLVERS, Trial, trial, uncached

INTERVALS = (2, 3, 4, 6)
PAIRS = 2  # of sampler and spacing that the whole sweep is made for
ENDS = ((1, 2), (1, 1), (1, 3), (1, 4), (3, 2), (3, 4))  # first and last steps in full; the sweep is with the first
FINALISTS = 2  # of the sweep, whose ends are varied, and then of all, whose refreshes are moved
MOVES = 24  # of refreshes that are tried for each
DELTA = 0.05  # of alpha, in Gauss-Newton's differences


def judge(trial: Trial, recipe: Recipe, bar: tqdm | None = None) -> Recipe:
    if bar is not None:
        bar.update()
    return replace(recipe, error=trial.errors(recipe).mean().item())


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


def search(trial: Trial, budget: float, costs: Costs, baseline: list[Recipe], bar: tqdm) -> Iterator[Recipe]:
    """Ever better recipes, each with its error on the trial's seeds; baseline: uncached ones, with theirs."""
    most, judged = baseline[0].start or trial.unet.diffusion.num_timesteps, partial(judge, trial, bar=bar)

    def best(recipes: list[Recipe]) -> Recipe:
        found = min(recipes, key=error_of)
        bar.set_postfix_str(f"error {found.error:.4f}")
        return found

    yield (found := best(baseline))

    probe = widest(budget, costs, 2, 1, most) or baseline[0].plan
    pairs = sorted([judged(replace(recipe, plan=probe)) for recipe in baseline], key=error_of)[:PAIRS]

    def tried(pair: Recipe, interval: int, branch: int, ends: tuple[int, int]) -> list[Recipe]:
        plan = widest(budget, costs, interval, branch, most, ends)
        return [judged(replace(pair, plan=plan))] if plan else []

    grid = [(pair, interval, branch) for pair in pairs for branch in costs.partial for interval in INTERVALS]
    swept = {point: recipe for point in grid for recipe in tried(*point, ENDS[0])}
    yield (found := best([found, *swept.values()]))

    if not swept:  # the budget is too small for full passes and a partial one
        return
    points = sorted(swept, key=lambda point: swept[point].error)[:FINALISTS]
    ended = [*swept.values(), *(recipe for point in points for ends in ENDS[1:] for recipe in tried(*point, ends))]
    yield (found := best([found, *ended]))

    finalists = sorted(ended, key=error_of)[:FINALISTS]
    climbed = best([climb(recipe, judged) for recipe in finalists])
    yield (found := best([found, climbed]))

    fitted = [judged(replace(climbed, plan=fit(trial, climbed))), climbed]
    yield best([found, gauss_newton(trial, best(fitted), bar)])


def search_alike(trial: Trial, budget: float, costs: Costs, whole: Recipe, bar: tqdm) -> Iterator[Recipe]:
    """The like for plans with the steps of `whole`, the uncached run that is the reference; reuse comes first."""
    steps, helds, judged = whole.plan.steps, [], partial(judge, trial, bar=bar)
    for branch in costs.partial:
        plans = (uniform(steps, interval, branch) for interval in range(2, steps + 1))
        helds += [replace(whole, plan=plan) for plan in plans if costs(plan) <= budget][:1]
    if not helds:
        raise ValueError(f"no plan of {steps} steps costs {budget:.3g} full passes or less")
    yield (found := min(map(judged, helds), key=error_of))
    for held in helds:
        linear = from_refreshes(steps, held.plan.branch, held.plan.refresh, "linear")
        for plan in (linear, fit(trial, held)):
            found = min(found, judged(replace(held, plan=plan)), key=error_of)
    yield found
    if whole.sampler != "ddpm":
        yield (found := climb(found, judged))
        yield gauss_newton(trial, found, bar)


def climb(recipe: Recipe, judged: Callable[[Recipe], Recipe]) -> Recipe:
    """Move refreshes, one at a time, while the error falls; MOVES tries, shared evenly among them."""
    steps, branch = recipe.plan.steps, recipe.plan.branch
    tries = [(k, by) for by in (-1, 1, -2, 2) for k in range(1, len(recipe.plan.refresh))]
    for k, by in tries[:: -(-len(tries) // MOVES)]:
        refresh = list(recipe.plan.refresh)
        refresh[k] += by
        if refresh == sorted(set(refresh)) and 0 < refresh[k] < steps:
            moved = judged(replace(recipe, plan=from_refreshes(steps, branch, refresh, "linear")))
            recipe = min(recipe, moved, key=error_of)
    return recipe


def fit(trial: Trial, recipe: Recipe) -> CachePlan:
    """The plan with the alphas that forecast best, in least squares, the features Y of the uncached run:

    alpha_t = sum <Y_t - Y_j, Y_j - Y_i> / sum |Y_j - Y_i|^2, i < j the last two refreshes before t.
    """
    plan = recipe.plan
    settings = replace(recipe, plan=full(plan.steps, plan.branch)).settings(trial.unet.fingerprint)
    alpha, older, newer = [0.0] * plan.steps, None, None
    for step in denoise(trial.unet, trial.seeds, x_T=trial.x_T, **settings):
        if step.i in plan.refresh:
            older, newer = newer, step.cached_U
        elif older is not None:
            slope = newer - older
            length = slope.square().sum().item()  # 0 where quad has repeated a timestep: then no alpha has an effect
            alpha[step.i] = ((step.cached_U - newer) * slope).sum().item() / length if length else 0.0
    return replace(plan, alpha=tuple(alpha))


def gauss_newton(trial: Trial, recipe: Recipe, bar: tqdm) -> Recipe:
    """One step of Gauss-Newton on all alphas together, for the mean of the images' errors; damped until it helps.

    The images are almost linear in the alphas near the optimum, so their derivatives, by differences, and one linear
    system do what a search along each alpha would take hundreds of runs for.
    """
    norms = trial.reference.flatten(1).norm(dim=1, keepdim=True)

    def residuals(alpha: tuple[float, ...]) -> Tensor:  # [seeds, CHW]
        bar.update()
        images = trial.images(replace(recipe, plan=replace(recipe.plan, alpha=alpha)))
        return ((images - trial.reference).flatten(1) / norms).double().cpu()

    alpha, plan = recipe.plan.alpha, recipe.plan
    second = plan.refresh[1] if len(plan.refresh) > 1 else plan.steps
    free = [i for i in range(second, plan.steps) if i not in plan.refresh]
    if not free:
        return recipe
    r = residuals(alpha)
    weights = r.norm(dim=1, keepdim=True).rsqrt()  # from the squares' sum to the norms' sum
    J = [(residuals((*alpha[:i], alpha[i] + DELTA, *alpha[i + 1 :])) - r) / DELTA * weights for i in free]
    J = torch.stack(J).flatten(1)  # [free, seeds * CHW]
    moving = J.any(dim=1)  # an alpha without effect stays: its step has no length, or its two refreshes are the same
    free, J = [i for i, moves in zip(free, moving) if moves], J[moving]
    if not free:
        return recipe
    A, b = J @ J.T, J @ (r * weights).flatten()
    for damping in (1e-3, 1e-2, 1e-1, 1.0):
        change = torch.linalg.solve(A + damping * A.diagonal().diag(), b)
        moved = list(alpha)
        for i, by in zip(free, change.tolist()):
            moved[i] -= by
        error = residuals(tuple(moved)).norm(dim=1).mean().item()
        if error < recipe.error:
            recipe = replace(recipe, plan=replace(plan, alpha=tuple(moved)), error=error)
    return recipe


def checked(check: Trial, found: Recipe, baselines: list[Recipe]) -> Recipe:
    """The best on seeds that the search has not seen, with its error there."""
    return min((judge(check, recipe) for recipe in (found, *baselines)), key=error_of)


def report(found: Recipe, held_out: Trial, baselines: list[Recipe], costs: Costs) -> str:
    """A table of errors on held-out seeds, in Markdown."""
    lines = ["| held-out seeds | cost | mean error | median | worst |", "|---|---|---|---|---|"]
    for recipe in [*baselines, found]:
        e, plan = held_out.errors(recipe), recipe.plan
        name = f"{recipe.sampler}, {plan.steps} steps, {recipe.spacing}"
        if len(plan.refresh) < plan.steps:
            name += f", {len(plan.refresh)} in full, branch {plan.branch}"
        lines.append(f"| {name} | {costs(plan):.1f} | {e.mean():.4f} | {e.median():.4f} | {e.max():.4f} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    unet = load(args.ckpt, device=choose_device(args.device))
    start, draw = args.start, args.data and source(args.data, unet.config.image_size)
    costs = Costs(unet, args.unit == "seconds")
    samplers = SOLVERS if args.sampler == "auto" else (args.sampler,)
    if args.sampler == ("ddpm" if args.steps is None else "auto"):
        raise ValueError(f"--sampler {args.sampler} {'needs' if args.steps is None else 'contradicts'} --steps")
    whole = None
    if args.steps is not None:
        whole = Recipe(full(args.steps), args.sampler, start=start, fingerprint=unet.fingerprint)
    folder = not args.out.endswith(".json")
    if not folder and len(args.budget) > 1:
        raise ValueError(f"--out {args.out}: {len(args.budget)} budgets need a folder, not a .json")
    unit = {"passes": 1.0, "gmacs": costs.unit / 1e9, "seconds": costs.unit}[args.unit]  # of one full pass
    for budget in args.budget:
        if not 2 * unit <= budget <= 1000 * unit:
            allowed = "" if args.unit == "passes" else f" ({2 * unit:.3g} to {1000 * unit:.4g} {args.unit})"
            raise ValueError(f"--budget {budget:g}: {args.ckpt} can be planned for 2 to 1000 full passes{allowed}")

    (Path(args.out) if folder else Path(args.out).parent).mkdir(parents=True, exist_ok=True)

    @cache
    def on(seeds: range) -> Trial:  # its reference takes a while, and the search needs that of its own seeds alone
        return trial(unet, seeds, whole, draw=draw, start=start, progress=True)

    for budget in args.budget:
        passes, search_seeds = budget / unit, on(CALIBRATION)
        out = Path(args.out) / f"{Path(args.ckpt).stem}-{budget:g}.json" if folder else Path(args.out)
        with tqdm(desc=f"budget {budget:g}", unit="plan", disable=None) as bar:
            if whole:
                baselines, progress = [], search_alike(search_seeds, passes, costs, whole, bar)
            else:
                fewer = uncached(unet, min(int(passes), start or unet.diffusion.num_timesteps), samplers, start)
                judged = [judge(search_seeds, recipe) for recipe in fewer]
                baselines = [min((r for r in judged if r.sampler == name), key=error_of) for name in samplers]
                progress = search(search_seeds, passes, costs, judged, bar)
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
    add("--ckpt", default="tiny", help="a checkpoint's name or path (default: tiny)")
    add("--budget", type=float, nargs="+", default=[20.0], help="cost of an image, in --unit (default: 20)")
    add(
        "--unit",
        choices=("passes", "gmacs", "seconds"),
        default="passes",
        help="full passes (default), GMACs or seconds",
    )
    add("--sampler", default="auto", choices=("auto", *SOLVERS, "ddpm"), help="default auto: the best without noise")
    add("--steps", type=int, help="be like uncached sampling with so many steps; with --sampler, and needed for ddpm")
    add("--data", help="begin from these images (shapes, cifar10, a folder or zip), noised to --start")
    add("--start", type=int, help="timesteps that are still to go from the noised images, as 700; with --data")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda where there is one")
    add("--out", default="recipe.json", help="a .json; or a folder, for one <ckpt>-<budget>.json a budget")
    return parser.parse_args(argv)
