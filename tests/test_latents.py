"""Latent diffusion's way from words to pictures, against diffusers' own pipelines; all random, and in miniature."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import noise, relative
from miniature import SCHEDULE, SIDE, first_stage, pipeline, randomized, text_encoder, tokenizer_files
from PIL import Image

from minicache import Diffusion, Recipe, UNet, UNetConfig, denoise, latents, load, sample, uniform
from minicache.formats.diffusers import save_diffusers
from minicache.images import to_uint8
from sample import main, parse

diffusers = pytest.importorskip("diffusers")
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
    assert relative(words.encode(*texts * 30)[-3:], words.encode(*texts)) < TOLERANCE
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


def test_older_names_and_another_scale(folder, tmp_path):
    _, pipe = folder
    state = {
        key.replace("transformer.text_model.", "transformer."): t for key, t in clip_keys(pipe.text_encoder).items()
    }
    torch.save({"state_dict": {**compvis(pipe.vae), **state, "scale_factor": torch.tensor(0.5)}}, tmp_path / "net.ckpt")
    tokenizer_files(tmp_path / "tokenizer")
    words, z = latents.load_words(tmp_path / "net.ckpt"), noise(2, 4, SIDE, SIDE)
    assert torch.equal(words.encode("cat"), pipe.encode_prompt("cat", "cpu", 1, False)[0])
    pictures = latents.decode(z, latents.load_first_stage(tmp_path / "net.ckpt", WORDED))
    assert relative(pictures, pipe.vae.decode(z / 0.5).sample) < TOLERANCE


def test_parts_lie_in_folders_beside_the_folder_of_a_unet(folder):
    path, pipe = folder
    for unet in (path / "unet", *(path / "unet").glob("*.safetensors")):
        assert torch.equal(latents.load_words(unet).encode("cat"), pipe.encode_prompt("cat", "cpu", 1, False)[0])
        assert latents.load_first_stage(unet, WORDED).config.scaling_factor == 0.18215


def test_a_set_has_one_first_stage(folder, tmp_path):
    path = shutil.copytree(folder[0], tmp_path / "sd")
    flags = ["--ckpt", str(path), "--prompt", "cat", "--num", "2", "--steps", "4", "--out", str(tmp_path / "out")]
    main(parse(flags))
    (tmp_path / "out" / "000001.png").unlink()
    randomized(first_stage(), seed=9).save_pretrained(path / "vae")
    with pytest.raises(ValueError, match="was made with first stage and text encoder"):
        main(parse(flags))


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


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_every_step_is_the_pipelines(folder, sampler):
    path, pipe = folder
    schedulers = {
        "ddim": diffusers.DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, clip_sample=False),
        "pndm": diffusers.PNDMScheduler(**SCHEDULE, set_alpha_to_one=False, skip_prk_steps=True),
    }
    parts = {**pipe.components, "scheduler": schedulers[sampler]}
    pipe, x_T, theirs = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False), noise(1, 4, 8, 8), []
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        "cat dog", negative_prompt="a", guidance_scale=7.5, num_inference_steps=10, latents=x_T, output_type="pt",
        callback_on_step_end=lambda pipe, i, t, tensors: theirs.append((t, tensors["latents"])) or tensors,
    ).images  # fmt: skip
    unet, words = load(path), latents.load_words(path)
    context, negative = words.encode("cat dog"), words.encode("a")
    at = {"steps": 10, "sampler": sampler, "spacing": "offset", "guidance": 7.5}
    ours = list(denoise(unet, x_T=x_T, context=context, negative=negative, **at))
    assert [step.t for step in ours] == [t for t, _ in theirs]
    assert all(relative(step.x, x) < TOLERANCE for step, (_, x) in zip(ours, theirs))
    finished = latents.decode(ours[-1].x, latents.load_first_stage(path, unet.config))
    assert relative((finished / 2 + 0.5).clamp(0, 1), pictures) < TOLERANCE


@pytest.fixture(scope="module")
def ldm(tmp_path_factory):
    """LDM-4-G's parts in a folder: U-Net with its table of classes, VQModel."""
    folder = tmp_path_factory.mktemp("ldm")
    unet = randomized(UNet(CLASSED))
    unet.diffusion = Diffusion(1000, 0.0015, 0.0195, "fixed_small", "scaled_linear")
    save_diffusers(folder / "unet", unet)
    first_stage("VQModel").save_pretrained(folder / "vqvae")
    return folder


def drawn(out, *flags):
    main(parse([*map(str, flags), "--num", "3", "--steps", "6", "--out", str(out)]))
    return np.load(out)["arr_0"].astype(int)


def test_sample_draws_the_pipelines_pictures(folder, tmp_path):
    """Without a flag for it, with the pipeline's own sampler."""
    path, pipe = folder
    flags = ["--ckpt", path, "--prompt", "cat dog", "--prompt", "a", "--negative", "cat", "--guidance", 7.5]
    images = drawn(tmp_path / "x.npz", *flags, "--interval", 1)
    x_T = torch.stack([noise(4, SIDE, SIDE, seed=seed) for seed in range(3)])
    theirs = pipe(["cat dog", "a", "cat dog"], negative_prompt=["cat"] * 3, num_inference_steps=6, latents=x_T)
    assert images.shape == (3, 2 * SIDE, 2 * SIDE, 3)
    assert np.abs(images - np.stack([np.asarray(image) for image in theirs.images])).max() <= 1


def test_what_suits_stable_diffusion_and_its_cache(folder, tmp_path):
    path, _ = folder
    images = drawn(tmp_path / "x.npz", "--ckpt", path, "--prompt", "cat", "--interval", 3, "--branch", 2)
    unet, words = load(path), latents.load_words(path)
    at = {"sampler": "pndm", "plan": uniform(7, 3, 2), "guidance": 7.5}  # 6 timesteps, of which one is taken twice
    z = sample(unet, range(3), context=words.encode("cat"), negative=words.encode(""), **at)
    assert np.abs(images - to_uint8(latents.decode(z, latents.load_first_stage(path, unet.config)))).max() <= 1
    alone = drawn(
        tmp_path / "y.npz", "--ckpt", path, "--prompt", "cat", "--interval", 3, "--branch", 2, "--batch-size", 1
    )
    assert np.abs(images - alone).max() <= 1
    astronaut = drawn(tmp_path / "z.npz", "--ckpt", path, "--interval", 3, "--guidance", 1)
    assert np.abs(images - astronaut).max() > 1


def test_what_suits_ldm_and_its_cache(ldm, tmp_path):
    images = drawn(tmp_path / "x.npz", "--ckpt", ldm, "--class", 2, "--class", 4, "--interval", 2, "--branch", 1)
    unet, classes = load(ldm), torch.tensor([[2], [4], [2]])
    at = {"plan": uniform(6, 2, 1), "guidance": 1.5, "spacing": "offset", "negative": torch.tensor([[5]])}
    z = sample(unet, range(3), context=classes, **at)
    assert np.abs(images - to_uint8(latents.decode(z, first_stage("VQModel")))).max() <= 1


@pytest.mark.parametrize("sampler, spacing", [(None, "offset"), ("ddpm", "offset"), ("dpm++2m", None)])
def test_latents_are_not_clipped_and_end_as_their_authors_do(sampler, spacing):
    suited = {"sampler": sampler or "ddim", "spacing": spacing, "clip_x0": False}
    assert latents.suits(CLASSED, sampler) == suited


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_pictures_to_look_at(folder, tmp_path, capsys, ending):
    out = tmp_path / f"x.{ending}"
    main(
        parse(
            ["--ckpt", str(folder[0]), "--prompt", "cat", "--num", "2", "--steps", "4", "--compare", "--out", str(out)]
        )
    )
    with Image.open(out) as image:
        assert image.width > 2 * 2 * 96
    assert "PSNR to uncached" in capsys.readouterr().out


def test_a_recipe_has_its_own_guidance(folder, tmp_path):
    path, _ = folder
    Recipe(uniform(6, 2, 1), spacing="offset").save(tmp_path / "r.json")
    images = drawn(tmp_path / "x.npz", "--ckpt", path, "--prompt", "cat", "--plan", tmp_path / "r.json")
    z = sample(
        load(path), range(3), context=latents.load_words(path).encode("cat"), plan=uniform(6, 2, 1), spacing="offset"
    )
    assert np.abs(images - to_uint8(latents.decode(z, latents.load_first_stage(path, WORDED)))).max() <= 1


@pytest.mark.parametrize("which, flags, words", [
    ("folder", ["--class", 3], "knows words, not classes: use --prompt"),
    ("folder", ["--prompt", "cat " * 90], "has 90 tokens; at most 75"),
    ("folder", ["--prompt", "cat", "--eta", 0.5], "eta=0.5 means nothing to sampler='pndm'"),
    ("ldm", ["--prompt", "cat"], "knows classes, not words: say which with --class"),
    ("ldm", [], "knows classes, not words: say which with --class"),
    ("ldm", ["--class", 6], "the classes are 0..5 without 5, which stands for none"),
    ("ldm", ["--class", 5], "the classes are 0..5 without 5, which stands for none"),
])  # fmt: skip
def test_wrong_questions(folder, ldm, tmp_path, which, flags, words):
    path = {"folder": folder[0], "ldm": ldm}[which]
    with pytest.raises(ValueError, match=re.escape(words)):
        drawn(tmp_path / "x.npz", "--ckpt", path, *flags)
    assert not list(tmp_path.iterdir())


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(latents, "HUB", "nobody/nothing")  # which is in nobody's cache


def test_what_is_not_there_is_named_with_its_place(tmp_path, offline):
    state = {"model.diffusion_model.out.0.weight": torch.ones(32)}
    torch.save({"state_dict": state}, tmp_path / "net.ckpt")
    for name, part in (
        ("text_encoder", latents.load_words),
        ("vae", lambda path: latents.load_first_stage(path, WORDED)),
    ):
        with pytest.raises(
            ConnectionError, match=f"get the folder {name} of nobody/nothing, and put it at {tmp_path / name}$"
        ):
            part(tmp_path / "net.ckpt")
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
