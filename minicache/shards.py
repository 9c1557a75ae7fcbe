"""Many pictures, drawn in shards: a run may be interrupted, killed, begun again, and shared among processes.

A shard is one batch of consecutive seeds, so its bytes do not depend on the process that draws it, or on when. It is on
disk whole or not at all, and a shard that is there is not drawn again, unless it is broken. A manifest says how the
images are made: a run with other settings is refused, and so is a second run while one is at work. Under torchrun each
process draws its share of the shards, and they meet only at the beginning and at the end. If one dies, begin again,
with as many as you like: each computes with the threads of the first run, since the last bits depend on their number.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from minicache.files import locked, replacing
from minicache.images import save_png

END_OF_PNG = b"IEND\xae\x42\x60\x82"
PATIENCE = timedelta(days=7)  # how long a process that has drawn its share waits for the others


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are, as torchrun says; (0, 1) without it."""
    rank, world = (os.environ.get(name, usual) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank}, WORLD_SIZE={world} in the environment: torchrun sets 0 <= RANK < WORLD_SIZE")
    return int(rank), int(world)


def meet() -> None:
    """Wait for all processes. They exchange nothing else, so gloo is enough on every device."""
    if rank_and_world()[1] > 1:
        if not dist.is_initialized():
            if dist.is_torchelastic_launched():
                threading.Thread(target=end_with, args=(launcher(),), daemon=True).start()
            dist.init_process_group("gloo", timeout=PATIENCE)
        dist.barrier()


def launcher() -> int:
    """The number of torchrun's process. ValueError where it was killed before, and this process has another parent.

    torchrun does not tell its number: a parent is believed that is Python, or a script that torchrun has started. The
    others would be waited for in vain, or, where the same line is run again, met among those of the new run.
    """
    parent = os.getppid()
    try:
        script = b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{parent}/environ").read_bytes()
        gone = not script and not Path(os.readlink(f"/proc/{parent}/exe")).name.startswith("python")
    except OSError:  # which is not told; orphans go to the first process, as a rule
        gone = parent == 1
    if gone:
        raise ValueError("torchrun, which has started this process, has gone")
    return parent


def end_with(launcher: int) -> None:
    """End this process when torchrun has been killed: the others may have gone, too, and would be waited for."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(2)  # from whatever it is doing, as a kill would


@dataclass(frozen=True)
class ImageSet:
    """The images of `seeds` at `out`, an .npz or a folder of PNGs, in shards of batch_size. manifest: plain JSON."""

    out: Path
    seeds: range
    batch_size: int
    manifest: dict[str, Any]

    @property
    def packed(self) -> bool:
        return self.out.suffix == ".npz"

    @property
    def folder(self) -> Path:
        """Where the shards are. Those of an .npz lie beside it until it is complete."""
        return self.out.with_name(self.out.name + ".parts") if self.packed else self.out

    @property
    def shards(self) -> list[range]:
        return [self.seeds[k : k + self.batch_size] for k in range(0, len(self.seeds), self.batch_size)]

    def files(self, shard: range) -> list[Path]:
        if self.packed:
            return [self.folder / f"{shard[0]:09d}.npy"]
        return [self.folder / f"{seed:06d}.png" for seed in shard]

    def write(self, shard: range, images: np.ndarray) -> None:
        """images: uint8 [B, H, W, C], one a seed. ValueError where a file would be written through a link."""
        if len(images) != len(shard):
            raise ValueError(f"{len(images)} images were drawn for {len(shard)} seeds")
        if links := [path for path in self.files(shard) if path.is_symlink()]:
            raise ValueError(f"{links[0]} is a link, and what it leads to no picture drawn here; remove the link")
        if self.packed:
            with replacing(self.files(shard)[0]) as temporary:
                np.save(content := io.BytesIO(), images)  # to a file, it misses that the disk is full
                temporary.write_bytes(content.getbuffer())
        else:
            for path, image in zip(self.files(shard), images):
                save_png(path, image)

    @property
    def complete(self) -> bool:
        """Whether the .npz is there. A folder is never known to be complete."""
        return self.packed and self.out.exists()

    def drawn(self, shard: range) -> bool:
        """Whether its files are there and whole; what is not will be drawn again."""
        if not self.packed:
            return all(map(whole_png, self.files(shard)))
        try:
            return np.lib.format.open_memmap(self.files(shard)[0], "r").shape[:1] == (len(shard),)
        except (OSError, ValueError, EOFError):
            return False

    @contextmanager
    def claimed(self, first: bool) -> Iterator[None]:
        """Share the lock of the folder, and compute with as many threads as the manifest says, as bits depend on that.

        first: of the processes that share the work; it has the lock alone while it writes the manifest. What is left of
        a run that was killed holds the lock, too. ValueError where others draw there, or other images are there.
        """
        if self.complete:
            self.check(self.out, packed_manifest(self.out))
            with suppress(OSError, ValueError):  # nothing is left, or it is somebody's
                self.check(self.folder, self.read(self.folder / "manifest.json"))
                self.discard()  # left by a process that was killed at the very end
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        refusal = f"{self.folder} is being drawn into by another process; torchrun shares the work"
        with locked(self.folder, refusal, shared=not first) as take:
            if first:
                self.declare()
                take(shared=True)
            made_with = self.read(self.folder / "manifest.json")
            self.check(self.folder, made_with)
            before = torch.get_num_threads()
            torch.set_num_threads(int(made_with.get("threads", before)))
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def declare(self) -> None:
        """Write the manifest, unless there is one, and pictures; ValueError where it or they are somebody else's."""
        manifest = self.folder / "manifest.json"
        found = next(self.folder.glob("*.npy" if self.packed else "*.png"), None)
        if manifest.exists():
            self.read(manifest)
        elif found:
            raise ValueError(f"{found} exists, and nothing tells how it was made; choose another --out")
        if not found:
            with replacing(manifest) as temporary:
                made_with = {**self.manifest, "threads": torch.get_num_threads()}
                temporary.write_text(json.dumps(made_with, indent=1) + "\n")

    def read(self, manifest: Path) -> dict[str, Any]:
        """The content of a manifest. ValueError for any other file of that name: it belongs to somebody."""
        try:
            theirs = json.loads(manifest.read_text())
            if theirs.keys() - {"threads"} == self.manifest.keys() and theirs.get("threads", 1) in range(1, 1025):
                return theirs
        except (ValueError, AttributeError, RecursionError):
            pass
        raise ValueError(f"{manifest} tells of something else than pictures drawn here; choose another --out")

    def check(self, where: Path, theirs: dict[str, Any]) -> None:
        """ValueError where their manifest, found at `where`, is not ours; it names the first setting that differs."""
        ours, theirs = flat(json.loads(json.dumps(self.manifest))), flat(theirs)  # as JSON gives it back
        theirs.pop("threads", None)  # is taken over, not compared
        for name in {**ours, **theirs}:
            was, now = theirs.get(name), ours.get(name)
            if was != now:
                with_what = f"another {name}" if isinstance(was, list) else f"{name} {was}, not {now}"
                raise ValueError(f"{where} was made with {with_what}; choose another --out")

    def finish(self) -> None:
        """Make one .npz of all shards, read one at a time, and remove them once it has been read back.

        The images are arr_0 [N, H, W, C], which the evaluator of ADM (Dhariwal & Nichol 2021) reads.
        """
        made_with = (self.folder / "manifest.json").read_text()
        first = np.load(self.files(self.shards[0])[0], mmap_mode="r")
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(self.seeds), *first.shape[1:])}
        with replacing(self.out) as temporary:
            with zipfile.ZipFile(temporary, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for shard in self.shards:
                        images = np.load(self.files(shard)[0])
                        if (images.dtype, images.shape) != (first.dtype, (len(shard), *first.shape[1:])):
                            raise ValueError(f"{self.files(shard)[0]} holds other images than {first.filename}")
                        file.write(images.tobytes())
                archive.writestr(zipfile.ZipInfo("manifest.json"), made_with)
            with zipfile.ZipFile(temporary) as archive:
                if broken := archive.testzip():
                    raise OSError(f"{self.out} cannot be written: {broken} reads back as something else")
        self.discard()

    def discard(self) -> None:
        """Remove the shards of an .npz, then what tells that they are ours, and their folder, unless it holds more."""
        for path in (*(self.files(shard)[0] for shard in self.shards), self.folder / "manifest.json"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def whole_png(path: Path) -> bool:
    """Whether the file is there, and ends as a PNG does."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(END_OF_PNG), os.SEEK_END)
            return file.read() == END_OF_PNG
    except OSError:
        return False


def flat(manifest: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"plan": {"steps": 5}} -> {"plan.steps": 5}"""
    items = {}
    for name, value in manifest.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return items


def packed_manifest(path: Path) -> dict[str, Any]:
    """The manifest in an .npz; ValueError for an .npz without one, and for any other file."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError
        with zipfile.ZipFile(path) as archive:
            return {**json.loads(archive.read("manifest.json"))}
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, RuntimeError):
        raise ValueError(f"{path} exists, and nothing tells how it was made; choose another --out") from None


def fill(images: ImageSet, draw: Callable[[range], np.ndarray]) -> int:
    """Draw what is missing of this process's share, and write it; the number of images drawn.

    draw: seeds -> uint8 [B, H, W, C]. Raises ValueError as `claimed` does.
    """
    rank, world = rank_and_world()
    if rank > 0:
        meet()  # when the first has written the manifest
    with images.claimed(first=rank == 0):
        if rank == 0:
            meet()
        complete, share = images.complete, images.shards[rank::world]
        missing = [shard for shard in share if not complete and not images.drawn(shard)]
        total, left = sum(map(len, share)), sum(map(len, missing))
        with tqdm(total=total, initial=total - left, unit="image", disable=None if rank == 0 else True) as bar:
            for shard in missing:
                images.write(shard, draw(shard))
                bar.update(len(shard))
        meet()
        if rank == 0 and images.packed and not complete:
            images.finish()
    return left
