"""The network says which argument is wrong, and takes images of other sizes than its own."""

from dataclasses import asdict

import pytest
import torch
from conftest import SMALL, noise

from minicache import UNetConfig


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_channels": 48}, "model_channels=48"),
        ({"image_size": 17}, "image_size=17"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 1.5)}, "channel_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"out_channels": 6}, "out_channels=6"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_wrong_configs(change, words):
    with pytest.raises(ValueError, match=words):
        UNetConfig(**{**asdict(SMALL), **change})


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda u, x: u(x[0], 1), "x has shape"),
        (lambda u, x: u(x[:, :2], 1), "x has shape"),
        (lambda u, x: u(x[..., :15], 1), "x has shape"),
        (lambda u, x: u(x, 1000), "t=1000"),
        (lambda u, x: u(x, -1), "t=-1"),
        (lambda u, x: u(x, torch.tensor([1, 2, 3])), "t has 3 elements"),
        (lambda u, x: u.forward_full(x, 1, 0), "branch=0"),
        (lambda u, x: u.forward_full(x, 1, 5), "branch=5"),
        (lambda u, x: u.forward_partial(x, 1, u.forward_full(x, 1, 2)[1], 4), "cached_U has shape"),
        (lambda u, x: u.forward_partial(x, 1, u.forward_full(x[:1], 1, 2)[1], 2), "cached_U has shape"),
    ],
)
def test_wrong_calls_of_the_network(unet, call, words):
    with pytest.raises(ValueError, match=words):
        call(unet, noise(2, 3, 16, 16))


def test_network_takes_other_sizes_than_its_own(unet):
    x = noise(2, 3, 24, 32)
    eps, cached_U = unet.forward_full(x, 7, 2)
    assert eps.shape == x.shape and torch.equal(unet.forward_partial(x, 7, cached_U, 2), eps)
