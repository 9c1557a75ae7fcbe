"""The forward process of DDPM (Ho et al. 2020): how an image becomes noise, the loss that teaches the way back, and the
timesteps that a way back visits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import exp, log, sqrt

import numpy as np
import torch
from torch import Tensor

VARIANCES = ("fixed_large", "fixed_small")
BETA_SCHEDULES = ("linear", "scaled_linear")
SPACINGS = ("uniform", "quad", "trailing", "linspace", "offset", "logsnr")  # and rho0.5 to rho100


@dataclass(frozen=True)
class Diffusion:
    """q(x_t | x_0) = N(sqrt(alphas_bar[t]) x_0, (1 - alphas_bar[t]) I), with betas that grow with t."""

    num_timesteps: int = 1000  # T: t runs over 0..T-1, T-1 the noisiest
    beta_start: float = 1e-4
    beta_end: float = 0.02
    variance: str = "fixed_large"  # of ancestral sampling: beta (fixed_large) or the posterior's (fixed_small)
    beta_schedule: str = "linear"  # in t the betas are linear, or their roots are (scaled_linear: latent diffusion)

    def __post_init__(self):
        if type(self.num_timesteps) is not int or not 1 <= self.num_timesteps <= 1000:
            raise ValueError(f"num_timesteps={self.num_timesteps!r} is not in 1..1000")
        betas = (self.beta_start, self.beta_end)
        if not all(type(beta) is float for beta in betas) or not 1e-9 <= self.beta_start <= self.beta_end < 1:
            raise ValueError(f"need floats 1e-9 <= beta_start <= beta_end < 1, not {betas[0]!r} and {betas[1]!r}")
        for name, allowed in (("variance", VARIANCES), ("beta_schedule", BETA_SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        if self.alphas_bar[-1] < 1e-30:
            raise ValueError(f"beta_end={self.beta_end} leaves nothing of an image after {self.num_timesteps} steps")

    @cached_property
    def alphas_bar(self) -> Tensor:
        """[T] float64 on the CPU: the part of x_0's variance that is left in x_t."""
        power = 2 if self.beta_schedule == "scaled_linear" else 1
        ends = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        betas = torch.linspace(*ends, self.num_timesteps, dtype=torch.float64) ** power
        return torch.cumprod(1 - betas, dim=0)

    def alpha_bar(self, t: float) -> float:
        """alphas_bar[t]; between whole timesteps log(alphas_bar / (1 - alphas_bar)), the log-SNR, is linear in t."""
        below, part = int(t), t - int(t)
        if part == 0:
            return self.alphas_bar[below].item()
        low, high = (log(a / (1 - a)) for a in self.alphas_bar[below : below + 2].tolist())
        return 1 / (1 + exp(-(low + part * (high - low))))

    def timestep(self, alpha_bar: float) -> float:
        """The inverse of `alpha_bar`: the t where that much is left, between 0 and T - 1."""
        return float(np.interp(log(1 / alpha_bar - 1), (1 / self.alphas_bar - 1).log(), range(self.num_timesteps)))

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise x0 [B, C, H, W] to t [B] with eps (Ho et al., Eq. 4): x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps."""
        signal, noise = self.scales(t, x0)
        return signal * x0 + noise * eps

    def loss(self, unet: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_simple (Eq. 14) of each image, [B]: the mean over pixels of (eps - unet(x_t, t))**2."""
        return (eps - unet(self.q_sample(x0, t, eps), t)).square().flatten(1).mean(1)

    def scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) at t, rounded to x's dtype at the very end, shaped to multiply x."""
        squares = (self.alphas_bar, 1 - self.alphas_bar)
        return tuple(square.sqrt().to(x.dtype).to(x.device)[t].reshape(-1, 1, 1, 1) for square in squares)

    def timesteps(self, steps: int, spacing: str = "uniform", start: int | None = None) -> list[float]:
        """The timesteps that `steps` steps visit, noisiest first.

        spacing: one of SPACINGS, or rho<number>. logsnr and rho are even in log s and in s ** (1 / rho), where
        s = sqrt(1 - abar) / sqrt(abar) (Karras et al. 2022, Eq. 5, for all of T - 1..0); most lie between whole t.
        start: only timesteps below start, the first is start - 1. ValueError where there are no such timesteps.
        """
        check_spacing(spacing)
        S, T = steps, min(start or self.num_timesteps, self.num_timesteps)
        if not 1 <= S <= T:
            raise ValueError(f"steps={S} is not in 1..{T}, the timesteps of this diffusion")
        if spacing == "uniform":  # DDIM's: range(0, T, T // S) where S divides T
            ts = [i * T // S for i in range(S)]
        elif spacing == "quad":  # DDIM's for CIFAR-10: repeats some, begins at 0.8 T
            ts = [int(root**2) for root in np.linspace(0, (0.8 * T) ** 0.5, S)]
        elif spacing == "trailing":
            ts = [round((i + 1) * T / S) - 1 for i in range(S)]
        elif spacing == "linspace":
            ts = np.linspace(0, T - 1, S).round().astype(int).tolist()
        elif spacing == "offset":  # latent diffusion's: from t = 1 on, for a last step that ends at t = 0
            if T % S > T / 10:  # so many are left out, the noisiest ones
                raise ValueError(f"steps={S} with spacing='offset' begin far below {T - 1}: take {T // (T // S + 1)}")
            ts = [i * (T // S) + 1 for i in range(S)]
        else:
            ends = [sqrt(1 / self.alpha_bar(t) - 1) for t in (0, T - 1)]
            if spacing == "logsnr":
                s = np.geomspace(*ends, S)
            else:
                rho = float(spacing.removeprefix("rho"))
                s = np.linspace(ends[0] ** (1 / rho), ends[1] ** (1 / rho), S) ** rho
            ts = [0, *(self.timestep(1 / (1 + each**2)) for each in s[1:-1].tolist()), T - 1][-S:]
        if (low := ts[-1] <= (spacing == "offset")) or ts[-1] >= T:
            why = "where no noise is left" if low else f"after the last one, {T - 1}"
            raise ValueError(f"steps={S} with spacing={spacing!r} would begin at t = {ts[-1]}, {why}")
        if start is not None and ts[-1] != start - 1:
            raise ValueError(f"spacing={spacing!r} does not begin at t = {start - 1}, where the noised images are")
        return ts[::-1]


def check_spacing(name: str) -> None:
    """ValueError for what is no spacing of `Diffusion.timesteps`."""
    rho = re.fullmatch(r"rho(\d+(\.\d+)?)", str(name))
    if name not in SPACINGS and not (rho and 0.5 <= float(rho[1]) <= 100):
        raise ValueError(f"spacing={name!r} is none of {', '.join(SPACINGS)}, rho0.5 to rho100 (as rho7)")
