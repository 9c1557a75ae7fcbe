"""Names -> verified files: the embedded checkpoints, and the public weights of Ho et al. (2020).

python -m minicache.checkpoints                       # what there is: name, size, EMA or not, on disk or not
python -m minicache.checkpoints verify NAME|PATH      # were real weights loaded right?
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from minicache.cli import Parser, run
from minicache.convert import read
from minicache.files import cache_folder, digest, fetch
from minicache.placement import choose, place
from minicache.unet import UNet, UNetConfig

TOLERANCE = 1e-3  # of diffusers' own test of these values


@dataclass(frozen=True)
class Entry:
    """A checkpoint on the network."""

    url: str
    checksum: str  # algorithm:hex, as published
    megabytes: int
    ema: bool  # averaged weights: the ones that draw well
    golden: str | None  # in golden_ddpm_logits.json
    note: str = ""  # what whoever chooses it should know

    def path(self, name: str) -> Path:
        return cache_folder() / f"{name}{Path(self.url.split('?')[0]).suffix or '.ckpt'}"


def embedded_folder() -> Path:
    """weights/ of the checkout, or of the installed wheel."""
    installed = Path(__file__).parent / "weights"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "weights"


EMBEDDED = ("tiny", "tiny_cifar10")
# Google's files on the hub where those are the ones wanted, else P. Esser's conversions (pesser/pytorch_diffusion).
REGISTRY = {name: Entry(**row) for name, row in json.loads((embedded_folder() / "registry.json").read_text()).items()}


def locate(name_or_path: str | Path) -> Path:
    """A name -> its verified file, downloaded if need be; a path -> itself. ValueError for what is neither."""
    name = str(name_or_path)
    if name in EMBEDDED:
        return embedded_folder() / f"{name}.pt"
    if name in REGISTRY:
        return fetch(REGISTRY[name].url, REGISTRY[name].path(name), REGISTRY[name].checksum)
    if Path(name).exists():
        return Path(name)
    names = [*EMBEDDED, *REGISTRY]
    if "/" in name or Path(name).suffix:
        raise ValueError(f"there is no file or folder {name}")
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the names are {', '.join(names)}"
    raise ValueError(f"{name!r} is neither a checkpoint's name nor a path: {hint}")


def load(
    name_or_path: str | Path,
    *,
    config: UNetConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    memory_format: str | torch.memory_format = "auto",
    compile: str | bool = False,
) -> UNet:
    """A network from a name or path, in eval mode, with `.config`, `.diffusion` and `.fingerprint`.

    name_or_path: see `python -m minicache.checkpoints`, or any file or folder that `convert.read` knows; config: for
    bare state dicts whose shapes leave it open. device, dtype, memory_format, compile: see `placement.choose`, which
    knows what is best where any of them is "auto". Raises ValueError, or ConnectionError where a download fails.
    """
    placement = choose(device, dtype, memory_format, compile)
    return place(read(locate(name_or_path), config), placement)


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


@torch.no_grad()
def golden_distances(unet: UNet) -> dict[str, float]:
    """Published network of this image size -> the largest difference of its 30 published outputs from this one's."""
    published = json.loads((embedded_folder() / "golden_ddpm_logits.json").read_text())
    size = unet.config.image_size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.config.in_channels, size, size, generator=generator, dtype=torch.float32, device="cpu")
    eps = unet(x, 10)[0, 0, 0, :30]
    return {
        name: (eps - torch.tensor(values)).abs().max().item()
        for name, values in published.items()
        if not name.startswith("_") and name.endswith(f"_{size}")
    }


def verify(name_or_path: str) -> int:
    """Print whether a checkpoint computes what was published for it; exit code 0, or 2 where it does not."""
    path = locate(name_or_path)
    unet = read(path)
    print(f"{path}: read strictly, {len(unet.state_dict())} tensors, all finite, fingerprint {unet.fingerprint}")
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


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m minicache.checkpoints", description="List the checkpoints, or verify one.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="name, size, EMA or not, on disk or not (default)")
    check = commands.add_parser("verify", help="compare a network's outputs with the published ones")
    check.add_argument("checkpoint", metavar="NAME|PATH")
    args = parser.parse_args(argv)
    if args.command == "verify":
        return verify(args.checkpoint)
    print(listing())
    return 0


if __name__ == "__main__":
    run("python -m minicache.checkpoints", main)
