"""Between tensors and what people look at: pictures, grids and animations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minicache.files import replacing

BAND = 44  # pixels under a picture, for its label
FONT_SIZES = (12, 11, 10, 9, 8)  # the largest that leaves room for all of a label is taken
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


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


def labelled(images: np.ndarray, labels: Sequence[str], columns: int | None = None, scale: int = 1) -> np.ndarray:
    """A `grid`, each pixel drawn scale x scale, with each picture's label in a band under it: uint8 [H', W', 3].

    A long label is wrapped, then shrunk, then cut. ValueError where there is not one label for each picture.
    """
    if len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} pictures; need one for each")
    cells = []
    for image, label in zip(images, labels):
        enlarged = picture(image, scale)
        cell = Image.new("RGB", (enlarged.width, enlarged.height + BAND), "white")
        cell.paste(enlarged)
        draw = ImageDraw.Draw(cell)
        lines, font, pitch = fitted(label, cell.width)
        for k, line in enumerate(lines):
            left = (cell.width - font.getlength(line)) / 2
            draw.text((left, enlarged.height + k * pitch), line, "black", font)
        cells.append(np.asarray(cell))
    return grid(np.stack(cells), pad=4, columns=columns)


def fitted(label: str, width: int) -> tuple[list[str], Font, int]:
    """Lines of at most `width` pixels that fit in BAND, their font, and the distance from line to line."""
    label = label[: 4 * width]  # no more letters are seen, and to measure a million of them again and again takes days
    for size in FONT_SIZES:
        font, pitch = default_font(size), size + 1
        lines, room = wrapped(label, width, font), 1 + int((BAND - font.getbbox("gj")[3]) / pitch)
        if len(lines) <= room and all(font.getlength(line) <= width for line in lines):
            return lines, font, pitch
    lines = lines[:room]
    while font.getlength(max(lines, key=font.getlength)) > width:
        lines = [line[:-1] if font.getlength(line) > width else line for line in lines]
    return lines, font, pitch


def wrapped(text: str, width: int, font: Font) -> list[str]:
    """As many words in each line as `width` pixels hold; a line of one word may be longer."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def default_font(size: int) -> Font:
    """Pillow's own font; before Pillow 10.1 it has one size, of about 11 pixels."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


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
