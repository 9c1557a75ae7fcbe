"""Frechet Inception Distance of two sets of images, by torch-fidelity (an extra).

    python -m minicache fid samples.npz cifar10_train/

FID is comparable only between equal counts of images: papers take 50,000 samples against the training set.
"""

from __future__ import annotations

import argparse

from minicache.metrics import fid, read_samples
from minicache.tools import Parser


def main(args: argparse.Namespace) -> None:
    a, b = read_samples(args.samples), read_samples(args.reference)
    print(f"FID {fid(a, b):.3f} ({a.shape[0]} images against {b.shape[0]})", flush=True)
    if a.shape[0] < 50_000:
        print("  fewer than the 50,000 samples of published values, which are lower: not comparable with them")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache fid", doc=__doc__)
    parser.add_argument("samples", metavar="SAMPLES", help="npz or folder written by sample.py, or a zip of images")
    parser.add_argument("reference", metavar="REFERENCE", help="likewise, of as many images or of a training set")
    return parser.parse_args(argv)
