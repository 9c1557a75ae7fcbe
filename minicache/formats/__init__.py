"""What others call the same network, one file a family; from a file of theirs to our network.

A new family is one more file here with a `Family` in it (family.py says what that is), and one more in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicache.checkpoints import agreed, build
from minicache.diffusion import Diffusion
from minicache.formats.diffusers import DIFFUSERS, weights_in
from minicache.formats.pesser import PESSER
from minicache.formats.tensorflow import TENSORFLOW
from minicache.unet import UNet, UNetConfig

__all__ = ["FAMILIES", "read", "weights_in"]

FAMILIES = (DIFFUSERS, TENSORFLOW, PESSER)


def read(path: Path, content: Mapping[str, Any], config: UNetConfig | None, image_size: int | None, ema: bool) -> UNet:
    """The network in the content of a foreign file; the arguments are those of `checkpoints.read`."""
    family = next((family for family in FAMILIES if family.mine(content)), None)
    theirs = family.tensors(content, ema) if family else content
    if not theirs or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in theirs.items()):
        kinds = sorted({type(value).__name__ for value in theirs.values()})
        raise ValueError(f"{path} is not a state dict: it holds {', '.join(kinds) or 'nothing'}")
    if any(key.startswith("module.") for key in theirs):
        raise ValueError(f"{path} has keys that begin with 'module.': a training checkpoint, not a bare state dict")
    if family is None:
        raise ValueError(f"{path} is not a network of this kind: no known family calls a tensor {next(iter(theirs))}")
    own_config, diffusion = family.told(path)
    config = agreed(path, own_config, config) or family.infer(path, theirs, image_size)
    if diffusion is None:  # Ho et al.: fixed_large for CIFAR-10; the published 256x256 weights have fixed_small
        diffusion = Diffusion(variance="fixed_large" if config.image_size <= 32 else "fixed_small")
    with torch.device("meta"):
        unet = UNet(config)
    keys, needed = family.keys(unet), unet.state_dict()
    names, state = {theirs: ours for ours, theirs in keys.items()}, {}
    for key, tensor in theirs.items():
        name = names.get(key, key)  # strangers are left for `build` to refuse
        conv = name in needed and needed[name].ndim == 2 and tensor.ndim == 4  # theirs is a 1x1 one, ours Linear
        state[name] = tensor.flatten(1) if conv else tensor
    return build(path, config, diffusion, state, keys)
