"""Stable Diffusion and LDM-4-G in miniature: all conventions of the real ones, random weights, no downloads."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SIDE = 8  # of the latents; pictures are twice as wide


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random, so that none can hide, and small enough that nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = values * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.1 * values + (parameter.data.mean() > 0.5)  # the scale of a norm is near 1
    return module.eval()


def tokenizer_files(folder: Path) -> Path:
    """CLIP's two files for a language of letters, and of one word."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return folder


def text_encoder() -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=len(TOKENS) - 2, eos_token_id=len(TOKENS) - 1,
    )  # fmt: skip
    return randomized(transformers.CLIPTextModel(config), seed=1)


def first_stage(kind: str = "AutoencoderKL") -> nn.Module:
    """f = 2. AutoencoderKL of 4 channels, or VQModel of 3 and 16 codewords."""
    shape = {"block_out_channels": (32, 64), "layers_per_block": 1, "down_block_types": ("DownEncoderBlock2D",) * 2,
             "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
    if kind == "AutoencoderKL":
        return randomized(diffusers.AutoencoderKL(**shape, latent_channels=4, scaling_factor=0.18215), seed=2)
    return randomized(diffusers.VQModel(**shape, latent_channels=3, num_vq_embeddings=16, scaling_factor=1.0), seed=2)


def unet2d(**changes) -> nn.Module:
    """Stable Diffusion's U-Net: cross-attention at every level but the deepest, where only the middle has it."""
    shape = {"sample_size": SIDE, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64),
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 2,
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 64,
             "attention_head_dim": 2}  # fmt: skip
    return randomized(diffusers.UNet2DConditionModel(**{**shape, **changes}))


def pipeline(folder: Path) -> "diffusers.StableDiffusionPipeline":
    """StableDiffusionPipeline with PNDM, as v1.5 ships it; its tokenizer's files lie in folder/tokenizer."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_files(folder / "tokenizer"), model_max_length=77)
    pipe = diffusers.StableDiffusionPipeline(
        vae=first_stage(), text_encoder=text_encoder(), unet=unet2d(), safety_checker=None, feature_extractor=None,
        tokenizer=tokenizer, requires_safety_checker=False,
        scheduler=diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
