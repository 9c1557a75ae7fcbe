"""How far images are from images: in pairs (relative L2, PSNR), as features (cosine), as distributions (FID)."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minicache.data import MOST_PIXELS, cifar10, each_image, image_files, tell_of_folder
from minicache.reading import LARGEST, understood
from minicache.sampling import Step

PIECE = 64  # images that are held at a time


def relative_l2(x: Tensor, reference: Tensor) -> Tensor:
    """||x - reference|| / ||reference|| of each image: [B, ...] -> [B]."""
    return (x - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, clipped to [-1, 1]: [B, ...] -> [B]."""
    return 10 * torch.log10(4 / (x.clamp(-1, 1) - reference.clamp(-1, 1)).square().flatten(1).mean(1))


def cosine_similarity(steps: Iterable[Step]) -> Tensor:
    """[S, S]: cosine of cached_U between each two of S steps, mean over the batch (DeepCache, Fig. 2b).

    steps: of an uncached `denoise`, plan=uncached(S, branch); the features of all steps are held at once.
    """
    features = torch.stack([step.cached_U.flatten(1).float() for step in steps], dim=1)  # [B, S, CHW]
    features = features / features.norm(dim=2, keepdim=True)
    return (features @ features.mT).mean(0)


class Moments(NamedTuple):
    """All that a Frechet distance needs to know of N features [N, C]."""

    count: int
    mean: Tensor  # float64 [C]
    covariance: Tensor  # float64 [C, C]


def moments(parts: Iterable[Tensor]) -> Moments:
    """Of features that come in parts [B, C], of which one at a time is held; ValueError for fewer than two rows."""
    count, total, squares = 0, 0.0, 0.0
    for part in parts:
        part = part.cpu().double()  # mps has no float64
        count, total, squares = count + len(part), total + part.sum(0), squares + part.T @ part
    if count < 2:
        raise ValueError(f"a Frechet distance needs two images at least on each side, not {count}")
    mean = total / count
    return Moments(count, mean, (squares - count * torch.outer(mean, mean)) / (count - 1))


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """Between the normal distributions that fit features a [N, C] and b [M, C] (Heusel et al. 2017, Eq. 6):

    ||mu_a - mu_b||^2 + tr(A + B - 2 (A B)^1/2). Biased upwards, by about C^2/4 (1/N + 1/M)
    where covariances are 1: compare equal counts.
    """
    (_, mu_a, A), (_, mu_b, B) = (x if isinstance(x, Moments) else moments([x]) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # A B and A^1/2 B A^1/2 have the same eigenvalues, and the latter is symmetric
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    distance = ((mu_a - mu_b).square().sum() + A.trace() + B.trace() - 2 * cross).item()
    if not math.isfinite(distance):
        raise ValueError("features that are NaN or infinite have no Frechet distance")
    return max(0.0, distance)


class Samples(NamedTuple):
    """Pictures on disk that need not fit in memory: 50,000 of 256 x 256 pixels are 10 GB."""

    shape: tuple[int, ...]  # [N, H, W, 3]
    pieces: Callable[[], Iterator[np.ndarray]]  # reads them from the first on: uint8 [B, H, W, 3], B <= PIECE

    def moments(self, features: Callable[[np.ndarray], Tensor], sets: int = 1) -> list[Moments]:
        """Of the features of so many equal sets, one after the other; features: uint8 [B, H, W, 3] -> [B, C]."""
        size = self.shape[0] // sets
        rows = chain.from_iterable(map(features, self.pieces()))
        return [moments(in_parts(islice(rows, size))) for _ in range(sets)]


def in_parts(rows: Iterator[Tensor]) -> Iterator[Tensor]:
    while part := list(islice(rows, PIECE)):
        yield torch.stack(part)


def read_samples(path: str | Path) -> Samples:
    """The npz (arr_0) or folder of images that sample.py writes, or a zip of images; or "cifar10", its training set.

    ValueError for anything else.
    """
    if path == "cifar10":
        tell_of_folder(path)
        images = cifar10("train")[0]
        return Samples(tuple(images.shape), lambda: (piece.numpy() for piece in images.split(PIECE)))
    path = Path(path)
    if path.suffix == ".npz":
        with opened(path) as (_, shape):
            return Samples(shape, partial(npz_pieces, path))
    first = next(each_image(path, None))
    return Samples((len(image_files(path)), *first.shape), partial(image_pieces, path))


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """arr_0 of an npz as a stream of bytes, and its shape; pickles are not read."""
    with understood(path, "an npz whose arr_0 holds images"):
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("there is no file of that name")
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, by_columns, dtype = read[np.lib.format.read_magic(file)](file)
            if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or by_columns:
                raise ValueError(f"it is {dtype} {list(shape)}; need uint8 [N, H, W, 3]")
            if math.prod(shape[1:3]) > MOST_PIXELS:
                raise ValueError(f"it has pictures of {shape[2]}x{shape[1]} pixels, more than {MOST_PIXELS:,}")
            if math.prod(shape) != (found := archive.getinfo("arr_0.npy").file_size - file.tell()):
                raise ValueError(f"its {shape[0]} pictures would be {math.prod(shape):,} bytes, and it holds {found:,}")
            yield file, shape


def npz_pieces(path: Path) -> Iterator[np.ndarray]:
    with opened(path) as (file, (count, *shape)):
        most = held(shape)
        for k in range(0, count, most):
            content = bytearray(file.read(min(most, count - k) * math.prod(shape)))
            yield np.frombuffer(content, np.uint8).reshape(-1, *shape)


def image_pieces(path: Path) -> Iterator[np.ndarray]:
    images = each_image(path, None)
    for first in images:
        yield np.stack([first, *islice(images, held(first.shape) - 1)])


def held(shape: Sequence[int]) -> int:
    """How many images [H, W, 3] make a piece: PIECE, or what LARGEST bytes hold; even files of a few kB may hold GB."""
    return max(1, min(PIECE, LARGEST // max(1, math.prod(shape))))


def inception() -> Callable[[np.ndarray], Tensor]:
    """The features of FID: uint8 [B, H, W, 3] -> [B, 2048], by torch-fidelity, which downloads Inception once."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError("FID needs torch-fidelity: pip install 'minicache[fid]'") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    return lambda images: network(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))[0]


def fid(a: Samples, b: Samples) -> float:
    """Frechet Inception Distance of two sets of images."""
    features = inception()
    return frechet_distance(*a.moments(features), *b.moments(features))
