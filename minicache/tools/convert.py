"""Convert a checkpoint: any known format -> minicache's own, or a diffusers folder.

python -m minicache convert model-790000.ckpt cifar10.pt
python -m minicache convert runs/shapes/last.pt my_unet --to diffusers
python -m minicache convert v1-5-pruned-emaonly.safetensors sd15/unet --to diffusers
python -m minicache convert mine.bin mine.pt --image-size 32 --groups 8 --beta-end 0.02     # a bare state dict
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from minicache.checkpoints import fingerprint, locate, read, save
from minicache.diffusion import VARIANCES, Diffusion
from minicache.files import lies_in
from minicache.formats.diffusers import save_diffusers
from minicache.tools import Parser, make_folder


def main(args: argparse.Namespace) -> None:
    if args.beta_end is None and args.variance is not None:
        raise ValueError(f"--variance {args.variance} goes with --beta-end, without which there is no new schedule")
    schedule = {"beta_end": args.beta_end, "variance": args.variance or VARIANCES[0]}
    diffusion = None if args.beta_end is None else Diffusion(**schedule)
    settings = {"image_size": args.image_size, "groups": args.groups, "raw": args.raw}
    if args.half and args.to != "minicache":
        raise ValueError("--half is for minicache's own format")
    dtype, src = torch.float16 if args.half else torch.float32, locate(args.src)
    if args.dst.exists() and (lies_in(args.dst, src) or args.dst.samefile(src)):
        raise ValueError(f"{args.dst} is what is converted, or a part of it; choose another name")
    if args.to == "minicache" and (args.dst.is_dir() or args.dst.suffix in (".safetensors", ".npz", ".bin")):
        raise ValueError(f"{args.dst} is a folder, or has the ending of another format; ours is a file, NAME.pt")
    unet = read(src, diffusion=diffusion, dtype=dtype, **settings)
    make_folder(args.dst.parent)
    if args.to == "diffusers":
        save_diffusers(args.dst, unet)
    else:
        save(args.dst, unet, args.half)
        unet = read(args.dst, dtype=dtype)  # half precision has another fingerprint
    parameters = sum(p.numel() for p in unet.parameters())
    print(f"{args.dst}: {parameters:,} parameters, {unet.config}, {unet.diffusion}, fingerprint {fingerprint(unet)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache convert", doc=__doc__)
    parser.add_argument("src", metavar="SRC", help="a name, or a file or folder of any format that minicache reads")
    parser.add_argument("dst", metavar="DST", type=Path, help="the file, or the diffusers folder, to write")
    parser.add_argument("--to", choices=("minicache", "diffusers"), default="minicache", help="(default: minicache)")
    parser.add_argument("--half", action="store_true", help="minicache: store float16, half the size")
    parser.add_argument(
        "--raw", action="store_true", help="TensorFlow's and CompVis': not the averages, where both are"
    )
    bare = "what a bare state dict does not tell (unless it is a published network's)"
    add = parser.add_argument_group(bare).add_argument
    add("--image-size", type=int, metavar="PIXELS", help="a side")
    add("--groups", type=int, help="of its GroupNorms")
    add("--beta-end", type=float, help="of the noise schedule that it was trained with")
    add("--variance", choices=VARIANCES, help=f"of ancestral sampling (default: {VARIANCES[0]})")
    return parser.parse_args(argv)
