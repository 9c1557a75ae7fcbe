"""Many pictures: a set of images in shards, which may be interrupted, killed and shared among processes.

A shard is one batch of consecutive seeds, so its bytes do not depend on who computes it, or when. It is on disk whole
or not at all, and whoever finds it there does not compute it again. A manifest says what the images are made with;
other settings are refused, and so is a second run while one is at work. Under torchrun every process takes its share of
the shards, and they meet only at the beginning and at the end: a run that lost a worker begins again, with as many as
are left.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from minicache.files import leftovers, replacing
from minicache.images import save_png

try:
    import fcntl
except ImportError:  # not on Windows, where two runs of one set are not kept apart
    fcntl = None

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

    @property
    def complete(self) -> bool:
        """Whether the .npz is there; a folder never tells."""
        return self.packed and self.out.exists()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Have the place to oneself, and say what the images are made with. ValueError where it is taken."""
        if self.complete:
            self.check(self.out, packed_manifest(self.out))
            shutil.rmtree(self.folder, ignore_errors=True)  # of a process that was killed just before it did so
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            manifest = self.folder / "manifest.json"
            drawn = next(self.folder.glob("*.npy" if self.packed else "*.png"), None)
            if manifest.exists():
                theirs = self.read(manifest)
                if drawn:
                    self.check(self.folder, theirs)
            elif drawn:
                raise ValueError(f"{drawn} exists, and nothing tells how it was made; choose another --out")
            with replacing(manifest) as temporary:
                temporary.write_text(json.dumps(self.manifest, indent=1) + "\n")
            yield

    def read(self, manifest: Path) -> dict[str, Any]:
        """A manifest of such a set; ValueError for any other file of that name, which is somebody's."""
        try:
            theirs = json.loads(manifest.read_text())
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict) or theirs.keys() != self.manifest.keys():
            raise ValueError(f"{manifest} tells of something else than pictures drawn here; choose another --out")
        return theirs

    def check(self, where: Path, theirs: dict[str, Any]) -> None:
        ours, theirs = flat(json.loads(json.dumps(self.manifest))), flat(theirs)  # as it reads after a way through JSON
        for name in {**ours, **theirs}:
            was, now = theirs.get(name), ours.get(name)
            if was != now:
                with_what = f"another {name}" if isinstance(was, list) else f"{name} {was}, not {now}"
                raise ValueError(f"{where} was made with {with_what}; choose another --out")

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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """ValueError where another process has the lock; it ends with the process that has it, however that ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being drawn into by another process; torchrun shares the work") from None
        yield
    finally:
        os.close(handle)


def flat(manifest: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"plan": {"steps": 5}} -> {"plan.steps": 5}"""
    items = {}
    for name, value in manifest.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return items


def packed_manifest(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("manifest.json"))
    except (zipfile.BadZipFile, KeyError, ValueError):
        raise ValueError(f"{path} exists, and nothing tells how it was made; choose another --out") from None


def fill(images: ImageSet, draw: Callable[[range], np.ndarray]) -> int:
    """Draw (seeds -> uint8 [B, H, W, C]) and write what is missing of this process's share; how many it drew."""
    rank, world = rank_and_world()
    with images.claimed() if rank == 0 else nullcontext():
        meet()
        complete, share = images.complete, images.shards[rank::world]
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
