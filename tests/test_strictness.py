"""What is wrong with a file, or contradicts it, is said in one sentence; and nothing half-written is left."""

import json
import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BARE, ROOT, SMALL, foreign, tensorflow

from minicache import CIFAR10, Diffusion, UNet, reading, tensors
from minicache.checkpoints import read, save
from minicache.formats.compvis import COMPVIS
from minicache.formats.diffusers import DIFFUSERS, new_attention, save_diffusers
from minicache.formats.pesser import PESSER
from minicache.tools.convert import main, parse
from minicache.words import Vocabulary


@pytest.mark.parametrize("form", ["pesser", "diffusers old", "diffusers new"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "nan"])
def test_strictness(tmp_path, unet, form, fault):
    state = {key: value.clone() for key, value in foreign(unet, form).items()}
    victim = next(key for key in state if re.search(r"(\.q\.|query|to_q).*weight", key))
    shown = new_attention(victim)
    if fault == "missing":
        del state[victim]
    elif fault == "extra":
        state["down.9.block.0.conv1.bias"] = torch.zeros(3)
        shown = "down.9"
    elif fault == "shape":
        state[victim] = torch.zeros(state[victim].shape[0], 3, 1, 1)
    else:
        state[victim].view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "x.ckpt")
    words = {"missing": "lacks tensor", "extra": "unexpected tensor", "shape": "has shape", "nan": "NaN"}[fault]
    with pytest.raises(ValueError, match=words) as error:
        read(tmp_path / "x.ckpt", config=SMALL, diffusion=Diffusion())
    assert shown in str(error.value) and "\n" not in str(error.value)


def test_what_would_change_nothing_is_refused(tmp_path, unet):
    save(tmp_path / "own.pt", unet)
    save_diffusers(tmp_path / "net", unet)
    torch.save(foreign(unet, "pesser"), tmp_path / "p.ckpt")
    for name in ("own.pt", "net"):
        for settings in ({"image_size": 16}, {"groups": 32}, {"image_size": 64, "groups": 8}):
            with pytest.raises(ValueError, match=r"says this itself: leave out (image_size|groups)="):
                read(tmp_path / name, **settings)
    with pytest.raises(ValueError, match="leave out image_size=16 and groups=32"):
        read(tmp_path / "p.ckpt", **BARE, config=SMALL)
    for name, settings in (("own.pt", {}), ("net", {}), ("p.ckpt", BARE)):
        with pytest.raises(ValueError, match="raw=True"):
            read(tmp_path / name, **settings, raw=True)
    for flags in (
        ["--image-size", "16"],
        ["--groups", "32"],
        ["--raw"],
        ["--beta-end", "0.1"],
        ["--variance", "fixed_small"],
    ):
        with pytest.raises(ValueError, match=r"says this itself|has its own|goes with"):
            main(parse([str(tmp_path / "own.pt"), str(tmp_path / "x.pt"), *flags]))
    with pytest.raises(ValueError, match="--half"):
        main(parse([str(tmp_path / "own.pt"), str(tmp_path / "x.pt"), "--half", "--to", "diffusers"]))
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("writer", [save, save_diffusers])
def test_a_network_without_its_diffusion_is_not_saved(tmp_path, writer):
    with pytest.raises(ValueError, match=r"no \.diffusion"):
        writer(tmp_path / "x.pt", UNet(SMALL))
    assert not list(tmp_path.iterdir())


def test_what_a_family_has_no_names_for_is_refused(tmp_path):
    for family, change in (
        (PESSER, {"context_dim": 8}),
        (COMPVIS, {}),
        (COMPVIS, {"context_dim": 8, "pooled_context": True}),
        (DIFFUSERS, {"context_dim": 8, "pooled_context": True}),
    ):
        with pytest.raises(ValueError, match="no names for"):
            family.keys(UNet(replace(SMALL, **change)))


def test_a_diffusers_folder_holds_no_words(tmp_path):
    unet = UNet(replace(SMALL, context_dim=8, num_tokens=4))
    unet.diffusion, unet.vocabulary = Diffusion(), Vocabulary(("red", "green", "blue"), 2)
    for null_token, words in ((0, unet.vocabulary), (0, None), (3, unet.vocabulary)):
        unet.config, unet.vocabulary = replace(unet.config, null_token=null_token), words
        with pytest.raises(ValueError, match="no words, and only a table of classes whose last row is null"):
            save_diffusers(tmp_path / "net", unet)
    assert not list(tmp_path.iterdir())


def test_a_config_that_contradicts_the_file_is_refused(tmp_path, unet):
    save(tmp_path / "own.pt", unet)
    save_diffusers(tmp_path / "net", unet)
    for path in ("own.pt", "net"):
        assert read(tmp_path / path, config=SMALL).config == SMALL
        for settings in ({"config": CIFAR10}, {"diffusion": Diffusion(beta_end=0.03)}):
            with pytest.raises(ValueError, match="not the"):
                read(tmp_path / path, **settings)


@pytest.mark.parametrize("form", ["minicache", "diffusers"])
def test_a_limit_on_the_file_leaves_no_half_checkpoint(tmp_path, form):
    """A limit on the size of files stands for the full disk."""
    command = f"ulimit -f 100; exec {sys.executable} -m minicache convert tiny_cifar10 {tmp_path}/x.pt --to {form}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_files_that_are_no_checkpoints(tmp_path, unet):
    save(tmp_path / "own.pt", unet)
    content = torch.load(tmp_path / "own.pt", weights_only=True)
    cases = {
        "truncated": (tmp_path / "own.pt").read_bytes()[:5000],
        "empty": b"",
        "text": b"hello",
        "png": b"\x89PNG\r\n\x1a\n",
        "pickle": pickle.dumps([1, 2, 3]),
        "code": pickle.dumps(Diffusion()),
    }
    (tmp_path / "text.npz").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"text\.npz cannot be read"):
        read(tmp_path / "text.npz")
    for name, data in cases.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.pt") as error:
            read(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)
        assert ("neither a whole zip nor a pickle" in str(error.value)) != (name in ("pickle", "code"))
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a.png", cases["png"])
    refused(tmp_path / "pictures.zip", "it is a zip of other files")
    for name, value, words in (
        ("list", [content["state_dict"], {}, 3, 4, {}], "holds a list"),
        ("numbers", {"a": 1, "b": 2.0}, "holds float, int"),
        ("nothing", {}, "holds nothing"),
        ("parallel", {"module.conv_in.weight": torch.zeros(1)}, "module."),
        ("other", {"layer.weight": torch.zeros(1)}, "not a network of this kind"),
        ("bare", unet.state_dict(), "of minicache's own, but not its shape: use checkpoints.save"),
        ("version", {"config": {"depth": 3}, "diffusion": {}, "state_dict": {}}, "depth"),
        ("values", {**content, "config": {**content["config"], "model_channels": 33}}, "model_channels=33"),
    ):
        torch.save(value, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=re.escape(words)):
            read(tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match="there is no file"):
        read(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match=r"no config\.json"):
        read(tmp_path)
    np.savez(tmp_path / "raw.npz", **tensorflow(unet))
    with pytest.raises(ValueError, match="--raw"):
        read(tmp_path / "raw.npz", **BARE)


@pytest.mark.parametrize(
    "file, field, value",
    [
        ("config.json", "_class_name", "UNet3DConditionModel"),
        ("config.json", "attention_head_dim", 8),
        ("config.json", "norm_num_groups", 0),
        ("config.json", "downsample_padding", 1),
        ("config.json", "out_channels", 6),
        ("config.json", "num_class_embeds", 10),
        ("config.json", "class_embed_type", "timestep"),
        ("config.json", "flip_sin_to_cos", True),
        ("config.json", "resnet_time_scale_shift", "scale_shift"),
        ("config.json", "down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"]),
        ("config.json", "up_block_types", ["UpBlock2D", "UpBlock2D"]),
        ("config.json", "block_out_channels", [64, 96]),
        ("config.json", "block_out_channels", 128),
        ("config.json", "down_block_types", None),
        ("config.json", "sample_size", [16, 32]),
        ("scheduler_config.json", "beta_schedule", "squaredcos_cap_v2"),
        ("scheduler_config.json", "prediction_type", "v_prediction"),
        ("scheduler_config.json", "trained_betas", [0.1, 0.2]),
        ("scheduler_config.json", "variance_type", "learned_range"),
        ("scheduler_config.json", "num_train_timesteps", 4000),
    ],
)
def test_configs_that_cannot_be_honoured(tmp_path, unet, file, field, value):
    save_diffusers(tmp_path / "net", unet)
    path = tmp_path / "net" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    words = {"variance_type": "variance=", "num_train_timesteps": "num_timesteps=", "norm_num_groups": "groups="}.get(
        field, field
    )
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "net")


def test_a_silent_field_means_what_diffusers_assumes(tmp_path, unet):
    """UNet2DModel's own defaults are another network: 8 channels a head, symmetric padding, ..."""
    save_diffusers(tmp_path / "net", unet)
    path = tmp_path / "net" / "config.json"
    content = json.loads(path.read_text())
    for field in ("attention_head_dim", "downsample_padding", "freq_shift", "norm_eps", "flip_sin_to_cos"):
        path.write_text(json.dumps({name: value for name, value in content.items() if name != field}))
        with pytest.raises(ValueError, match=field):
            read(tmp_path / "net")


@pytest.mark.parametrize("field", ["beta_start", "beta_end", "beta_schedule"])
def test_a_schedule_that_says_no_betas_is_not_ddpms(tmp_path, unet, field):
    """Those of flow matching and EDM say none, and such networks predict something else."""
    save_diffusers(tmp_path / "net", unet)
    path = tmp_path / "net" / "scheduler_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name != field}))
    with pytest.raises(ValueError, match=f"{field} is missing, as where flow matching or EDM was trained"):
        read(tmp_path / "net")


def own_file(path, unet: UNet, **change) -> Path:
    """A file of our own format, of which some parts are changed."""
    save(path, unet)
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    return path


def refused(path: Path, words: str, **settings) -> None:
    with pytest.raises(ValueError, match=words) as error:
        read(path, **settings)
    assert "\n" not in str(error.value) and path.name in str(error.value)


ODD = {
    "complex": lambda w: w.to(torch.complex64),
    "expanded": lambda w: torch.zeros(1).expand(w.shape),
    "overlapping": lambda w: torch.zeros(w.numel() // 2).as_strided(w.shape, (1,) * w.ndim),
    "sparse": lambda w: w.to_sparse(),
    "meta": lambda w: w.to("meta"),
    "nested": lambda w: torch.nested.nested_tensor([w[0], w[1]]),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")  # torch deprecates some of them
def test_odd_tensors_are_refused_wherever_they_lie(tmp_path, unet, kind):
    name = "M.0.conv1.weight"
    odd = ODD[kind](unet.state_dict()[name])
    refused(own_file(tmp_path / "x.pt", unet, state_dict={**unet.state_dict(), name: odd}), "not dense, real and all")
    training = {"optimizer": {"state": {0: [odd]}}}
    refused(own_file(tmp_path / "x.pt", unet, training=training), "not dense, real and all there")


def test_a_number_is_finite_in_the_dtype_that_it_is_read_in(tmp_path, unet):
    def with_weight(value: float, dtype: torch.dtype) -> Path:
        weight = torch.full_like(unet.M[0].conv1.weight, value, dtype=dtype)
        state = {**unet.state_dict(), "M.0.conv1.weight": weight}
        return own_file(tmp_path / "x.pt", unet, state_dict=state)

    refused(with_weight(1e300, torch.float64), "M.0.conv1.weight holds what is NaN or infinite as torch.float32")
    with pytest.raises(ValueError, match=r"infinite as torch\.float32"):
        main(parse([str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]))
    assert not (tmp_path / "y.pt").exists()
    refused(with_weight(1e5, torch.float32), "infinite as torch.float16", dtype=torch.float16)
    refused(with_weight(1, torch.int64), "no tensor of floating-point numbers but a torch.int64")
    assert (read(with_weight(1.5, torch.float8_e4m3fn)).M[0].conv1.weight == 1.5).all()


@pytest.mark.parametrize(
    "part, value, words",
    [
        ("state_dict", 5, "not a checkpoint of this version"),
        ("state_dict", [1], "not a checkpoint of this version"),
        ("config", [1], "not a checkpoint of this version"),
        ("config", {"num_res_blocks": 10**9}, "in 1..65536"),
        ("config", {"num_res_blocks": 33}, "num_res_blocks <= 32"),
        ("config", {"channel_mult": [1] * 17}, "channel_mult must be 1 to 16"),
        ("config", {"channel_mult": [1, 10**12]}, "in 1..65536"),
        ("config", {"model_channels": 32 * 10**9}, "in 1..65536"),
        ("config", {"image_size": 10**9}, "in 1..65536"),
        ("config", {"image_size": 2**14, "attention_resolutions": [2**13]}, "8192 at most"),
        ("config", {"model_channels": 2**13}, "8192 at most"),
        ("config", {"context_dim": 8, "num_tokens": 10**12}, "in 1..65536"),
        ("config", {"dropout": "a"}, "not a checkpoint of this version"),
        ("vocabulary", {"words": ["a"], "length": 3, "examples": [1]}, "not a checkpoint of this version"),
        ("vocabulary", {"words": ["a"], "length": 3}, "1 words need a table"),
    ],
)
def test_wrong_parts_of_our_own_format(tmp_path, unet, part, value, words):
    if part == "config" and isinstance(value, dict):
        value = {**asdict(unet.config), **value}
    refused(own_file(tmp_path / "x.pt", unet, **{part: value}), words)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("conv_in.weight", torch.tensor(1.0)),
        ("conv_in.weight", torch.zeros(3)),
        ("conv_in.weight", torch.zeros(0, 3, 3, 3)),
        ("down.0.block.0.conv1.weight", torch.tensor(1.0)),
    ],
)
def test_shapes_that_tell_no_network(tmp_path, unet, name, tensor):
    torch.save({**foreign(unet, "pesser"), name: tensor}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "not a network of this kind", **BARE)


def test_names_and_betas_of_other_kinds(tmp_path, unet):
    first = {"input_blocks.0.0.weight": torch.zeros(1)}
    for content, words in (
        ({**foreign(unet, "diffusers new"), 5: torch.zeros(1)}, "not a network of this kind"),
        ({**first, 5: torch.zeros(1)}, "not a network of this kind"),
        ({**first, "betas": torch.zeros(0)}, "betas can be honoured"),
        ({**first, "betas": torch.tensor(1.0)}, "betas can be honoured"),
        ({**first, "betas": torch.rand(2, 2)}, "betas can be honoured"),
        ({**first, "betas": torch.rand(2000)}, "betas can be honoured"),
    ):
        torch.save(content, tmp_path / "x.ckpt")
        refused(tmp_path / "x.ckpt", words, **({} if "betas" in content else BARE))


def test_arrays_that_are_no_weights_are_not_read(tmp_path, monkeypatch):
    """As pictures, of which a small file may hold many."""
    pictures = np.zeros((50, 16, 16, 3), np.uint8)
    np.savez_compressed(tmp_path / "small.npz", arr_0=pictures)
    np.savez(tmp_path / "large.npz", arr_0=pictures)
    monkeypatch.setattr(tensors, "LARGEST", 1000)
    refused(tmp_path / "small.npz", r"it would take 38,\d\d\d bytes")
    monkeypatch.setattr(reading, "LARGEST", 1000)
    refused(tmp_path / "large.npz", r"arr_0\.npy is no stored or deflated file of at most 1,000 bytes")


def test_arrays_that_are_no_floating_point_numbers(tmp_path, unet):
    variables = tensorflow(unet)
    for odd, words in (
        (np.zeros(3, [("a", "f4")]), "no floating-point numbers"),
        (np.zeros((3, 3, 3, 32), complex), "no floating-point numbers"),
        (np.full((3, 3, 3, 32), 1e300), "NaN or infinite as torch.float32"),
    ):
        np.savez(tmp_path / "x.npz", **{**variables, "model/conv_in/W": odd})
        refused(tmp_path / "x.npz", words, **BARE, raw=True)


@pytest.mark.parametrize(
    "field, value",
    [("layers_per_block", 10**9), ("sample_size", 10**9), ("down_block_types", 5), ("dropout", "a"), ("dropout", [1])],
)
def test_configs_of_wrong_kinds_and_sizes(tmp_path, unet, field, value):
    save_diffusers(tmp_path / "net", unet)
    path = tmp_path / "net" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=r"config\.json is not a config that can be honoured"):
        read(tmp_path / "net")


@pytest.mark.parametrize("file", ["config.json", "scheduler_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "5", "{", '{"sample_size": 1' + "0" * 5000 + "}", "\udcff"])
def test_texts_that_are_no_configs(tmp_path, unet, file, text):
    save_diffusers(tmp_path / "net", unet)
    (tmp_path / "net" / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"{file} is not a .* that can be honoured"):
        read(tmp_path / "net")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    pipe = os.open(tmp_path / "x.pt", os.O_RDWR)
    os.write(pipe, b"hello")
    closing = threading.Timer(3, os.close, [pipe])  # so that whoever reads it fails at last
    closing.start()
    refused(tmp_path / "x.pt", "there is no file")
    closing.cancel()
    os.close(pipe)
