"""Checkpoints on disk <-> networks: minicache's own files, diffusers folders, pesser / ermongroup / DeepCache files,
and the original TensorFlow variables. A file is read strictly: not one tensor may be missing, left over, misshapen
or not finite, and a configuration that this network cannot honour is refused by the field's name.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicache.dialects import (
    DIFFUSERS,
    PESSER,
    config_from_diffusers,
    config_to_diffusers,
    diffusion_from_diffusers,
    from_tensorflow,
    infer_config,
    new_attention,
    scheduler_to_diffusers,
)
from minicache.diffusion import Diffusion
from minicache.files import replacing
from minicache.unet import UNet, UNetConfig

# What a fingerprint always covers: all fields of the first release but dropout, which changes no output.
FIRST_FIELDS = ("image_size", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions",
                "in_channels", "out_channels", "groups")  # fmt: skip

# --- reading ---------------------------------------------------------------------------------------------------------


def read(
    path: str | Path, config: UNetConfig | None = None, *, image_size: int | None = None, ema: bool = True
) -> UNet:
    """The network in a file or folder of any known format: float32, on the CPU, in eval mode, with `.diffusion` and
    `.fingerprint` set. A bare file whose shapes leave it open needs its config, or its image_size; ema chooses among
    TensorFlow's variables. ValueError says what is wrong with the file."""
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    content = read_file(path, ema)
    if "state_dict" in content and "config" in content:
        own, diffusion = own_settings(path, content)
        refuse_another(config, own, path)
        return build(path, own, diffusion, content["state_dict"])
    if not content or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        kinds = sorted({type(value).__name__ for value in content.values()})
        raise ValueError(f"{path} is not a state dict: it holds {', '.join(kinds) or 'nothing'}")
    if any(key.startswith("module.") for key in content):
        raise ValueError(f"{path} has keys that begin with 'module.': a training checkpoint, not a bare state dict")

    dialect, diffusion = PESSER, None
    if any(key.startswith("down_blocks.") for key in content):
        dialect, folder = DIFFUSERS, path.parent
        content = {new_attention(key): value for key, value in content.items()}
        if (folder / "config.json").exists():
            own = config_from_diffusers(folder / "config.json")
            refuse_another(config, own, folder / "config.json")
            config = own
        for scheduler in (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json"):
            if diffusion is None and scheduler.exists():
                diffusion = diffusion_from_diffusers(scheduler)
    if config is None:
        config = infer_config(path, content, dialect, image_size)
    if diffusion is None:  # Ho et al.: fixed_large for CIFAR-10; the published 256x256 weights have fixed_small
        diffusion = Diffusion(variance="fixed_large" if config.image_size <= 32 else "fixed_small")

    with torch.device("meta"):
        keys = dialect.keys(UNet(config))
    ours = {theirs: name for name, theirs in keys.items()}
    state = {ours.get(key, key): value for key, value in content.items()}  # strangers are left for `build` to refuse
    for name, value in state.items():
        if ".attn." in name and value.ndim == 4:  # theirs is a 1x1 convolution, ours Linear
            state[name] = value.flatten(1)
    return build(path, config, diffusion, state, keys)


def find_weights(path: Path) -> Path:
    """The weights in a diffusers folder: a network's own, or a pipeline's with its network in unet/."""
    folder = path / "unet" if (path / "unet").is_dir() else path
    if not (folder / "config.json").exists():
        raise ValueError(f"{path} holds no config.json: not a diffusers folder")
    names = ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} holds neither {' nor '.join(names)}")


def read_file(path: Path, ema: bool = True) -> dict[str, Any]:
    """What a file holds, loaded without running any code from it; ValueError where it cannot be."""
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as variables:
                content = dict(variables)
        elif path.suffix == ".safetensors":
            content = _read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, MemoryError) as error:
        raise ValueError(f"{path}: {error}") from None
    except pickle.UnpicklingError:  # whose message advises to load it unsafely
        raise ValueError(f"{path} cannot be read as a checkpoint: it holds something else than tensors") from None
    except Exception as error:  # what a damaged file makes torch and zipfile raise has many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{path} cannot be read as a checkpoint (truncated, or another kind of file): {reason}"
        raise ValueError(message) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a state dict: it holds a {type(content).__name__}")
    return from_tensorflow(content, ema) if path.suffix == ".npz" else content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading .safetensors needs the package: pip install safetensors") from None
    return load_file(path)


def own_settings(path: Path, content: dict[str, Any]) -> tuple[UNetConfig, Diffusion]:
    try:
        return UNetConfig(**content["config"]), Diffusion(**content["diffusion"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of this version of minicache: {error}") from None


def refuse_another(config: UNetConfig | None, own: UNetConfig, path: Path) -> None:
    if config not in (None, own):
        raise ValueError(f"{path} has its own config, {own}, which is not the one given, {config}")


def build(
    path: Path,
    config: UNetConfig,
    diffusion: Diffusion,
    state: Mapping[str, Any],
    keys: Mapping[str, str] | None = None,
) -> UNet:
    """A network with exactly these tensors (in float32). keys: our names -> the file's, for what is said of errors."""
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
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {keys.get(name, name)} is no tensor but a {type(tensor).__name__}")
        if tensor.shape != needed[name].shape:
            shapes = f"{list(tensor.shape)}; the network needs {list(needed[name].shape)}"
            raise ValueError(f"{path}: tensor {keys.get(name, name)} has shape {shapes}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {keys.get(name, name)} holds NaN or infinity")
    # copied, as kernels choose by the alignment of memory: every format then computes the same bits
    weights = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in state.items()}
    unet.load_state_dict(weights, assign=True)
    unet.diffusion, unet.fingerprint = diffusion, fingerprint(unet)
    return unet.eval()


def fingerprint(unet: UNet) -> str:
    """A hash of the network's shape and of its weights as float32; equal for the same weights in any format.

    Fields of the config that came after the first recipes count only where they are not at their default.
    """
    shape = asdict(unet.config)
    later = [field for field in fields(unet.config) if field.name not in (*FIRST_FIELDS, "dropout")]
    config = {name: shape[name] for name in FIRST_FIELDS}
    config |= {field.name: shape[field.name] for field in later if shape[field.name] != field.default}
    hasher = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.float().cpu().contiguous().numpy())
    return hasher.hexdigest()[:16]


# --- writing ---------------------------------------------------------------------------------------------------------


def save(path: str | Path, unet: UNet, half: bool = False, training: dict[str, Any] | None = None) -> None:
    """minicache's own format: {"config", "diffusion", "state_dict"}, and "training" where a run can resume from it.
    half: store float16 (half the size; computing stays in float32)."""
    state = {name: tensor.half() if half else tensor for name, tensor in unet.state_dict().items()}
    content = {"config": asdict(unet.config), "diffusion": asdict(unet.diffusion), "state_dict": state}
    if training is not None:
        content["training"] = training
    with replacing(path) as temporary:
        write(temporary, content)


def write(path: Path, content: dict[str, Any]) -> None:
    """torch.save, but a full disk is an OSError; torch itself reports an internal error."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def save_diffusers(folder: str | Path, unet: UNet) -> None:
    """A folder that diffusers' UNet2DModel, DDPMPipeline and DDIMPipeline load with from_pretrained."""
    if Path(folder).exists():
        raise ValueError(f"{folder} exists; choose another name for the diffusers folder")
    state = unet.state_dict()
    files = {
        "config.json": config_to_diffusers(unet.config),
        "scheduler_config.json": scheduler_to_diffusers(unet.diffusion),
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
        weights = {theirs: state[ours].contiguous() for ours, theirs in DIFFUSERS.keys(unet).items()}
        write(temporary / "diffusion_pytorch_model.bin", weights)
