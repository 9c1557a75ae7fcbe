"""What others call the same network, one file a family; from a file of theirs to our network.

A new family is one more file here with a `Family` in it (family.py says what that is; pesser.py is the shortest), and
one more in FAMILIES, where the first whose `mine` says yes is taken. Other layouts of tensors are undone in `tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicache.checkpoints import PRESETS, agreed, build, refuse_idle
from minicache.diffusion import Diffusion
from minicache.formats.compvis import COMPVIS
from minicache.formats.diffusers import DIFFUSERS, weights_in
from minicache.formats.pesser import PESSER
from minicache.formats.tensorflow import TENSORFLOW
from minicache.reading import understood
from minicache.unet import UNet, UNetConfig

__all__ = ["FAMILIES", "read", "weights_in"]

PUBLISHED = {
    "cifar10": Diffusion(),
    "lsun_256": Diffusion(variance="fixed_small"),
    "ldm_imagenet": Diffusion(1000, 0.0015, 0.0195, "fixed_small", "scaled_linear"),
    "sd15": Diffusion(1000, 0.00085, 0.012, "fixed_small", "scaled_linear"),
}
FAMILIES = (DIFFUSERS, COMPVIS, TENSORFLOW, PESSER)


def read(
    path: Path,
    content: Mapping[str, Any],
    config: UNetConfig | None,
    diffusion: Diffusion | None,
    image_size: int | None,
    groups: int | None,
    raw: bool,
    dtype: torch.dtype,
) -> UNet:
    """The network in the content of a foreign file; the arguments are those of `checkpoints.read`."""
    family = next((family for family in FAMILIES if family.mine(content)), None)
    with understood(path, "a network of this kind"):
        theirs = family.tensors(content, raw) if family else content
    refuse_other_things(path, theirs)
    if family is None:
        if "time.linear1.weight" in theirs:
            raise ValueError(f"{path} holds a state dict of minicache's own, but not its shape: use checkpoints.save")
        raise ValueError(f"{path} is not a network of this kind: no known family calls a tensor {next(iter(theirs))}")
    own_config, own_diffusion = family.told(path, content)
    refuse_idle(path, raw=None if family.averages else raw or None)
    if config := agreed(path, own_config, config):
        refuse_idle(path, image_size=image_size, groups=groups)
    else:
        config = family.infer(path, theirs, image_size, groups)
    diffusion = agreed(path, own_diffusion, diffusion) or published_diffusion(config)
    refuse_to_guess(path, config, diffusion)
    with torch.device("meta"):
        unet = UNet(config)
    keys, needed = family.keys(unet), unet.state_dict()
    names, state = {theirs: ours for ours, theirs in keys.items()}, {}
    for key, tensor in theirs.items():
        name = names.get(key, key)  # strangers are left for `build` to refuse
        conv = name in needed and needed[name].ndim == 2 and tensor.ndim == 4  # theirs is a 1x1 one, ours Linear
        state[name] = tensor.flatten(1) if conv else tensor
    return build(path, config, diffusion, state, keys, dtype)


def refuse_other_things(path: Path, content: Mapping[str, Any]) -> None:
    """ValueError for what is no bare state dict."""
    if not content or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        kinds = sorted({type(value).__name__ for value in content.values()})
        raise ValueError(f"{path} is not a state dict: it holds {', '.join(kinds) or 'nothing'}")
    if any(key.startswith("module.") for key in content):
        raise ValueError(f"{path} has keys that begin with 'module.': a training checkpoint, not a bare state dict")


def published_diffusion(config: UNetConfig | None) -> Diffusion | None:
    """What the networks of PRESETS were trained with; None for another config.

    The variances: fixed_large for CIFAR-10, fixed_small with the published 256x256 weights, and for latents.
    """

    def essence(config: UNetConfig) -> UNetConfig:
        return replace(config, dropout=0.0, num_tokens=None, null_token=0)

    alike = (name for name, preset in PRESETS.items() if config and essence(config) == essence(preset))
    return PUBLISHED.get(next(alike, None))


def refuse_to_guess(path: Path, config: UNetConfig | None, diffusion: Diffusion | None) -> None:
    """ValueError for what is still not known, with who may say it, and how."""
    missing = [what for what, value in (
        ("its image size and groups (config=UNetConfig(...), or --image-size and --groups of convert)", config),
        ("its noise schedule (diffusion=Diffusion(...), or --beta-end of convert)", diffusion),
    ) if value is None]  # fmt: skip
    if missing:
        raise ValueError(f"{path} does not tell {' and '.join(missing)}")
