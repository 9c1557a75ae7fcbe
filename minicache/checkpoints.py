"""Names -> verified files: the embedded checkpoints, and the public weights of Ho et al. (2020)."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from minicache.convert import read
from minicache.files import cache_folder, fetch
from minicache.placement import choose_placement, place
from minicache.unet import UNet, UNetConfig


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

    name_or_path: see `python -m minicache list`, or any file or folder that `convert.read` knows; config: for
    bare state dicts whose shapes leave it open. device, dtype, memory_format, compile: see `choose_placement`, which
    knows what is best where any of them is "auto". Raises ValueError, or ConnectionError where a download fails.
    """
    placement = choose_placement(device, dtype, memory_format, compile)
    return place(read(locate(name_or_path), config), placement)
