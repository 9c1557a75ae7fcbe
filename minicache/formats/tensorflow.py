"""The variables of Ho et al.'s own checkpoints, as .npz: pesser's names in another spelling, and other layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from minicache.formats.family import Family
from minicache.formats.pesser import NAMES


def from_tensorflow(variables: Mapping[str, np.ndarray], raw: bool = False) -> dict[str, Tensor]:
    """Variables of Ho et al.'s checkpoints -> pesser's names and layouts; those of the optimizer are left out."""
    suffix = "" if raw else "/ExponentialMovingAverage"
    pattern = re.compile(rf"model/(.+)/(W|b|gamma|beta){suffix}")
    state = {}
    for name, value in variables.items():
        if match := pattern.fullmatch(name):
            path, parameter = match.groups()
            if value.dtype.kind != "f":
                raise ValueError(f"{name} is {value.dtype}, and no floating-point numbers")
            if not path.startswith("mid/"):  # whose block_1 is so named by pesser too
                path = re.sub(r"(down|up|block|attn)_(\d+)", r"\1/\2", path)
            path = re.sub(r"dense(\d)", r"dense/\1", path).replace("/", ".")
            with np.errstate(over="ignore"):  # infinity is refused for all families alike
                tensor = torch.from_numpy(np.asarray(value, np.float32))
            if tensor.ndim == 4:  # HWIO -> OIHW
                tensor = tensor.permute(3, 2, 0, 1)
            elif tensor.ndim == 2:  # [in, out] -> [out, in], or that as a 1x1 convolution
                tensor = tensor.T if "temb" in path else tensor.T[:, :, None, None]
            state[f"{path}.{'weight' if parameter in ('W', 'gamma') else 'bias'}"] = tensor.contiguous()
    if not state:
        raise ValueError(
            f"no variable of the form model/.../W{suffix}: not a TensorFlow checkpoint of DDPM"
            + ("" if raw else ", or one without moving averages (--raw)")
        )
    return state


TENSORFLOW = Family(
    mine=lambda content: bool(content) and all(isinstance(value, np.ndarray) for value in content.values()),
    keys=NAMES.keys,
    infer=NAMES.infer,
    tensors=from_tensorflow,
    averages=True,
)
