"""The protocol by which plans are compared: one for every method, and fixed before any search.

Error: relative L2 of the final, unclipped image, of each seed, to the reference of the same seed.
Reference: DPM-Solver++(2M) with as many steps as there are timesteps, trailing; for an ancestral sampler, whose images
depend on the number of steps, the uncached run of the same steps and the same noise.
Start: pure noise; or images noised to t = start - 1, which stay where a weakly trained network is good.
Seeds: plans are searched on CALIBRATION, must beat fewer steps once more on CHECK, and are reported on HELD_OUT, among
which are sample.py's own pictures.
Cost: MACs of convolutions and linear layers, in full passes of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minicache.checkpoints import fingerprint
from minicache.data import Source
from minicache.metrics import relative_l2
from minicache.plan import full
from minicache.recipe import Recipe
from minicache.samplers import SPACINGS, sample, timesteps
from minicache.unet import UNet

CALIBRATION = range(10_000, 10_008)
CHECK = range(10_008, 10_024)
HELD_OUT = range(32)
BATCH = 16
SOLVERS = ("ddim", "dpm++2m", "plms")  # the samplers without noise, which share one limit as steps grow


@dataclass(frozen=True, eq=False)
class Trial:
    """Seeds, where their trajectories begin, and where they should end."""

    unet: UNet
    seeds: Sequence[int]
    x_T: Tensor | None  # None: pure noise, from the seeds
    reference: Tensor  # [len(seeds), C, H, W]
    fingerprint: str  # of the network's weights

    def images(self, recipe: Recipe) -> Tensor:
        settings = recipe.settings(self.fingerprint)
        return sample(self.unet, self.seeds, x_T=self.x_T, batch_size=BATCH, **settings)

    def errors(self, recipe: Recipe) -> Tensor:
        """Relative L2 of each image, [len(seeds)]."""
        return relative_l2(self.images(recipe), self.reference)


def trial(
    unet: UNet,
    seeds: Sequence[int],
    reference: Recipe | None = None,
    *,
    draw: Source | None = None,
    start: int | None = None,
    progress: bool = False,
) -> Trial:
    """Compute a reference (default: `finest`). draw: images to begin from, noised to t = start - 1; both or neither."""
    if (draw is None) != (start is None):
        raise ValueError("images and start go together: the images are noised to t = start - 1")
    x_T = None if draw is None else noised(unet, seeds, draw, start)
    weights = fingerprint(unet)
    settings = (reference or finest(unet, start)).settings(weights)
    images = sample(unet, seeds, x_T=x_T, batch_size=BATCH, progress=progress, **settings)
    return Trial(unet, seeds, x_T, images, weights)


def finest(unet: UNet, start: int | None = None) -> Recipe:
    """The reference of all samplers without noise."""
    return Recipe(full(start or unet.diffusion.num_timesteps), "dpm++2m", "trailing", start=start)


def noised(unet: UNet, seeds: Sequence[int], draw: Source, start: int) -> Tensor:
    """One image a seed, noised to t = start - 1; image and noise come from the seed."""
    parts = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x0 = draw(1, generator)
        parts.append(unet.diffusion.q_sample(x0, torch.tensor([start - 1]), torch.randn(x0.shape, generator=generator)))
    return torch.cat(parts)


def spacings(start: int | None) -> list[str]:
    """Those that may be used: all from pure noise; from noised images those that begin where the noise is."""
    return [name for name in SPACINGS if start is None or timesteps(2, name, start)[0] == start - 1]


def uncached(unet: UNet, steps: int, samplers: Sequence[str] = SOLVERS, start: int | None = None) -> list[Recipe]:
    """Fewer steps instead of caching, the baseline that matters: each sampler with every spacing."""
    weights = fingerprint(unet)
    return [
        Recipe(full(steps), sampler, spacing, start=start, fingerprint=weights)
        for sampler in samplers
        for spacing in spacings(start)
    ]
