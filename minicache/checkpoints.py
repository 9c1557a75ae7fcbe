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
    note: str = ""

    def path(self, name: str) -> Path:
        return cache_folder() / f"{name}{Path(self.url.split('?')[0]).suffix or '.ckpt'}"


def _hub(repo: str, sha256: str, megabytes: int, ema: bool, revision: str = "main", note: str = "") -> Entry:
    url = f"https://huggingface.co/google/{repo}/resolve/{revision}/diffusion_pytorch_model.bin"
    return Entry(url, f"sha256:{sha256}", megabytes, ema, f"google_{repo.replace('-', '_')}", note)


def _heibox(file: str, md5: str, megabytes: int, ema: bool, golden: str | None, note: str = "") -> Entry:
    """P. Esser's conversions of Ho et al.'s files: github.com/pesser/pytorch_diffusion."""
    return Entry(f"https://heibox.uni-heidelberg.de/f/{file}/?dl=1", f"md5:{md5}", megabytes, ema, golden, note)


EMBEDDED = ("tiny", "tiny_cifar10")
REGISTRY = {
    "ddpm_cifar10": _hub(
        "ddpm-cifar10-32",
        "ac3416a548879738893e935b42cab9119f51745b62bec4b6d8375e4d86e98ea4",
        143,
        ema=False,
        revision="267b167dc01f0e4e61923ea244e8b988f84deb80",
        note="not averaged: FID 12 (as published); ddpm_cifar10_ema has FID 3.2",
    ),
    "ddpm_cifar10_ema": _heibox(
        "2e4f01e2d9ee49bab1d5",
        "1fa350b952534ae442b1d5235cce5cd3",
        143,
        ema=True,
        golden=None,
        note="FID 3.2 (as published)",
    ),
    "ddpm_celebahq_256": _hub(
        "ddpm-celebahq-256",
        "efff89712093ad060ce99d9b461bbe542b49d8dd4ce30f23fe5761dca292361d",
        455,
        ema=False,
        revision="cd5c944777ea2668051904ead6cc120739b86c4d",
    ),
    "ddpm_celebahq_256_ema": _hub(
        "ddpm-ema-celebahq-256", "3ec1b462abd49605d4f7cddfe453626e9aea1edc8c2449450a1c054efb863abf", 455, ema=True
    ),
    "ddpm_church_256": _hub(
        "ddpm-church-256", "3111c176c9848d8d9b91d6fb8e2aa2945c220845aced8f47efb44f9deadd412c", 455, ema=False
    ),
    "ddpm_church_256_ema": _hub(
        "ddpm-ema-church-256",
        "0825f31de9d51f6b94f8080233432e77ee5aa9a185b7172a1fd9863916444847",
        455,
        ema=True,
        revision="adb3310e276abf2c09ef3e2bb8b1946b47b1468d",
    ),
    "ddpm_bedroom_256": _hub(
        "ddpm-bedroom-256",
        "d0c4c246baad16eb12629b6a4d458fecf210483b76796e6fa9cd1756b217966a",
        455,
        ema=False,
        revision="d6ccd889ac8a4c072ae35e63fed664718cdaa060",
    ),
    "ddpm_bedroom_256_ema": _hub(
        "ddpm-ema-bedroom-256",
        "73d137f32e27a033b1fbf2684e007aceef4bf458d897354f325349985662fd78",
        455,
        ema=True,
        revision="df329a8d5319a212e813ba83427e4af56760c35f",
    ),
    "ddpm_cat_256": _heibox(
        "fac870bd988348eab88e", "bbee0e7c3d7abfb6e2539eaf2fb9987b", 455, ema=False, golden="google_ddpm_cat_256"
    ),
    "ddpm_cat_256_ema": _heibox(
        "0701aac3aa69457bbe34", "646f23f4821f2459b8bafc57fd824558", 455, ema=True, golden="google_ddpm_ema_cat_256"
    ),
}


def embedded_folder() -> Path:
    """weights/ of the checkout, or of the installed wheel."""
    installed = Path(__file__).parent / "weights"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "weights"


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
    dtype: torch.dtype = torch.float32,
) -> UNet:
    """A network from a name or path, in eval mode, with `.config`, `.diffusion` and `.fingerprint`.

    name_or_path: see `python -m minicache.checkpoints`, or any file or folder that `convert.read` knows; config: for
    bare state dicts whose shapes leave it open. Raises ValueError, or ConnectionError where a download fails.
    """
    return read(locate(name_or_path), config).to(device, dtype)


def listing() -> str:
    rows = [("name", "MB", "EMA", "on disk", "from")]
    for name in EMBEDDED:
        size = (embedded_folder() / f"{name}.pt").stat().st_size
        rows.append((name, f"{size / 1e6:.1f}", "yes", "yes", "weights/ (trained by train_tiny.py)"))
    for name, entry in REGISTRY.items():
        here = "yes" if entry.path(name).exists() else "no"
        rows.append((name, str(entry.megabytes), "yes" if entry.ema else "NO", here, f"{entry.url}  {entry.note}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


@torch.no_grad()
def golden_distances(unet: UNet) -> dict[str, float]:
    """Published network of this image size -> the largest difference of its 30 published outputs from this one's."""
    published = json.loads((embedded_folder() / "golden_ddpm_logits.json").read_text())
    size = unet.config.image_size
    x = torch.randn(1, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
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
    run("checkpoints", main)
