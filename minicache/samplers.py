"""The samplers: each is a pure function beside its equation, and one entry of SAMPLERS. sampling.py has their loop.

Notation: a is alphas_bar at this step's t and a_next at the next one's (1 after the last), so that
x_t = sqrt(a) x_0 + sqrt(1 - a) eps; lambda = log(sqrt(a) / sqrt(1 - a)), and h is the length of a step in lambda.
Coefficients are float64 numbers; images are float32 [B, C, H, W].

Multistep samplers take DDIM's step with the mean over it that earlier points foretell: of eps (PLMS, DEIS) or of x_0
(DPM-Solver++, UniPC). Their first steps have fewer points, and so a lower order.
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
    pull: Tensor | None = None  # under guidance: how far the context moves eps, before it is scaled


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


def plms_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """PLMS (Liu et al. 2022), Eq. 12: along a mean of this eps and up to three earlier ones.

    The weights are those of Adams and Bashforth, for steps of equal length. There is no Runge-Kutta warm-up, so that
    every step costs one pass (Zhang and Chen 2023 call this iPNDM).
    """
    return step_along(adams_bashforth([now.eps, *(point.eps for point in past)]), now, a_next)


def pndm_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """PLMS as in latent diffusion (Rombach et al. 2022): the first step is taken twice, the second time along the mean
    of the eps at both ends. Of the two eps at its end, the later counts from then on."""
    if a_next == now.a:
        return step_along((now.eps + past[0].eps) / 2, past[0], now.a)
    latest = {point.a: point for point in (*reversed(past), now)}
    now, *past = reversed(latest.values())
    return plms_step(now, past, a_next)


def adams_bashforth(slopes: Sequence[Tensor]) -> Tensor:
    """The mean slope over the next step, from up to four slopes at equal distances, the latest first."""
    weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    return sum(w * slope for w, slope in zip(weights[min(len(slopes), 4) - 1], slopes))


def deis_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """DEIS (Zhang and Chen 2023), Eq. 14, with polynomials in lambda."""
    eps = now.eps if a_next == 1 else polynomial_mean("eps", [now, *past], now.a, a_next)
    return step_along(eps, now, a_next)


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
    """DPM-Solver++(3M), of the same authors' code, which has half of the parabola's quadratic term; UniP-3 has all."""
    if a_next == 1 or len(past) < 2:
        return dpmpp_2m_step(now, past, a_next)
    return step_towards(polynomial_mean("x0", [now, *past[:2]], now.a, a_next, quadratic), now, a_next)


def unipc_correct(now: Point, past: Sequence[Point]) -> Point:
    """UniC (Zhao et al. 2023), Alg. 1 with B_2: the last step once more, with the x_0 at its end as well."""
    x0 = polynomial_mean("x0", [now, *past], past[0].a, now.a) if past[1:] else (now.x0 + past[0].x0) / 2
    return now._replace(x=step_towards(x0, past[0], now.a))


def step_along(eps: Tensor, now: Point, a_next: float) -> Tensor:
    """DDIM's step as if eps were the same all the way."""
    return ddim_step(now._replace(eps=eps, x0=predict_x0(now.x, eps, now.a, now.clip)), (), a_next)


def step_towards(x0: Tensor, now: Point, a_next: float) -> Tensor:
    """DDIM's step as if x_0 were the same all the way: sigma'/sigma x - alpha' (exp(-h) - 1) x_0."""
    h = step_length(now.a, a_next)
    return sqrt((1 - a_next) / (1 - now.a)) * now.x - sqrt(a_next) * (exp(-h) - 1) * x0


def polynomial_mean(of: str, points: Sequence[Point], a: float, a_next: float, quadratic: float = 1.0) -> Tensor:
    """The mean of eps or x0 over the step from a to a_next, where it is the polynomial in lambda through the points.

    DDIM's step is the integral of eps exp(-lambda) or x_0 exp(lambda), so that this is a mean with these weights. Over
    u = 0..1, that of u^k is M_k = 1 / (1 - exp(-h)) - k / h M_{k-1}, M_0 = 1 (the phi functions of exponential
    integrators), with -h for eps. quadratic scales M_2.
    """
    h = step_length(a, a_next)
    u = [step_length(a, point.a) / h for point in points]
    h, means = h if of == "x0" else -h, [1.0]
    for k in range(1, len(points)):
        means.append(1 / (1 - exp(-h)) - k / h * means[-1])
    means[2:3] = [quadratic * mean for mean in means[2:3]]
    weights = np.linalg.solve(np.vander(u, increasing=True).T, means).tolist()
    return sum(w * getattr(point, of) for w, point in zip(weights, points))


def step_length(a: float, a_next: float) -> float:
    """h = lambda' - lambda."""
    return half_log_snr(a_next) - half_log_snr(a)


def half_log_snr(a: float) -> float:
    """lambda of DPM-Solver: log(sqrt(a) / sqrt(1 - a))."""
    return 0.5 * log(a / (1 - a))


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
    "plms": Sampler(plms_step, history=3, spacing="rho7"),
    "plms2": Sampler(plms_step, history=1, spacing="rho7"),  # the number, here and below: of the order
    "plms3": Sampler(plms_step, history=2, spacing="rho7"),
    "pndm": Sampler(pndm_step, history=4, spacing="offset", twice=True),
    "deis": Sampler(deis_step, history=2, spacing="rho7"),
    "deis4": Sampler(deis_step, history=3, spacing="rho7"),  # tAB3 of the paper: a cubic
    "dpm++2m": Sampler(dpmpp_2m_step, history=1, spacing="rho7"),
    "dpm++3m": Sampler(dpmpp_3m_step, history=2, spacing="rho7"),
    "unipc": Sampler(dpmpp_2m_step, history=2, spacing="rho10", correct=unipc_correct),  # UniP-2 is DPM-Solver++(2M)
    "unipc3": Sampler(partial(dpmpp_3m_step, quadratic=1.0), history=3, spacing="logsnr", correct=unipc_correct),
}


def passes(steps: int, sampler: str) -> int:
    """How many steps a plan for so many timesteps has."""
    return steps + (isinstance(sampler, str) and sampler in SAMPLERS and SAMPLERS[sampler].twice)
