"""Convert a checkpoint: any known format -> minicache's own, or a diffusers folder.

python -m minicache convert model-790000.ckpt cifar10.pt
python -m minicache convert runs/shapes/last.pt my_unet --to diffusers
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minicache.checkpoints import fingerprint, locate, read, save
from minicache.formats.diffusers import save_diffusers
from minicache.tools import Parser


def main(args: argparse.Namespace) -> None:
    unet = read(locate(args.src), image_size=args.image_size, ema=not args.raw)
    if args.to == "diffusers":
        save_diffusers(args.dst, unet)
    elif args.dst.suffix in (".safetensors", ".npz", ".bin"):
        raise ValueError(f"{args.dst}: that ending belongs to another format; ours is .pt")
    else:
        save(args.dst, unet, args.half)
        unet = read(args.dst)  # half precision has another fingerprint
    parameters = sum(p.numel() for p in unet.parameters())
    print(f"{args.dst}: {parameters:,} parameters, {unet.config}, {unet.diffusion}, fingerprint {fingerprint(unet)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache convert", doc=__doc__)
    parser.add_argument("src", metavar="SRC", help="a name, or a file or folder of any format that minicache reads")
    parser.add_argument("dst", metavar="DST", type=Path, help="the file, or the diffusers folder, to write")
    parser.add_argument("--to", choices=("minicache", "diffusers"), default="minicache", help="(default: minicache)")
    parser.add_argument("--half", action="store_true", help="minicache: store float16, half the size")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", help="TensorFlow .npz: the moving averages (default)")
    which.add_argument("--raw", action="store_true", help="TensorFlow .npz: the raw variables")
    parser.add_argument("--image-size", type=int, help="for a bare state dict whose shapes do not tell: pixels a side")
    return parser.parse_args(argv)
