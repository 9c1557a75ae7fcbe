"""Fit a solver to a network: its weights in closed form, its timesteps by search, and the alphas of a cache's forecast.

A finely resolved path leads from each x_T to its image. A solver with few steps runs beside it, and at each step takes
those weights that lead, in least squares over some seeds, to where the path is at the next timestep. What is left to
search for is the timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minicache.metrics import relative_l2
from minicache.plan import CachePlan
from minicache.samplers import Point, Sampler, step_along
from minicache.sampling import Network, denoise
from minicache.solver import Solver, noise_level

FINEST = {"steps": 200, "sampler": "dpm++2m", "spacing": "rho4"}  # a path; 800 steps change images by 0.0003
LAGS = 8  # eps that a fitted step weighs, at most
KNOTS = 10  # timesteps that a sweep shifts; more steps move along with them
SWEEPS = 3
RIDGE = 1e-8  # pulls weights to DDIM's, in parts of their mean square


class Path:
    """y = x / sqrt(a) at any noise level s, on the finely resolved way of a few seeds: a Hermite cubic between steps,
    as eps is dy/ds. where: what `denoise` is told of seeds, x_T, context and guidance."""

    @torch.no_grad()
    def __init__(self, unet: Network, **where: Any):
        alpha_bar, s, y, eps = unet.diffusion.alpha_bar, [], [], []
        self.where = where
        for step in denoise(unet, **FINEST, **where):
            a = alpha_bar(step.t)
            x = sqrt(a) * step.x0 + sqrt(1 - a) * step.eps
            s, y, eps = [*s, noise_level(a)], [*y, x / sqrt(a)], [*eps, step.eps]
        self.image = step.x
        self.s, self.y, self.eps = [*s, 0.0], [*y, step.x], [*eps, step.eps]
        self.norm = self.image.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)

    def __call__(self, s: float) -> Tensor:
        k = min(max(sum(level > s for level in self.s), 1), len(self.s) - 1)
        h = self.s[k] - self.s[k - 1]
        u = (s - self.s[k - 1]) / h
        ends = (1 + 2 * u) * (1 - u) ** 2 * self.y[k - 1] + u * u * (3 - 2 * u) * self.y[k]
        return ends + h * u * (1 - u) * ((1 - u) * self.eps[k - 1] - u * self.eps[k])


@dataclass(frozen=True, eq=False)
class Fitting(Solver):
    """A solver that finds its weights while it runs; where they are, those of the table stand for nothing."""

    path: Path | None = None
    found: list[tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=list)  # of eps, of pulls

    @property
    def entry(self) -> Sampler:
        return Sampler(self.step, history=LAGS - 1)

    def step(self, now: Point, past: Sequence[Point], a_next: float) -> Tensor:
        """The step that ends as near to the path as any along a weighted sum of these eps does."""
        s, s_next = noise_level(now.a), noise_level(a_next)
        needed = (self.path(s_next) - now.x / sqrt(now.a)) / (s_next - s)  # the direction that would end on it
        points = [now, *past]
        eps = torch.stack([*(p.eps for p in points), *(p.pull for p in points if p.pull is not None)])
        E = (eps / self.path.norm).flatten(1).cpu().double()  # not every device has float64
        short = ((needed - now.eps) / self.path.norm).flatten().cpu().double()
        A = E @ E.T
        ridge = RIDGE * A.diagonal().mean() + torch.finfo(A.dtype).tiny  # where eps is 0, so is A
        weights = torch.linalg.solve(A + ridge * torch.eye(len(A), dtype=A.dtype), E @ short)
        weights[0] += 1
        self.found.append((tuple(weights[: len(points)].tolist()), tuple(weights[len(points) :].tolist())))
        return step_along(torch.tensordot(weights.to(eps), eps, 1), now, a_next)


class Forecasting(torch.nn.Module):
    """A network that finds the alphas of a plan while it runs: those whose forecasts are, in least squares, nearest to
    the features of a full pass at the same step."""

    def __init__(self, unet: Network):
        super().__init__()
        self.unet, self.config, self.diffusion = unet, unet.config, unet.diffusion
        self.training = unet.training  # a wrapper of its own would be in training mode, which `denoise` refuses
        self.older = self.newer = None
        self.alpha: list[float] = []  # one a pass

    def forward_full(self, x: Tensor, t: Tensor, branch: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        eps, cached_U = self.unet.forward_full(x, t, branch, context)
        self.older, self.newer = self.newer, cached_U
        self.alpha.append(0.0)
        return eps, cached_U

    def forward_partial(self, x: Tensor, t: Tensor, cached_U: Tensor, branch: int, context: Tensor | None) -> Tensor:
        self.alpha.append(0.0)
        if self.older is not None:
            change, needed = self.newer - self.older, self.unet.forward_full(x, t, branch, context)[1] - self.newer
            size = change.float().square().sum().item()  # 0 where both were at one timestep, as with quad
            self.alpha[-1] = (change.float() * needed.float()).sum().item() / size if size else 0.0  # half overflows
            cached_U = self.newer + self.alpha[-1] * change
        return self.unet.forward_partial(x, t, cached_U, branch, context)


class Fit(NamedTuple):
    """A solver with its plan, and the mean error of the images that they were fitted on."""

    solver: Solver
    plan: CachePlan
    error: float


def fitted(unet: Network, path: Path, t: Sequence[float], plan: CachePlan, name: str = "fitted") -> Fit:
    """The weights and the alphas for these timesteps, found by one run beside the path."""
    fitting, network = Fitting(tuple(t), ((1.0,),) * len(t), path=path), Forecasting(unet)
    plan = replace(plan, alpha=())
    *_, last = denoise(network, plan=plan, sampler=fitting, **path.where)
    weights, pulls = zip(*fitting.found)
    solver = Solver(fitting.t, weights, name, pulls if any(pulls) else ())
    return Fit(solver, replace(plan, alpha=network.alpha), relative_l2(last.x, path.image).mean().item())


def forecast(unet: Network, **settings: Any) -> CachePlan:
    """The plan, whose alphas are fitted to the sampler and the steps that it is in; settings: of `denoise`."""
    network = Forecasting(unet)
    for _ in denoise(network, **settings):
        pass
    return replace(settings["plan"], alpha=tuple(network.alpha))


def nested(full: int, partial: int) -> CachePlan:
    """`full` full steps at branch 1, and as many partial ones, spread evenly between them."""
    gaps = [0] * full  # partial steps after each full one: none after the first, which knows one feature, nor the last
    for k in range(partial):
        gaps[1 + k * (full - 2) // partial] += 1
    refresh = [sum(gaps[:k]) + k for k in range(full)]
    return CachePlan(full + partial, 1, tuple(refresh))


def search(unet: Network, path: Path, plan: CachePlan, rho: float) -> Iterator[Fit]:
    """Ever better fits: one for timesteps uniform in s^(1/rho), then one for each change of them that helps.

    Each sweep tries to shift every timestep (but the first) towards either neighbour, and those around it less; the
    shifts are halved when they help no longer.
    """
    diffusion = unet.diffusion
    full = diffusion.timesteps(len(plan.refresh), f"rho{rho:g}")
    known = [noise_level(diffusion.alpha_bar(each)) ** (1 / rho) for each in full]
    least = known[-1]
    u = np.interp(range(plan.steps), plan.refresh, known).tolist()  # partial steps evenly between

    def fit(u: list[float]) -> Fit:
        return fitted(unet, path, [diffusion.timestep(1 / (1 + v ** (2 * rho))) for v in u], plan)

    yield (best := fit(u))
    S, size = plan.steps, 0.25
    width = max(1.0, (S - 1) / KNOTS)
    for _ in range(SWEEPS):
        before = best.error
        for center in torch.arange(S - 1, 0, -width).tolist():
            for sign in (1, -1):
                moved = shifted(u, center, sign * size, width, least)
                tried = fit(moved)
                if tried.error < best.error:
                    best, u = tried, moved
                    yield best
                    break
        if best.error > 0.97 * before:
            size /= 2


def shifted(u: list[float], center: float, size: float, width: float, least: float) -> list[float]:
    """u, which falls, plus a hat of this width, whose top is `size` of the way to the neighbour before (or after)."""
    moved = list(u)
    for j in range(1, len(u)):
        share = size * max(0.0, 1 - abs(j - center) / width)
        neighbour = u[j - 1] if share > 0 else u[j + 1] if j + 1 < len(u) else least
        moved[j] += abs(share) * (neighbour - u[j])
    return moved
