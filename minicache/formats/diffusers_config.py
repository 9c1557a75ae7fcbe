"""What diffusers' config.json and scheduler_config.json say, and what in them this network cannot honour."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicache.diffusion import Diffusion
from minicache.reading import read_whole, understood
from minicache.unet import UNetConfig

# What each of their two networks must be set to, and what it assumes where config.json is silent.
BOTH = {
    "act_fn": ("silu", "silu"),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "mid_block_scale_factor": (1, 1),
    "num_class_embeds": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_dim": (None, None),
    "time_embedding_type": ("positional", "positional"),
}
UNET2D = {
    "_class_name": ("UNet2DModel", None),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "downsample_type": ("conv", "conv"),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "upsample_type": ("conv", "conv"),
}
UNET2DCONDITION = {
    "_class_name": ("UNet2DConditionModel", None),
    "addition_embed_type": (None, None),
    "attention_type": ("default", "default"),
    "conv_in_kernel": (3, 3),
    "conv_out_kernel": (3, 3),
    "cross_attention_norm": (None, None),
    "dual_cross_attention": (False, False),
    "encoder_hid_dim": (None, None),
    "mid_block_only_cross_attention": (None, None),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn"),
    "only_cross_attention": (False, False),
    "resnet_out_scale_factor": (1, 1),
    "resnet_skip_time_act": (False, False),
    "time_cond_proj_dim": (None, None),
    "time_embedding_act_fn": (None, None),
    "timestep_post_act": (None, None),
    "transformer_layers_per_block": (1, 1),
}
# The timestep embedding, the padding of Downsample and norm_eps: DDPM's, or ADM's, which diffusers assumes.
CONVENTIONS = {
    adm: {
        "downsample_padding": (int(adm), 1),
        "flip_sin_to_cos": (adm, True),
        "freq_shift": (int(not adm), 0),
        "norm_eps": (1e-5 if adm else 1e-6, 1e-5),
    }
    for adm in (False, True)
}
SCHEDULER = {
    "prediction_type": ("epsilon", "epsilon"),
    "rescale_betas_zero_snr": (False, False),
    "trained_betas": (None, None),
}
A_LEVEL = ("attention_head_dim", "cross_attention_dim", "layers_per_block", "num_attention_heads",
           "only_cross_attention", "sample_size", "transformer_layers_per_block")  # fmt: skip


def require(path: str | Path, content: Mapping[str, Any], fields: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (needed, default) in fields.items():
        if (value := content.get(name, default)) != needed:
            raise ValueError(f"{path}: {name}={value!r} is not what this network does; it needs {needed!r}")


def config_from_diffusers(path: str | Path, text: str | bytes) -> UNetConfig:
    """The text of a config.json of UNet2DModel or UNet2DConditionModel, or a ValueError that names the field that
    cannot be honoured."""
    what = "a config that can be honoured"
    with understood(path, what):
        content = {**json.loads(text)}
        for name in A_LEVEL:  # what may be said for each level
            value = content.get(name)
            if isinstance(value, list) and value and value == value[:1] * len(value):
                content[name] = value[0]
        context = content.get("_class_name") == "UNet2DConditionModel"
        told = lambda adm: sum(content.get(name, default) == it for name, (it, default) in CONVENTIONS[adm].items())  # noqa: E731
        adm = told(True) > told(False)
    require(path, content, {**BOTH, **(UNET2DCONDITION if context else UNET2D), **CONVENTIONS[adm]})
    with understood(path, what):
        size, widths = content.get("sample_size"), content.get("block_out_channels", [224, 448, 672, 896])
        if type(size) is not int:
            raise ValueError(f"sample_size={size!r} must be one whole number")
        if not _whole_numbers(widths) or any(width % widths[0] for width in widths):
            raise ValueError(f"block_out_channels={widths} must be multiples of the first")
        channels = 4 if context else 3
        return UNetConfig(
            image_size=size,
            model_channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=content.get("layers_per_block", 2),
            attention_resolutions=tuple(size >> level for level in _attends(content, context)),
            in_channels=content.get("in_channels", channels),
            out_channels=content.get("out_channels", channels),
            dropout=content.get("dropout") or 0.0,
            groups=content.get("norm_num_groups", 32),
            adm=adm,
            **(_context(content) if context else {}),
        )


def _attends(content: Mapping[str, Any], context: bool) -> list[int]:
    """The levels with attention, by the kinds of blocks."""
    kind, down, up = "CrossAttn" if context else "Attn", content.get("down_block_types"), content.get("up_block_types")
    levels = [level for level, name in enumerate(down or ()) if name == f"{kind}DownBlock2D"]
    count = len(content.get("block_out_channels", range(4)))
    if down != _block_types(count, levels, kind, "Down"):
        raise ValueError(f"down_block_types={down} must be {count} of DownBlock2D, {kind}DownBlock2D")
    if up != _block_types(count, levels, kind, "Up")[::-1]:
        raise ValueError(f"up_block_types={up} must mirror down_block_types")
    return levels


def _context(content: Mapping[str, Any]) -> dict[str, int]:
    """What only UNet2DConditionModel has. Its attention_head_dim is, by a mistake of old, the number of heads."""
    name = "num_attention_heads" if content.get("num_attention_heads") else "attention_head_dim"
    sizes = {"context_dim": ("cross_attention_dim", 1280), "heads": (name, 8)}
    for theirs, default in sizes.values():
        if type(value := content.get(theirs, default)) is not int:
            raise ValueError(f"{theirs}={value!r} must be one whole number, the same at all levels")
    return {ours: content.get(*field) for ours, field in sizes.items()}


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(type(value) is int and value > 0 for value in values)


def _block_types(count: int, levels: list[int], kind: str, way: str) -> list[str]:
    return [f"{kind if level in levels else ''}{way}Block2D" for level in range(count)]


def config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    if config.channel_mult[0] != 1:
        raise ValueError(f"channel_mult={config.channel_mult}: diffusers can only hold one that begins with 1")
    count, kind = len(config.channel_mult), "CrossAttn" if config.context_dim else "Attn"
    levels = [level for level in range(count) if config.image_size >> level in config.attention_resolutions]
    fields = {**BOTH, **(UNET2DCONDITION if config.context_dim else UNET2D), **CONVENTIONS[config.adm]}
    context = {"cross_attention_dim": config.context_dim, "attention_head_dim": config.heads}
    return {
        **{name: needed for name, (needed, _) in fields.items()},
        "sample_size": config.image_size,
        "block_out_channels": [config.model_channels * mult for mult in config.channel_mult],
        "layers_per_block": config.num_res_blocks,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "dropout": config.dropout,
        "norm_num_groups": config.groups,
        "down_block_types": _block_types(count, levels, kind, "Down"),
        "up_block_types": _block_types(count, levels, kind, "Up")[::-1],
        **(context if config.context_dim else {}),
    }


def diffusion_from_diffusers(path: Path) -> Diffusion:
    """scheduler_config.json of any scheduler of DDPM's schedule, which says its betas, or a ValueError that names the
    field."""
    what = "a schedule that can be honoured"
    with understood(path, what):
        content = {**json.loads(read_whole(path))}
    require(path, content, SCHEDULER)
    with understood(path, what):
        if unsaid := [name for name in ("beta_start", "beta_end", "beta_schedule") if name not in content]:
            raise ValueError(f"{unsaid[0]} is missing, as where flow matching or EDM was trained")
        return Diffusion(
            num_timesteps=content.get("num_train_timesteps", 1000),
            beta_start=content["beta_start"],
            beta_end=content["beta_end"],
            variance=content.get("variance_type", "fixed_small"),
            beta_schedule=content["beta_schedule"],
        )


def scheduler_to_diffusers(config: UNetConfig, diffusion: Diffusion) -> dict[str, Any]:
    """Latents are not clipped, and their networks are asked from t = 1 on."""
    return {
        "_class_name": "DDPMScheduler",
        **{name: needed for name, (needed, _) in SCHEDULER.items()},
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_schedule": diffusion.beta_schedule,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "variance_type": diffusion.variance,
        "clip_sample": not config.context_dim,
        "steps_offset": int(bool(config.context_dim)),
    }
