"""The samplers: each is a pure function beside its equation, and one entry of SAMPLERS. sampling.py has their loop.

Notation: a is alphas_bar at this step's t and a_next at the next one's (1 after the last), so that
x_t = sqrt(a) x_0 + sqrt(1 - a) eps; lambda = log(sqrt(a) / sqrt(1 - a)), and h is the length of a step in lambda.
Coefficients are float64 numbers; images are float32 [B, C, H, W].

Multistep samplers take DDIM's step along what they expect to be the mean over it, of eps (PLMS, DEIS) or of x_0
(DPM-Solver++, UniPC), from now and some steps before. They begin with lower orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, log, sqrt
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Point(NamedTuple):
    """One evaluation of the network on the way from noise to image."""

    a: float
    x: Tensor  # the state x_t
    eps: Tensor  # the network's output there
    x0: Tensor  # the image that eps predicts, clipped where `clip`
    clip: bool = False
    i: int = 0  # the step, from 0


def predict_x0(x: Tensor, eps: Tensor, a: float, clip: bool = False) -> Tensor:
    """DDPM (Ho et al. 2020), Eq. 4 solved for x_0: (x_t - sqrt(1 - a) eps) / sqrt(a)."""
    x0 = (x - sqrt(1 - a) * eps) / sqrt(a)
    return x0.clamp(-1, 1) if clip else x0


def ddim_step(now: Point, past: Sequence[Point], a_next: float, eta: float = 0.0, z: Tensor | None = None) -> Tensor:
    """DDIM (Song et al. 2021), Eq. 12 and 16: sqrt(a') x_0 + sqrt(1 - a' - sigma^2) eps + sigma z."""
    sigma = eta * sqrt((1 - a_next) / (1 - now.a)) * sqrt(1 - now.a / a_next)
    x = sqrt(a_next) * now.x0 + sqrt(1 - a_next - sigma**2) * now.eps
    return x + sigma * z if sigma > 0 else x


def ddpm_step(now: Point, past: Sequence[Point], a_next: float, variance: str, z: Tensor | None) -> Tensor:
    """DDPM (Ho et al. 2020), Eq. 7, from t to any earlier t': sqrt(a') beta / (1 - a) x_0 + ... x_t + sigma z."""
    a, alpha = now.a, now.a / a_next
    beta = 1 - alpha
    mean = sqrt(a_next) * beta / (1 - a) * now.x0 + sqrt(alpha) * (1 - a_next) / (1 - a) * now.x
    sigma = sqrt(beta if variance == "fixed_large" else beta * (1 - a_next) / (1 - a))
    return mean if a_next == 1 else mean + sigma * z


# --- of eps ----------------------------------------------------------------------------------------------------------


def plms_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """PLMS (Liu et al. 2022), Eq. 12, along a mean of this eps and up to three earlier ones.

    The weights are those of Adams and Bashforth for steps of equal length, in whatever the spacing is even. There is no
    Runge-Kutta warm-up, so that every step costs one pass. (Zhang and Chen 2023 call this iPNDM.)
    """
    return step_along(adams_bashforth([now.eps, *(point.eps for point in past)]), now, a_next)


def pndm_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """PLMS as in latent diffusion (Rombach et al. 2022), the first step taken twice: at its end once more from its
    start, along the mean of both eps. Of the two eps at that end, the later counts from then on.
    """
    if a_next == now.a:
        return step_along((now.eps + past[0].eps) / 2, past[0], now.a)
    latest = {point.a: point for point in (*reversed(past), now)}
    now, *past = reversed(latest.values())
    return plms_step(now, past, a_next)


def deis_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """DEIS (Zhang and Chen 2023), Eq. 14: eps is a polynomial in lambda through now and the past."""
    points = [now, *past] if a_next < 1 else [now]
    weights = exponential_weights(points, now.a, a_next, -1) if a_next < 1 else [1.0]
    return step_along(combine(weights, [point.eps for point in points]), now, a_next)


def step_along(eps: Tensor, now: Point, a_next: float) -> Tensor:
    """DDIM's step from now.x, as if eps were the same all the way."""
    return ddim_step(now._replace(eps=eps, x0=predict_x0(now.x, eps, now.a, now.clip)), (), a_next)


def adams_bashforth(slopes: Sequence[Tensor]) -> Tensor:
    """The mean slope over the next step, from up to four slopes at equal distances, the latest first."""
    weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    return combine(weights[min(len(slopes), 4) - 1], slopes)


# --- of x_0 ----------------------------------------------------------------------------------------------------------


def dpmpp_2m_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022), Alg. 2: with r = h_last / h, towards (1 + 1/2r) x_0 - 1/2r x_0_last."""
    if a_next == 1:
        return now.x0
    x0 = now.x0
    if past:
        r = step_length(past[0].a, now.a) / step_length(now.a, a_next)
        x0 = (1 + 0.5 / r) * x0 - 0.5 / r * past[0].x0
    return step_towards(x0, now, a_next)


def dpmpp_3m_step(now: Point, past: Sequence[Point], a_next: float, quadratic: float = 0.5) -> Tensor:
    """DPM-Solver++(3M): x_0 is a parabola through the last three, with half its quadratic term, as in their code."""
    if a_next == 1 or len(past) < 2:
        return dpmpp_2m_step(now, past, a_next)
    points = [now, *past[:2]]
    weights = exponential_weights(points, now.a, a_next, 1, quadratic)
    return step_towards(combine(weights, [point.x0 for point in points]), now, a_next)


def unipc_correct(now: Point, past: Sequence[Point]) -> Point:
    """UniC (Zhao et al. 2023), Alg. 1 with B_2: the last step again, with the x_0 at its end among the points.

    Only x changes: the network is not asked again.
    """
    points = [now, *past]
    weights = exponential_weights(points, past[0].a, now.a, 1) if len(past) > 1 else (0.5, 0.5)
    return now._replace(x=step_towards(combine(weights, [point.x0 for point in points]), past[0], now.a))


def step_towards(x0: Tensor, now: Point, a_next: float) -> Tensor:
    """The same step of DDIM, as if x_0 were the same all the way: sigma'/sigma x - alpha' (exp(-h) - 1) x_0."""
    h = step_length(now.a, a_next)
    return sqrt((1 - a_next) / (1 - now.a)) * now.x - sqrt(a_next) * (exp(-h) - 1) * x0


# --- what they share -------------------------------------------------------------------------------------------------


def half_log_snr(a: float) -> float:
    """lambda of DPM-Solver: log(sqrt(a) / sqrt(1 - a))."""
    return 0.5 * log(a / (1 - a))


def step_length(a: float, a_next: float) -> float:
    """h = lambda' - lambda."""
    return half_log_snr(a_next) - half_log_snr(a)


def exponential_weights(
    points: Sequence[Point], a: float, a_next: float, sign: int, quadratic: float = 1.0
) -> list[float]:
    """One weight a point: the mean of a polynomial in lambda through all points, over the step from a to a_next.

    DDIM's steps are exact in exp(lambda) for x_0 and in exp(-lambda) for eps, so that means are weighted by
    exp(sign * lambda). With u from 0 to 1 over the step, those of u^k follow by parts (they are the phi functions of
    exponential integrators): M_0 = 1, M_k = 1 / (1 - exp(-h)) - k / h M_{k-1}. quadratic scales M_2.
    """
    h = step_length(a, a_next)
    u = [step_length(a, point.a) / h for point in points]
    h, means = sign * h, [1.0]
    for k in range(1, len(points)):
        means.append(1 / (1 - exp(-h)) - k / h * means[-1])
    means[2:3] = [quadratic * mean for mean in means[2:3]]
    return np.linalg.solve(np.vander(u, increasing=True).T, means).tolist()


def combine(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    return sum(w * tensor for w, tensor in zip(weights, tensors))


@dataclass(frozen=True)
class Sampler:
    """What the loop must know of a sampler.

    step(now, past, a_next) -> x at a_next. `past` has the latest Point first; it is empty at the first step, and never
    longer than `history`. a_next is 1 at the last step, where no noise is left. A step that predicts x_0 again honours
    now.clip. A stochastic sampler names the setting that scales its noise, and is given it, and z, as keywords.
    """

    step: Callable[..., Tensor]
    history: int = 0  # how many earlier Points the step looks at
    noise: str | None = None  # "eta" or "variance"; None: it draws no noise
    spacing: str = "uniform"  # unless asked for another
    clip_x0: bool = False  # unless asked otherwise
    correct: Callable[[Point, Sequence[Point]], Point] | None = None  # (now, past) -> a better now (UniPC)
    twice: bool = False  # takes its first step twice, at the cost of one pass more than there are timesteps


SAMPLERS = {
    "ddim": Sampler(ddim_step, noise="eta"),
    "ddpm": Sampler(ddpm_step, noise="variance", clip_x0=True),
    "dpm++2m": Sampler(dpmpp_2m_step, history=1, spacing="trailing"),
    "dpm++3m": Sampler(dpmpp_3m_step, history=2, spacing="rho7"),
    "unipc": Sampler(dpmpp_2m_step, history=2, spacing="rho7", correct=unipc_correct),  # UniP-2 is DPM-Solver++(2M)
    "unipc3": Sampler(partial(dpmpp_3m_step, quadratic=1.0), history=3, spacing="rho7", correct=unipc_correct),
    "deis": Sampler(deis_step, history=2, spacing="rho7"),
    "plms2": Sampler(plms_step, history=1, spacing="rho7"),  # the number: of its order
    "plms3": Sampler(plms_step, history=2, spacing="rho7"),
    "plms": Sampler(plms_step, history=3, spacing="linspace"),
    "pndm": Sampler(pndm_step, history=4, spacing="offset", twice=True),
}


def passes(steps: int, sampler: str) -> int:
    """How many steps a plan for so many timesteps has."""
    return steps + (isinstance(sampler, str) and sampler in SAMPLERS and SAMPLERS[sampler].twice)
