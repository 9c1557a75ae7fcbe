"""Around a network of latent diffusion (Rombach et al. 2022): prompts -> context, and latents -> pictures.

Both are the work of other networks, which diffusers and transformers hold: pip install -e ".[latent]". Their weights
are taken from the checkpoint itself where they are in it (a pipeline's folder, or a file of CompVis'), from folders
beside it that are named as in a pipeline (vae or vqvae, text_encoder, tokenizer), or else from Stable Diffusion's
repository on the hub.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minicache.images import to_uint8
from minicache.samplers import SAMPLERS
from minicache.tensors import read_file
from minicache.unet import UNetConfig

HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FIRST_STAGE, CLIP = "first_stage_model.", "cond_stage_model.transformer.text_model."  # prefixes in files of CompVis'
OLD_CLIP = "cond_stage_model.transformer."  # in older ones
SCALE = 0.18215  # of Stable Diffusion's latents, where a file does not say another
HEAD = 64  # channels of a head of CLIP's
BATCH = 64  # prompts that CLIP reads at a time


@dataclass(frozen=True)
class ClipWords:
    """CLIP's text model, in the place of a `Vocabulary`."""

    tokenizer: Any
    model: nn.Module
    guidance: float = 7.5  # that suits Stable Diffusion
    examples: tuple[str, ...] = ("a photograph of an astronaut riding a horse",)

    @torch.no_grad()
    def encode(self, *prompts: str) -> Tensor:
        """Tokens [B, 77, 768] of B prompts, of which one may be empty. ValueError for one that is too long."""
        length = self.model.config.max_position_embeddings
        for prompt, ids in zip(prompts, self.tokenizer(list(prompts)).input_ids):
            if len(ids) > length:
                raise ValueError(f"{prompt!r} has {len(ids) - 2} tokens; at most {length - 2} are taken")
        padded = self.tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
        return torch.cat([self.model(ids)[0] for ids in padded.input_ids.split(BATCH)])


def suits(config: UNetConfig, sampler: str | None = None) -> dict[str, Any]:
    """Fields of `Settings` that suit a latent network, with this sampler or the one its authors draw with."""
    sampler = sampler or ("ddim" if config.num_tokens else "pndm")
    leading = SAMPLERS[sampler].spacing == "uniform"  # which ends where no noise is left; theirs ends one step before
    return {"sampler": sampler, "spacing": "offset" if leading else None, "clip_x0": False}


def around(
    path: Path, config: UNetConfig, device: torch.device
) -> tuple[ClipWords | None, Callable[[Tensor], np.ndarray], str]:
    """What stands around the latent network at `path`: its words (None: it knows classes), latents -> uint8, and a hash
    of both's weights."""
    first_stage = load_first_stage(path, config)
    hasher = hashlib.sha256(str(first_stage.config.scaling_factor).encode())
    words = None if config.num_tokens else load_words(path)
    for model in (first_stage, words and words.model):
        for tensor in model.state_dict().values() if model else ():
            hasher.update(tensor.contiguous().numpy())
    first_stage = first_stage.to(device)
    return words, lambda x: to_uint8(decode(x, first_stage)), hasher.hexdigest()[:16]


@torch.no_grad()
def decode(latents: Tensor, first_stage: nn.Module) -> Tensor:
    """Latents [B, c, h, w] -> pictures [B, 3, H, W] near [-1, 1], float32; one at a time, so that many fit in memory.

    first_stage: AutoencoderKL, or VQModel, which takes the nearest codewords first; its config tells the scale.
    """
    scaled = latents.to(next(first_stage.parameters())) / first_stage.config.scaling_factor
    return torch.cat([first_stage.decode(z[None]).sample.float() for z in scaled])


def load_first_stage(path: Path, config: UNetConfig) -> nn.Module:
    """AutoencoderKL or VQModel of the checkpoint at `path`, whose U-Net has this config.

    ValueError and ConnectionError say what is missing, and where to put it.
    """
    diffusers = package("diffusers")
    state = tensors(path, FIRST_STAGE)
    kinds = {"vae": diffusers.AutoencoderKL, "vqvae": diffusers.VQModel}
    found = first_stage_in(path, state) if state else from_folders(path, kinds, hub=config.num_tokens is None)
    if found.config.latent_channels != config.in_channels:
        channels = f"{found.config.latent_channels} channels, and the U-Net of {config.in_channels}"
        raise ValueError(f"{path}: the first stage has latents of {channels}")
    return found.float().eval()


def load_words(path: Path) -> ClipWords:
    """CLIP's text model and tokenizer, of the checkpoint at `path`; errors as in `load_first_stage`."""
    transformers = package("transformers")
    state = tensors(path, CLIP) or tensors(path, OLD_CLIP)
    model = clip_in(path, state) if state else from_folders(path, {"text_encoder": transformers.CLIPTextModel})
    tokenizer = from_folders(path, {"tokenizer": transformers.CLIPTokenizer})
    if len(tokenizer) != model.config.vocab_size:  # transformers makes an empty one where it finds no files
        raise ConnectionError(by_hand(path, "tokenizer"))
    return ClipWords(tokenizer, model.float().eval())


def package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(f'what stands around a latent network needs {name}: pip install -e ".[latent]"') from None


def tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """What a file holds under a prefix, without the prefix; nothing for a folder."""
    content = {} if path.is_dir() else read_file(path)
    content = content.get("state_dict", content)
    return {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}


def from_folders(path: Path, kinds: Mapping[str, type], hub: bool = True) -> Any:
    """A part of a pipeline, from the first of these folders that is in (or beside) `path`; else HUB's."""
    for folder in beside(path):
        for name, kind in kinds.items():
            if (folder / name).is_dir():
                return kind.from_pretrained(folder / name)
    name, kind = next(iter(kinds.items()))
    if not hub:
        folders = " or ".join(kinds)
        raise ValueError(
            f"{path} holds no first stage: put its folder {folders}, as in a pipeline, into {beside(path)[0]}"
        )
    try:
        return kind.from_pretrained(HUB, subfolder=name)
    except OSError:
        raise ConnectionError(by_hand(path, name)) from None


def beside(path: Path) -> list[Path]:
    """Where the parts may lie: in the folder itself or that of a file; but first in the one of which it is the unet."""
    folder = path if path.is_dir() else path.parent
    return [folder.resolve().parent, folder] if folder.resolve().name == "unet" else [folder]


def by_hand(path: Path, name: str) -> str:
    return f"cannot get {name} from the hub: get the folder {name} of {HUB}, and put it at {beside(path)[0] / name}"


def first_stage_in(path: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """A first stage from tensors of CompVis' names, which tell its shape: with codewords it is a VQModel."""
    from diffusers import AutoencoderKL, VQModel
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    widths = [len(state[key]) for level in range(9) if (key := f"encoder.down.{level}.block.0.conv1.weight") in state]
    shape = {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": sum(f"encoder.down.0.block.{j}.conv1.weight" in state for j in range(9)),
        "latent_channels": len(state["post_quant_conv.weight"]),
    }
    codewords = state.get("quantize.embedding.weight")
    scale = float(tensors(path, "scale_factor").get("", SCALE if codewords is None else 1.0))
    if not 0 < scale < math.inf:
        raise ValueError(f"{path}: its scale_factor is {scale}")
    if codewords is None:
        model = AutoencoderKL(**shape, scaling_factor=scale)
    else:
        n, width = codewords.shape
        model = VQModel(**shape, num_vq_embeddings=n, vq_embed_dim=width, scaling_factor=scale)
    theirs = convert_ldm_vae_checkpoint({FIRST_STAGE + key: tensor for key, tensor in state.items()}, model.config)
    return filled(path, model, theirs if codewords is None else {**theirs, "quantize.embedding.weight": codewords})


def clip_in(path: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """CLIP's text model from tensors that tell its shape."""
    from transformers import CLIPTextConfig, CLIPTextModel

    if "embeddings.token_embedding.weight" not in state:
        raise ValueError(f"{path}: the text encoder in it is not CLIP's")
    vocabulary, width = state["embeddings.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(state["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(key.endswith(".mlp.fc1.weight") for key in state),
        num_attention_heads=width // HEAD,
        max_position_embeddings=len(state["embeddings.position_embedding.weight"]),
        hidden_act="quick_gelu",
    )
    model = CLIPTextModel(config)
    prefix = "text_model." if hasattr(model, "text_model") else ""  # which transformers 5.6 dropped
    return filled(path, model, {prefix + key: tensor for key, tensor in state.items()})


def filled(path: Path, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The model with these weights; ValueError for what it needs and does not find."""
    for name, needed in model.state_dict().items():
        if name not in state or state[name].shape != needed.shape:
            raise ValueError(f"{path}: its {type(model).__name__} lacks {name} {list(needed.shape)}")
    model.load_state_dict(state, strict=False)  # older files hold more, as CLIP's position_ids
    return model
