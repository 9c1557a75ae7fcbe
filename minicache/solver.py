"""A deterministic sampler as a table of numbers: the timesteps it visits, and how it weighs the eps it has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from minicache.diffusion import Diffusion
from minicache.samplers import SAMPLERS, Point, Sampler, predict_x0, step_along

LARGEST = 10**12  # of a solver's numbers: what is larger overflows sooner or later


def noise_level(a: float) -> float:
    """s = sqrt(1 - a) / sqrt(a)."""
    return math.sqrt((1 - a) / a)


@dataclass(frozen=True)
class Solver:
    """DDIM's step along a weighted sum of the eps seen so far: with y = x / sqrt(a) and s = sqrt(1 - a) / sqrt(a),

        y' = y + (s' - s) sum_k (weights[j][k] eps_{j-k} + pulls[j][k] (towards - away)_{j-k}),

    of step j, from t[j] to t[j + 1]; the last step goes to s = 0. Every linear multistep sampler without noise and
    clipping has this form: weights of DDIM are 1, of PLMS those of Adams and Bashforth, and none has pulls. Those weigh
    what the context alone changes in eps, under guidance, which a fit may treat otherwise than the rest. ValueError for
    other tables.
    """

    t: tuple[float, ...]  # the timesteps, falling, from the noisiest one; whole or not
    weights: tuple[tuple[float, ...], ...]  # of step j: of eps_j, eps_{j-1}, ..., j + 1 of them at most
    name: str = "fitted"  # how it came about
    pulls: tuple[tuple[float, ...], ...] = ()  # rows like those of weights, or none

    def __post_init__(self):
        tables = (self.weights, self.pulls)
        rows = [row for table in tables for row in (table if isinstance(table, Sequence) else [None])]
        if not all(isinstance(each, Sequence) for each in (self.t, *rows)):
            raise ValueError("a solver's t and each row of its weights and pulls must be sequences of numbers")
        if not isinstance(self.name, str):
            raise ValueError(f"a solver's name={self.name!r} must be a text")
        t, (weights, pulls) = tuple(self.t), (tuple(map(tuple, table)) for table in tables)
        numbers = [*t, *(weight for row in rows for weight in row)]
        if not all(type(number) in (int, float) and abs(number) <= LARGEST for number in numbers):
            raise ValueError(f"a solver's t, weights and pulls must be finite numbers, of size {LARGEST} at most")
        if not t or any(a <= b for a, b in pairwise(t)) or not (0 <= t[-1] and 0 < t[0]):
            raise ValueError(f"a solver's timesteps must fall from above 0 to 0 at the least, unlike {t}")
        for table in (weights, pulls or weights):
            if len(table) != len(t) or not all(1 <= len(row) <= j + 1 for j, row in enumerate(table)):
                raise ValueError(f"a solver of {len(t)} steps needs a row of weights for each, of 1 to j + 1 in step j")
        for name, value in (("t", t), ("weights", weights), ("pulls", pulls)):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return self.name

    @property
    def entry(self) -> Sampler:
        """What the loop must know, as of any other sampler."""
        return Sampler(self.step, history=max(map(len, self.weights + self.pulls)) - 1)

    def step(self, now: Point, past: Sequence[Point], a_next: float) -> Tensor:
        points = [now, *past]
        eps = sum(w * point.eps for w, point in zip(self.weights[now.i], points))
        if self.pulls:
            eps = eps + sum(w * point.pull for w, point in zip(self.pulls[now.i], points))
        return step_along(eps, now, a_next)


def tabulated(sampler: str, t: Sequence[float], diffusion: Diffusion) -> Solver:
    """The table of one of SAMPLERS on these timesteps, exact to rounding. ValueError for a sampler that draws noise.

    Each step is linear in y_0 and in all eps so far: the sampler is given these as unit vectors, and returns the table.
    """
    entry, S = SAMPLERS[sampler], len(t)
    if entry.noise == "variance" or entry.twice:
        raise ValueError(f"sampler={sampler!r} is no table of weights, one row a timestep")
    unit = torch.eye(S + 1, dtype=torch.float64)  # y_0, eps_0, eps_1, ...
    alphas, rows, past = [*map(diffusion.alpha_bar, t), 1.0], [], []
    x = unit[0] * math.sqrt(alphas[0])
    for j, (a, a_next) in enumerate(pairwise(alphas)):
        y, s, s_next = x / math.sqrt(a), noise_level(a), noise_level(a_next)
        now = Point(a, x, unit[j + 1], predict_x0(x, unit[j + 1], a), i=j)
        now = entry.correct(now, past) if entry.correct and past else now
        x = entry.step(now, past, a_next)
        past = [now, *past][: entry.history]
        row = ((x / math.sqrt(a_next) - y)[1 : j + 2] / (s_next - s)).flip(0)
        rows.append(tuple(row[: 1 + row.abs().gt(1e-9).nonzero().max()].tolist()))
    return Solver(tuple(t), tuple(rows), sampler)
