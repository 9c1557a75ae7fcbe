"""What `evaluate` compares: uncached and fitted samplers, DeepCache, and forecasts in its place."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch import Tensor

from minicache.checkpoints import fingerprint, load
from minicache.cost import plan_macs
from minicache.fit import forecast
from minicache.placement import Placement, place
from minicache.plan import CachePlan, PlanCache, uncached, uniform
from minicache.recipe import Recipe
from minicache.samplers import SAMPLERS, passes
from minicache.solver import Solver
from minicache.tools.calibrate import CALIBRATION, SHORTLIST, Task, finest, nearest, off_the_shelf

INTERVALS = (2, 3, 5, 10)  # of the plans that are published
FLOOR = "floor"
SHELF = "uncached"


class Spectrum(PlanCache):
    """A forecast from the features of all refreshes: ridge regression on Chebyshev polynomials of the step, of degree 4
    (Spectrum, 2603.01623), in equal parts with the plan's own forecast."""

    DEGREE, RIDGE = 4, 0.1

    def __init__(self, plan: CachePlan):
        super().__init__(plan)
        steps = np.linspace(-1, 1, plan.steps)
        self.basis = np.polynomial.chebyshev.chebvander(steps, self.DEGREE)  # [steps, DEGREE + 1]
        self.A, self.B = self.RIDGE * np.eye(self.DEGREE + 1), [0.0] * (self.DEGREE + 1)

    def keep(self, i: int, cached_U: Tensor) -> None:
        super().keep(i, cached_U)
        self.A = self.A + np.outer(self.basis[i], self.basis[i])
        self.B = [b + weight * cached_U.float() for b, weight in zip(self.B, self.basis[i].tolist())]

    def stand_in(self, i: int) -> Tensor:
        weights = np.linalg.solve(self.A, self.basis[i]).tolist()
        own = super().stand_in(i)
        return (own + sum(weight * b for weight, b in zip(weights, self.B)).to(own.dtype)) / 2


class Method(NamedTuple):
    """How a picture is drawn."""

    recipe: Recipe
    cache: Callable[[CachePlan], PlanCache] = PlanCache
    task: Task | None = None  # of another network


def learned(task: Task, recipe: Recipe) -> Method:
    """The recipe with those alphas that forecast features best on calibrate's seeds; found when they are needed."""
    settings = {**recipe.settings(task.fingerprint), **task.where(CALIBRATION)}
    plan = cache(partial(forecast, task.unet, **settings))
    return Method(recipe, lambda _: PlanCache(plan()))


def draws_noise(recipe: Recipe) -> bool:
    """Whether images depend on noise beside x_T, and so on the number of steps."""
    return recipe.entry.noise == "variance" or recipe.eta > 0


def whole_run(task: Task, like: str, spacing: str | None, eta: float) -> Recipe:
    """The uncached run in whose steps others' plans are tried; like: SAMPLER-STEPS."""
    sampler, _, steps = like.rpartition("-")
    if sampler not in SAMPLERS or not steps.isdecimal():
        raise ValueError(f"--like {like}: need a sampler and its steps, as pndm-50")
    return task.recipe(uncached(passes(int(steps), sampler)), sampler, spacing=spacing, eta=eta)


def same_run(recipe: Recipe, whole: Recipe) -> bool:
    """Whether they differ in nothing but the cache."""
    first, second = ({**vars(r), "plan": r.plan.steps, "fingerprint": None, "error": None} for r in (recipe, whole))
    return first == second


def published(task: Task, whole: Recipe) -> dict[str, Method]:
    """Plans that need no calibration of the sampler, in the steps of `whole`, at branches that the network has."""
    found = {}
    for N in INTERVALS:
        linear = replace(whole, plan=uniform(whole.plan.steps, N, 1, "linear"))
        for branch in (3, 1):
            if branch <= len(task.unet.D):
                found[f"deepcache-n{N}-b{branch}"] = Method(replace(whole, plan=uniform(whole.plan.steps, N, branch)))
        found |= {
            f"linear-n{N}-b1": Method(linear),
            f"l2p-n{N}-b1": learned(task, linear),
            f"spectrum-n{N}-b1": Method(linear, Spectrum),
        }
    return found


def fitted(task: Task, whole: Recipe, recipes: Iterable[Recipe]) -> dict[str, dict[str, Method]]:
    """What was calibrated for this guidance, and for the steps of `whole` where that draws noise; of one cost, what was
    best when it was calibrated."""
    found: dict[str, dict[str, Method]] = {}
    for recipe in sorted(recipes, key=lambda each: (each.error is None, each.error)):
        suits = same_run(recipe, whole) if draws_noise(whole) else not draws_noise(recipe)
        if suits and recipe.guidance == whole.guidance:
            kind = "fitted" if isinstance(recipe.sampler, Solver) else recipe.sampler
            cached = "cached" if len(recipe.plan.refresh) < recipe.plan.steps else "uncached"
            name = f"{kind}-{cached}-{task.cost(recipe.plan):.0f}"
            found.setdefault(name, {f"{name}-0": Method(recipe)})
    return found


def smaller(task: Task, whole: Recipe, ckpt: str, placement: Placement) -> dict[str, dict[str, Method]]:
    """Another network in the steps of `whole`. ValueError where it cannot be asked for the same pictures."""
    unet = load(ckpt)
    for name in ("image_size", "in_channels", "context_dim", "vocabulary"):
        theirs, ours = (getattr(each if name == "vocabulary" else each.config, name) for each in (unet, task.unet))
        if theirs != ours:
            raise ValueError(f"--smaller {ckpt} has another {name} than --ckpt: {theirs}, not {ours}")
    theirs, ours = (plan_macs(each, uncached(1)) / 1e9 for each in (unet, task.unet))
    if theirs >= ours:
        raise ValueError(f"--smaller {ckpt} takes {theirs:.2f} GMACs a pass, not fewer than --ckpt, {ours:.2f}")
    other = Task(place(unet, placement), fingerprint(unet), task.prompts)
    recipe = other.recipe(whole.plan, whole.sampler, spacing=whole.spacing, eta=whole.eta)
    return {"smaller": {f"smaller-{name_of(recipe)}": Method(recipe, task=other)}}


def fewer_steps(task: Task, whole: Recipe, budget: float) -> dict[str, dict[str, Method]]:
    """Uncached runs for this cost: of the deterministic samplers, unless `whole` draws noise; and of that of `whole`.

    ValueError for the cost of fewer than two steps, as a single one would begin where no noise is left, and for that of
    more steps than there are timesteps.
    """
    step, T = task.cost(uncached(1)), task.unet.diffusion.num_timesteps
    steps = int(budget / step + 1e-9)
    if not 2 <= steps <= T:
        raise ValueError(f"--budgets {budget:g}: rows of 2 to {T} steps cost {2 * step:g} to {T * step:g} full passes")
    kinds = {} if draws_noise(whole) else {SHELF: off_the_shelf(task, steps)}
    if steps > 2 or not whole.entry.twice:
        kinds[whole.sampler] = [replace(whole, plan=uncached(steps))]
    return {f"{kind}-{budget:g}": {name_of(each): Method(each) for each in row} for kind, row in kinds.items()}


def shortlisted(task: Task, found: dict[str, dict[str, Method]]) -> dict[str, dict[str, Method]]:
    """The same rows, but in those of the SHELF only what is nearest to the reference, on a few seeds; draws them."""
    target, listed = cache(lambda: task.images(finest(task), SHORTLIST)), dict(found)
    for name, row in found.items():
        if name.startswith(f"{SHELF}-"):
            best = nearest(task, [method.recipe for method in row.values()], target())
            listed[name] = {name_of(each): Method(each) for each in best}
    return listed


def name_of(uncached: Recipe) -> str:
    """Of its pictures on disk, which two rows may share."""
    return f"{uncached.sampler}-{uncached.spacing}-{uncached.plan.steps}"


def methods(
    task: Task, whole: Recipe, budgets: Iterable[float], recipes: Iterable[Recipe]
) -> dict[str, dict[str, Method]]:
    """Row -> name -> method, of one cost, of which the best counts. The first row is `whole`. Nothing is drawn: see
    `shortlisted`.

    ValueError for what cannot be drawn.
    """
    found = {"whole": {name_of(whole): Method(whole)}}
    found |= {name: {name: method} for name, method in published(task, whole).items()}
    found |= fitted(task, whole, recipes)
    for budget in budgets:
        found |= fewer_steps(task, whole, budget)
    if not draws_noise(whole):
        found[FLOOR] = {FLOOR: Method(finest(task, part=2))}
    for row in found.values():
        for method in row.values():
            method.recipe.timesteps(task.unet.diffusion)
    return found


def chosen(found: dict[str, dict[str, Method]], only: list[str]) -> dict[str, dict[str, Method]]:
    """The rows whose names fit one of the patterns, and the first, which the others are compared with."""
    names = {*islice(found, 1)}
    for pattern in only:
        fitting = fnmatch.filter(found, pattern)
        if not fitting:
            raise ValueError(f"--only {pattern} fits no row; there are {', '.join(found)}")
        names |= {*fitting}
    return {name: row for name, row in found.items() if name in names}
