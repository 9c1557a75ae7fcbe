"""Latent diffusion's way from words to pictures, against diffusers' own pipelines; all random, and in miniature."""

import re

import pytest
import torch
from conftest import noise, relative
from miniature import SIDE, first_stage, pipeline, text_encoder, tokenizer_files

from minicache import UNetConfig, latents

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5
WORDED = UNetConfig(
    SIDE, 32, (1, 2), attention_resolutions=(SIDE,), in_channels=4, out_channels=4, context_dim=64, adm=True
)
CLASSED = UNetConfig(
    SIDE, 32, (1, 2), attention_resolutions=(SIDE,), context_dim=64, num_tokens=6, null_token=5, adm=True
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder."""
    folder = tmp_path_factory.mktemp("pipe")
    pipe = pipeline(folder)
    pipe.save_pretrained(folder / "sd")
    return folder / "sd", pipe


def compvis(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A first stage by CompVis' names; written down apart from the code that reads them."""
    renamed, levels = {}, len(model.config.block_out_channels)
    for key, tensor in model.state_dict().items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        if "mid_block.attentions.0" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = re.sub(r"to_([qkv])", r"\1", key).replace("to_out.0", "proj_out")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        renamed[f"first_stage_model.{key}"] = tensor
    return renamed


def clip_keys(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    prefix = "cond_stage_model.transformer.text_model."
    state = {prefix + key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    return {**state, f"{prefix}embeddings.position_ids": torch.arange(77)[None]}  # in older files


def test_prompts(folder):
    path, pipe = folder
    words = latents.load_words(path)
    texts = ["cat dog", "", "a cat"]
    assert torch.equal(words.encode(*texts), pipe.encode_prompt(texts, "cpu", 1, False)[0])
    with pytest.raises(ValueError, match="has 80 tokens; at most 75 are taken"):
        words.encode("cat", "cat " * 80)


def test_pictures(folder):
    path, pipe = folder
    z = noise(3, 4, SIDE, SIDE)
    pictures = latents.decode(z, latents.load_first_stage(path, WORDED))
    assert pictures.shape == (3, 3, 2 * SIDE, 2 * SIDE)
    assert relative(pictures, pipe.vae.decode(z / 0.18215).sample) < TOLERANCE


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_one_file_of_compvis(folder, tmp_path, ending):
    _, pipe = folder
    state = {key: t.clone() for key, t in {**compvis(pipe.vae), **clip_keys(pipe.text_encoder)}.items()}
    state["model.diffusion_model.out.0.weight"] = torch.ones(32)
    if ending == "ckpt":
        torch.save({"state_dict": state, "global_step": 3}, tmp_path / "net.ckpt")
    else:
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "net.safetensors")
    tokenizer_files(tmp_path / "tokenizer")
    path, z = tmp_path / f"net.{ending}", noise(2, 4, SIDE, SIDE)
    assert torch.equal(latents.load_words(path).encode("cat"), pipe.encode_prompt("cat", "cpu", 1, False)[0])
    assert torch.equal(latents.decode(z, latents.load_first_stage(path, WORDED)), latents.decode(z, pipe.vae))


def test_codewords_are_taken_before_decoding(tmp_path):
    theirs, z = first_stage("VQModel"), noise(2, 3, SIDE, SIDE)
    torch.save({"state_dict": compvis(theirs)}, tmp_path / "ldm.ckpt")
    ours = latents.load_first_stage(tmp_path / "ldm.ckpt", CLASSED)
    codewords = theirs.quantize.embedding.weight  # [16, 3]
    nearest = (z.permute(0, 2, 3, 1)[..., None, :] - codewords).square().sum(-1).argmin(-1)
    quantized = codewords[nearest].permute(0, 3, 1, 2)
    expected = theirs.decoder(theirs.post_quant_conv(quantized))
    assert relative(latents.decode(z, ours), expected) < TOLERANCE
    assert relative(latents.decode(z, ours), theirs.decode(z, force_not_quantize=True).sample) > 0.1
    theirs.save_pretrained(tmp_path / "folder" / "vqvae")
    assert torch.equal(
        latents.decode(z, latents.load_first_stage(tmp_path / "folder", CLASSED)), latents.decode(z, ours)
    )


def test_one_picture_at_a_time(monkeypatch):
    vae, seen = first_stage(), []
    original = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: seen.append(len(z)) or original(z))
    latents.decode(noise(3, 4, SIDE, SIDE), vae)
    assert seen == [1, 1, 1]


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(latents, "HUB", "nobody/nothing")  # which is in nobody's cache


def test_what_is_not_there_is_named_with_its_place(tmp_path, offline):
    state = {"model.diffusion_model.out.0.weight": torch.ones(32)}
    torch.save({"state_dict": state}, tmp_path / "net.ckpt")
    for load in (latents.load_words, lambda path: latents.load_first_stage(path, WORDED)):
        name = "text_encoder" if load is latents.load_words else "vae"
        with pytest.raises(
            ConnectionError, match=f"get the folder {name} of nobody/nothing, and put it at {tmp_path / name}$"
        ):
            load(tmp_path / "net.ckpt")
    torch.save({"state_dict": clip_keys(text_encoder())}, tmp_path / "clip.ckpt")
    with pytest.raises(
        ConnectionError, match=f"get the folder tokenizer of .* and put it at {tmp_path / 'tokenizer'}$"
    ):
        latents.load_words(tmp_path / "clip.ckpt")
    with pytest.raises(ValueError, match=f"net.ckpt holds no first stage: put its folder vae or vqvae, .* {tmp_path}$"):
        latents.load_first_stage(tmp_path / "net.ckpt", CLASSED)


def test_a_damaged_part_and_one_of_another_network(tmp_path):
    state = compvis(first_stage("VQModel"))
    torch.save({"state_dict": state}, tmp_path / "ldm.ckpt")
    with pytest.raises(ValueError, match="latents of 3 channels, and the U-Net of 4"):
        latents.load_first_stage(tmp_path / "ldm.ckpt", WORDED)
    del state["first_stage_model.decoder.conv_out.bias"]
    torch.save({"state_dict": state}, tmp_path / "ldm.ckpt")
    with pytest.raises(ValueError, match=r"its VQModel lacks decoder.conv_out.bias \[3\]"):
        latents.load_first_stage(tmp_path / "ldm.ckpt", CLASSED)


def test_without_the_packages_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'needs diffusers: pip install -e "\.\[latent\]"'):
        latents.load_first_stage(tmp_path, WORDED)
