"""U-ViT: the official code's outputs, the published sizes, and the laws of every network with two passes."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, noise, official_weight, relative

from minicache import Diffusion, sample, uniform
from minicache.checkpoints import save
from minicache.cost import cache_bytes, macs, pass_cost, plan_macs
from minicache.uvit import UViT, UViTConfig

SMALL = UViTConfig(image_size=8, patch_size=2, channels=32, pairs=2, heads=4, num_tokens=5)
CLASSES = torch.tensor([[3], [1]])


def meta(config: UViTConfig) -> UViT:
    with torch.device("meta"):
        return UViT(config)


OFFICIAL = (
    (r"^positions", "pos_embed"),
    (r"^tokens", "label_emb"),
    (r"^patches", "patch_embed.proj"),
    (r"^D\.", "in_blocks."),
    (r"^M\.", "mid_block."),
    (r"^norm_out", "norm"),
    (r"^pixels", "decoder_pred"),
    (r"^conv_out", "final_layer"),
    (r"join", "skip_linear"),
    (r"attn\.proj_out", "attn.proj"),
    (r"attn\.[qkv]\.", "attn.qkv."),
    (r"mlp_in", "mlp.fc1"),
    (r"mlp_out", "mlp.fc2"),
)


def official_state(config: UViTConfig) -> dict[str, torch.Tensor]:
    """The weights of golden/README.md, by the names of the official code (baofff/U-ViT, libs/uvit.py)."""
    state = {}
    for key, value in meta(config).state_dict().items():
        name, shape = key, list(value.shape)
        name = re.sub(r"^U\.(\d+)", lambda i: f"out_blocks.{config.pairs - 1 - int(i[1])}", name)  # innermost first
        for ours, theirs in OFFICIAL:
            name = re.sub(ours, theirs, name)
        if "qkv" in name:
            part = "qkv".index(key.split(".")[-2])
            state[key] = official_weight(name, (3 * shape[0], shape[1])).chunk(3)[part]
        else:
            batch = [1] * (key == "positions")
            state[key] = official_weight(name, (*batch, *shape)).reshape(shape)
    return state


@pytest.fixture(scope="module")
def uvit() -> UViT:
    uvit = meta(SMALL).eval()
    uvit.load_state_dict(official_state(SMALL), assign=True)
    uvit.diffusion = Diffusion()
    return uvit


def test_eps_is_that_of_the_official_code(uvit):
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "official_uvit_8px.npz").items()}
    assert relative(uvit(golden["x"], golden["t"], golden["y"][:, None]), golden["eps"]) < 5e-6


@pytest.mark.parametrize(
    "config, millions",
    [
        (UViTConfig(32, 2, 512, 6, 8), 44),  # S/2, CIFAR-10
        (UViTConfig(64, 4, 768, 8, 12, num_tokens=1000), 131),  # M/4, ImageNet 64
        (UViTConfig(32, 2, 1024, 10, 16, in_channels=4, num_tokens=1001), 287),  # L/2, ImageNet 256
        (UViTConfig(32, 2, 1152, 14, 16, in_channels=4, num_tokens=1001), 501),  # H/2, ImageNet 256
    ],
)
def test_published_sizes(config, millions):
    assert round(sum(p.numel() for p in meta(config).parameters()) / 1e6) == millions


def test_cost_by_branch():
    """H/2 is published as 133.3 G. A pair costs as much as any other, so a branch's cost is a straight line."""
    uvit = meta(UViTConfig(32, 2, 1152, 14, 16, in_channels=4, num_tokens=1001))
    assert sum(pass_cost(uvit)[:2]) / 1e9 == pytest.approx(133.3, rel=1e-3)
    N, C = uvit.cached_shape(1)
    block, join = 12 * N * C**2, 2 * N * C**2
    first, second, last = (macs(uvit, branch) for branch in (1, 2, 14))
    assert second - first == 2 * block + join and last - first == 13 * (second - first)
    assert macs(uvit) == last + block  # the middle
    assert plan_macs(uvit, uniform(10, 5, 1)) == 2 * macs(uvit) + 8 * first
    assert cache_bytes(uvit, uniform(10, 5, 1)) == 4 * N * C


@pytest.mark.parametrize("branch", (1, 2))
def test_partial_equals_full_with_a_fresh_cache(uvit, branch):
    x = noise(2, 3, 8, 8)
    eps, cached_U = uvit.forward_full(x, 500, branch, CLASSES)
    assert tuple(cached_U.shape[1:]) == uvit.cached_shape(branch)
    assert torch.equal(uvit.forward_partial(x, 500, cached_U, branch, CLASSES), eps)
    assert torch.equal(uvit(x, 500, uvit.tokens(CLASSES)), eps)
    for y, t, classes in ((x + 0.1, 500, CLASSES), (x, 400, CLASSES), (x, 500, CLASSES.flip(0))):
        assert not torch.allclose(uvit.forward_partial(y, t, cached_U, branch, classes), eps, atol=1e-3)


def test_sampling_with_a_cache_and_guidance(uvit):
    settings = {"seeds": [0, 1], "context": CLASSES, "guidance": 3.0}
    uncached = sample(uvit, steps=6, **settings)
    assert torch.equal(sample(uvit, plan=uniform(6, 1, 1), **settings), uncached)
    assert not torch.equal(sample(uvit, plan=uniform(6, 3, 1), **settings), uncached)
    null = sample(uvit, [0, 1], steps=6)
    assert relative(sample(uvit, [0, 1], steps=6, context=torch.zeros_like(CLASSES)), null) < 1e-5
    assert relative(sample(uvit, steps=6, **{**settings, "guidance": 0.0}), null) < 1e-5
    alone = sample(uvit, [1], context=CLASSES[1:], plan=uniform(6, 3, 1))
    assert relative(sample(uvit, [0, 1], context=CLASSES, plan=uniform(6, 3, 1))[1:], alone) < 1e-5


def test_without_classes():
    uvit = UViT(UViTConfig(8, 4, 32, 1, 4)).to(torch.bfloat16)
    eps, cached_U = uvit.forward_full(noise(1, 3, 8, 8), 500, 1, None)
    assert eps.dtype == torch.float32 and cached_U.shape == (1, 5, 32)


def test_what_does_not_fit_is_refused(uvit):
    x, cached_U = noise(2, 3, 8, 8), noise(2, 18, 32)
    for given, words in (
        ((x[..., :4], 0, cached_U, 1, None), "is not what"),
        ((x.int(), 0, cached_U, 1, None), "is not what"),
        ((x[0, 0, 0, 0], 0, cached_U, 1, None), "is not what"),
        ((x, np.int64(5000), cached_U, 1, None), "t=5000 is not a timestep"),
        ((x, torch.tensor([1, 2, 3]), cached_U, 1, None), "is not what"),
        ((x, 0, cached_U, 1, CLASSES.expand(2, 3)), "is not what"),
        ((x, 0, cached_U, 1, CLASSES[:, 0]), "is not what"),
        ((x, 0, cached_U, 1, CLASSES[:1]), "is not what"),
        ((x, 0, cached_U, 1, noise(2, 1, 7)), "is not what"),
        ((x, 0, cached_U[:1], 1, None), "cached_U has shape"),
        ((x, 0, cached_U, 3, None), "branch=3 is not in 1..2"),
    ):
        with pytest.raises(ValueError, match=words):
            uvit.forward_partial(*given)
    with pytest.raises(ValueError, match="is not what"):
        UViT(UViTConfig(8, 4, 32, 1, 4))(x, 0, CLASSES)


def test_it_is_not_saved_as_what_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="a UViT could not be read back"):
        save(tmp_path / "x.pt", UViT(SMALL))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("image_size", 9, "patches must fill the image"),
        ("image_size", 10**9, "whole numbers in"),
        ("image_size", 8192, "256 a side"),
        ("patch_size", 0, "whole numbers in"),
        ("channels", 32.0, "whole numbers in"),
        ("heads", 3, "even multiple of heads"),
        ("heads", 0, "whole numbers in"),
        ("pairs", 10**9, "whole numbers in"),
        ("pairs", 1000, "pairs must be 256 at most"),
        ("num_tokens", -1, "whole numbers in"),
        ("null_token", 5, "one of the num_tokens"),
    ],
)
def test_what_no_uvit_has_is_refused_before_anything_is_built(field, value, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **{field: value})
