"""The checkpoints there are: name, size, EMA or not, on disk or not.

python -m minicache list
"""

from __future__ import annotations

import argparse

from minicache.checkpoints import EMBEDDED, REGISTRY, embedded_folder
from minicache.tools import Parser


def listing() -> str:
    """A table of all names, for a person to choose from."""
    rows = [("name", "MB", "EMA", "on disk", "note", "from")]
    for name in EMBEDDED:
        size = (embedded_folder() / f"{name}.pt").stat().st_size
        rows.append((name, f"{size / 1e6:.1f}", "yes", "yes", "embedded; see weights/README.md", "train_tiny.py"))
    for name, entry in REGISTRY.items():
        here = "yes" if entry.path(name).exists() else "no"
        rows.append((name, str(entry.megabytes), "yes" if entry.ema else "NO", here, entry.note, entry.url))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main(args: argparse.Namespace) -> None:
    print(listing())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return Parser(prog="python -m minicache list", doc=__doc__).parse_args(argv)
