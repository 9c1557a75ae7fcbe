"""The U-Net of DDPM (Ho et al. 2020), with the two forward passes of DeepCache (Ma et al. 2023).

Read from leaf to root: time embedding -> Attention -> ResBlock -> the blocks of D and U -> UNetConfig -> UNet.
Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep: t [B] -> [B, dim], sines first, wavelengths from 2 pi to 10000 * 2 pi."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """t [B] -> temb [B, 4 * channels]. Every block begins with SiLU(temb), so it is applied here, once."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        temb = timestep_embedding(t, self.channels).to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(temb))))


class Attention(nn.Module):
    """Single-head self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)  # every residual branch starts as zero: scale 1e-10 in Ho et al.

    def forward(self, h: Tensor) -> Tensor:
        pixels = rearrange(self.norm(h), "b c h w -> b 1 (h w) c")  # one head
        attended = F.scaled_dot_product_attention(self.q(pixels), self.k(pixels), self.v(pixels))
        return h + rearrange(self.proj_out(attended), "b 1 (h w) c -> b c h w", h=h.shape[2])


class ResBlock(nn.Module):
    """h [B, c_in, H, W], temb [B or 1, 4 * model_channels] -> [B, c_out, H, W]; ends in Attention where asked to."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, attention: bool):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(4 * config.model_channels, c_out)
        self.norm2 = nn.GroupNorm(config.groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attn = Attention(c_out, config.groups) if attention else nn.Identity()

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        r = self.conv1(F.silu(self.norm1(h)))
        r = r + self.temb_proj(temb)[:, :, None, None]
        r = self.conv2(self.dropout(F.silu(self.norm2(r))))
        return self.attn(self.shortcut(h) + r)


class ConvIn(nn.Conv2d):
    """D[0]: from pixels to features."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return super().forward(x)


class Downsample(nn.Conv2d):
    """Half the resolution, by stride 2; padded on the right and bottom only, as TensorFlow's SAME does."""

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        return super().forward(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class UpBlock(nn.Module):
    """U_i: joins the feature from below with the skip of D_i; ends in an Upsample where D_i is a Downsample."""

    def __init__(self, c_below: int, c_skip: int, c_out: int, config: UNetConfig, attention: bool, up: bool):
        super().__init__()
        self.c_below = c_below
        self.block = ResBlock(c_below + c_skip, c_out, config, attention)
        self.upsample = Upsample(c_out, c_out, 3, padding=1) if up else nn.Identity()

    def forward(self, h: Tensor, skip: Tensor, temb: Tensor) -> Tensor:
        return self.upsample(self.block(torch.cat([h, skip], dim=1), temb))


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. Level l works at image_size / 2**l with model_channels * channel_mult[l] channels."""

    image_size: int  # pixels a side
    model_channels: int  # a multiple of groups, as is every width
    channel_mult: tuple[int, ...]
    num_res_blocks: int = 2  # a level, on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (16,)  # besides the middle, which always has it
    in_channels: int = 3
    out_channels: int = 3
    dropout: float = 0.0
    groups: int = 32  # of every GroupNorm; one of a single channel cannot see how strong the noise is

    def __post_init__(self):
        for name in ("channel_mult", "attention_resolutions"):  # lists from JSON become tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "model_channels", "channel_mult", "num_res_blocks", "in_channels", "groups"):
            sizes = getattr(self, name) if name == "channel_mult" else (getattr(self, name),)
            if not sizes or any(type(size) is not int or size < 1 for size in sizes):
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive whole numbers")
        halvings = len(self.channel_mult) - 1
        for wrong, why in (
            (
                self.model_channels % self.groups,
                f"model_channels={self.model_channels} must be a multiple of groups={self.groups}",
            ),
            (self.image_size % 2**halvings, f"image_size={self.image_size} cannot be halved {halvings} times"),
            (self.out_channels != self.in_channels, f"out_channels={self.out_channels} must equal in_channels"),
            (not 0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)"),
        ):
            if wrong:
                raise ValueError(why)


# The networks of Ho et al.: CIFAR-10 (35.7M parameters), and CelebA-HQ and LSUN at 256x256 (113.7M).
CIFAR10 = UNetConfig(image_size=32, model_channels=128, channel_mult=(1, 2, 2, 2), dropout=0.1)
LSUN_256 = UNetConfig(image_size=256, model_channels=128, channel_mult=(1, 1, 2, 2, 4, 4))


class UNet(nn.Module):
    """eps = unet(x, t): two flat lists and a middle.

    Each D_i emits one skip and U_i consumes it, so len(D) == len(U): 12 for CIFAR-10, 18 for LSUN_256. Branch b of
    DeepCache (its own numbering, Table 12) keeps the b outermost pairs alive, D[:b] and U[:b]; `cached_U`, the output
    of U[b] (of M, if b == len(D)), stands in for all that lies deeper. The network keeps no state between calls.

    x: [B, in_channels, H, W] in [-1, 1] plus noise, H and W multiples of 2**(levels - 1). t: the timestep 0..999, an
    int or a tensor of one element (one row of temb for the whole batch) or of B. Computes in the weights' dtype;
    eps has the shape and dtype of x.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.diffusion = None  # the Diffusion it was trained with: set by whoever loads or trains it,
        self.fingerprint = None  # and a hash of the weights, by whoever loads them
        n = config.num_res_blocks
        widths = [config.model_channels * mult for mult in config.channel_mult]

        self.time = TimeEmbedding(config.model_channels)
        self.D, self.U = nn.ModuleList(), nn.ModuleList()
        c = config.model_channels  # what D_i emits
        for level, width in enumerate(widths):
            attention = config.image_size // 2**level in config.attention_resolutions
            below = widths[min(level + 1, len(widths) - 1)]
            for j in range(n + 1):
                if j > 0:
                    D_i = ResBlock(c, width, config, attention)
                    c = width
                elif level > 0:
                    D_i = Downsample(c, c, 3, stride=2)
                else:
                    D_i = ConvIn(config.in_channels, c, 3, padding=1)
                c_below = below if j == n else width
                self.D.append(D_i)
                self.U.append(UpBlock(c_below, c, width, config, attention, up=isinstance(D_i, Downsample)))
        self.M = nn.ModuleList([ResBlock(c, c, config, attention=True), ResBlock(c, c, config, attention=False)])
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, t: int | Tensor) -> Tensor:
        """eps(x, t), uncached."""
        return self.forward_full(x, t, branch=1)[0]

    def forward_full(self, x: Tensor, t: int | Tensor, branch: int = 3) -> tuple[Tensor, Tensor]:
        """The whole network: (eps, cached_U), cached_U [B, *cached_shape(branch, H, W)]."""
        h, temb = self.begin(x, t, branch)
        skips = []
        for D_i in self.D:
            h = D_i(h, temb)
            skips.append(h)
        for M_i in self.M:
            h = M_i(h, temb)
        for U_i in reversed(self.U[branch:]):
            h = U_i(h, skips.pop(), temb)
        cached_U = h
        for U_i in reversed(self.U[:branch]):
            h = U_i(h, skips.pop(), temb)
        return self.end(h, x), cached_U

    def forward_partial(self, x: Tensor, t: int | Tensor, cached_U: Tensor, branch: int = 3) -> Tensor:
        """Only the `branch` outermost pairs, around cached_U from a full pass at an earlier, noisier step: eps."""
        h, temb = self.begin(x, t, branch, cached_U)
        skips = []
        for D_i in self.D[:branch]:
            h = D_i(h, temb)
            skips.append(h)
        h = cached_U
        for U_i in reversed(self.U[:branch]):
            h = U_i(h, skips.pop(), temb)
        return self.end(h, x)

    def begin(self, x: Tensor, t: int | Tensor, branch: int, cached_U: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x in the weights' dtype, and temb; or a ValueError that says which argument is wrong."""
        C, multiple = self.config.in_channels, 2 ** (len(self.config.channel_mult) - 1)
        if x.ndim != 4 or x.shape[1] != C or x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"x has shape {list(x.shape)}; need [B, {C}, H, W], H and W multiples of {multiple}")
        needed = [x.shape[0], *self.cached_shape(branch, *x.shape[2:])]
        if cached_U is not None and list(cached_U.shape) != needed:
            raise ValueError(f"cached_U has shape {list(cached_U.shape)}; branch={branch} of this x needs {needed}")
        if isinstance(t, int) and not 0 <= t <= 999:  # a tensor is not looked at: that would wait for the device
            raise ValueError(f"t={t} is not a timestep in 0..999")
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        if t.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"t has {t.shape[0]} elements; need 1, or one for each of the {x.shape[0]} images")
        return x.to(self.conv_out.weight.dtype), self.time(t)

    def end(self, h: Tensor, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)

    def cached_shape(self, branch: int, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of cached_U for images of height x width."""
        if not 1 <= branch <= len(self.D):
            raise ValueError(f"branch={branch} is not in 1..{len(self.D)}, the pairs of this network")
        level = (branch - 1) // (self.config.num_res_blocks + 1)
        return self.U[branch - 1].c_below, height >> level, width >> level
