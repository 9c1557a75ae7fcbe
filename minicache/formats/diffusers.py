"""diffusers: the names of UNet2DModel, its configuration, its schedulers, and folders of theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicache.checkpoints import diffusion_of, write
from minicache.diffusion import Diffusion
from minicache.files import replacing
from minicache.formats.family import Dialect, Family
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


# --- folders ---------------------------------------------------------------------------------------------------------


def weights_in(path: Path) -> Path:
    """The weights in a diffusers folder: a network's own, or a pipeline's with its network in unet/."""
    folder = path / "unet" if (path / "unet").is_dir() else path
    if not (folder / "config.json").exists():
        raise ValueError(f"{path} holds no config.json: not a diffusers folder")
    names = ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} holds neither {' nor '.join(names)}")


def told(path: Path, content: Mapping[str, Any]) -> tuple[UNetConfig | None, Diffusion | None]:
    """What config.json and scheduler_config.json beside the weights say; None where there is no such file."""
    folder, config, diffusion = path.parent, None, None
    if (folder / "config.json").exists():
        config = config_from_diffusers(folder / "config.json")
    for scheduler in (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json"):
        if diffusion is None and scheduler.exists():
            diffusion = diffusion_from_diffusers(scheduler)
    return config, diffusion


def save_diffusers(folder: str | Path, unet: UNet) -> None:
    """A folder that diffusers' UNet2DModel, DDPMPipeline and DDIMPipeline load with from_pretrained."""
    if Path(folder).exists():
        raise ValueError(f"{folder} exists; choose another name for the diffusers folder")
    state = unet.state_dict()
    files = {
        "config.json": config_to_diffusers(unet.config),
        "scheduler_config.json": scheduler_to_diffusers(diffusion_of(unet)),
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    }
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        weights = {theirs: state[ours].contiguous() for ours, theirs in NAMES.keys(unet).items()}
        write(temporary / "diffusion_pytorch_model.bin", weights)


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


DIFFUSERS = Family(
    mine=lambda content: any(str(key).startswith("down_blocks.") for key in content),
    keys=NAMES.keys,
    infer=NAMES.infer,
    tensors=lambda content, raw: {new_attention(key): value for key, value in content.items()},
    told=told,
)
