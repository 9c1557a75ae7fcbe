"""Many pictures: a set of images in shards, which may be interrupted, killed and shared among processes.

A shard is one batch of consecutive seeds, so its bytes do not depend on who computes it, or when. It is on disk whole
or not at all, and whoever finds it there does not compute it again. A manifest says what the images are made with;
other settings are refused. Under torchrun every process takes its share of the shards, and they meet only at the
beginning and at the end: a run that lost a worker begins again, with as many as are left.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from minicache.files import leftovers, replacing
from minicache.images import save_png

PATIENCE = timedelta(days=7)  # of a process that has done its share


def rank_and_world() -> tuple[int, int]:
    """As torchrun tells; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def meet() -> None:
    """Wait for all processes. Nothing else passes between them, so gloo will do on every device."""
    if rank_and_world()[1] > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        dist.barrier()


@dataclass(frozen=True)
class ImageSet:
    """Images of `seeds`, in batches of batch_size, at `out`: an .npz, or a folder of PNGs. manifest: plain JSON."""

    out: Path
    seeds: range
    batch_size: int
    manifest: dict[str, Any]

    @property
    def packed(self) -> bool:
        return self.out.suffix == ".npz"

    @property
    def folder(self) -> Path:
        """Where shards are: beside an .npz until it is complete."""
        return self.out.with_name(self.out.name + ".parts") if self.packed else self.out

    @property
    def shards(self) -> list[range]:
        return [self.seeds[k : k + self.batch_size] for k in range(0, len(self.seeds), self.batch_size)]

    def files(self, shard: range) -> list[Path]:
        if self.packed:
            return [self.folder / f"{shard[0]:09d}.npy"]
        return [self.folder / f"{seed:06d}.png" for seed in shard]

    def write(self, shard: range, images: np.ndarray) -> None:
        """images: uint8 [B, H, W, C]."""
        if self.packed:
            with replacing(self.files(shard)[0]) as temporary:
                np.save(temporary, images)
        else:
            for path, image in zip(self.files(shard), images):
                save_png(path, image)

    def claim(self) -> None:
        """Say what the images are made with. ValueError where the place is taken by other ones."""
        manifest = self.folder / "manifest.json"
        if self.packed and self.out.exists():
            self.check(self.out, packed_manifest(self.out))
        elif manifest.exists():
            self.check(self.folder, json.loads(manifest.read_text()))
        else:
            taken = next((path for shard in self.shards for path in self.files(shard) if path.exists()), None)
            if taken:
                raise ValueError(f"{taken} exists, and nothing tells how it was made; choose another --out")
            with replacing(manifest) as temporary:
                temporary.write_text(json.dumps(self.manifest, indent=1) + "\n")

    def check(self, where: Path, theirs: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(self.manifest))  # as it reads after a journey through JSON
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                was, now = (shorten(str(manifest.get(name)), 60) for manifest in (theirs, ours))
                raise ValueError(f"{where} was made with {name} {was}, not {now}; choose another --out")

    def finish(self) -> None:
        """One .npz of all shards, read one at a time; in a folder, remove what killed processes have left behind.

        arr_0 [N, H, W, C] is what the evaluator of ADM (Dhariwal & Nichol 2021) reads.
        """
        if not self.packed:
            for leftover in leftovers(self.folder):
                leftover.unlink(missing_ok=True)
            return
        first = np.load(self.files(self.shards[0])[0], mmap_mode="r")
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(self.seeds), *first.shape[1:])}
        with replacing(self.out) as temporary:
            with zipfile.ZipFile(temporary, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for shard in self.shards:
                        file.write(np.load(self.files(shard)[0]).tobytes())
                archive.writestr(zipfile.ZipInfo("manifest.json"), json.dumps(self.manifest, indent=1) + "\n")
        shutil.rmtree(self.folder)


def packed_manifest(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("manifest.json"))
    except (zipfile.BadZipFile, KeyError, ValueError):
        raise ValueError(f"{path} exists, and nothing tells how it was made; choose another --out") from None


def fill(images: ImageSet, draw: Callable[[range], np.ndarray]) -> int:
    """Draw (seeds -> uint8 [B, H, W, C]) and write what is missing of this process's share; how many it drew."""
    rank, world = rank_and_world()
    if rank == 0:
        images.claim()
    meet()
    complete = images.packed and images.out.exists()
    share = images.shards[rank::world]
    missing = [shard for shard in share if not complete and not all(path.exists() for path in images.files(shard))]
    total, left = sum(map(len, share)), sum(map(len, missing))
    with tqdm(total=total, initial=total - left, unit="image", disable=None if rank == 0 else True) as bar:
        for shard in missing:
            images.write(shard, draw(shard))
            bar.update(len(shard))
    meet()
    if rank == 0 and not complete:
        images.finish()
    return left
