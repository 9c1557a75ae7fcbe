"""Names -> verified files -> networks, and networks -> files of our own format.

A file is read strictly: not one tensor may be missing, left over, misshapen or not finite.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicache.diffusion import Diffusion
from minicache.files import cache_folder, digest, fetch, replacing
from minicache.placement import choose_placement, place
from minicache.reading import understood
from minicache.tensors import read_file, write
from minicache.unet import UNet, UNetConfig
from minicache.words import Vocabulary

# --- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A checkpoint on the network."""

    url: str
    checksum: str | None  # algorithm:hex, as published; None: no hash is
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


EMBEDDED = ("emoji", "tiny_cifar10")
# Google's files on the hub where those are the ones wanted, else P. Esser's conversions (pesser/pytorch_diffusion); and
# CompVis' LDM-4-G, and of Stable Diffusion the U-Net alone: what else it needs, other packages read from other files.
REGISTRY = {name: Entry(**row) for name, row in json.loads((embedded_folder() / "registry.json").read_text()).items()}
# The networks of Ho et al.: CIFAR-10 (35.7M parameters), and CelebA-HQ and LSUN at 256x256 (113.7M).
CIFAR10 = UNetConfig(image_size=32, model_channels=128, channel_mult=(1, 2, 2, 2), dropout=0.1)
LSUN_256 = UNetConfig(image_size=256, model_channels=128, channel_mult=(1, 1, 2, 2, 4, 4))
# Those of Rombach et al., for latents of 64x64: LDM-4-G for the classes of ImageNet at 256x256 (400.9M, and their
# table, whose last row is the null class), and Stable Diffusion v1 for prompts at 512x512 (859.5M).
LDM_IMAGENET = UNetConfig(64, 192, (1, 2, 3, 5), attention_resolutions=(32, 16, 8), context_dim=512, num_tokens=1001,
                          null_token=1000, adm=True)  # fmt: skip
SD_15 = UNetConfig(64, 320, (1, 2, 4, 4), attention_resolutions=(64, 32, 16), in_channels=4, out_channels=4,
                   context_dim=768, heads=8, adm=True)  # fmt: skip
PRESETS = {"cifar10": CIFAR10, "lsun_256": LSUN_256, "ldm_imagenet": LDM_IMAGENET, "sd15": SD_15}


def locate(name_or_path: str | Path) -> Path:
    """A name -> its file, downloaded if need be; a path -> itself. ValueError for what is neither.

    The file of a name is verified; where no hash is published, a warning says so.
    """
    name = str(name_or_path)
    if name_or_path in EMBEDDED:  # a string: a Path is one, whatever its name
        return embedded_folder() / f"{name}.pt"
    if name_or_path in REGISTRY:
        entry = REGISTRY[name]
        path = fetch(entry.url, entry.path(name), entry.checksum, entry.megabytes)
        if entry.checksum is None:
            its = f"its sha256 is {digest(path, 'sha256')}"
            warnings.warn(f"{path} is not verified: no hash of {entry.url} is published; {its}", stacklevel=2)
        return path
    if name and Path(name).exists():
        return Path(name)
    names = [*EMBEDDED, *REGISTRY]
    if "/" in name or Path(name).suffix:
        raise ValueError(f"there is no file or folder {name}")
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the names are {', '.join(names)}"
    raise ValueError(f"{name!r} is neither a checkpoint's name nor a path: {hint}")


# --- reading ---------------------------------------------------------------------------------------------------------


def load(
    name_or_path: str | Path,
    *,
    config: UNetConfig | None = None,
    diffusion: Diffusion | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    memory_format: str | torch.memory_format = "auto",
    compile: str | bool = False,
) -> UNet:
    """A network from a name or path, in eval mode, with its `.config` and `.diffusion`.

    name_or_path: see `python -m minicache list`, or any file or folder that `read` knows; config, diffusion: see
    `read`. device, dtype, memory_format, compile: see `choose_placement`, which knows what is best where any of them is
    "auto". Raises ValueError, or ConnectionError where a download fails.
    """
    placement = choose_placement(device, dtype, memory_format, compile)
    return place(read(locate(name_or_path), config, diffusion, dtype=placement.dtype), placement)


def read(
    path: str | Path,
    config: UNetConfig | None = None,
    diffusion: Diffusion | None = None,
    *,
    image_size: int | None = None,
    groups: int | None = None,
    raw: bool = False,
    dtype: torch.dtype = torch.float32,
) -> UNet:
    """The network in a file or folder, of our format or of any in `formats`: on the CPU, in eval mode.

    A bare state dict tells neither its image_size and groups nor its diffusion; a caller must (image_size and groups
    alone, or the whole config) unless its shapes are those of PRESETS. raw: not the averages, where both are stored.
    dtype: of the weights; each is converted by itself, and so memory never holds them twice.
    ValueError says what is wrong with the file, what it does not tell, and what was said that it leaves no room for.
    """
    from minicache import formats  # here and not above, as formats is built on this module

    path = Path(path)
    path = formats.weights_in(path) if path.is_dir() else path
    content = read_file(path)
    if "config" in content and "state_dict" in content:
        refuse_idle(path, image_size=image_size, groups=groups, raw=raw or None)
        return read_own(path, content, config, diffusion, dtype)
    return formats.read(path, content, config, diffusion, image_size, groups, raw, dtype)


def shape_of(name_or_path: str | Path) -> UNet:
    """The network of a checkpoint or of PRESETS; on the meta device, without its weights, if it is a published one."""
    name = str(name_or_path)
    config = PRESETS.get(name) or (name in REGISTRY and PRESETS["lsun_256" if "256" in name else "cifar10"])
    if not config:
        return load(name_or_path)
    with torch.device("meta"):
        return UNet(config)


def read_own(
    path: Path, content: Mapping[str, Any], config: UNetConfig | None, diffusion: Diffusion | None, dtype: torch.dtype
) -> UNet:
    """The network in the content of a file of our own format, which `save` wrote."""
    with understood(path, "a checkpoint of this version of minicache"):
        own, its = UNetConfig(**content["config"]), Diffusion(**content["diffusion"])
        state = dict(content["state_dict"])
        vocabulary = Vocabulary(**content["vocabulary"]) if "vocabulary" in content else None
        if vocabulary and len(vocabulary.words) >= (own.num_tokens or 1):
            raise ValueError(f"{len(vocabulary.words)} words need a table of more rows than {own.num_tokens}")
    config, diffusion = agreed(path, own, config), agreed(path, its, diffusion)
    unet = build(path, config, diffusion, state, dtype=dtype)
    unet.vocabulary = vocabulary
    return unet


def agreed(path: Path, own: Any, given: Any) -> Any:
    """What a file says of itself (None: nothing), or else what the caller says; ValueError if they contradict."""
    if own is not None and given not in (None, own):
        names = [each.name for each in fields(own) if getattr(own, each.name) != getattr(given, each.name)]
        theirs, ours = (", ".join(f"{name}={getattr(each, name)!r}" for name in names) for each in (own, given))
        raise ValueError(f"{path} has its own {theirs}, and not the {ours} given")
    return given if own is None else own


def refuse_idle(path: Path, **settings: int | None) -> None:
    """ValueError for settings that are given (not None) and would change nothing."""
    if said := [f"{name}={value}" for name, value in settings.items() if value is not None]:
        raise ValueError(f"{path} says this itself: leave out {' and '.join(said)}")


def build(
    path: Path,
    config: UNetConfig,
    diffusion: Diffusion,
    state: Mapping[str, Any],
    keys: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> UNet:
    """A network with exactly these tensors, in this dtype. keys: our names -> the file's, for errors to speak of."""
    with torch.device("meta"):
        unet = UNet(config)
    needed, keys = unet.state_dict(), keys or {}
    for problem, names in (
        ("lacks", [keys.get(name, name) for name in needed if name not in state]),
        ("has the unexpected", [name for name in state if name not in needed]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{path} {problem} tensor {names[0]}{more}")
    weights = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{path}: {keys.get(name, name)} is no tensor of floating-point numbers but a {kind}")
        if tensor.shape != needed[name].shape:
            shapes = f"{list(tensor.shape)}; the network needs {list(needed[name].shape)}"
            raise ValueError(f"{path}: tensor {keys.get(name, name)} has shape {shapes}")
        # copied, as kernels choose by the alignment of memory: every format then computes the same bits
        weights[name] = tensor.to(dtype, copy=True).contiguous()
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"{path}: tensor {keys.get(name, name)} holds what is NaN or infinite as {dtype}")
    unet.load_state_dict(weights, assign=True)
    unet.diffusion = diffusion
    return unet.eval()


# --- a network's identity --------------------------------------------------------------------------------------------

# What a fingerprint always covers: all fields of the first release but dropout, which changes no output.
FIRST_FIELDS = ("image_size", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions",
                "in_channels", "out_channels", "groups")  # fmt: skip


def fingerprint(unet: UNet) -> str:
    """A hash of the network's shape, schedule of noise and weights as float32: 16 hex digits, the same in any format.

    It is computed when asked, so that changed weights have another one; weights rounded by a dtype are changed, too.
    The schedule, and fields of the config that came after the first release, count where they are not at their default.
    """
    config = {name: getattr(unet.config, name) for name in FIRST_FIELDS}
    for part in filter(None, (unet.config, unet.diffusion)):
        later = [each for each in fields(part) if each.name not in (*FIRST_FIELDS, "dropout")]
        config |= {each.name: value for each in later if (value := getattr(part, each.name)) != each.default}
    hasher = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.float().cpu().contiguous().numpy())
    return hasher.hexdigest()[:16]


# --- writing ---------------------------------------------------------------------------------------------------------


def save(path: str | Path, unet: UNet, half: bool = False, training: dict[str, Any] | None = None) -> None:
    """Write our own format: {"config", "diffusion", "state_dict"}, "vocabulary" where prompts are understood, and
    "training" where a run can resume from it.

    half: store float16 (half the size; computing stays in float32). ValueError for a network without `.diffusion`, and
    for another one than a UNet.
    """
    if not isinstance(unet.config, UNetConfig):
        raise ValueError(f"a {type(unet).__name__} could not be read back: torch.save its state_dict, and its config")
    state = {name: tensor.half() if half else tensor for name, tensor in unet.state_dict().items()}
    content = {"config": asdict(unet.config), "diffusion": asdict(diffusion_of(unet)), "state_dict": state}
    if unet.vocabulary is not None:
        content["vocabulary"] = asdict(unet.vocabulary)
    if training is not None:
        content["training"] = training
    with replacing(path) as temporary:
        write(temporary, content)


def diffusion_of(unet: UNet) -> Diffusion:
    """What the network was trained with; ValueError where nobody has said it."""
    if unet.diffusion is None:
        raise ValueError("the network has no .diffusion: set it to the Diffusion(...) that it was trained with")
    return unet.diffusion
