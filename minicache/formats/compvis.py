"""CompVis' latent diffusion and Stable Diffusion: their UNetModel, alone or among all else that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicache.diffusion import BETA_SCHEDULES, Diffusion
from minicache.formats.family import CLASS_TABLE, TRANSFORMER, Dialect, Family
from minicache.reading import understood

PREFIX = "model.diffusion_model."
NAMES = Dialect(
    time=("time_embed.0", "time_embed.2"),
    conv_in="input_blocks.0.0",
    norm_out="out.0",
    conv_out="out.2",
    down="input_blocks.{i}.0",
    down_attn="input_blocks.{i}.1",
    downsample="input_blocks.{i}.0.op",
    mid=("middle_block.0", "middle_block.2"),
    mid_attn="middle_block.1",
    up="output_blocks.{o}.0",
    up_attn="output_blocks.{o}.1",
    upsample="output_blocks.{o}.{last}.conv",
    leaves={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "temb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "shortcut": "skip_connection",
    },
    attention=None,
    transformer=TRANSFORMER,
)


def state_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors of a file: Lightning puts them under "state_dict"."""
    state = content.get("state_dict")
    return state if isinstance(state, dict) else content


def tensors(content: Mapping[str, Any], raw: bool) -> Mapping[str, Tensor]:
    """The U-Net's tensors by their own names, and LDM's table of classes; the averages (EMA) where there are any."""
    state = state_of(content)
    if not any(key.startswith(PREFIX) for key in state):
        return state
    unet = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    averages = {key: state.get("model_ema.diffusion_model" + key.replace(".", "")) for key in unet}
    if raw and not any(value is not None for value in averages.values()):
        raise ValueError("there are no averages beside these weights, and so nothing raw to ask for")
    if not raw:
        unet |= {key: value for key, value in averages.items() if value is not None}
    return unet | {key: value for key, value in state.items() if key == f"{CLASS_TABLE}.weight"}


def told(path: Path, content: Mapping[str, Any]) -> tuple[None, Diffusion | None]:
    """The betas, where they lie beside the weights. They were written in float32, and are told to six digits."""
    betas = state_of(content).get("betas")
    if not isinstance(betas, Tensor):
        return None, None
    with understood(path, "a checkpoint whose betas can be honoured"):
        ends = [float(f"{beta:.6g}") for beta in (betas[0].item(), betas[-1].item())]
        for schedule in BETA_SCHEDULES:
            diffusion = Diffusion(len(betas), *ends, variance="fixed_small", beta_schedule=schedule)
            if torch.allclose(diffusion.alphas_bar, torch.cumprod(1 - betas.double(), 0), rtol=1e-3):
                return None, diffusion
        raise ValueError(f"its betas, {ends[0]} to {ends[1]}, are none of {', '.join(BETA_SCHEDULES)}")


COMPVIS = Family(
    mine=lambda content: any(str(key).removeprefix(PREFIX).startswith("input_blocks.") for key in state_of(content)),
    keys=NAMES.keys,
    infer=NAMES.infer,
    tensors=tensors,
    averages=True,
    told=told,
)
