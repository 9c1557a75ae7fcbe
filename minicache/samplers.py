"""From noise to image: each sampler is a pure function beside its equation, and one loop runs them all, cached or not.

Notation: a is alphas_bar at this step's t and a_next at the next one's (1 after the last), so that
x_t = sqrt(a) x_0 + sqrt(1 - a) eps. Coefficients are float64 numbers; images are float32 [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import exp, log, sqrt
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minicache.diffusion import VARIANCES, Diffusion
from minicache.plan import CachePlan, full
from minicache.unet import UNet

SAMPLERS = ("ddim", "ddpm", "dpm++2m", "plms")
SPACINGS = ("uniform", "quad", "trailing", "linspace")
STEPS = 100  # unless asked for others


def timesteps(steps: int, spacing: str = "uniform", num_timesteps: int = 1000) -> list[int]:
    """The timesteps that `steps` steps visit, noisiest first; ValueError where they would begin at t = 0."""
    S, T = steps, num_timesteps
    if not 1 <= S <= T:
        raise ValueError(f"steps={S} is not in 1..{T}, the timesteps of this diffusion")
    if spacing == "uniform":  # DDIM's: range(0, T, T // S) where S divides T
        ts = [i * T // S for i in range(S)]
    elif spacing == "quad":  # DDIM's for CIFAR-10: repeats some, begins at 0.8 T
        ts = [int(root**2) for root in np.linspace(0, sqrt(0.8 * T), S)]
    elif spacing == "trailing":
        ts = [round((i + 1) * T / S) - 1 for i in range(S)]
    elif spacing == "linspace":
        ts = np.linspace(0, T - 1, S).round().astype(int).tolist()
    else:
        raise ValueError(f"spacing={spacing!r} is none of {', '.join(SPACINGS)}")
    if ts[-1] == 0:
        raise ValueError(f"steps={S} with spacing={spacing!r} would begin at t = 0, where no noise is left to remove")
    return ts[::-1]


def ddim_step(x0: Tensor, eps: Tensor, a: float, a_next: float, eta: float = 0.0, z: Tensor | None = None) -> Tensor:
    """DDIM (Song et al. 2021), Eq. 12 and 16: sqrt(a') x_0 + sqrt(1 - a' - sigma^2) eps + sigma z."""
    sigma = eta * sqrt((1 - a_next) / (1 - a)) * sqrt(1 - a / a_next)
    x = sqrt(a_next) * x0 + sqrt(1 - a_next - sigma**2) * eps
    return x + sigma * z if sigma > 0 else x


def ddpm_step(x: Tensor, x0: Tensor, a: float, a_next: float, variance: str, z: Tensor | None) -> Tensor:
    """DDPM (Ho et al. 2020), Eq. 7, from t to any earlier t': sqrt(a') beta / (1 - a) x_0 + ... x_t + sigma z."""
    alpha = a / a_next
    beta = 1 - alpha
    mean = sqrt(a_next) * beta / (1 - a) * x0 + sqrt(alpha) * (1 - a_next) / (1 - a) * x
    sigma = sqrt(beta if variance == "fixed_large" else beta * (1 - a_next) / (1 - a))
    return mean if a_next == 1 else mean + sigma * z


def dpmpp_2m_step(x: Tensor, x0: Tensor, a: float, a_next: float, past: tuple[float, Tensor] | None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022), Alg. 2; past is the last step's (a, x_0), None (first order) before that.

    With lambda = log(sqrt(a) / sqrt(1 - a)), h = lambda' - lambda and r = h_last / h:
    D = (1 + 1/2r) x_0 - 1/2r x_0_last,  x' = sigma'/sigma x - alpha' (exp(-h) - 1) D.
    """
    if a_next == 1:
        return x0
    h = _half_log_snr(a_next) - _half_log_snr(a)
    if past is not None:
        a_last, x0_last = past
        r = (_half_log_snr(a) - _half_log_snr(a_last)) / h
        x0 = (1 + 0.5 / r) * x0 - 0.5 / r * x0_last
    return sqrt((1 - a_next) / (1 - a)) * x - sqrt(a_next) * (exp(-h) - 1) * x0


def _half_log_snr(a: float) -> float:
    return 0.5 * log(a / (1 - a))


def adams_bashforth(eps: Tensor, past: list[Tensor]) -> Tensor:
    """PLMS (Liu et al. 2022), Eq. 12: eps combined with up to three earlier ones, the latest first, for DDIM's step."""
    order = min(len(past), 3)
    weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))[order]
    return sum(w * e for w, e in zip(weights, [eps, *past]))


class Step(NamedTuple):
    """What one step of `denoise` leaves behind."""

    i: int  # 0 is the noisiest step
    t: int
    x: Tensor  # the state after the step; after the last one, the image
    x0: Tensor  # the image as predicted at this step (clipped where clip_x0)
    eps: Tensor  # the network's output
    cached_U: Tensor  # at a refresh the fresh feature, else what stood in for it


def denoise(
    unet: UNet,
    seeds: Iterable[int] | None = None,
    *,
    x_T: Tensor | None = None,
    start: int | None = None,
    sampler: str = "ddim",
    steps: int | None = None,
    spacing: str = "uniform",
    eta: float = 0.0,
    variance: str | None = None,
    clip_x0: bool | None = None,
    plan: CachePlan | None = None,
) -> Iterator[Step]:
    """Denoise one batch, and yield a Step after each step.

    seeds: one whole number an image; all of its noise (x_T, then each step's z) comes from it alone, on the CPU, so
    an image does not depend on its batch or device. x_T [B, C, H, W]: start here instead (stochastic samplers need
    seeds as well). start: x_T is images noised to t = start - 1, and only timesteps below start are visited.
    sampler: one of SAMPLERS. steps: the plan's, or STEPS. spacing: one of SPACINGS. eta: DDIM's noise, 0 to 1.
    variance: DDPM's, one of VARIANCES; None is the checkpoint's own. clip_x0: clip the predicted image to [-1, 1];
    None is True for ddpm alone. plan: what to cache; None is nothing. ValueError says what is wrong.
    """
    if unet.training and unet.config.dropout:
        raise ValueError("the network is in training mode, where dropout spoils its output: call unet.eval() first")
    diffusion = unet.diffusion or Diffusion()
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is none of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1 or (eta and sampler != "ddim"):
        raise ValueError(f"eta={eta} with sampler={sampler!r}: need eta in 0..1, and 0 outside ddim")
    if variance not in (None, *VARIANCES):
        raise ValueError(f"variance={variance!r} is none of {', '.join(VARIANCES)}")
    if plan is not None and steps not in (None, plan.steps):
        raise ValueError(f"steps={steps} contradicts the plan, which has {plan.steps}")
    plan = plan or full(STEPS if steps is None else steps)
    if start is not None and (x_T is None or not 1 <= start <= diffusion.num_timesteps):
        raise ValueError(f"start={start} needs x_T, noised to t = start - 1, and to be in 1..{diffusion.num_timesteps}")
    ts = timesteps(plan.steps, spacing, start or diffusion.num_timesteps)
    stochastic = sampler == "ddpm" or eta > 0
    if seeds is None and (x_T is None or stochastic):
        raise ValueError("seeds are needed: for x_T, or for the noise of a stochastic sampler")
    seeds = None if seeds is None else list(seeds)
    if seeds is not None and (not seeds or (x_T is not None and len(seeds) != len(x_T))):
        raise ValueError(f"{len(seeds)} seeds for {'no' if x_T is None else len(x_T)} images; need one for each")

    device = next(unet.parameters()).device
    shape = (unet.config.in_channels, unet.config.image_size, unet.config.image_size)
    generators = [torch.Generator().manual_seed(index(seed)) for seed in seeds or ()]

    def noise() -> Tensor:
        draws = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators]
        return torch.stack(draws).to(device)

    x = noise() if generators else x_T
    if x_T is not None:
        if x_T.shape[1:] != shape:
            raise ValueError(f"x_T has shape {list(x_T.shape)}; need [B, {shape[0]}, {shape[1]}, {shape[2]}]")
        x = x_T.to(device, torch.float32)
    clip = sampler == "ddpm" if clip_x0 is None else clip_x0
    variance = variance or diffusion.variance
    return _loop(unet, x, ts, diffusion, sampler, eta, variance, clip, plan, noise if stochastic else None)


@torch.no_grad()
def _loop(unet, x, ts, diffusion, sampler, eta, variance, clip, plan, noise) -> Iterator[Step]:
    ts_device = torch.tensor(ts, device=x.device)
    refreshes = set(plan.refresh)
    older = newer = None  # cached_U of the last two refreshes
    past: list[tuple[float, Tensor, Tensor]] = []  # (a, eps, x0) of the last three steps, the latest first
    for i, t in enumerate(ts):
        if i in refreshes:
            older = newer if plan.forecasts else None
            eps, newer = unet.forward_full(x, ts_device[i : i + 1], plan.branch)
            cached_U = newer
        else:
            cached_U = torch.lerp(older, newer, 1 + plan.alpha[i]) if plan.alpha[i] else newer
            eps = unet.forward_partial(x, ts_device[i : i + 1], cached_U, plan.branch)

        a = diffusion.alphas_bar[t].item()
        a_next = diffusion.alphas_bar[ts[i + 1]].item() if i + 1 < len(ts) else 1.0
        direction = adams_bashforth(eps, [e for _, e, _ in past]) if sampler == "plms" else eps
        x0 = (x - sqrt(1 - a) * direction) / sqrt(a)
        x0 = x0.clamp(-1, 1) if clip else x0
        z = noise() if noise and a_next < 1 else None
        if a_next != a:  # quad repeats timesteps: a step of zero length changes nothing
            if sampler == "ddpm":
                x = ddpm_step(x, x0, a, a_next, variance, z)
            elif sampler == "dpm++2m":
                x = dpmpp_2m_step(x, x0, a, a_next, (past[0][0], past[0][2]) if past else None)
            else:
                x = ddim_step(x0, direction, a, a_next, eta, z)
            past = [(a, eps, x0), *past[:2]]
        yield Step(i, t, x, x0, eps, cached_U)


def sample(
    unet: UNet,
    seeds: Iterable[int] | None = None,
    *,
    x_T: Tensor | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    **settings,
) -> Tensor:
    """Images [B, C, H, W] near [-1, 1], float32 on the network's device: `denoise`, run to its end.

    seeds, x_T and settings as in `denoise`. batch_size: images at a time (default: all). progress: a bar on a terminal.
    """
    seeds = None if seeds is None else list(seeds)
    count = max(0 if many is None else len(many) for many in (seeds, x_T))
    size = max(count, 1) if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    steps = settings["plan"].steps if settings.get("plan") else settings.get("steps") or STEPS
    images = []
    with tqdm(total=-(-count // size) * steps, unit="step", disable=None if progress else True) as bar:
        for k in range(0, max(count, 1), size):
            part, x_part = (None if many is None else many[k : k + size] for many in (seeds, x_T))
            for step in denoise(unet, part, x_T=x_part, **settings):
                bar.update()
                x = step.x
            images.append(x)
    return torch.cat(images)
