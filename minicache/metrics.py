"""How far images are from images: in pairs (relative L2, PSNR), as features (cosine), as distributions (FID)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minicache.data import read_images
from minicache.samplers import Step
from minicache.unet import UNet


def relative_l2(x: Tensor, reference: Tensor) -> Tensor:
    """||x - reference|| / ||reference|| of each image: [B, ...] -> [B]."""
    return (x - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, clipped to [-1, 1]: [B, ...] -> [B]."""
    return 10 * torch.log10(4 / (x.clamp(-1, 1) - reference.clamp(-1, 1)).square().flatten(1).mean(1))


def cosine_similarity(steps: Iterable[Step]) -> Tensor:
    """[S, S]: cosine of cached_U between each two of S steps, mean over the batch (DeepCache, Fig. 2b).

    steps: of an uncached `denoise`, plan=full(S, branch); the features of all steps are held at once.
    """
    features = torch.stack([step.cached_U.flatten(1).float() for step in steps], dim=1)  # [B, S, CHW]
    features = features / features.norm(dim=2, keepdim=True)
    return (features @ features.mT).mean(0)


@torch.no_grad()
def unet_features(unet: UNet, images: Tensor, batch_size: int = 64) -> Tensor:
    """[B, C] float64: the middle of a diffusion network, averaged over pixels, at images scaled to a low timestep.

    Offline features that every checkpoint brings along. Distances in them are comparable within one checkpoint alone.
    """
    t = unet.diffusion.num_timesteps // 20
    signal = unet.diffusion.alphas_bar[t].sqrt().item()
    parts = images.clamp(-1, 1).split(batch_size)
    middles = [unet.forward_full(signal * part, t, branch=len(unet.D))[1] for part in parts]
    return torch.cat([middle.mean((2, 3)) for middle in middles]).cpu().double()  # mps has no float64


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the normal distributions that fit features a [N, C] and b [M, C] (Heusel et al. 2017, Eq. 6):

    ||mu_a - mu_b||^2 + tr(A + B - 2 (A B)^1/2). Biased upwards, by about C^2/4 (1/N + 1/M)
    where covariances are 1: compare equal counts.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs two features at least on each side, not {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    mean_part = (a.mean(0) - b.mean(0)).square().sum()
    A, B = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # A B and A^1/2 B A^1/2 have the same eigenvalues, and the latter is symmetric
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return max(0.0, (mean_part + A.trace() + B.trace() - 2 * cross).item())


def read_samples(path: str | Path) -> np.ndarray:
    """uint8 [N, H, W, 3]: the npz (arr_0) or folder of images that sample.py writes, or a zip of images."""
    path = Path(path)
    if path.suffix == ".npz":
        try:
            images = np.load(path, allow_pickle=False)["arr_0"]
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"{path} is not an npz with arr_0: {error}") from None
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}; need uint8 [N, H, W, 3]")
        return images
    return read_images(path, image_size=None).permute(0, 2, 3, 1).numpy()


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet Inception Distance of uint8 images [N, H, W, 3], by torch-fidelity, which downloads Inception once."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise ValueError("FID needs torch-fidelity: pip install 'minicache[fid]'") from None

    class Images(torch.utils.data.Dataset):
        def __init__(self, images: np.ndarray):
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> Tensor:
            return torch.from_numpy(self.images[i]).permute(2, 0, 1)

    result = calculate_metrics(
        input1=Images(a), input2=Images(b), fid=True, cuda=torch.cuda.is_available(), verbose=False
    )
    return result["frechet_inception_distance"]
