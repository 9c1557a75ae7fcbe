"""Names, our own format, and the golden test of the published weights."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, noise, random_unet, relative

from minicache import Diffusion, load, sample
from minicache.checkpoints import EMBEDDED, REGISTRY, Entry, fingerprint, locate, read, save
from minicache.tools.list import listing
from minicache.tools.verify import golden_distances, verify


def test_registry_is_complete():
    names = [f"ddpm_{kind}{ema}" for kind in ("cifar10", "celebahq_256", "church_256", "bedroom_256", "cat_256")
             for ema in ("", "_ema")]  # fmt: skip
    latent = ["ldm_imagenet", "sd15"]  # conditional: other numbers, of other papers
    assert sorted(REGISTRY) == sorted([*names, *latent])
    golden = json.loads((ROOT / "weights" / "golden_ddpm_logits.json").read_text())
    assert [name for name, entry in REGISTRY.items() if entry.checksum is None] == ["ldm_imagenet"]
    assert re.fullmatch("sha256:[0-9a-f]{64}", REGISTRY["sd15"].checksum)
    for name in names:
        entry = REGISTRY[name]
        algorithm, digest = entry.checksum.split(":")
        assert re.fullmatch("[0-9a-f]+", digest) and len(digest) == {"sha256": 64, "md5": 32}[algorithm]
        assert entry.ema == name.endswith("_ema") and (entry.golden is None or len(golden[entry.golden]) == 30)
        assert entry.golden or name == "ddpm_cifar10_ema"
    assert "ddpm_cifar10_ema" in REGISTRY["ddpm_cifar10"].note  # whoever takes the worse one is told of the better
    assert len({entry.url for entry in REGISTRY.values()}) == len(REGISTRY)


def test_listing(monkeypatch, tmp_path):
    monkeypatch.setenv("MINICACHE_HOME", str(tmp_path))
    lines = listing().splitlines()
    assert len(lines) == 1 + len(EMBEDDED) + len(REGISTRY)
    megabytes = f"{(ROOT / 'weights' / 'tiny_cifar10.pt').stat().st_size / 1e6:.1f}"
    assert lines[2].split()[:4] == ["tiny_cifar10", megabytes, "yes", "yes"]
    line = next(line for line in lines if line.startswith("ddpm_cifar10 "))
    assert line.split()[1:4] == ["143", "NO", "no"] and "FID 12" in line


def test_who_has_no_home_is_asked_for_a_folder(monkeypatch):
    """As in a container that runs under a number of its own."""
    monkeypatch.delenv("MINICACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what Python makes of "~" there
    for command in (listing, lambda: locate("sd15")):
        with pytest.raises(ValueError, match="MINICACHE_HOME"):
            command()


def test_a_fingerprint_is_that_of_the_weights_of_now():
    """The shipped recipes name it; it is no attribute that outlives a change."""
    name, known = "tiny_cifar10", "142aa5419567f6ec"
    unet = load(name)
    assert fingerprint(unet) == known
    assert fingerprint(load(name, dtype=torch.bfloat16)) != known
    unet.conv_out.bias[0] += 1e-3
    assert fingerprint(unet) != known


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_checkpoints(name):
    unet = load(name)
    assert not unet.training and sum(p.numel() for p in unet.parameters()) < 5e6
    path = locate(name)
    assert path.stat().st_size <= 10e6
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in (ROOT / "weights" / "README.md").read_text(), f"weights/README.md lacks the hash {digest}"
    x0 = noise(1, 3, 32, 32).clamp(-1, 1)
    loss = unet.diffusion.loss(unet, x0, torch.tensor([900]), noise(1, 3, 32, 32, seed=1))
    assert loss < 0.2  # it has learned: an untrained network, which predicts 0, has 1


def test_emoji_understands_its_examples_and_draws_what_they_say():
    """The mean colour of a heart, an apple and a plain face is that of the thing asked for."""
    unet = load("emoji")
    assert len(unet.vocabulary.encode(*unet.vocabulary.examples)) == 16
    prompts = "heavy black heart noto", "green apple noto", "grinning face twemoji"
    ids = unet.vocabulary.encode(*prompts)
    middle = sample(unet, range(3), context=ids, guidance=3.0, steps=10)[:, :, 10:22, 10:22].clamp(-1, 1).mean((2, 3))
    (red, green, _), (other_red, other_green, _), (_, yellow, blue) = middle.tolist()
    assert red > green + 0.5 and other_green > other_red + 0.1 and yellow > blue + 0.5


def test_names_and_paths(tmp_path, unet):
    for name, words in (
        ("emojy", "did you mean emoji"),
        ("ddpm_cifar", "did you mean ddpm_cifar10"),
        ("zzz", "the names are emoji"),
        ("", "'' is neither a checkpoint's name nor a path"),
        ("no/such/file.pt", "there is no file or folder no/such/file.pt"),
        ("nothing.ckpt", "there is no file"),
    ):
        with pytest.raises(ValueError, match=words):
            load(name)
    with pytest.raises(ValueError, match="neither a checkpoint's name nor a path"):
        load(Path("emoji"))  # a path, and no name
    save(tmp_path / "net.pt", unet)
    again = load(tmp_path / "net.pt", dtype=torch.bfloat16)
    x = noise(1, 3, 16, 16)
    eps = again(x, 10)
    assert again.conv_out.weight.dtype == torch.bfloat16 and eps.dtype == torch.float32
    assert relative(eps, unet(x, 10)) < 0.05 and fingerprint(load(tmp_path / "net.pt")) == fingerprint(unet)


def test_own_format_keeps_config_and_diffusion(tmp_path, unet):
    unet = random_unet()
    unet.diffusion = Diffusion(beta_end=0.012, variance="fixed_small")
    save(tmp_path / "full.pt", unet)
    save(tmp_path / "half.pt", unet, half=True)
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (tmp_path / "full.pt").stat().st_size
    again = read(tmp_path / "half.pt")
    assert again.diffusion == unet.diffusion and again.conv_out.weight.dtype == torch.float32
    assert torch.allclose(again(noise(1, 3, 16, 16), 5), unet(noise(1, 3, 16, 16), 5), atol=1e-2)


def test_golden_input_is_the_published_one():
    """torch.manual_seed(0), then randn: a generator of its own gives the same numbers."""
    torch.manual_seed(0)
    assert torch.equal(torch.randn(1, 3, 32, 32), noise(1, 3, 32, 32))


def test_verify(tmp_path, monkeypatch, capsys):
    """Two published networks of 16 pixels; the right file, a mix-up, a stranger, and one without published values."""
    nets = {name: random_unet() for name in ("a_16", "b_16", "stranger")}
    for k, (name, unet) in enumerate(nets.items()):
        unet.conv_out.bias += 0.1 * k
        save(tmp_path / f"{name}.pt", unet)
    x = noise(1, 3, 16, 16)
    golden = {name: nets[name](x, 10)[0, 0, 0, :30].flatten().tolist() for name in ("a_16", "b_16")}
    (tmp_path / "golden_ddpm_logits.json").write_text(json.dumps({**golden, "c_32": [0.0] * 30, "_how": "text"}))
    monkeypatch.setattr("minicache.tools.verify.embedded_folder", lambda: tmp_path)
    assert golden_distances(nets["a_16"])["a_16"] < 1e-6 < 0.05 < golden_distances(nets["a_16"])["b_16"]

    files = {"right": ("a_16", "a_16"), "mixed": ("b_16", "a_16"), "wrong": ("stranger", "a_16"),
             "unpublished": ("stranger", None), "unpublished_mixed": ("b_16", None)}  # fmt: skip
    for name, (file, published) in files.items():
        data = (tmp_path / f"{file}.pt").read_bytes()
        entry = Entry(f"http://127.0.0.1:9/{name}.pt", "sha256:" + hashlib.sha256(data).hexdigest(), 1, True, published)
        monkeypatch.setitem(REGISTRY, name, entry)
        monkeypatch.setenv("MINICACHE_HOME", str(tmp_path / "home"))
        entry.path(name).parent.mkdir(exist_ok=True)
        entry.path(name).write_bytes(data)
    for argument, code, words in (
        ("right", 0, "OK: its 30 outputs agree with those published for a_16"),
        ("mixed", 2, "those of b_16: the likely mix-up"),
        ("wrong", 2, "fit no other published network"),
        ("unpublished", 0, "No outputs are published"),
        ("unpublished_mixed", 2, "these are b_16's; the likely mix-up"),
        (str(tmp_path / "b_16.pt"), 0, "OK: these are the weights of b_16"),
        (str(tmp_path / "stranger.pt"), 0, "No outputs are published"),
    ):
        assert verify(argument) == code, argument
        assert words in capsys.readouterr().out
