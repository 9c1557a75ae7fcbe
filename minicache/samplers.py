"""The samplers: each is a pure function beside its equation, and one entry of SAMPLERS. sampling.py has their loop.

Notation: a is alphas_bar at this step's t and a_next at the next one's (1 after the last), so that
x_t = sqrt(a) x_0 + sqrt(1 - a) eps. Coefficients are float64 numbers; images are float32 [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import NamedTuple

from torch import Tensor


class Point(NamedTuple):
    """One evaluation of the network on the way from noise to image."""

    a: float
    x: Tensor  # the state x_t
    eps: Tensor  # the network's output there
    x0: Tensor  # the image that eps predicts, clipped where `clip`
    clip: bool = False


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


def dpmpp_2m_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022), Alg. 2; of first order where there is no past.

    With lambda = log(sqrt(a) / sqrt(1 - a)), h = lambda' - lambda and r = h_last / h:
    D = (1 + 1/2r) x_0 - 1/2r x_0_last,  x' = sigma'/sigma x - alpha' (exp(-h) - 1) D.
    """
    if a_next == 1:
        return now.x0
    x0, h = now.x0, half_log_snr(a_next) - half_log_snr(now.a)
    if past:
        r = (half_log_snr(now.a) - half_log_snr(past[0].a)) / h
        x0 = (1 + 0.5 / r) * x0 - 0.5 / r * past[0].x0
    return sqrt((1 - a_next) / (1 - now.a)) * now.x - sqrt(a_next) * (exp(-h) - 1) * x0


def half_log_snr(a: float) -> float:
    """lambda of DPM-Solver: log(sqrt(a) / sqrt(1 - a))."""
    return 0.5 * log(a / (1 - a))


def plms_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """PLMS (Liu et al. 2022), Eq. 12: DDIM's step along a direction from this eps and up to three earlier ones.

    The weights are those of Adams and Bashforth, which assume steps of equal length in t. The first steps are of lower
    order; there is no Runge-Kutta warm-up, so that every step costs one pass.
    """
    eps = adams_bashforth([now.eps, *(point.eps for point in past)])
    return ddim_step(now._replace(eps=eps, x0=predict_x0(now.x, eps, now.a, now.clip)), past, a_next)


def pndm_step(now: Point, past: Sequence[Point], a_next: float) -> Tensor:
    """PLMS as Stable Diffusion has it, its first step taken twice: from the start of Euler's once more, along the mean
    direction of both ends. Adams and Bashforth then go on with the end's eps where the second try has led to.

    (Latent diffusion's plms.py; diffusers' PNDMScheduler without Runge-Kutta steps.)
    """
    if a_next == now.a:
        start, eps = past[0], (now.eps + past[0].eps) / 2
        return ddim_step(start._replace(eps=eps, x0=predict_x0(start.x, eps, start.a, start.clip)), (), now.a)
    latest = {point.a: point for point in (*reversed(past), now)}  # at each a the later of two
    now, *past = reversed(latest.values())
    return plms_step(now, past, a_next)


def adams_bashforth(slopes: Sequence[Tensor]) -> Tensor:
    """The mean slope over the next step, from up to four slopes at equal distances, the latest first."""
    weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    return sum(w * slope for w, slope in zip(weights[min(len(slopes), 4) - 1], slopes))


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
    "plms": Sampler(plms_step, history=3, spacing="linspace"),
    "pndm": Sampler(pndm_step, history=4, spacing="offset", twice=True),
}


def passes(steps: int, sampler: str) -> int:
    """How many steps a plan for so many timesteps has."""
    return steps + (sampler in SAMPLERS and SAMPLERS[sampler].twice)
