"""Metrics against closed forms and other implementations, and the protocol that uses them."""

import numpy as np
import pytest
import torch
from conftest import noise

from minicache import Diffusion, denoise, full, sample
from minicache.data import shapes
from minicache.metrics import (
    cosine_similarity,
    fid,
    frechet_distance,
    psnr,
    read_samples,
    relative_l2,
    unet_features,
)
from minicache.shards import ImageSet, fill
from minicache.tools.fid import main, parse
from minicache.tools.protocol import CALIBRATION, CHECK, HELD_OUT, noised, trial, uncached


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


def test_frechet_distance_of_correlated_features():
    """Against the definition, with a general matrix square root by eigenvalues."""
    a, b = noise(40, 5).double() @ noise(5, 5, seed=1).double(), noise(30, 5, seed=2).double() + 1
    A, B = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    values = np.linalg.eigvals(A @ B).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(A + B) - 2 * np.sqrt(values.clip(0)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="two features at least"):
        frechet_distance(a, b[:1])


def test_similarity_of_features(unet):
    steps = list(denoise(unet, [0, 1], plan=full(5, branch=2)))
    similarity = cosine_similarity(steps)
    assert similarity.shape == (5, 5) and torch.allclose(similarity.diagonal(), torch.ones(5))
    expected = torch.cosine_similarity(steps[1].cached_U.flatten(1), steps[4].cached_U.flatten(1)).mean()
    assert torch.allclose(similarity[1, 4], expected) and torch.allclose(similarity, similarity.T)


def test_features_do_not_depend_on_the_batch(unet):
    images = noise(5, 3, 16, 16)
    assert torch.allclose(unet_features(unet, images), unet_features(unet, images, batch_size=2), atol=1e-5)


def test_samples_are_read_back(tmp_path, capsys, monkeypatch):
    images = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    for name in ("a.npz", "a"):
        fill(ImageSet(tmp_path / name, range(3), 2, {}), lambda seeds: images[seeds.start : seeds.stop])
    assert np.array_equal(read_samples(tmp_path / "a.npz"), images) and np.array_equal(
        read_samples(tmp_path / "a"), images
    )
    np.savez(tmp_path / "b.npz", arr_0=images.astype(float))
    np.savez(tmp_path / "c.npz", x=images)
    for name, words in (("b.npz", "float64"), ("c.npz", "arr_0"), ("missing.npz", "missing"), ("d", "neither")):
        with pytest.raises(ValueError, match=words):
            read_samples(tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"pip install 'minicache\[fid\]'"):
        fid(images, images)
    with pytest.raises(ValueError, match="fid"):
        main(parse([str(tmp_path / "a.npz"), str(tmp_path / "a")]))


def test_protocol(unet):
    assert len({*CALIBRATION, *CHECK, *HELD_OUT}) == len(CALIBRATION) + len(CHECK) + len(HELD_OUT)
    unet.diffusion = Diffusion(num_timesteps=20)
    try:
        pure = trial(unet, [3, 4])
        assert torch.equal(pure.reference, sample(unet, [3, 4], sampler="dpm++2m", steps=20, spacing="trailing"))
        exact, *others = (pure.errors(recipe) for recipe in uncached(unet, 20, ("dpm++2m", "ddim")))
        assert len(others) == 7 and min(error.max() for error in [exact, *others]) == 0
        draw = lambda n, generator: shapes(n, 16, generator)  # noqa: E731
        begun = trial(unet, [3, 4], draw=draw, start=10)
        assert torch.equal(begun.x_T[1:], noised(unet, [4], draw, 10))
        assert {recipe.spacing for recipe in uncached(unet, 5, start=10)} == {"trailing", "linspace"}
        assert all(recipe.start == 10 for recipe in uncached(unet, 5, start=10))
        with pytest.raises(ValueError, match="go together"):
            trial(unet, [3], start=10)
    finally:
        unet.diffusion = Diffusion()


def test_start(unet):
    x = noise(2, 3, 16, 16)
    seen = [step.t for step in denoise(unet, x_T=x, start=700, steps=7, spacing="trailing")]
    assert seen == [699, 599, 499, 399, 299, 199, 99]
    assert torch.equal(sample(unet, x_T=x, start=1000, steps=4), sample(unet, x_T=x, steps=4))
    for start in (0, 1001):
        with pytest.raises(ValueError, match=f"start={start}"):
            denoise(unet, x_T=x, start=start)
    with pytest.raises(ValueError, match="needs x_T"):
        denoise(unet, [0], start=700)
