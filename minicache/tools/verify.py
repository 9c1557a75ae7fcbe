"""Were real weights loaded right? Compares a network's outputs with those published by diffusers.

python -m minicache verify ddpm_cifar10
"""

from __future__ import annotations

import argparse
import json

import torch

from minicache.checkpoints import REGISTRY, embedded_folder, fingerprint, locate, read
from minicache.files import digest
from minicache.tools import Parser
from minicache.unet import UNet

TOLERANCE = 1e-3  # of diffusers' own test of these values


@torch.no_grad()
def golden_distances(unet: UNet) -> dict[str, float]:
    """Published network of this image size -> the largest difference of its 30 published outputs from this one's.

    Nothing where none of this size is published; with a context, none is.
    """
    published = json.loads((embedded_folder() / "golden_ddpm_logits.json").read_text())
    size = unet.config.image_size
    names = [name for name in published if not name.startswith("_") and name.endswith(f"_{size}")]
    if unet.config.context_dim or not names:
        return {}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.config.in_channels, size, size, generator=generator, dtype=torch.float32, device="cpu")
    eps = unet(x, 10)[0, 0, 0, :30]
    return {name: (eps - torch.tensor(published[name])).abs().max().item() for name in names}


def verify(name_or_path: str) -> int:
    """Print whether a checkpoint computes what was published for it; exit code 0, or 2 where it does not."""
    path = locate(name_or_path)
    unet = read(path)
    print(f"{path}: read strictly, {len(unet.state_dict())} tensors, all finite, fingerprint {fingerprint(unet)}")
    if path.is_file():
        print(f"sha256 {digest(path, 'sha256')}")
    entry = REGISTRY.get(name_or_path)
    distances = golden_distances(unet)
    fits = [name for name, distance in distances.items() if distance < TOLERANCE]
    expected = entry.golden if entry else None
    if expected and fits == [expected]:
        print(f"OK: its 30 outputs agree with those published for {expected} within {distances[expected]:.1e}")
    elif expected:
        print(f"NOT {expected}: its outputs differ by {distances[expected]:.3f} from those published")
        print(f"They are those of {fits[0]}: the likely mix-up." if fits else "They fit no other published network.")
        return 2
    elif fits and entry:
        print(f"NOT {name_or_path}, for which no outputs are published: these are {fits[0]}'s; the likely mix-up.")
        return 2
    elif fits:
        print(f"OK: these are the weights of {fits[0]}, by its 30 published outputs")
    else:
        print("No outputs are published for this checkpoint, and it fits no published one; nothing more can be said.")
    return 0


def main(args: argparse.Namespace) -> int:
    return verify(args.checkpoint)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache verify", doc=__doc__)
    parser.add_argument("checkpoint", metavar="NAME|PATH")
    return parser.parse_args(argv)
