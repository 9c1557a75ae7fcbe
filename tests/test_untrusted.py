"""No reader runs code that somebody has put into a file, in place of the tensors or pictures that belong there."""

import json
import pickle
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minicache import Recipe, load, uniform
from minicache.metrics import read_samples
from minicache.shards import ImageSet, fill
from minicache.tools.evaluate import Pictures


class Trap:
    """Unpickled, it makes a file: `sprung`."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


@pytest.fixture
def sprung(tmp_path):
    path = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(path)))
    assert path.exists(), "the trap is harmless"
    path.unlink()
    return path


def array(sprung: Path) -> np.ndarray:
    return np.array([Trap(sprung)], dtype=object)


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "plain.ckpt", "x.npz"])
def test_a_checkpoint(tmp_path, sprung, name):
    path, content = tmp_path / name, {"conv_in.weight": Trap(sprung)}
    if name == "x.npz":
        np.savez(path, **{"model/conv_in/W": array(sprung)})
    elif name == "plain.ckpt":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name == "zip.pt")
    with pytest.raises(ValueError, match=f"{name} cannot be read as a checkpoint"):
        load(path)
    assert not sprung.exists()


def test_a_set_of_pictures(tmp_path, sprung):
    np.savez(tmp_path / "x.npz", arr_0=array(sprung))
    with pytest.raises(ValueError, match="not an npz whose arr_0 holds images"):
        read_samples(tmp_path / "x.npz")
    assert not sprung.exists()


def test_a_shard_of_a_set_that_is_resumed(tmp_path, sprung):
    images = ImageSet(tmp_path / "x.npz", range(2), 1, {"eta": 0.5})
    images.folder.mkdir()
    (images.folder / "manifest.json").write_text(json.dumps(images.manifest))
    good, bad = (images.files(shard)[0] for shard in images.shards)
    np.save(good, np.zeros((1, 4, 4, 3), np.uint8))
    np.save(bad, array(sprung))
    with pytest.raises(ValueError, match="allow_pickle"):
        images.finish()
    with suppress(ValueError):  # refused, or drawn again
        fill(images, lambda seeds: np.zeros((1, 4, 4, 3), np.uint8))
    assert not sprung.exists()


def test_pictures_kept_by_evaluate(tmp_path, sprung):
    method = SimpleNamespace(recipe=Recipe(uniform(4, 2)))
    pictures = Pictures(tmp_path, task=None, manifest={}, pairs=2, num=2, batch_size=1)
    path = tmp_path / "pairs" / "ddim.npz"
    path.parent.mkdir()
    np.savez(path, arr_0=array(sprung))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("manifest.json", json.dumps({**asdict(method.recipe), "num": 2, "batch_size": 1}))
    with pytest.raises(ValueError, match="allow_pickle"):
        pictures.paired("ddim", method)
    assert not sprung.exists()
