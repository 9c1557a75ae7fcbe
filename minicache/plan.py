"""What is computed at each step of sampling: one immutable value, its constructors, and the cache that follows it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# alpha at step i, after full steps at j and, last, at k
FORECASTS = {"hold": lambda i, j, k: 0.0, "linear": lambda i, j, k: (i - k) / (k - j)}
MAX_STEPS = 1000  # the most timesteps that a Diffusion has


@dataclass(frozen=True)
class CachePlan:
    """Which of `steps` denoising steps (0 = the noisiest) run in full, and what the others feed the network.

    A partial step i keeps the `branch` outermost pairs of the U-Net alive, around
        cached_U = newer + alpha[i] * (newer - older)        (the features of the last two refreshes),
    so alpha 0 is DeepCache's reuse, and (i - newer's step) / (newer's step - older's step) is linear forecasting.
    alpha is 0 at refreshes and before the second one. Anything else raises ValueError.
    """

    steps: int
    branch: int
    refresh: tuple[int, ...]  # ascending, 0 first
    alpha: tuple[float, ...] = ()  # one a step; empty means all 0

    def __post_init__(self):
        _whole_number("steps", self.steps, high=MAX_STEPS)
        _whole_number("branch", self.branch)
        refresh = tuple(_whole_number("refresh", i, low=0) for i in self.refresh)
        alpha = tuple(float(a) for a in self.alpha) or (0.0,) * self.steps
        object.__setattr__(self, "refresh", refresh)
        object.__setattr__(self, "alpha", alpha)
        if refresh[:1] != (0,) or list(refresh) != sorted(set(refresh)) or refresh[-1] >= self.steps:
            raise ValueError(f"refresh={list(refresh)} must ascend from 0 and stay below steps={self.steps}")
        if len(alpha) != self.steps or not all(abs(a) <= MAX_STEPS for a in alpha):
            raise ValueError(f"alpha must be {self.steps} numbers, one for each step, in -{MAX_STEPS}..{MAX_STEPS}")
        second = refresh[1] if len(refresh) > 1 else self.steps
        for i, a in enumerate(alpha):
            if a != 0 and (i in refresh or i < second):
                raise ValueError(f"alpha[{i}]={a} must be 0: step {i} is a refresh, or comes before the second one")

    @property
    def forecasts(self) -> bool:
        """Whether two features must be kept, not one."""
        return any(self.alpha)


def uncached(steps: int, branch: int = 1) -> CachePlan:
    """The plan that refreshes at every step."""
    return uniform(steps, interval=1, branch=branch)


def uniform(steps: int, interval: int, branch: int = 3, forecast: str = "hold") -> CachePlan:
    """1:N caching (DeepCache, Sec. 3.3): a full step, then interval - 1 partial ones, and so on."""
    _whole_number("steps", steps, high=MAX_STEPS)
    _whole_number("interval", interval)
    return from_refreshes(steps, branch, range(0, steps, interval), forecast)


def nonuniform(
    steps: int,
    interval: int,
    center: float,
    power: float,
    branch: int = 3,
    forecast: str = "hold",
    official: bool = False,
) -> CachePlan:
    """Non-uniform 1:N caching (DeepCache, Eq. 7): ceil(steps / interval) full steps, densest around step `center`.

    The refreshes are l**power + center, for l evenly spaced from the power-th root of -center to that of
    steps - center (the end left out). A root of a negative number is read as that of its size, with its sign.
    0 <= center <= steps, 1 <= power <= 100. `power` is lowered by 0.02 at a time until all refreshes are distinct.
    official=True gives the lists of the published code instead, which lets Python take complex roots.
    """
    _whole_number("steps", steps, high=MAX_STEPS)
    _whole_number("interval", interval)
    if not 0 <= center <= steps:
        raise ValueError(f"center={center} is not in 0..{steps}, the steps")
    if not 1 <= power <= 100:
        raise ValueError(f"power={power} is not in 1..100")
    if official and power == 1:
        raise ValueError("power=1 with official=True: the published code needs a power above 1")
    count = math.ceil(steps / interval)
    while True:
        refresh = (_official_points if official else _signed_points)(steps, count, center, power)
        if len(refresh) == count:
            return from_refreshes(steps, branch, refresh, forecast)
        power = power - 0.02 if official else max(power - 0.02, 1.0)
        if official and power <= 1:
            raise ValueError(f"the published code finds no {count} distinct steps for center={center} and this power")


def _signed_points(steps: int, count: int, center: float, power: float) -> list[int]:
    root = np.linspace(-(center ** (1 / power)), (steps - center) ** (1 / power), count + 1)
    points = np.floor(np.sign(root) * np.abs(root) ** power + center + 1e-9)[:-1].clip(max=steps - 1)
    return sorted({0, *points[1:].astype(int).tolist()})


def _official_points(steps: int, count: int, center: float, power: float) -> list[int]:
    roots = np.linspace(complex(-center) ** (1 / power), complex(steps - center) ** (1 / power), count + 1)
    points = np.unique((roots**power).real.astype(np.int32))  # the imaginary part is lost, and Eq. 7 with it
    return [0, *(int(point + center) for point in points[1:-1])]


def from_refreshes(steps: int, branch: int, refresh: Iterable[int], forecast: str) -> CachePlan:
    if forecast not in FORECASTS:
        raise ValueError(f"forecast={forecast!r} is none of {', '.join(FORECASTS)}")
    refresh, alpha = tuple(refresh), [0.0] * steps
    for j, k, end in zip(refresh, refresh[1:], (*refresh[2:], steps)):
        for i in range(k + 1, end):
            alpha[i] = FORECASTS[forecast](i, j, k)
    return CachePlan(steps, branch, refresh, tuple(alpha))


def _whole_number(name: str, value: Any, low: int = 1, high: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        most = "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}{most}")
    return int(value)


class PlanCache:
    """The features that the loop keeps while it denoises one batch, as a plan says.

    `sample(..., cache=...)` takes a subclass and makes one from the plan for each batch: another `stand_in` is another
    forecast, another `refreshes` a rule that decides while running. A fixed mix of the last two features needs no
    class: it is alpha (their mean: -1/2). `cost` counts what the plan says.
    """

    def __init__(self, plan: CachePlan):
        self.plan, self.refresh = plan, set(plan.refresh)
        self.older = self.newer = None  # cached_U of the last two refreshes; older only where a forecast needs it
        self.two = plan.forecasts or type(self).stand_in is not PlanCache.stand_in

    def refreshes(self, i: int, x: Tensor) -> bool:
        """Whether step i, which begins with x [B, C, H, W], runs in full. Step 0 must."""
        return i in self.refresh

    def keep(self, i: int, cached_U: Tensor) -> None:
        """Take the fresh feature of step i, which ran in full."""
        self.older, self.newer = self.newer if self.two else None, cached_U

    def stand_in(self, i: int) -> Tensor:
        """What step i, which does not run in full, feeds the network as cached_U."""
        alpha = self.plan.alpha[i]
        return torch.lerp(self.older, self.newer, 1 + alpha) if alpha else self.newer
