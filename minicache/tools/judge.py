"""Judge plans by the images they end with, and fit their alphas to be judged better."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from minicache.metrics import relative_l2
from minicache.plan import CachePlan, uncached
from minicache.recipe import Recipe
from minicache.sampling import denoise
from minicache.tools.evaluate import Benchmark

BATCH = 16  # images at a time
DELTA = 0.05  # of alpha, in Gauss-Newton's differences


@dataclass(frozen=True, eq=False)
class Judge:
    """Seeds, and the images where their trajectories should end."""

    benchmark: Benchmark
    seeds: range
    reference: Tensor  # [len(seeds), C, H, W]

    @classmethod
    def on(cls, benchmark: Benchmark, seeds: range, reference: Recipe | None = None) -> Judge:
        """Draw the reference; None: the finest."""
        settings = {"batch_size": BATCH, "progress": True}
        return cls(benchmark, seeds, benchmark.images(reference or benchmark.finest, seeds, **settings))

    def images(self, recipe: Recipe) -> Tensor:
        return self.benchmark.images(recipe, self.seeds, batch_size=BATCH)

    def errors(self, recipe: Recipe) -> Tensor:
        """Relative L2 of each image, [len(seeds)]."""
        return relative_l2(self.images(recipe), self.reference)

    def residuals(self, recipe: Recipe) -> Tensor:
        """(image - reference) / ||reference||, whose norms are the errors: float64 [len(seeds), CHW]."""
        norms = self.reference.flatten(1).norm(dim=1, keepdim=True)
        return ((self.images(recipe) - self.reference).flatten(1) / norms).double().cpu()

    def score(self, recipe: Recipe, bar: tqdm | None = None) -> Recipe:
        """The recipe, with its mean error on these seeds."""
        if bar is not None:
            bar.update()
        return replace(recipe, error=self.errors(recipe).mean().item())


def fit(judge: Judge, recipe: Recipe) -> CachePlan:
    """The plan with the alphas that forecast best, in least squares, the features Y of the uncached run:

    alpha_t = sum <Y_t - Y_j, Y_j - Y_i> / sum |Y_j - Y_i|^2, i < j the last two refreshes before t.
    """
    plan = recipe.plan
    benchmark, whole = judge.benchmark, replace(recipe, plan=uncached(plan.steps, plan.branch))
    settings = {"x_T": benchmark.x_T(judge.seeds), **whole.settings(benchmark.fingerprint)}
    alpha, older, newer = [0.0] * plan.steps, None, None
    for step in denoise(benchmark.unet, judge.seeds, **settings):
        if step.i in plan.refresh:
            older, newer = newer, step.cached_U
        elif older is not None:
            slope = newer - older
            length = slope.square().sum().item()  # 0 where quad has repeated a timestep: then no alpha has an effect
            alpha[step.i] = ((step.cached_U - newer) * slope).sum().item() / length if length else 0.0
    return replace(plan, alpha=tuple(alpha))


def gauss_newton(judge: Judge, recipe: Recipe, bar: tqdm) -> Recipe:
    """One step of Gauss-Newton on all alphas together, for the mean of the images' errors; damped until it helps.

    The images are almost linear in the alphas near the optimum, so their derivatives, by differences, and one linear
    system do what a search along each alpha would take hundreds of runs for.
    """
    alpha, plan = recipe.plan.alpha, recipe.plan

    def residuals(alpha: tuple[float, ...]) -> Tensor:
        bar.update()
        return judge.residuals(replace(recipe, plan=replace(plan, alpha=alpha)))

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
