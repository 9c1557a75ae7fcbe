"""Between tensors and what people look at: pictures, grids and animations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from minicache.files import replacing


def to_uint8(x: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C]: what lies outside is clamped, then all is rounded.

    Raises ValueError for NaN and infinity, which would pass for black and white.
    """
    if not torch.isfinite(x).all():
        raise ValueError("the pictures hold NaN or infinity; a wider --dtype may help")
    return rearrange(((x.float() + 1) * 127.5).clamp(0, 255).round().byte().cpu(), "b c h w -> b h w c").numpy()


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """The way back: uint8 [B, H, W, C] -> float32 [B, C, H, W] in [-1, 1]; a tensor stays on its device."""
    return rearrange(torch.as_tensor(images), "b h w c -> b c h w").contiguous().float() / 127.5 - 1


def grid(images: np.ndarray, pad: int = 2, columns: int | None = None) -> np.ndarray:
    """uint8 [B, H, W, C] -> one picture [H', W', C] on white; columns: None is as square as B allows."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    B, H, W, C = images.shape
    cells = np.full((rows * columns, H + pad, W + pad, C), 255, np.uint8)
    cells[:B, pad:, pad:] = images
    sheet = rearrange(cells, "(r c) h w d -> (r h) (c w) d", c=columns)
    return np.pad(sheet, ((0, pad), (0, pad), (0, 0)), constant_values=255)


def beside(left: np.ndarray, right: np.ndarray, gap: int = 8) -> np.ndarray:
    """Two pictures of one height next to each other."""
    return np.concatenate([left, np.full((left.shape[0], gap, left.shape[2]), 255, np.uint8), right], axis=1)


def picture(array: np.ndarray, scale: int = 1) -> Image.Image:
    """uint8 [H, W, 1 or 3] -> a PIL image, each pixel drawn scale x scale."""
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def enlargement(size: int) -> int:
    """How much to enlarge images of size x size so that a person sees them."""
    return max(1, 96 // size)


def save_png(path: str | Path, sheet: np.ndarray, scale: int = 1) -> None:
    with replacing(path) as temporary:
        picture(sheet, scale).save(temporary)


def save_gif(path: str | Path, sheets: Sequence[np.ndarray], scale: int = 1, seconds: float = 4.0) -> None:
    """An endless animation of `seconds`, then a pause on the last picture."""
    frames = [picture(sheet, scale) for sheet in sheets]
    durations = [max(20, int(1000 * seconds / len(frames)))] * (len(frames) - 1) + [1500]
    with replacing(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0)
