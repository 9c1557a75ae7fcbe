"""Read damaged files of every kind: each is read, or refused in one sentence. A command (on Linux), not a test:

    python tests/fuzz.py --num 2000
    python tests/fuzz.py --only recipe --first 17 --num 1     what seed 17 does to a recipe, with its traceback

A valid small file is damaged, by its seed, and read in a process that may take 5 seconds and 1 GB. A ValueError or an
OSError of one line is right; exit 1 for anything else.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import random_unet, tensorflow
from PIL import Image

from minicache import Diffusion, Recipe, UNetConfig, load, uniform
from minicache.captions import captioned
from minicache.checkpoints import read, save
from minicache.data import each_image, labelled
from minicache.formats.diffusers import save_diffusers
from minicache.metrics import read_samples
from minicache.shards import ImageSet, fill
from minicache.solver import Solver
from minicache.words import Vocabulary

MEMORY = 1 << 30
TINY = UNetConfig(4, 8, (1, 2), num_res_blocks=1, attention_resolutions=(2,), groups=4)
KNOWN = {"image_size": 4, "groups": 4, "diffusion": Diffusion()}  # what a bare file of TINY does not tell
NASTY = ["null", "true", "-1", "0", "2.5", "1e308", "-1e999", "NaN", "9" * 400, "1000000000", '""', '"x"', "[]", "{}",
         "[" * 3000, '{"a":' * 3000]  # fmt: skip


# Each kind of file: a function of a folder that writes a valid one, and one that reads it. --------------------------


def picture(path: Path, kind: str = "PNG") -> Path:
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path, kind)
    return path


def checkpoint(path: Path) -> Path:
    unet = random_unet(replace(TINY, context_dim=8, num_tokens=3))
    unet.vocabulary = Vocabulary(("blue", "red"), 3, examples=("red",))
    save(path, unet)
    return path


def safetensors(path: Path) -> Path:
    from safetensors.torch import save_file

    save_diffusers(path.parent / "folder", random_unet(TINY))
    save_file(torch.load(path.parent / "folder" / "diffusion_pytorch_model.bin"), path)
    return path


def variables(path: Path) -> Path:
    np.savez(path, **tensorflow(random_unet(TINY)))
    return path


def folder(name: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        save_diffusers(path, random_unet(TINY))
        return path / name

    return write


def recipe(path: Path) -> Path:
    solver = Solver((900, 500.5, 20), ((1.0,), (1.5, -0.5), (1.0,)))
    Recipe(uniform(3, 2), solver, guidance=2.0, fingerprint="0123456789abcdef", error=0.1).save(path)
    return path


def images(path: Path) -> ImageSet:
    return ImageSet(path, range(2), 1, {"plan": {"steps": 3, "refresh": [0, 2]}, "eta": 0.0, "weights": "abc"})


def draw(seeds: range) -> np.ndarray:
    return np.zeros((len(seeds), 4, 4, 3), np.uint8)


def manifest(path: Path) -> Path:
    fill(images(path), draw)
    return path / "manifest.json"


def packed(path: Path) -> Path:
    fill(images(path), draw)
    return path


def captions(path: Path) -> Path:
    picture(path.with_name("a.png"))
    path.write_text('file,caption\na.png,a red cat\na.png,"blue, not green"\n')
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.png", "b/2.png"):
            archive.write(picture(path.with_name("x")), name)
    path.with_name("x").unlink()
    return path


def alone(kind: str) -> tuple[str, Callable, Callable]:
    return f"{kind}.png", lambda path: picture(path, kind.upper()), lambda path: [*each_image(path.parent, None)]


READERS = {
    "checkpoint": ("x.pt", checkpoint, load),
    "safetensors": ("x.safetensors", safetensors, lambda path: read(path, **KNOWN)),
    "npz": ("x.npz", variables, lambda path: read(path, raw=True, **KNOWN)),
    "config.json": ("x", folder("config.json"), load),
    "scheduler": ("x", folder("scheduler_config.json"), load),
    "recipe": ("x.json", recipe, Recipe.load),
    "manifest": ("x", manifest, lambda path: fill(images(path), draw)),
    "set": ("x.npz", packed, lambda path: (fill(images(path), draw), list(read_samples(path).pieces()))),
    "zip": ("x.zip", zipped, lambda path: labelled(str(path), "train")),
    **{kind: alone(kind) for kind in ("png", "jpeg", "gif", "bmp", "webp")},
    "captions": ("captions.csv", captions, lambda path: captioned(path.parent).images(4)),
}

# Damage ------------------------------------------------------------------------------------------------------------


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A few bits, bytes, slices or words of it are not what they were. Half of the archives are damaged within a file
    of theirs, as its checksum would give away all other damage."""
    if zipfile.is_zipfile(io.BytesIO(content)) and chance.random() < 0.5:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        name = chance.choice(sorted(files))
        files[name] = damaged(files[name], chance)
        with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
            for name, inner in files.items():
                archive.writestr(name, inner)
        return made.getvalue()
    if content[:1] == b"{" and chance.random() < 0.8:
        words = re.findall(r'"[^"]*"|[\w.+-]+|\W', content.decode())
        values = [k for k, word in enumerate(words) if word.strip()]
        for _ in range(chance.randint(1, 3)):
            words[chance.choice(values)] = chance.choice([*NASTY, *words])
        return "".join(words).encode()
    damage, n = bytearray(content), max(1, len(content))
    for _ in range(chance.choice([1, 1, 2, 8])):
        at, length = chance.randrange(n), min(1 << chance.randrange(10), n)
        kind = chance.choice(["bit", "byte", "cut", "end", "zero", "copy", "noise"])
        if kind == "bit" and at < len(damage):
            damage[at] ^= 1 << chance.randrange(8)
        elif kind == "byte" and at < len(damage):
            damage[at] = chance.choice([0, 1, 127, 128, 255])
        elif kind == "end":
            del damage[at:]
        else:
            other = {"zero": bytes(length), "copy": content[: n - at][-length:], "noise": chance.randbytes(length)}
            damage[at : at + length] = other.get(kind, b"")
    return bytes(damage)


def attempt(name: str, seed: int, valid: Path, verbose: bool = False) -> str:
    """One damaged file, read: "read", "refused", or what went wrong."""
    start, _, read_it = READERS[name]
    place = valid.with_name("copy")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(valid, place)
    target = place / (valid / "target").read_text()
    if seed >= 0:
        target.write_bytes(damaged(target.read_bytes(), random.Random(f"{name} {seed}")))
    try:
        read_it(place / start)
        return "read"
    except (ValueError, OSError) as error:
        if verbose:
            traceback.print_exc()
        text = str(error)
        return "refused" if text and "\n" not in text else f"not one sentence: {text[:200]!r}"
    except BaseException as error:
        if verbose:
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]!r} ({Path(where.filename).name}:{where.lineno})"


# The process that reads, and the one that watches it ------------------------------------------------------------------


def work(pipe, name: str, valid: Path) -> None:
    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + MEMORY, base + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        pipe.send(attempt(name, pipe.recv(), valid))


def fuzz(name: str, seeds: range, valid: Path, seconds: float) -> dict[int, str]:
    outcomes, process = {}, None
    for seed in seeds:
        if process is None:
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(target=work, args=(theirs, name, valid), daemon=True)
            process.start()
            theirs.close()
        ours.send(seed)
        try:
            outcomes[seed] = ours.recv() if ours.poll(seconds) else f"more than {seconds:g} seconds"
        except EOFError:
            process.join()
            outcomes[seed] = f"the process died: {process.exitcode}"
        if outcomes[seed].startswith(("more than", "the process died")):
            process.kill()
            process = None
    if process:
        process.kill()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=2000, help="damaged files of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=5, help="for each file; more on a busy machine")
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS), help="kinds of files")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    findings = 0
    print(f"{'file':14}{'read':>7}{'refused':>9}{'wrong':>7}")
    for name in args.only:
        with tempfile.TemporaryDirectory() as place:
            valid = Path(place) / "valid"
            valid.mkdir()
            target = READERS[name][1](valid / READERS[name][0])
            (valid / "target").write_text(str(target.relative_to(valid)))
            if (sound := attempt(name, -1, valid)) != "read":
                raise SystemExit(f"{name}: the sound file is not read: {sound}")
            if args.num == 1:
                attempt(name, args.first, valid, verbose=True)
            outcomes = fuzz(name, range(args.first, args.first + args.num), valid, args.seconds)
        counts = Counter(outcome if outcome in ("read", "refused") else "wrong" for outcome in outcomes.values())
        print(f"{name:14}{counts['read']:7}{counts['refused']:9}{counts['wrong']:7}", flush=True)
        kinds: dict[str, list[int]] = {}
        for seed, outcome in outcomes.items():
            if outcome not in ("read", "refused"):
                kinds.setdefault(outcome, []).append(seed)
        for outcome, seeds in kinds.items():
            print(f"    {outcome}: seeds {', '.join(map(str, seeds[:5]))}{', ...' * (len(seeds) > 5)} ({len(seeds)})")
        findings += len(kinds)
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
