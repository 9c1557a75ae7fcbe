"""minicache: a minimal DDPM U-Net with DeepCache (arXiv 2312.00858), in pure PyTorch."""

from minicache.checkpoints import CIFAR10, LDM_IMAGENET, LSUN_256, SD_15, load
from minicache.diffusion import Diffusion
from minicache.plan import CachePlan, PlanCache, nonuniform, uncached, uniform
from minicache.recipe import Recipe
from minicache.sampling import denoise, sample
from minicache.unet import UNet, UNetConfig

__version__ = "0.1.0"
__all__ = [
    "CIFAR10",
    "LDM_IMAGENET",
    "LSUN_256",
    "SD_15",
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
