"""Every format reads to the same network; whatever is wrong with a file is said in one sentence."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, SMALL, noise, random_unet

from minicache import CIFAR10, LSUN_256, Diffusion, UNet, load
from minicache.checkpoints import fingerprint, read, save
from minicache.formats.diffusers import DIFFUSERS, OLD_ATTENTION, new_attention, save_diffusers
from minicache.formats.pesser import PESSER
from minicache.tools.convert import main, parse


def published_keys(name: str) -> dict[str, list[int]]:
    lines = (GOLDEN / f"keys_{name}.txt").read_text().splitlines()
    fields = (line.split("\t") for line in lines if not line.startswith("#"))
    return {key: json.loads(shape.split("]")[0] + "]") for key, shape in (field[:2] for field in fields)}


@pytest.mark.parametrize("config, name", [(CIFAR10, "cifar10"), (LSUN_256, "256")], ids=["cifar10", "256"])
@pytest.mark.parametrize("dialect", ["diffusers", "pesser"])
def test_names_and_shapes_are_the_published_ones(config, name, dialect):
    with torch.device("meta"):
        unet = UNet(config)
    keys = (DIFFUSERS if dialect == "diffusers" else PESSER).keys(unet)
    published = published_keys(f"{dialect}_{name}")
    assert set(keys.values()) == set(published)
    for ours, tensor in unet.state_dict().items():
        conv = dialect == "pesser" and ".attn." in ours and tensor.ndim == 2
        assert [*tensor.shape, *[1, 1] * conv] == published[keys[ours]]
    assert len(unet.D) == len(unet.U) == {"cifar10": 12, "256": 18}[name]
    assert sum(p.numel() for p in unet.parameters()) == {"cifar10": 35_746_307, "256": 113_673_219}[name]


BARE = {"image_size": 16, "groups": 32, "diffusion": Diffusion()}  # what a bare file of SMALL does not tell


def foreign(unet: UNet, form: str) -> dict[str, torch.Tensor]:
    """The network's tensors as others store them; written down apart from the code that reads them."""
    state = unet.state_dict()
    if form.startswith("diffusers"):
        names = {theirs: state[ours] for ours, theirs in DIFFUSERS.keys(unet).items()}
        if form == "diffusers old":
            for old, new in OLD_ATTENTION.items():
                names = {key.replace(new, old): value for key, value in names.items()}
        return names
    pesser = {}
    for ours, theirs in PESSER.keys(unet).items():
        attention = bool(re.search(r"attn.*\.(q|k|v|proj_out)\.weight", theirs))
        pesser[theirs] = state[ours][:, :, None, None] if attention else state[ours]
    return pesser


def tensorflow(unet: UNet, suffix: str = "") -> dict[str, np.ndarray]:
    variables = {}
    for key, tensor in foreign(unet, "pesser").items():
        path, _, parameter = key.rpartition(".")
        path = re.sub(r"(down|up)\.(\d+)", r"\1_\2", path)
        path = re.sub(r"\b(block|attn)\.(\d+)", r"\1_\2", path).replace("dense.", "dense")
        array = tensor.numpy()
        if array.ndim == 4:
            nin = array.shape[2:] == (1, 1)
            array = array[:, :, 0, 0].T if nin else array.transpose(2, 3, 1, 0)
        elif array.ndim == 2:
            array = array.T
        normed = "norm" in path.split(".")[-1]
        name = {"weight": "gamma" if normed else "W", "bias": "beta" if normed else "b"}[parameter]
        variables[f"model/{path.replace('.', '/')}/{name}{suffix}"] = array
    return variables


@pytest.mark.parametrize("name", ["cifar10", "256"])
def test_tensorflow_names_are_the_published_ones(name):
    with torch.device("meta"):
        unet = UNet(CIFAR10 if name == "cifar10" else replace(LSUN_256, model_channels=32))  # narrow, for the memory
    ours = {key: list(value.shape) for key, value in tensorflow(unet.to_empty(device="cpu")).items()}
    published = published_keys(f"tf_{name}")
    assert set(ours) == set(published)
    if name == "cifar10":
        assert ours == published


def test_every_format_gives_the_same_network(tmp_path, unet):
    x = noise(1, 3, 16, 16)
    torch.save(foreign(unet, "pesser"), tmp_path / "pesser.ckpt")
    torch.save(foreign(unet, "diffusers old"), tmp_path / "old.bin")
    torch.save(foreign(unet, "diffusers new"), tmp_path / "new.bin")
    garbage = {key: value + 1 for key, value in tensorflow(unet).items()}
    averages = tensorflow(unet, "/ExponentialMovingAverage")
    np.savez(tmp_path / "tf.npz", **garbage, **averages, global_step=np.array(7))
    save(tmp_path / "own.pt", unet)
    save_diffusers(tmp_path / "folder", unet)
    for name, settings in {
        "pesser.ckpt": BARE,
        "old.bin": {"config": SMALL, "diffusion": Diffusion()},
        "new.bin": BARE,
        "tf.npz": BARE,
        "own.pt": {},
        "folder": {},
    }.items():
        again = read(tmp_path / name, **settings)
        assert again.config == SMALL and not again.training
        assert torch.equal(again(x, 10), unet(x, 10)), name
    assert not torch.equal(read(tmp_path / "tf.npz", **BARE, raw=True)(x, 10), unet(x, 10))


def test_fingerprint_tells_weights_and_not_formats(tmp_path, unet):
    save(tmp_path / "a.pt", unet)
    torch.save(foreign(unet, "pesser"), tmp_path / "b.ckpt")
    other = random_unet()
    other.conv_out.bias[0] += 1e-3
    save(tmp_path / "c.pt", other)
    settings = {"config": SMALL, "diffusion": Diffusion()}
    a, b, c = (fingerprint(read(tmp_path / name, **settings)) for name in ("a.pt", "b.ckpt", "c.pt"))
    assert a == b != c and re.fullmatch("[0-9a-f]{16}", a)


def test_pipeline_folder_with_subfolders(tmp_path, unet):
    save_diffusers(tmp_path / "flat", unet)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "flat").rename(tmp_path / "pipe" / "unet")
    (tmp_path / "pipe" / "scheduler").mkdir()
    moved = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
    (tmp_path / "pipe" / "unet" / "scheduler_config.json").rename(moved)
    moved.write_text(moved.read_text().replace("0.02", "0.015"))
    assert read(tmp_path / "pipe").diffusion.beta_end == 0.015


def test_bare_presets_are_recognised_by_their_shapes(tmp_path):
    for preset, dialect in ((CIFAR10, "pesser"), (replace(CIFAR10, model_channels=64), "pesser")):
        unet = UNet(preset)
        torch.save(foreign(unet, dialect), tmp_path / "bare.ckpt")
        if preset == CIFAR10:
            read_unet = read(tmp_path / "bare.ckpt")
            assert read_unet.config == CIFAR10 and read_unet.diffusion.variance == "fixed_large"
        else:
            with pytest.raises(ValueError, match="image size"):
                read(tmp_path / "bare.ckpt")


@pytest.mark.parametrize("form", ["pesser", "diffusers new"])
def test_a_bare_file_is_asked_for_what_its_shapes_do_not_tell(tmp_path, form):
    """Eps is another one with other groups, and the pictures with another schedule: neither is guessed."""
    tiny = load("tiny_cifar10")
    assert tiny.config.groups != 32 and tiny.diffusion.beta_end != 0.02
    torch.save(foreign(tiny, form), path := tmp_path / "bare.bin")
    image, noises = "its image size and groups", "its noise schedule"
    for settings, words in (
        ({}, f"{image} .* and {noises}"),
        ({"image_size": 32}, f"{image} .* and {noises}"),
        ({"groups": 8, "diffusion": tiny.diffusion}, image),
        ({"config": tiny.config}, f"does not tell {noises}"),
        ({"image_size": 32, "groups": 8}, f"does not tell {noises}"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            read(path, **settings)
        assert "convert" in str(error.value) and "\n" not in str(error.value)
    x = noise(1, 3, 32, 32)
    for settings in ({"config": tiny.config}, {"image_size": 32, "groups": 8}):
        again = read(path, **settings, diffusion=tiny.diffusion)
        assert fingerprint(again) == fingerprint(tiny) and again.diffusion == tiny.diffusion
        assert torch.allclose(again(x, 500), tiny(x, 500), atol=1e-6)
    assert load(path, config=tiny.config, diffusion=tiny.diffusion).diffusion == tiny.diffusion


def test_groups_that_no_preset_has_are_no_obstacle(tmp_path):
    """20 channels in groups of 4: a preset with so many could not be made, and is not tried."""
    unet = random_unet(replace(SMALL, model_channels=20, groups=4))
    torch.save(foreign(unet, "pesser"), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="does not tell its image size and groups"):
        read(tmp_path / "x.ckpt")
    assert read(tmp_path / "x.ckpt", **{**BARE, "groups": 4}).config == unet.config


def test_a_folder_without_a_scheduler_is_asked_for_the_schedule(tmp_path, unet):
    save_diffusers(tmp_path / "net", unet)
    (tmp_path / "net" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="does not tell its noise schedule"):
        read(tmp_path / "net")
    assert read(tmp_path / "net", diffusion=Diffusion(beta_end=0.01)).diffusion.beta_end == 0.01


# --- what is refused -------------------------------------------------------------------------------------------------


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
            with pytest.raises(ValueError, match=r"leaves nothing open that (image_size|groups)="):
                read(tmp_path / name, **settings)
    with pytest.raises(ValueError, match="image_size=16 or groups=32 could decide"):
        read(tmp_path / "p.ckpt", **BARE, config=SMALL)
    for name, settings in (("own.pt", {}), ("net", {}), ("p.ckpt", BARE)):
        with pytest.raises(ValueError, match="raw=True"):
            read(tmp_path / name, **settings, raw=True)
    for flags in (
        ["--image-size", "16"],
        ["--groups", "32"],
        ["--raw"],
        ["--beta-end", "0.5"],
        ["--variance", "fixed_small"],
    ):
        with pytest.raises(ValueError, match=r"nothing open|has its own|goes with"):
            main(parse([str(tmp_path / "own.pt"), str(tmp_path / "x.pt"), *flags]))
    with pytest.raises(ValueError, match="--half"):
        main(parse([str(tmp_path / "own.pt"), str(tmp_path / "x.pt"), "--half", "--to", "diffusers"]))
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("writer", [save, save_diffusers])
def test_a_network_without_its_diffusion_is_not_saved(tmp_path, writer):
    with pytest.raises(ValueError, match=r"no \.diffusion"):
        writer(tmp_path / "x.pt", UNet(SMALL))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", [DIFFUSERS, PESSER])
def test_a_network_with_a_context_has_no_names_in_these_families(tmp_path, family):
    unet = UNet(replace(SMALL, context_dim=8))
    unet.diffusion = Diffusion()
    with pytest.raises(ValueError, match="context_dim=8"):
        family.keys(unet)
    with pytest.raises(ValueError, match="context_dim=8"):
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
    command = f"ulimit -f 100; exec {sys.executable} -m minicache convert tiny {tmp_path}/x.pt --to {form}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_files_that_are_no_checkpoints(tmp_path, unet):
    save(tmp_path / "own.pt", unet)
    content = torch.load(tmp_path / "own.pt", weights_only=True)
    cases = {
        "truncated": (tmp_path / "own.pt").read_bytes()[:5000],
        "empty": b"",
        "text": b"hello",
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
    for name, value, words in (
        ("list", [content["state_dict"], {}, 3, 4, {}], "holds a list"),
        ("numbers", {"a": 1, "b": 2.0}, "holds float, int"),
        ("nothing", {}, "holds nothing"),
        ("parallel", {"module.conv_in.weight": torch.zeros(1)}, "module."),
        ("other", {"layer.weight": torch.zeros(1)}, "not a network of this kind"),
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
        ("config.json", "_class_name", "UNet2DConditionModel"),
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


def test_command(tmp_path, unet, capsys):
    torch.save(foreign(unet, "pesser"), tmp_path / "p.ckpt")
    bare = ["--image-size", "16", "--groups", "32", "--beta-end", "0.03", "--variance", "fixed_small"]
    with pytest.raises(ValueError, match="--image-size and --groups of convert"):
        main(parse([str(tmp_path / "p.ckpt"), str(tmp_path / "d")]))
    main(parse([str(tmp_path / "p.ckpt"), str(tmp_path / "d"), "--to", "diffusers", *bare]))
    main(parse([str(tmp_path / "d"), str(tmp_path / "m.pt"), "--half"]))
    again = read(tmp_path / "m.pt")
    assert torch.allclose(again.conv_out.weight, unet.conv_out.weight, atol=1e-3)
    assert again.diffusion == Diffusion(beta_end=0.03, variance="fixed_small")
    assert "fingerprint" in capsys.readouterr().out
    for ending in ("safetensors", "npz"):
        with pytest.raises(ValueError, match="another format"):
            main(parse([str(tmp_path / "m.pt"), str(tmp_path / f"x.{ending}")]))
    with pytest.raises(ValueError, match="exists"):
        main(parse([str(tmp_path / "m.pt"), str(tmp_path / "d"), "--to", "diffusers"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "m.pt", "p.ckpt"]
