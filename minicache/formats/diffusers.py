"""diffusers: the names of UNet2DModel and UNet2DConditionModel, their configurations, the schedulers, and folders."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minicache.checkpoints import PRESETS, diffusion_of
from minicache.diffusion import Diffusion
from minicache.files import replacing
from minicache.formats.diffusers_config import (
    config_from_diffusers,
    config_to_diffusers,
    diffusion_from_diffusers,
    scheduler_to_diffusers,
)
from minicache.formats.family import ATTENTION, CLASS_TABLE, TRANSFORMER, Dialect, Family
from minicache.reading import read_whole
from minicache.tensors import write
from minicache.unet import UNet, UNetConfig

NAMES = Dialect(
    time=("time_embedding.linear_1", "time_embedding.linear_2"),
    norm_out="conv_norm_out",
    down="down_blocks.{l}.resnets.{j}",
    down_attn="down_blocks.{l}.attentions.{j}",
    downsample="down_blocks.{l}.downsamplers.0.conv",
    mid=("mid_block.resnets.0", "mid_block.resnets.1"),
    mid_attn="mid_block.attentions.0",
    up="up_blocks.{r}.resnets.{j}",
    up_attn="up_blocks.{r}.attentions.{j}",
    upsample="up_blocks.{r}.upsamplers.0.conv",
    leaves={"temb_proj": "time_emb_proj", "shortcut": "conv_shortcut"},
    attention=dict(zip(ATTENTION, ("group_norm", "to_q", "to_k", "to_v", "to_out.0"))),
    transformer=TRANSFORMER,
)
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def new_attention(key: str) -> str:
    for old, new in OLD_ATTENTION.items():
        key = key.replace(old, new)
    return key


# --- folders ---------------------------------------------------------------------------------------------------------


def weights_in(path: Path) -> Path:
    """The weights in a diffusers folder: a network's own, or a pipeline's with its network in unet/."""
    folder = path / "unet" if (path / "unet").is_dir() else path
    if not (folder / "config.json").exists():
        raise ValueError(f"{path} holds no config.json: not a diffusers folder")
    names = [f"diffusion_pytorch_model.{end}" for end in ("safetensors", "bin", "fp16.safetensors", "fp16.bin")]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} holds none of {', '.join(names)}")


def told(path: Path, content: Mapping[str, Any]) -> tuple[UNetConfig | None, Diffusion | None]:
    """What config.json and scheduler_config.json beside the weights say; None where there is no such file.

    A table of classes among the weights is one of ours: see `save_diffusers`.
    """
    folder, config, diffusion = path.parent, None, None
    if (folder / "config.json").exists():
        config = config_from_diffusers(folder / "config.json", read_whole(folder / "config.json"))
        if config.context_dim and (table := content.get(f"{CLASS_TABLE}.weight")) is not None:
            config = replace(config, num_tokens=len(table), null_token=len(table) - 1)
    for scheduler in (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json"):
        if diffusion is None and scheduler.exists():
            diffusion = diffusion_from_diffusers(scheduler)
    return config, diffusion


def save_diffusers(folder: str | Path, unet: UNet) -> None:
    """A folder that diffusers' UNet2DModel, DDPMPipeline and DDIMPipeline load with from_pretrained; with a context,
    UNet2DConditionModel: a pipeline's unet/. It has no place for a table of classes, which lies among its weights."""
    if Path(folder).exists():
        raise ValueError(f"{folder} exists; choose another name for the diffusers folder")
    if unet.vocabulary is not None or unet.config.null_token != (unet.config.num_tokens or 1) - 1:
        raise ValueError("a diffusers folder can hold no words, and only a table of classes whose last row is null")
    state, keys = unet.state_dict(), NAMES.keys(unet)
    files = {
        "config.json": config_to_diffusers(unet.config),
        "scheduler_config.json": scheduler_to_diffusers(unet.config, diffusion_of(unet)),
    }
    if not unet.config.context_dim:
        parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        files["model_index.json"] = {"_class_name": "DDPMPipeline", **parts}
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        weights = {}
        for ours, theirs in keys.items():
            conv = theirs.endswith((".proj_in.weight", ".proj_out.weight"))  # theirs is a 1x1 one, ours Linear
            weights[theirs] = (state[ours][:, :, None, None] if conv else state[ours]).contiguous()
        write(temporary / "diffusion_pytorch_model.bin", weights)


def tensors(content: Mapping[str, Any], raw: bool) -> Mapping[str, Any]:
    """By today's names: UNet2DModel's attention had others once."""
    return {new_attention(key): value for key, value in content.items()}


def infer(path: Path, state: Mapping[str, Tensor], image_size: int | None, groups: int | None) -> UNetConfig | None:
    """`Dialect.infer`; of a network that is not published, a warning says what is assumed: files may be otherwise."""
    config = NAMES.infer(path, state, image_size, groups)
    if config and not config.context_dim and config not in PRESETS.values():
        told = f"{path}: without its config.json, heads, padding and embedding of t are taken as DDPM's"
        warnings.warn(told, stacklevel=5)
    return config


DIFFUSERS = Family(
    mine=lambda content: any(str(key).startswith("down_blocks.") for key in content),
    keys=NAMES.keys,
    infer=infer,
    tensors=tensors,
    told=told,
)
