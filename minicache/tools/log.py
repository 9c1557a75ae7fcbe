"""log.csv of a training run: its losses, every so many steps. It also tells whose the pictures beside it are."""

from __future__ import annotations

from pathlib import Path

from minicache.files import replacing
from minicache.reading import read_whole, understood

HEADER = "step,loss,loss_noisiest_tenth,seconds"


def claim(folder: Path) -> None:
    """Begin the log of a folder, if there is none. ValueError where it, or previews beside it, are somebody else's."""
    path, checkpoint = folder / "log.csv", folder / "last.pt"
    drawn, lines = next(folder.glob("preview_*.png"), None), read(path)
    if drawn and not path.exists() and not checkpoint.exists():
        raise ValueError(f"{drawn} exists, and no log.csv tells that a run drew it; choose another --out")
    if lines and not checkpoint.exists():
        raise ValueError(f"{path} tells of a run whose last.pt is gone; choose another --out, or remove it")
    write(path, lines)


def log(path: Path, step: int, *values: float) -> None:
    """Add a line, in place of those from this step on, which a run that was killed left."""
    kept = [line for line in read(path) if int(line.partition(",")[0]) < step]
    write(path, [*kept, ",".join([str(step), *(f"{value:.6g}" for value in values)])])


def read(path: Path) -> list[str]:
    """Its lines but for the header, each of which begins with a step. ValueError for any other file of that name."""
    if not path.exists():
        return []
    with understood(path, "the log of a training run"):
        header, *lines = read_whole(path).decode().splitlines()
        if header != HEADER or not all(line.partition(",")[0].isdecimal() for line in lines):
            raise ValueError("it has other lines; choose another --out")
    return lines


def write(path: Path, lines: list[str]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("\n".join([HEADER, *lines, ""]))
