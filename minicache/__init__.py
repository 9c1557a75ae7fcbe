"""minicache: a minimal DDPM U-Net with DeepCache (arXiv 2312.00858), in pure PyTorch."""

from typing import Any

from minicache.diffusion import Diffusion
from minicache.plan import CachePlan, PlanCache, full, nonuniform, uncached, uniform  # noqa: F401
from minicache.recipe import Recipe
from minicache.samplers import denoise, sample
from minicache.unet import CIFAR10, LSUN_256, UNet, UNetConfig

__version__ = "0.1.0"
__all__ = [
    "CIFAR10",
    "LSUN_256",
    "CachePlan",
    "Diffusion",
    "PlanCache",
    "Recipe",
    "UNet",
    "UNetConfig",
    "denoise",
    "load",
    "nonuniform",
    "sample",
    "uncached",
    "uniform",
]


def __getattr__(name: str) -> Any:
    """`load` on first use: `python -m minicache checkpoints` would otherwise import its own module twice."""
    if name == "load":
        from minicache.checkpoints import load

        return load
    raise AttributeError(f"module 'minicache' has no attribute {name!r}")
