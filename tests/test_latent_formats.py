"""CompVis' checkpoints and diffusers' conditional folders: the same network from each, and what neither may hold."""

import json
import sys
import types
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import compvis, noise
from test_formats import published_keys

from minicache import LDM_IMAGENET, SD_15, Diffusion, UNet, load
from minicache.checkpoints import fingerprint, read, save
from minicache.formats import published_diffusion
from minicache.formats.compvis import COMPVIS, PREFIX
from minicache.formats.diffusers import DIFFUSERS, config_to_diffusers, save_diffusers
from minicache.tools import convert, verify

TABLE = "cond_stage_model.embedding.weight"


@cache
def meta(config) -> UNet:
    with torch.device("meta"):
        return UNet(config)


@pytest.fixture(scope="module", params=["sd", "ldm"])
def miniature(request):
    """The config, the diffusion and CompVis' tensors of a small latent network."""
    return compvis(request.param)[1:]


def lightning(state: dict, diffusion: Diffusion, averages: bool = False) -> dict:
    """A checkpoint as CompVis' training writes it: other parts, schedules and counters around the U-Net."""
    whole = {key if key == TABLE else PREFIX + key: value for key, value in state.items()}
    if averages:
        whole |= {"model_ema." + key.removeprefix("model.").replace(".", ""): value
                  for key, value in whole.items() if key.startswith(PREFIX)}  # fmt: skip
        whole |= {key: value + 1 for key, value in whole.items() if key.startswith(PREFIX)}
        whole |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    betas = torch.linspace(diffusion.beta_start**0.5, diffusion.beta_end**0.5, 1000) ** 2
    others = {
        "betas": betas,
        "alphas_cumprod": (1 - betas).cumprod(0),
        "first_stage_model.quant_conv.bias": betas[:3] + 1,
    }
    return {"epoch": 3, "global_step": 17, "pytorch-lightning_version": "1.4.2", "state_dict": whole | others}


def in_diffusers(config, state: dict) -> dict:
    unet = meta(config)
    theirs = DIFFUSERS.keys(unet)
    return {theirs[ours]: state[key] for ours, key in COMPVIS.keys(unet).items()}


@pytest.mark.parametrize("config, name", [(LDM_IMAGENET, "ldm4g"), (SD_15, "sd15")], ids=["ldm", "sd"])
def test_names_and_shapes_are_compvis(config, name):
    unet = meta(config)
    keys, published = COMPVIS.keys(unet), published_keys(f"compvis_{name}")
    if config.num_tokens:
        published[TABLE] = [1001, 512]
    assert set(keys.values()) == set(published)
    for ours, tensor in unet.state_dict().items():
        conv = keys[ours].endswith((".proj_in.weight", ".proj_out.weight"))
        assert [*tensor.shape, *[1, 1] * conv] == published[keys[ours]]


def test_every_format_gives_the_same_network(tmp_path, miniature):
    config, diffusion, state = miniature
    torch.save(state, tmp_path / "bare.ckpt")
    torch.save(lightning(state, diffusion), tmp_path / "lightning.ckpt")
    torch.save(lightning(state, diffusion, averages=True), tmp_path / "averages.ckpt")
    torch.save(lightning(state, diffusion)["state_dict"], tmp_path / "flat.ckpt")
    torch.save(in_diffusers(config, state), tmp_path / "diffusers.bin")
    unet = read(tmp_path / "bare.ckpt", config=config, diffusion=diffusion)
    save_diffusers(tmp_path / "folder", unet)
    save(tmp_path / "own.pt", unet)
    both = {"config": config, "diffusion": diffusion}
    for name, settings in {
        "lightning.ckpt": {"config": config},
        "averages.ckpt": {"config": config},
        "flat.ckpt": {"config": config},
        "diffusers.bin": both,
        "folder": {},
        "own.pt": {},
    }.items():
        again = read(tmp_path / name, **settings)
        assert fingerprint(again) == fingerprint(unet), name
        assert again.config == config and again.diffusion == diffusion, name
    raw = read(tmp_path / "averages.ckpt", config=config, raw=True)
    assert torch.equal(raw.conv_out.bias, unet.conv_out.bias + 1)
    with pytest.raises(ValueError, match="no averages"):
        read(tmp_path / "lightning.ckpt", config=config, raw=True)


def test_a_single_safetensors_file(tmp_path, miniature):
    save_file = pytest.importorskip("safetensors.torch").save_file
    config, diffusion, state = miniature
    save_file(lightning(state, diffusion)["state_dict"], tmp_path / "pruned.safetensors")
    again = read(tmp_path / "pruned.safetensors", config=config)
    assert torch.equal(again.conv_out.weight, state["out.2.weight"]) and again.diffusion == diffusion


def test_a_pipeline_folder(tmp_path, miniature):
    config, diffusion, state = miniature
    torch.save(state, tmp_path / "bare.ckpt")
    save_diffusers(tmp_path / "pipe" / "unet", read(tmp_path / "bare.ckpt", config=config, diffusion=diffusion))
    (tmp_path / "pipe" / "scheduler").mkdir()
    (tmp_path / "pipe" / "unet" / "scheduler_config.json").unlink()
    pndm = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": diffusion.beta_start,
            "beta_end": diffusion.beta_end, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
            "trained_betas": None, "clip_sample": False}  # fmt: skip
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text(json.dumps(pndm))
    weights = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.bin"
    weights.rename(weights.with_suffix(".fp16.bin"))
    for path in ("pipe", "pipe/unet"):
        again = read(tmp_path / path)
        assert again.config == config and again.diffusion == diffusion


def test_strict_within_the_prefix(tmp_path, miniature):
    config, diffusion, state = miniature
    key = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    for change, words in (
        ({PREFIX + key: None}, f"lacks tensor {key}"),
        ({PREFIX + "label_emb.0.0.weight": torch.zeros(1)}, "unexpected tensor label_emb"),
        ({PREFIX + key: torch.zeros(3, 3)}, r"to_k\.weight has shape \[3, 3\]"),
        ({"betas": torch.linspace(0.1, 0.2, 1000) ** 3}, "betas, 0.001 to 0.008, are none of linear, scaled_linear"),
        ({"betas": torch.linspace(1e-4, 0.02, 1000)}, "has its own"),
    ):
        content = lightning(state, diffusion)
        content["state_dict"] |= change
        content["state_dict"] = {key: value for key, value in content["state_dict"].items() if value is not None}
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=words) as error:
            read(tmp_path / "x.ckpt", config=config, diffusion=diffusion)
        assert "\n" not in str(error.value)


def test_lightning_s_own_classes_are_not_needed_and_others_are_refused(tmp_path, miniature, monkeypatch):
    """Callbacks lie beside the tensors by their class: it is not imported, and nothing of it is run."""
    config, diffusion, state = miniature
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    state = lightning(state, diffusion)
    torch.save({**state, "callbacks": {module.ModelCheckpoint: {"best_model_score": 1.5}}}, tmp_path / "a.ckpt")
    torch.save({**state, "callbacks": {module.ModelCheckpoint: Diffusion()}}, tmp_path / "b.ckpt")
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # torch >= 2.6
        assert read(tmp_path / "a.ckpt", config=config).diffusion == diffusion
        assert "pytorch_lightning" not in sys.modules
    with pytest.raises(ValueError, match=r"something else than tensors; if you trust .* torch\.save") as error:
        read(tmp_path / "b.ckpt", config=config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", [COMPVIS, DIFFUSERS])
@pytest.mark.parametrize("config", [SD_15, LDM_IMAGENET], ids=["sd", "ldm"])
def test_bare_files_of_published_shapes_are_recognised(tmp_path, family, config):
    tensors = meta(config).state_dict()
    state = {theirs: tensors[ours] for ours, theirs in family.keys(meta(config)).items()}
    assert family.mine(state) and family.infer(tmp_path, state, None, None) == config
    without = {key: value for key, value in state.items() if key != TABLE}
    assert family.infer(tmp_path, without, None, None) == replace(config, num_tokens=None, null_token=0)
    assert published_diffusion(config).beta_schedule == "scaled_linear"


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"in_channels": 9, "out_channels": 9},
            "is not sd15, as model_channels=32, in_channels=9;",
        ),  # inpainting, but for its output
        ({"context_dim": 1024}, "is not sd15, as model_channels=32, context_dim=1024;"),  # Stable Diffusion 2
        ({"channel_mult": (1, 2, 4), "context_dim": 2048}, "is not"),
    ],
)
def test_another_bare_network_with_a_context_is_not_guessed(tmp_path, change, words):
    unet = meta(replace(SD_15, **change, model_channels=32, groups=8))
    state = {theirs: unet.state_dict()[ours] for ours, theirs in COMPVIS.keys(unet).items()}
    with pytest.raises(ValueError, match=words + ".*shapes do not tell heads"):
        COMPVIS.infer(tmp_path, state, None, None)


@pytest.mark.parametrize(
    "field, value",
    [
        ("in_channels", 9),  # inpainting
        ("attention_head_dim", [5, 10, 20, 20]),  # Stable Diffusion 2
        ("transformer_layers_per_block", [1, 2, 10, 10]),  # SDXL
        ("addition_embed_type", "text_time"),
        ("cross_attention_dim", [16, 32, 64, 64]),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("mid_block_type", None),
        ("only_cross_attention", True),
        ("class_embed_type", "projection"),
        ("encoder_hid_dim", 4096),
        ("time_cond_proj_dim", 256),  # latent consistency models
        ("conv_in_kernel", 1),
        ("norm_eps", 1e-6),
        ("flip_sin_to_cos", False),
        ("down_block_types", ["AttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]),
        ("_class_name", "UNet2DModel"),
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "squaredcos_cap_v2"),
    ],
)
def test_configs_that_cannot_be_honoured(tmp_path, field, value):
    _, config, diffusion, state = compvis("sd")
    torch.save(state, tmp_path / "bare.ckpt")
    save_diffusers(tmp_path / "net", read(tmp_path / "bare.ckpt", config=config, diffusion=diffusion))
    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "net").glob("*.json")}
    assert set(files) == {"config.json", "scheduler_config.json"}
    name = "scheduler_config.json" if field in ("prediction_type", "beta_schedule") else "config.json"
    (tmp_path / "net" / name).write_text(json.dumps({**files[name], field: value}))
    words = {"_class_name": "attention_head_dim"}.get(field, field)
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "net")


def test_the_config_of_stable_diffusion(tmp_path):
    """As its unet/config.json says it; and as later releases of diffusers write the same network."""
    published = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
        "cross_attention_dim": 768, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    }  # fmt: skip
    later = {"attention_head_dim": [8] * 4, "transformer_layers_per_block": [1] * 4, "use_linear_projection": True}
    for content in (published, published | later, config_to_diffusers(SD_15)):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert DIFFUSERS.told(tmp_path / "weights.bin", {})[0] == SD_15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_float32_network(tmp_path, dtype, miniature):
    """Read at once in half precision, or rounded after it was read: the same bits."""
    config, diffusion, state = miniature
    torch.save(state, tmp_path / "bare.ckpt")
    half = load(tmp_path / "bare.ckpt", config=config, diffusion=diffusion, dtype=dtype)
    rounded = read(tmp_path / "bare.ckpt", config=config, diffusion=diffusion).to(dtype)
    assert half.conv_out.weight.dtype == dtype and fingerprint(half) == fingerprint(rounded)


def test_commands_take_a_latent_network(tmp_path, capsys, miniature):
    config, diffusion, state = miniature
    torch.save(state, tmp_path / "bare.ckpt")
    save(tmp_path / "own.pt", read(tmp_path / "bare.ckpt", config=config, diffusion=diffusion))
    convert.main(convert.parse([str(tmp_path / "own.pt"), str(tmp_path / "net"), "--to", "diffusers"]))
    convert.main(convert.parse([str(tmp_path / "net"), str(tmp_path / "half.pt"), "--half"]))
    assert torch.load(tmp_path / "half.pt", weights_only=True)["state_dict"]["conv_out.weight"].dtype == torch.float16
    assert torch.allclose(read(tmp_path / "half.pt").conv_out.weight, state["out.2.weight"], atol=1e-3)
    capsys.readouterr()
    assert verify.main(verify.parse([str(tmp_path / "net")])) == 0
    assert f"read strictly, {len(state)} tensors" in (out := capsys.readouterr().out) and "No outputs" in out
    x, context = noise(1, config.in_channels, 16, 16), noise(1, 3, config.context_dim)
    assert torch.equal(read(tmp_path / "net")(x, 9, context), read(tmp_path / "own.pt")(x, 9, context))
