"""Metrics against closed forms and other implementations."""

import io
import math
import os
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise

from minicache import denoise, metrics, uncached
from minicache.images import save_png
from minicache.metrics import cosine_similarity, fid, frechet_distance, moments, psnr, read_samples, relative_l2
from minicache.shards import ImageSet, fill, packed_manifest
from minicache.tools.fid import main, parse


def test_pairs():
    reference = noise(3, 3, 4, 4).clamp(-1, 1)
    x = reference + torch.tensor([0.0, 0.1, -0.2]).reshape(3, 1, 1, 1) * reference
    assert torch.allclose(relative_l2(x, reference), torch.tensor([0.0, 0.1, 0.2]), atol=1e-6)
    half = torch.zeros(1, 1, 2, 2)
    assert psnr(half + 0.2, half).item() == pytest.approx(20.0)  # a tenth of the range
    assert psnr(half + 5, half + 1).item() == float("inf")  # what lies outside [-1, 1] is no part of the picture


def test_frechet_distance_of_known_normals():
    """Columns that are independent by construction: sum (m - m')^2 + (s - s')^2."""
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double().repeat(50, 1)
    unit = signs / signs.std(0)
    a = unit * torch.tensor([1.0, 2.0]) + torch.tensor([0.0, 3.0])
    b = unit * torch.tensor([4.0, 2.5]) + torch.tensor([1.0, 3.0])
    assert frechet_distance(a, b) == pytest.approx(1 + 9 + 0.25, rel=1e-9)
    assert frechet_distance(a, a[torch.randperm(len(a))]) == pytest.approx(0, abs=1e-9)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="there is no file of that name"):
        read_samples(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="nothing tells how it was made"):
        packed_manifest(tmp_path / "x.npz")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_at_no_distance(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(torch.full((4, 2), value), torch.ones(4, 2))


def test_frechet_distance_of_correlated_features():
    """Against the definition, with a general matrix square root by eigenvalues."""
    a, b = noise(40, 5).double() @ noise(5, 5, seed=1).double(), noise(30, 5, seed=2).double() + 1
    A, B = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    values = np.linalg.eigvals(A @ B).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(A + B) - 2 * np.sqrt(values.clip(0)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="two images at least"):
        frechet_distance(a, b[:1])


def test_similarity_of_features(unet):
    steps = list(denoise(unet, [0, 1], plan=uncached(5, branch=2)))
    similarity = cosine_similarity(steps)
    assert similarity.shape == (5, 5) and torch.allclose(similarity.diagonal(), torch.ones(5))
    expected = torch.cosine_similarity(steps[1].cached_U.flatten(1), steps[4].cached_U.flatten(1)).mean()
    assert torch.allclose(similarity[1, 4], expected) and torch.allclose(similarity, similarity.T)


def test_moments_do_not_depend_on_the_parts():
    features = noise(50, 6) + 3
    of_parts = moments(features.split(7))
    assert torch.allclose(of_parts.mean, features.double().mean(0), atol=1e-12) and of_parts.count == 50
    assert torch.allclose(of_parts.covariance, torch.cov(features.double().T), atol=1e-12)
    other = noise(40, 6, seed=1)
    assert frechet_distance(of_parts, moments(other.split(9))) == pytest.approx(frechet_distance(features, other))


def test_samples_are_read_back(tmp_path, capsys, monkeypatch):
    images = np.random.RandomState(0).randint(0, 256, (7, 8, 8, 3)).astype(np.uint8)
    for name in ("a.npz", "a"):
        fill(ImageSet(tmp_path / name, range(7), 2, {}), lambda seeds: images[seeds.start : seeds.stop])
    np.savez_compressed(tmp_path / "z.npz", arr_0=images)
    monkeypatch.setattr(metrics, "PIECE", 3)
    for name in ("a.npz", "a", "z.npz"):
        samples = read_samples(tmp_path / name)
        for _ in ("once", "again"):
            pieces = list(samples.pieces())
            assert samples.shape == (7, 8, 8, 3) and [len(piece) for piece in pieces] == [3, 3, 1]
            assert np.array_equal(np.concatenate(pieces), images)


def test_a_folder_with_the_name_of_a_set(tmp_path, monkeypatch):
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "cifar10", lambda split: (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), None))
    with pytest.warns(UserWarning, match=r"cifar10 is a built-in source; the folder of that name is \./cifar10"):
        assert read_samples("cifar10").shape == (2, 32, 32, 3)
    save_png(tmp_path / "cifar10" / "a.png", np.zeros((8, 8, 3), np.uint8))
    assert read_samples("./cifar10").shape == read_samples(Path("cifar10")).shape == (1, 8, 8, 3)


def test_a_piece_of_large_pictures_is_a_small_one(tmp_path, monkeypatch):
    """64 black pictures of 8192 x 8192 pixels are 12 GB, and a file of 12 MB."""
    monkeypatch.setattr(metrics, "LARGEST", 2 * 8 * 8 * 3)
    images = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    for name in ("a.npz", "a"):
        fill(ImageSet(tmp_path / name, range(5), 5, {}), lambda _: images)
        pieces = list(read_samples(tmp_path / name).pieces())
        assert [len(piece) for piece in pieces] == [2, 2, 1] and np.array_equal(np.concatenate(pieces), images)


def test_an_npz_of_huge_pictures_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1, 2**13, 2**14, 3)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match=r"x\.npz is not .*: it has pictures of 16384x8192 pixels, more than 67"):
        read_samples(tmp_path / "x.npz")


def test_samples_need_not_fit_in_memory(tmp_path):
    """50,000 pictures of 256 x 256 pixels are 10 GB, and four times that as float32; here, 12 MB are read."""
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4000, 32, 32, 3), np.uint8))
    tracemalloc.start()
    (known,) = read_samples(tmp_path / "x.npz").moments(lambda images: torch.from_numpy(images[:, 0, :2, 0]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert known.count == 4000 and peak < 2e6


def test_what_is_no_set_of_samples(tmp_path, monkeypatch):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "float.npz", arr_0=images.astype(float))
    np.savez(tmp_path / "name.npz", x=images)
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}]))
    np.savez(tmp_path / "whole.npz", arr_0=images)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-100])
    for name, words in (("float.npz", "float64"), ("name.npz", "arr_0"), ("pickle.npz", "object"),
                        ("cut.npz", "cut.npz is not"), ("missing.npz", "missing"), ("d", "no folder")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            read_samples(tmp_path / name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    whole = read_samples(tmp_path / "whole.npz")
    with pytest.raises(ValueError, match=r"pip install 'minicache\[fid\]'"):
        fid(whole, whole)
    with pytest.raises(ValueError, match="fid"):
        main(parse([str(tmp_path / "whole.npz")] * 2))


def test_fid_is_the_frechet_distance_of_inceptions_features(tmp_path, capsys, inception):
    a, b = (np.random.RandomState(k).randint(0, 256, (90, 8, 8, 3)).astype(np.uint8) for k in range(2))
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez(tmp_path / "b.npz", arr_0=b)
    expected = frechet_distance(*(torch.from_numpy(x).double().mean((1, 2)) for x in (a, b)))
    main(parse([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]))
    assert f"FID {expected:.3f} (90 images against 90)" in capsys.readouterr().out
    assert inception == [64, 26, 64, 26]


def test_an_npz_whose_header_breaks_off_is_refused(tmp_path):
    """numpy reads that header with Python's own tokenizer, whose errors are of a kind of their own."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=r"x\.npz is not an npz whose arr_0 holds images: "):
        read_samples(tmp_path / "x.npz")


@pytest.mark.parametrize("count", [4, 10**12, 0, -1])
def test_an_npz_that_counts_other_pictures_than_it_holds_is_refused(tmp_path, count):
    header = io.BytesIO()
    shape = (count, 2, 2, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(3 * 2 * 2 * 3))
    with pytest.raises(ValueError, match=f"its {count} pictures would be .* bytes, and it holds 36"):
        read_samples(tmp_path / "x.npz")
