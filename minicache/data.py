"""Images to train on. A source is a function draw(n, generator) -> x0 [n, 3, S, S] in [-1, 1]; a captioned one (see
`captions`) gives x0 and the ids of words [n, K], or None for them.

A training step's images depend on its generator alone, so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import io
import math
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from minicache.files import cache_folder, fetch, lies_in
from minicache.images import to_tensor
from minicache.reading import read_whole, understood, unzip

Source = Callable[[int, torch.Generator], Tensor]
CaptionedSource = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # no pickles inside, unlike the Python archive
CIFAR10_CHECKSUM = "md5:c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # of images, whatever their names; for EPS Pillow would run a program
BUILT_IN = ("shapes", "cifar10")  # names of sources; a folder of such a name is ./shapes
MOST_PIXELS = 1 << 26  # of an image
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp")
OTHERS = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".ppm", ".pgm", ".tga", ".ico", ".svg")


def source(name: str, image_size: int, out: Path | None = None) -> Source:
    """The source of that name: "shapes" (procedural, endless), "cifar10" (downloaded), or a folder or zip of images.

    Images from files are flipped left to right with probability 1/2. Raises ValueError where there are none, and where
    the folder that is written to, `out`, lies among them.
    """
    if name in BUILT_IN:
        tell_of_folder(name)
    if name == "shapes":
        return lambda n, generator: shapes(n, image_size, generator)
    if name == "cifar10":
        if image_size != 32:
            raise ValueError(f"image_size={image_size}: CIFAR-10 has 32")
        images, _ = cifar10()
    else:
        if out and lies_in(out, name):
            raise ValueError(f"--out {out} lies in --data {name}: a resumed run would learn from its own previews")
        images = read_images(Path(name), image_size)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        batch = images[torch.randint(len(images), (n,), generator=generator)]
        flip = torch.rand(n, generator=generator) < 0.5
        batch[flip] = batch[flip].flip(2)
        return to_tensor(batch)

    return draw


def tell_of_folder(name: str) -> None:
    """Warn where a folder has this name, too, of what is built in and is taken."""
    if Path(name).is_dir():
        warnings.warn(f"{name} is a built-in source; the folder of that name is ./{name}", stacklevel=3)


def wordless(draw: Source) -> CaptionedSource:
    """A source of pictures without words: its ids are None."""
    return lambda n, generator: (draw(n, generator), None)


def batch(
    draw: CaptionedSource, size: int, num_timesteps: int, jitter: float, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x0 [B, C, H, W], t [B], eps [B, C, H, W] and context of a step: they depend on the seed and the step alone.

    t: one random timestep from each of `size` equal parts of 0..T-1, so that every step has some of the noisiest.
    eps: the noise of each image is scaled by 1 + jitter * N(0, 1). The norm of plain noise varies by only 1%, and a
    network full of normalisations learns slowly to see that; what it does not see stays in the picture as grain.
    """
    generator = torch.manual_seed(seed * 1_000_003 + step)  # the global one: dropout draws from it after this
    x0, context = draw(size, generator)
    t = ((torch.arange(size) + torch.rand(size, generator=generator)) * num_timesteps / size).long()
    eps = torch.randn(x0.shape, generator=generator) * (1 + jitter * torch.randn(size, 1, 1, 1, generator=generator))
    return x0, t.clamp(max=num_timesteps - 1), eps, context


def cifar10(split: str = "train") -> tuple[Tensor, Tensor]:
    """CIFAR-10 (Krizhevsky 2009): uint8 [N, 32, 32, 3], and classes 0..9 [N]; 50,000 of "train", 10,000 of "test"."""
    path = fetch(CIFAR10_URL, cache_folder() / "cifar-10-binary.tar.gz", CIFAR10_CHECKSUM, 170)
    names = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    with tarfile.open(path) as archive:
        batches = [archive.extractfile(f"cifar-10-batches-bin/{name}.bin").read() for name in names]
    records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # a label, then the pixels
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()
    return torch.from_numpy(images), torch.from_numpy(records[:, 0].astype(np.int64))


def labelled(name: str, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Images and classes, as `cifar10` returns them, and the classes' names in the order of their numbers.

    name: "cifar10", or a folder or zip with one folder a class. Classes are numbered in the order of their names.
    """
    if name == "cifar10":
        tell_of_folder(name)
        return *cifar10(split), list(CIFAR10_CLASSES)
    classes = [Path(file).parent.name for file, _ in image_files(Path(name))]
    names = sorted(set(classes))
    return read_images(Path(name), 32), torch.tensor([names.index(each) for each in classes]), names


def walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, also where links lead, but each folder once; none of hidden folders, such as
    .ipynb_checkpoints, which has old copies. OSError where it may not look."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # of two ways to one, always the same
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
        else:
            seen.add(real)
            yield from (Path(root) / name for name in names)


def all_files(path: Path) -> list[tuple[str, Callable[[], bytes]]]:
    """Name and content of all that is in a folder (and below) or a zip, in the order of the names."""
    if path.is_dir():
        return [(str(file), partial(read_whole, file)) for file in sorted(walk(path))]
    if path.is_file() and zipfile.is_zipfile(path):
        with understood(path, "a zip that can be read"):
            archive = zipfile.ZipFile(path)
        members = [
            (each.filename.replace("\\", "/"), each) for each in archive.infolist()
        ]  # as old Windows tools write
        members.sort(key=lambda member: member[0])
        shown = [each for each in members if not any(part.startswith(".") for part in Path(each[0]).parts[:-1])]
        return [(name, partial(unzip, archive, member)) for name, member in shown]
    raise ValueError(f"{path} is no folder or zip of images")


def image_files(path: Path) -> list[tuple[str, Callable[[], bytes]]]:
    """Those of images. A warning tells of pictures of other kinds, which are left out."""
    files = all_files(path)
    if others := [name for name, _ in files if name.lower().endswith(OTHERS) and not of_macos(name)]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(f"left out of {path}: {others[0]}{more}; taken are {', '.join(SUFFIXES)}", stacklevel=2)
    return [(name, content) for name, content in files if is_image(name)]


def each_image(path: Path, image_size: int | None) -> Iterator[np.ndarray]:
    """Every image in a folder or zip, one at a time, in the order of the names: uint8 [H, W, 3].

    image_size: H and W; images are scaled, and cropped about the centre. None: all must have the first one's size.
    Raises ValueError where an image cannot be read, or there is none.
    """
    shape, files = None, image_files(path)
    if not files:
        raise ValueError(f"data={str(path)!r} holds no images ({', '.join(SUFFIXES)})")
    for name, content in tqdm(files, desc="reading", unit="image", disable=None, leave=False):
        image = decode(content, f"{name} in {path}")
        size = image.size if image_size is None else (image_size, image_size)
        pixels = np.asarray(ImageOps.fit(image, size, Image.Resampling.BOX))
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise ValueError(f"{name} in {path} is {image.width}x{image.height} pixels, unlike the first image")
        yield pixels


def decode(content: Callable[[], bytes], name: str) -> Image.Image:
    """The image in a file's content: RGB, turned as its camera says, on white where it is transparent.

    ValueError, with the name, where it cannot be read: it must be one of FORMATS, and have at most MOST_PIXELS.
    """
    with understood(name, "an image that can be read"):
        try:
            image = Image.open(io.BytesIO(content()), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"it has {image.width}x{image.height} pixels, more than {MOST_PIXELS:,}")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip: the upper 8, as Pillow has of RGB
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def read_images(path: Path, image_size: int | None) -> Tensor:
    """All of `each_image` together: uint8 [N, S, S, 3]."""
    return torch.from_numpy(np.stack(list(each_image(path, image_size))))


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not of_macos(name)


def of_macos(name: str) -> bool:
    return Path(name).name.startswith("._")  # it puts ._name beside each name


def shapes(n: int, size: int, generator: torch.Generator) -> Tensor:
    """n pictures [n, 3, size, size] in [-1, 1]: one or two outlined discs, rings, squares, triangles or crosses each.

    They lie on a gradient. Each is drawn from its signed distance, so edges are smooth at any size.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, 1, 1, generator=generator)

    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")  # [size, size] in (-1, 1)
    angle = uniform(0, 2 * math.pi, n, 1)
    slope = 0.5 + 0.35 * (x * angle.cos() + y * angle.sin())
    light, dark = hue(uniform(0, 1, n), 0.35, uniform(0.75, 1, n)), hue(uniform(0, 1, n), 0.45, uniform(0.25, 0.6, n))
    image = dark + (light - dark) * slope.clamp(0, 1)

    count = torch.randint(1, 3, (n, 1, 1, 1), generator=generator)
    for k in range(2):
        kind = torch.randint(5, (n, 1, 1), generator=generator)
        radius, turn = uniform(0.35, 0.6, n), uniform(0, 2 * math.pi, n)
        cx, cy = uniform(-0.6, 0.6, n), uniform(-0.6, 0.6, n)
        u = (x - cx) * turn.cos() + (y - cy) * turn.sin()
        v = (y - cy) * turn.cos() - (x - cx) * turn.sin()
        distance = signed_distances(u, v, radius).gather(1, kind[:, None].expand(-1, 1, size, size))
        fill = hue(uniform(0, 1, n), 0.85, uniform(0.8, 1, n)) * (0.9 - 0.25 * (v / radius)[:, None]).clamp(0.4, 1)
        pixel, drawn = 2 / size, count > k
        image = torch.lerp(image, 0.15 * fill, (0.5 - distance / pixel).clamp(0, 1) * drawn)  # the outline
        image = torch.lerp(image, fill, (0.5 - (distance + 1.4 * pixel) / pixel).clamp(0, 1) * drawn)
    return image * 2 - 1


def signed_distances(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """To the disc, ring, square, triangle and cross of radius r about the origin: [n, 5, S, S], negative inside."""
    length, au, av = (u * u + v * v).sqrt(), u.abs(), v.abs()
    disc = length - r
    ring = (length - 0.72 * r).abs() - 0.28 * r
    square = torch.maximum(au, av) - 0.8 * r
    triangle = torch.maximum(0.866 * au + 0.5 * v, -v) - 0.55 * r
    cross = torch.minimum(
        torch.maximum(au - r, av - 0.33 * r),
        torch.maximum(av - r, au - 0.33 * r),
    )
    return torch.stack([disc, ring, square, triangle, cross], dim=1)


def hue(h: Tensor, saturation: float, value: Tensor) -> Tensor:
    """HSV -> RGB: h in [0, 1] and value [n, 1, 1] -> [n, 3, 1, 1] in [0, 1]."""
    offsets = torch.tensor([5.0, 3.0, 1.0]).reshape(1, 3, 1, 1)
    k = (offsets + 6 * h[:, None]) % 6
    return value[:, None] * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))
