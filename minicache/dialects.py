"""How others name the same network: the tensors of pesser / ermongroup / DeepCache, diffusers and TensorFlow, and the
configurations of diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicache.diffusion import Diffusion
from minicache.unet import CIFAR10, LSUN_256, UNet, UNetConfig


@dataclass(frozen=True)
class Dialect:
    """How others name the same modules. {l}: level, {r}: level counted from the deepest, {j}: block of the level."""

    time: tuple[str, str]
    norm_out: str
    down: str
    down_attn: str
    downsample: str
    mid: tuple[str, str]
    mid_attn: str
    up: str
    up_attn: str
    upsample: str
    leaves: Mapping[str, str]  # of blocks and attention, where the names differ from ours

    def modules(self, config: UNetConfig) -> dict[str, str]:
        """Our module path -> theirs, for every module that a network of this config may have."""
        n, levels = config.num_res_blocks, len(config.channel_mult)
        names = {"time.linear1": self.time[0], "time.linear2": self.time[1]}
        names |= {"D.0": "conv_in", "norm_out": self.norm_out, "conv_out": "conv_out"}

        def add_block(ours: str, block: str, attn: str) -> None:
            for leaf in ("norm1", "conv1", "temb_proj", "norm2", "conv2", "shortcut"):
                names[f"{ours}.{leaf}"] = f"{block}.{self.leaves.get(leaf, leaf)}"
            for leaf in ("norm", "q", "k", "v", "proj_out"):
                names[f"{ours}.attn.{leaf}"] = f"{attn}.{self.leaves.get(leaf, leaf)}"

        for i in range(levels * (n + 1)):
            level, j = divmod(i, n + 1)
            at = {"l": level, "r": levels - 1 - level}
            if j > 0:
                add_block(f"D.{i}", self.down.format(j=j - 1, **at), self.down_attn.format(j=j - 1, **at))
            elif level > 0:
                names[f"D.{i}"] = self.downsample.format(l=level - 1)
                names[f"U.{i}.upsample"] = self.upsample.format(**at)
            add_block(f"U.{i}.block", self.up.format(j=n - j, **at), self.up_attn.format(j=n - j, **at))
        add_block("M.0", self.mid[0], self.mid_attn)
        add_block("M.1", self.mid[1], "")
        return names

    def keys(self, unet: UNet) -> dict[str, str]:
        """Our parameter -> theirs, for exactly the parameters of this network."""
        modules = self.modules(unet.config)
        split = (key.rpartition(".") for key in unet.state_dict())
        return {f"{module}.{parameter}": f"{modules[module]}.{parameter}" for module, _, parameter in split}


PESSER = Dialect(
    time=("temb.dense.0", "temb.dense.1"),
    norm_out="norm_out",
    down="down.{l}.block.{j}",
    down_attn="down.{l}.attn.{j}",
    downsample="down.{l}.downsample.conv",
    mid=("mid.block_1", "mid.block_2"),
    mid_attn="mid.attn_1",
    up="up.{l}.block.{j}",
    up_attn="up.{l}.attn.{j}",
    upsample="up.{l}.upsample.conv",
    leaves={"shortcut": "nin_shortcut"},
)
DIFFUSERS = Dialect(
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
    leaves={
        "temb_proj": "time_emb_proj",
        "shortcut": "conv_shortcut",
        "norm": "group_norm",
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "proj_out": "to_out.0",
    },
)
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def new_attention(key: str) -> str:
    for old, new in OLD_ATTENTION.items():
        key = key.replace(old, new)
    return key


def from_tensorflow(variables: Mapping[str, np.ndarray], ema: bool) -> dict[str, Tensor]:
    """Variables of Ho et al.'s checkpoints -> pesser's names and layouts; those of the optimizer are left out."""
    suffix = "/ExponentialMovingAverage" if ema else ""
    pattern = re.compile(rf"model/(.+)/(W|b|gamma|beta){suffix}")
    state = {}
    for name, value in variables.items():
        if match := pattern.fullmatch(name):
            path, parameter = match.groups()
            if not path.startswith("mid/"):  # whose block_1 is so named by pesser too
                path = re.sub(r"(down|up|block|attn)_(\d+)", r"\1/\2", path)
            path = re.sub(r"dense(\d)", r"dense/\1", path).replace("/", ".")
            tensor = torch.from_numpy(np.asarray(value, np.float32))
            if tensor.ndim == 4:  # HWIO -> OIHW
                tensor = tensor.permute(3, 2, 0, 1)
            elif tensor.ndim == 2:  # [in, out] -> [out, in], a 1x1 convolution but for the time embedding
                tensor = tensor.T if "temb" in path else tensor.T[:, :, None, None]
            state[f"{path}.{'weight' if parameter in ('W', 'gamma') else 'bias'}"] = tensor.contiguous()
    if not state:
        raise ValueError(
            f"no variable of the form model/.../W{suffix}: not a TensorFlow checkpoint of DDPM"
            + (", or one without moving averages (--raw)" if ema else "")
        )
    return state


def infer_config(path: Path, state: Mapping[str, Tensor], dialect: Dialect, image_size: int | None) -> UNetConfig:
    """The config of a bare state dict. Shapes tell all but the image size, which the presets' shapes imply."""

    def first(level: int, j: int = 0) -> Tensor | None:
        return state.get(f"{dialect.down.format(l=level, j=j)}.conv1.weight")

    levels = next(level for level in range(len(state) + 1) if first(level) is None)
    if not levels or "conv_in.weight" not in state:
        raise ValueError(f"{path} is not a network of this kind: it lacks conv_in, or the first block of the way down")
    widths, channels = [len(first(level)) for level in range(levels)], len(state["conv_in.weight"])
    attends = [f"{dialect.down_attn.format(l=level, j=0)}.{dialect.leaves.get('q', 'q')}.weight" in state
               for level in range(levels)]  # fmt: skip

    def config(size: int) -> UNetConfig:
        return UNetConfig(
            image_size=size,
            model_channels=channels,
            channel_mult=tuple(width // channels for width in widths),
            num_res_blocks=next(j for j in range(len(state) + 1) if first(0, j) is None),
            attention_resolutions=tuple(size >> level for level in range(levels) if attends[level]),
            in_channels=state["conv_in.weight"].shape[1],
        )

    if image_size is not None:
        return config(image_size)
    for preset in (CIFAR10, LSUN_256):
        if config(preset.image_size) == replace(preset, dropout=0.0):
            return preset
    raise ValueError(
        f"{path} is a bare state dict, and its shapes do not tell its image size: pass config=UNetConfig(...), "
        "or convert it first, with python -m minicache convert SRC DST --image-size PIXELS"
    )


# --- configurations --------------------------------------------------------------------------------------------------

# What UNet2DModel must be set to, and what it assumes where config.json is silent.
UNET2D = {
    "_class_name": ("UNet2DModel", None),
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": (1e-6, 1e-5),
    "num_class_embeds": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_dim": (None, None),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}
SCHEDULER = {
    "beta_schedule": ("linear", "linear"),
    "prediction_type": ("epsilon", "epsilon"),
    "rescale_betas_zero_snr": (False, False),
    "trained_betas": (None, None),
}


def require(path: Path, content: Mapping[str, Any], fields: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (needed, default) in fields.items():
        if (value := content.get(name, default)) != needed:
            raise ValueError(f"{path}: {name}={value!r} is not what this network does; it needs {needed!r}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def config_from_diffusers(path: Path) -> UNetConfig:
    """UNet2DModel's config.json, or a ValueError that names the field that cannot be honoured."""
    content = read_json(path)
    require(path, content, UNET2D)
    size, widths = content.get("sample_size"), content.get("block_out_channels", [224, 448, 672, 896])
    size = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
    if type(size) is not int:
        raise ValueError(f"{path}: sample_size={size!r} must be one whole number")
    if not _whole_numbers(widths) or any(width % widths[0] for width in widths):
        raise ValueError(f"{path}: block_out_channels={widths} must be multiples of the first")
    down, up = content.get("down_block_types") or (), content.get("up_block_types") or ()
    attends = [kind == "AttnDownBlock2D" for kind in down]
    if list(down) != _block_types(attends, "Down") or len(down) != len(widths):
        raise ValueError(f"{path}: down_block_types={list(down)} must be {len(widths)} of DownBlock2D, AttnDownBlock2D")
    if list(up) != _block_types(attends[::-1], "Up"):
        raise ValueError(f"{path}: up_block_types={list(up)} must mirror down_block_types")
    return UNetConfig(
        image_size=size,
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=content.get("layers_per_block", 2),
        attention_resolutions=tuple(size >> level for level, attend in enumerate(attends) if attend),
        in_channels=content.get("in_channels", 3),
        out_channels=content.get("out_channels", 3),
        dropout=content.get("dropout") or 0.0,
        groups=content.get("norm_num_groups", 32),
    )


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(type(value) is int and value > 0 for value in values)


def _block_types(attends: list[bool], way: str) -> list[str]:
    return [f"{'Attn' if attend else ''}{way}Block2D" for attend in attends]


def config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    if config.channel_mult[0] != 1:
        raise ValueError(f"channel_mult={config.channel_mult}: diffusers can only hold one that begins with 1")
    attends = [config.image_size >> level in config.attention_resolutions for level in range(len(config.channel_mult))]
    return {
        **{name: needed for name, (needed, _) in UNET2D.items()},
        "sample_size": config.image_size,
        "block_out_channels": [config.model_channels * mult for mult in config.channel_mult],
        "layers_per_block": config.num_res_blocks,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "dropout": config.dropout,
        "norm_num_groups": config.groups,
        "down_block_types": _block_types(attends, "Down"),
        "up_block_types": _block_types(attends[::-1], "Up"),
    }


def diffusion_from_diffusers(path: Path) -> Diffusion:
    """scheduler_config.json of DDPM or DDIM, or a ValueError that names the field."""
    content = read_json(path)
    require(path, content, SCHEDULER)
    return Diffusion(
        num_timesteps=content.get("num_train_timesteps", 1000),
        beta_start=content.get("beta_start", 1e-4),
        beta_end=content.get("beta_end", 0.02),
        variance=content.get("variance_type", "fixed_small"),
    )


def scheduler_to_diffusers(diffusion: Diffusion) -> dict[str, Any]:
    return {
        "_class_name": "DDPMScheduler",
        **{name: needed for name, (needed, _) in SCHEDULER.items()},
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "variance_type": diffusion.variance,
        "clip_sample": True,
    }
