"""The network says which argument is wrong, and takes images of other sizes than its own."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import SMALL, noise, random_unet, relative

from minicache import LDM_IMAGENET, SD_15, UNet, UNetConfig
from minicache.unet import ResBlock, Transformer


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_channels": 48}, "model_channels=48"),
        ({"image_size": 17}, "image_size=17"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 1.5)}, "channel_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"num_res_blocks": 33}, "num_res_blocks=33: .* num_res_blocks <= 32"),
        ({"channel_mult": (1, 257)}, r"channel_mult=\(1, 257\): .* 8192 at most"),
        ({"channel_mult": (1,) * 17}, "channel_mult must be 1 to 16"),
        ({"out_channels": 6}, "out_channels=6"),
        ({"out_channels": 3.0}, "out_channels=3.0"),
        ({"null_token": 1.0, "num_tokens": 3, "context_dim": 8}, "null_token=1.0"),
        ({"attention_resolutions": np.array([16])}, "whole numbers"),
        ({"dropout": 1.0}, "^dropout=1.0: dropout must be a number in"),  # of the other fields, no word
        ({"adm": 1}, "adm=1: adm and pooled_context must be True or False"),
        ({"heads": True}, "heads=True: need whole numbers"),
        ({"dropout": np.float64(0.1)}, "dropout must be a number"),  # which no checkpoint could be read with
    ],
)
def test_wrong_configs(change, words):
    with pytest.raises(ValueError, match=words):
        UNetConfig(**{**asdict(SMALL), **change})


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda u, x: u(x[0], 1), "need floats"),
        (lambda u, x: u(x[:, :2], 1), "need floats"),
        (lambda u, x: u(x[..., :15], 1), "need floats"),
        (lambda u, x: u(x[0, 0, 0, 0], 1), "need floats"),
        (lambda u, x: u(x.long(), 1), "need floats"),
        (lambda u, x: u(x.to(torch.complex64), 1), "need floats"),
        (lambda u, x: u(x, np.int64(5000)), "t=5000"),
        (lambda u, x: u(x, np.float32(-0.5)), "t=-0.5"),
        (lambda u, x: u(x, float("nan")), "t=nan"),
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


@pytest.mark.parametrize("config, parameters", [(LDM_IMAGENET, 400_920_579), (SD_15, 859_520_964)], ids=["ldm", "sd"])
def test_latent_networks_have_the_published_sizes(config, parameters):
    with torch.device("meta"):
        unet = UNet(config)
    table = sum(p.numel() for name, p in unet.named_parameters() if name.startswith("tokens."))
    assert sum(p.numel() for p in unet.parameters()) - table == parameters
    assert table == (512_512 if config.num_tokens else 0)


def test_a_loaded_row_of_the_null_token_stays_as_it_is():
    """Fresh, the null token says nothing; a trained one (the null class of LDM) is kept, and neither is trained on."""
    config = replace(SMALL, context_dim=16, num_tokens=4, null_token=3, adm=True)
    fresh, unet = UNet(config), random_unet(config)
    assert not fresh.tokens.weight[3].any() and fresh.tokens.weight[2].any() and unet.tokens.weight[3].any()
    x = noise(2, 3, 16, 16)
    assert torch.equal(unet(x, 5), unet(x, 5, torch.tensor([[3], [3]])))
    with torch.enable_grad():
        unet(x, 5, torch.tensor([[2], [3]])).square().sum().backward()
    assert unet.tokens.weight.grad[2].any() and not unet.tokens.weight.grad[3].any()


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, context_dim=8, heads=2)], ids=["ddpm", "latent"])
def test_a_fresh_network_begins_at_zero(config):
    """But for biases, eps is 0, and so is each residual branch (as in Ho et al.'s code): a block is its shortcut."""
    unet, x, context = UNet(config), noise(2, 3, 16, 16), noise(2, 4, 8) if config.context_dim else None
    for name, parameter in unet.named_parameters():
        parameter *= not name.endswith("bias")
    assert unet(x, 500, context).count_nonzero() == 0
    blocks = [block for block in unet.modules() if isinstance(block, ResBlock)]
    assert any(block.attn for block in blocks)
    for block in blocks:
        h, temb = noise(2, block.conv1.in_channels, 8, 8), noise(2, 4 * config.model_channels)
        assert torch.equal(block(h, temb, context), block.shortcut(h))


def test_no_context_is_the_row_of_the_null_token():
    """Whichever it is: of a table of classes it is the last one."""
    unet, x = random_unet(replace(SMALL, context_dim=8, num_tokens=5, null_token=4)), noise(2, 3, 16, 16)
    assert torch.equal(unet(x, 500), unet(x, 500, torch.full((2, 1), 4)))
    assert not torch.equal(unet(x, 500), unet(x, 500, torch.zeros(2, 1, dtype=torch.long)))


def test_a_pooled_context_is_a_sum():
    """Tokens that are zero, as those that fill a prompt up, add nothing to temb, however many there are."""
    unet, x = random_unet(replace(SMALL, context_dim=8, pooled_context=True)), noise(2, 3, 16, 16)
    for block in unet.modules():
        if isinstance(block, Transformer):  # which sees the tokens otherwise
            block.proj_out.weight *= 0
    tokens = noise(2, 3, 8)
    eps = unet(x, 500, tokens)
    assert torch.allclose(unet(x, 500, torch.cat([tokens, torch.zeros(2, 5, 8)], dim=1)), eps, atol=1e-5)
    assert relative(unet(x, 500, 2 * tokens), eps) > 1e-3


def test_network_takes_other_sizes_than_its_own(unet):
    x = noise(2, 3, 24, 32)
    eps, cached_U = unet.forward_full(x, 7, 2)
    assert eps.shape == x.shape and torch.equal(unet.forward_partial(x, 7, cached_U, 2), eps)
