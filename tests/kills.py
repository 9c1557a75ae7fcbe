"""Kill commands at random moments, and begin them again: they end as if undisturbed. A command (on Linux), not a test:

    python tests/kills.py                               about half an hour
    python tests/kills.py --only train --kills 5 --seed 3

SIGKILL comes while a command starts, works, or writes a file. Under torchrun it takes all processes, the launcher alone
or a rank alone, and those that are left must end by themselves. Then the same line is run again, until it ends by
itself; and all begins anew, until all kills have come. After a kill, each file must be whole; at the end, what an
undisturbed run leaves, byte by byte, but for what was measured in seconds, and the losses in log.csv, whose means begin
anew at each start. Exit 1 for anything else.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, random_unet

from minicache import UNetConfig
from minicache.checkpoints import save

PATIENCE = 60  # seconds until those that are left of a command must have ended
VICTIMS = ("all", "the launcher", "all", "a rank")  # in turn
TINY = UNetConfig(8, 8, (1, 2), num_res_blocks=1, attention_resolutions=(4,), groups=4)
SETS = "sample.py --ckpt NET --num 5000 --steps 5 --batch-size 10 --out OUT/"
TWO = "-m torch.distributed.run --nproc-per-node 2 -- "
TRAIN = "train_tiny.py --image-size 8 --model-channels 8 --channel-mult 1,2 --num-res-blocks 1 --groups 4"
TRAIN += " --attention-resolutions 4 --batch-size 8 --steps 600 --save-every 20 --preview-every 200 --out OUT/run"
EVALUATE = "-m minicache evaluate --ckpt NET --pairs 4 --budgets 5 --like ddim-20 --out OUT/table"
CALIBRATE = "-m minicache calibrate --ckpt NET --budget 5 --out OUT/recipe.json"
CASES = {  # a line; the temporary files at whose sight it is killed; the latest moment, as a part of its time at work
    "sets: folder": (SETS + "set", "set/.*.tmp.png", 0.25),
    "sets: folder, 2 processes": (TWO + SETS + "set", "set/.*.tmp.png", 0.25),
    "sets: npz": (SETS + "set.npz", ".*.tmp.npz", 0.25),
    "sets: npz, 2 processes": (TWO + SETS + "set.npz", ".*.tmp.npz", 0.25),
    "train": (TRAIN, "run/.*.tmp.*", 0.25),
    "evaluate": (EVALUATE, "table/**/.*.tmp.*", 0.25),
    "calibrate": (CALIBRATE, ".*.tmp.json", 1),  # which does not go on, but begins anew
}


class Run:
    """A command at work. Whatever it starts has its mark in the environment, and is found by that."""

    def __init__(self, line: str, out: Path):
        self.out, self.mark, self.said = out, f"{os.getpid()}-{time.time_ns()}", tempfile.TemporaryFile("w+")
        command = line.replace("NET", str(out.with_name("net.pt"))).replace("OUT", str(out)).split()
        command = [sys.executable, *command, *["--resume"] * (out / "run" / "last.pt").exists()]
        marked = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MINICACHE_KILLS": self.mark}
        self.before, output = self.changed(), {"stdout": self.said, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, cwd=ROOT, env=marked, **output)

    def changed(self) -> list[int]:
        """When a name last came or went in the folders that it writes to."""
        return [folder.stat().st_mtime_ns for folder in (self.out, *self.out.iterdir()) if folder.is_dir()]

    def works(self) -> bool:
        return self.changed() != self.before

    def lives_until(self, event: Callable[[], Any] = bool, seconds: float = 3600) -> bool:
        """Wait for an event, or so long; whether the command has not ended by then."""
        until = time.monotonic() + seconds
        while (lives := self.process.poll() is None) and time.monotonic() < until and not event():
            time.sleep(0.001)
        return lives

    def failure(self) -> list[str]:
        """Wait for its end; what it says if that is not a good one."""
        self.lives_until()
        self.said.seek(0)
        return [f"exit code {self.process.returncode}: {self.said.read()[-500:]!r}"] * (self.process.returncode != 0)

    def moment(self, chance: random.Random, start: float, rest: float, writing: str) -> str:
        """Wait for a moment to kill it at, and say which; "" when it ends before."""
        when, part = chance.choice(["starting", "working", "working", "writing"]), chance.random()
        if when == "writing":
            return when * self.lives_until(lambda: any(self.out.glob(writing)))
        working = when == "working" and self.lives_until(self.works)
        return when * self.lives_until(seconds=part * (rest if working else start))

    def family(self) -> list[int]:
        """Its processes, the first one first."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is somebody else's
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return sorted(found, key=lambda number: (number != self.process.pid, number))

    def kill(self, whom: str, chance: random.Random) -> tuple[str, int]:
        """Kill all, or the launcher or a rank where there are ranks: whom, and how many lived on for too long."""
        family = self.family()
        launcher, ranks = family[:1], family[1:]
        whom = whom if ranks else "all"
        kill({"all": family, "the launcher": launcher, "a rank": ranks and [chance.choice(ranks)]}[whom])
        until = time.monotonic() + PATIENCE
        while (left := self.family()) and time.monotonic() < until:
            self.process.poll()
            time.sleep(0.02)
        kill(left)
        self.process.wait()
        return whom, len(left)


def kill(numbers: list[int]) -> None:
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def content(path: Path) -> Any:
    """What must be the same of a file; an exception where it is not whole."""
    if path.suffix == ".pt":
        return leaves(torch.load(path))
    if path.suffix == ".md":
        return re.sub(r"[^|]*\|$", "", path.read_text(), flags=re.MULTILINE)  # without the speed-up
    if path.suffix == ".csv":
        return re.sub(r",.*$", "", path.read_text(), flags=re.MULTILINE)  # means of losses begin anew at each start
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return path.read_bytes()


def leaves(value: Any) -> list[Any]:
    """What a nest of dictionaries and lists holds, and the keys."""
    if isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else value
        return [leaf for part in parts for leaf in leaves(part)]
    return [value.numpy().tobytes() if isinstance(value, torch.Tensor) else value]


def whole(path: Path, final: Path) -> bool:
    """Whether a file, after a kill, can be read, and is what it will be, unless it is written again and again."""
    try:
        now, then = content(path), content(final) if path.suffix in (".png", ".npz", ".md") else None
    except Exception:
        return False
    return then is None or now == then[: len(now) if path.suffix == ".md" else None]


def files(out: Path) -> dict[str, Path]:
    return {str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()}


def disturbed(line: str, writing: str, part: float, place: Path, most: int, chance: random.Random) -> list[str]:
    """The figures of a case; then whatever was wrong."""
    right, out, wrong, kinds = place / "right", place / "out", [], Counter()
    right.mkdir()
    began, run = time.monotonic(), Run(line, right)
    run.lives_until(run.works)
    start = time.monotonic() - began
    if failure := run.failure():
        raise SystemExit(f"{line}, undisturbed: {failure[0]}")
    rest, kills, starts, rounds, began = time.monotonic() - began - start, 0, 0, 0, time.monotonic()
    while kills < most:
        out.mkdir()
        rounds, starts, run = rounds + 1, starts + 1, Run(line, out)
        while kills < most and (when := run.moment(chance, start, part * rest, writing)):
            whom, left = run.kill(VICTIMS[kills % len(VICTIMS)], chance)
            kills, kinds = kills + 1, kinds + Counter([when, whom])
            cut = [n for n, path in files(out).items() if path.name[0] != "." and not whole(path, right / n)]
            wrong += [f"kill {kills} ({when}, {whom}): {name} is not whole" for name in cut]
            (out / "recipe.json").unlink(missing_ok=True)  # as it would not be replaced
            wrong += [f"kill {kills} ({when}, {whom}): {left} processes live on for {PATIENCE} s"] * bool(left)
            starts, run = starts + 1, Run(line, out)
        found, there, expected = run.failure(), files(out), files(right)
        found += [f"{name} is {'missing' if name in expected else 'left'}" for name in there.keys() ^ expected.keys()]
        both = [name for name in there if name in expected]
        found += [f"{name} differs" for name in both if content(there[name]) != content(expected[name])]
        wrong += [f"round {rounds}: {what}" for what in found]
        shutil.rmtree(out)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    took = f"{time.monotonic() - began:.0f} s (undisturbed: {start:.0f} until it works, {rest:.0f} more)"
    return [f"{kills} kills ({told}), {starts} starts, {rounds} rounds, {took}", *wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each case")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", metavar="CASE", default=[""], help=f"or how it begins: {'; '.join(CASES)}")
    args, findings = parser.parse_args(), 0
    for name, case in [(name, case) for name, case in CASES.items() if name.startswith(tuple(args.only))]:
        with tempfile.TemporaryDirectory() as place:
            save(Path(place) / "net.pt", random_unet(TINY))
            told, *wrong = disturbed(*case, Path(place), args.kills, random.Random(f"{args.seed} {name}"))
        print(f"{name}: {told}: {'not equal' if wrong else 'equal'}", *wrong[:20], sep="\n    ", flush=True)
        findings += len(wrong)
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
