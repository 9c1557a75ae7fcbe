"""Every format reads to the same network; what its files do not tell is asked for, not guessed."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BARE, GOLDEN, SMALL, foreign, noise, random_unet, tensorflow

from minicache import CIFAR10, LSUN_256, Diffusion, UNet, load
from minicache.checkpoints import fingerprint, read, save
from minicache.formats.diffusers import DIFFUSERS, save_diffusers
from minicache.formats.pesser import PESSER
from minicache.plan import uncached
from minicache.recipe import Recipe
from minicache.tools.convert import main, parse

ASSUMED = "without its config.json, heads, padding and embedding of t are taken as DDPM's"


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
        with pytest.warns(UserWarning, match=ASSUMED) if name == "new.bin" else nullcontext():
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


def test_fingerprint_tells_noise_schedules():
    """A recipe has timesteps: they mean other noise levels in another schedule."""
    unet, found = random_unet(), []
    schedules = Diffusion(), Diffusion(beta_end=0.012), Diffusion(beta_end=0.012, beta_schedule="scaled_linear"), None
    for unet.diffusion in schedules:
        found.append(fingerprint(unet))
    assert len({*found[:3]}) == 3 and found[3] == found[0]
    with pytest.raises(ValueError, match="made for the weights"):
        Recipe(uncached(5), fingerprint=found[0]).settings(found[1])


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


@pytest.mark.filterwarnings(f"ignore:.*{ASSUMED}")
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
        unsaid = form == "diffusers new" and "config" not in settings
        with pytest.warns(UserWarning, match=ASSUMED) if unsaid else nullcontext():
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


def test_what_is_converted_is_not_replaced(tmp_path, unet):
    save(tmp_path / "net.pt", unet)
    before = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "link.pt").symlink_to("net.pt")
    for name in ("net.pt", "link.pt"):
        with pytest.raises(ValueError, match="is what is converted, or a part of it; choose another name"):
            main(parse([str(tmp_path / "net.pt"), str(tmp_path / name), "--half"]))
    assert (tmp_path / "net.pt").read_bytes() == before
    save_diffusers(tmp_path / "folder", unet)
    for name in ("", "config.json"):
        with pytest.raises(ValueError, match="is what is converted, or a part of it"):
            main(parse([str(tmp_path / "folder"), str(tmp_path / "folder" / name)]))
    assert read(tmp_path / "folder").config == unet.config


def test_where_nothing_can_be_written(tmp_path, unet):
    save(tmp_path / "net.pt", unet)
    (tmp_path / "folder").mkdir()
    for name, words in (("folder", "is a folder"), ("net.pt/x.pt", "this folder cannot be made or written to")):
        with pytest.raises(ValueError, match=words):
            main(parse([str(tmp_path / "net.pt"), str(tmp_path / name)]))
    with pytest.raises(ValueError, match="is a folder"):
        main(parse([str(tmp_path / "net.pt"), ""]))
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "net.pt"}
