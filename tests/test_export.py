"""The exported graphs compute what PyTorch does, at any batch size, and cache as the sampling loop does."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, noise, random_unet, relative

from minicache import Diffusion, UNet, UNetConfig, load, sample, uniform
from minicache.checkpoints import fingerprint, save
from minicache.tools import export


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    unet = random_unet()
    unet.diffusion = Diffusion(num_timesteps=200, beta_end=0.05)
    path = tmp_path_factory.mktemp("net") / "net.pt"
    save(path, unet)
    return path


def test_exported_programs(net, tmp_path):
    export.main(export.parse(["--ckpt", str(net), "--branch", "2", "--format", "pt2", "--out", str(tmp_path)]))
    full, partial = (torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("full", "partial_b2"))
    unet, x, t = load(net), noise(5, 3, 16, 16), torch.tensor([70])
    eps, cached_U = full(x, t)
    for ours, theirs in zip((eps, cached_U), unet.forward_full(x, t, 2)):
        assert relative(ours, theirs) < 1e-5
    t = torch.tensor([60])
    assert relative(partial(x, t, cached_U), unet.forward_partial(x, t, cached_U, 2)) < 1e-5


def test_deepcache_on_onnxruntime(net, tmp_path, monkeypatch):
    """The example that is exported beside the graphs is run, and compared with the sampling loop."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.main(export.parse(["--ckpt", str(net), "--out", str(tmp_path / "deep")]))
    example = runpy.run_path(str(tmp_path / "deep" / "example.py"))
    x_T = noise(3, 3, 16, 16)
    for interval in (1, 4):
        drawn = example["ddim"](x_T.numpy(), 20, interval)
        assert relative(drawn, sample(load(net), x_T=x_T, plan=uniform(20, interval, 3))) < 1e-4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["example.py", "6", "2"])
    runpy.run_path(str(tmp_path / "deep" / "example.py"), run_name="__main__")
    assert (tmp_path / "example.png").exists()
    assert json.loads((tmp_path / "deep" / "network.json").read_text())["fingerprint"] == fingerprint(load(net))


def test_the_example_suits_a_network_of_few_timesteps(tmp_path, monkeypatch, capsys):
    """Bare, it takes all there are; a single step would begin where no noise is left."""
    sessions = types.SimpleNamespace(InferenceSession=lambda path: types.SimpleNamespace(
        run=lambda _, inputs: (inputs["x"], None)[: 4 - len(inputs)]))  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", sessions)
    alphas_bar = Diffusion(num_timesteps=20, beta_end=0.2).alphas_bar.tolist()
    network = {"full": "f", "partial": "p", "shape": [3, 2, 2], "alphas_bar": alphas_bar}
    (tmp_path / "network.json").write_text(json.dumps(network))
    example = shutil.copy(Path(export.__file__).with_name("onnx_example.py"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["example.py"])
    runpy.run_path(example, run_name="__main__")
    assert (tmp_path / "example.png").exists()
    for steps in ("1", "21"):
        monkeypatch.setattr("sys.argv", ["example.py", steps])
        with pytest.raises(SystemExit):
            runpy.run_path(example, run_name="__main__")
        assert "steps must be in 2..20" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_program(net, tmp_path):
    """A limit on the size of files stands for the full disk."""
    command = f"ulimit -f 200; exec {sys.executable} -m minicache export --ckpt {net} --format pt2 --out {tmp_path}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_wrong_flags(net, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for flags, words in ((["--branch", "9"], "branch=9"), (["--out", str(tmp_path / "file")], "File exists")):
        with pytest.raises(ValueError, match=words):
            export.main(export.parse(["--ckpt", str(net), "--format", "pt2", "--out", str(tmp_path / "x"), *flags]))
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"needs onnx: pip install 'minicache\[onnx\]'"):
        export.main(export.parse(["--ckpt", str(net), "--out", str(tmp_path / "x")]))
    assert not (tmp_path / "x").exists()


def test_the_folder_is_tried_before_the_work(net, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(export, "programs", lambda *_: pytest.fail("worked"))
    with pytest.raises(ValueError, match="cannot be made or written to"):
        export.main(export.parse(["--ckpt", str(net), "--format", "pt2", "--out", str(tmp_path / "file" / "x")]))


def test_a_network_with_a_context_is_refused():
    """Its graphs would know the null context alone, without a word."""
    with pytest.raises(ValueError, match="takes a context"):
        export.programs(UNet(UNetConfig(2, 32, (1,), 1, (), context_dim=8, num_tokens=5)), 1)
    with pytest.raises(ValueError, match="takes a context"):  # and not: cannot download
        export.main(export.parse(["--ckpt", "sd15", "--format", "pt2", "--out", "x"]))


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_files_of_others_stay(net, tmp_path, monkeypatch, ending):
    if ending == "onnx":
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "programs", lambda *_: pytest.fail("worked"))
    flags = ["--ckpt", str(net), "--format", ending, "--out", str(tmp_path)]
    for name in ("network.json", "full.onnx", "full.pt2", "partial_b3.onnx", "partial_b1.pt2", "example.py"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} exists; choose another --out"):
            export.main(export.parse(flags))
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_an_export_that_fails_leaves_nothing(net, tmp_path, monkeypatch):
    """And none leaves a network.json without its graphs, wherever it is killed."""
    flags = ["--ckpt", str(net), "--format", "pt2", "--out", str(tmp_path)]
    save_program, saved = torch.export.save, []

    def full_disk(program, file):
        saved.append(program)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        save_program(program, file)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(torch.export, "save", full_disk)
        export.main(export.parse(flags))
    assert not [*tmp_path.iterdir()]

    replaced, replace = [], os.replace

    def noted(temporary, path):
        replaced.append(os.path.basename(path))
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", noted)
    export.main(export.parse(flags))
    assert sorted(replaced[:-1]) == ["full.pt2", "partial_b3.pt2"] and replaced[-1] == "network.json"
