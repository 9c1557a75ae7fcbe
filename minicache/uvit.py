"""U-ViT (Bao et al. 2022, "All are Worth Words"): a transformer in the shape of a U-Net, with DeepCache's two passes.
The class, the time and the patches of the image are tokens alike; each U_i joins the tokens from below with those that
D_i emits. Shapes: B images, N tokens (the class where there is one, the time, the patches), C channels of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minicache.unet import Attention, Context, Time, timestep_embedding


class Block(nn.Module):
    """h [B, N, C] -> [B, N, C]: attention of the tokens to each other, then an MLP; in U, the long skip before both."""

    def __init__(self, channels: int, heads: int, skip: bool = False):
        super().__init__()
        self.join = nn.Linear(2 * channels, channels) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = Attention(channels, channels, heads, bias=False)
        self.mlp_in, self.mlp_out = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, h: Tensor, skip: Tensor | None = None) -> Tensor:
        h = h if self.join is None else self.join(torch.cat([h, skip], dim=-1))
        normed = self.norm1(h)
        h = h + self.attn(normed, normed)
        return h + self.mlp_out(F.gelu(self.mlp_in(self.norm2(h))))


@dataclass(frozen=True)
class UViTConfig:
    """The shape of a U-ViT. UViTConfig(32, 2, 512, 6, 8) is the paper's U-ViT-S/2 for CIFAR-10: 44M parameters."""

    image_size: int  # pixels a side, a multiple of patch_size
    patch_size: int  # pixels a side
    channels: int  # of a token, an even multiple of heads
    pairs: int  # blocks before the middle, and as many after it
    heads: int
    in_channels: int = 3
    num_tokens: int | None = None  # classes, and one that says nothing; None: an unconditional network
    null_token: int = 0  # the class that says nothing
    context_dim = property(lambda self: self.channels if self.num_tokens else None)  # width of the class's token

    def __post_init__(self):
        sizes = (self.image_size, self.patch_size, self.channels, self.pairs, self.heads, self.in_channels,
                 self.num_tokens or 1)  # fmt: skip
        if any(type(size) is not int or not 1 <= size <= 2**16 for size in sizes):
            raise ValueError(f"sizes, pairs and heads must be whole numbers in 1..65536: {self}")
        side, rest = divmod(self.image_size, self.patch_size)
        for fine, rule in (
            (not rest and side <= 256, "patches must fill the image, and be 256 a side at most"),
            (self.channels % math.lcm(2, self.heads) == 0, "channels must be an even multiple of heads"),
            (self.pairs <= 256 and self.channels <= 2**13, "pairs must be 256 at most, and channels 8192"),
            (self.null_token in range(self.num_tokens or 1), "null_token must be one of the num_tokens"),
        ):
            if not fine:
                raise ValueError(f"{rule}: {self}")


class UViT(nn.Module):
    """eps = uvit(x, t, context). Branch b keeps the b outermost pairs alive, D[:b] and U[:b]; `cached_U` [B, N, C] is
    the output of U[b] (of M, if b == len(D)). x: [B, in_channels, image_size, image_size]. context: classes [B, 1], or
    their tokens [B, 1, C]; None: the null class. Computes in the weights' dtype; eps has the shape and dtype of x."""

    def __init__(self, config: UViTConfig):
        super().__init__()
        C, size, side = config.channels, config.patch_size, config.image_size // config.patch_size
        self.config, self.diffusion, self.vocabulary = config, None, None  # diffusion: set by whoever trains it
        self.tokens = nn.Embedding(config.num_tokens, C) if config.num_tokens else None
        self.patches = nn.Conv2d(config.in_channels, C, size, stride=size)
        self.positions = nn.Parameter(0.02 * torch.randn((2 if config.num_tokens else 1) + side**2, C))
        self.D = nn.ModuleList(Block(C, config.heads) for _ in range(config.pairs))
        self.M = Block(C, config.heads)
        self.U = nn.ModuleList(Block(C, config.heads, skip=True) for _ in range(config.pairs))
        self.norm_out, self.pixels = nn.LayerNorm(C), nn.Linear(C, size**2 * config.in_channels)
        self.conv_out = nn.Conv2d(config.in_channels, config.in_channels, 3, padding=1)  # smooths the patches' edges

    def forward(self, x: Tensor, t: Time, context: Context = None) -> Tensor:
        return self.forward_full(x, t, 1, context)[0]

    def forward_full(self, x: Tensor, t: Time, branch: int = 1, context: Context = None) -> tuple[Tensor, Tensor]:
        """The whole network: (eps, cached_U)."""
        h, skips = self._begin(x, t, branch, context), []
        for D_i in self.D:
            skips.append(h := D_i(h))
        h = self.M(h)
        for U_i in reversed(self.U[branch:]):
            h = U_i(h, skips.pop())
        return self._end(h, skips).to(x.dtype), h

    def forward_partial(self, x: Tensor, t: Time, cached_U: Tensor, branch: int = 1, context: Context = None) -> Tensor:
        """Only the `branch` outermost pairs, around cached_U from a full pass at an earlier, noisier step: eps."""
        h, skips = self._begin(x, t, branch, context), []
        if cached_U.shape != h.shape:
            raise ValueError(f"cached_U has shape {list(cached_U.shape)}; need {list(h.shape)}")
        for D_i in self.D[:branch]:
            skips.append(h := D_i(h))
        return self._end(cached_U, skips).to(x.dtype)

    def _begin(self, x: Tensor, t: Time, branch: int, context: Context) -> Tensor:
        """All that the network is told, as tokens [B, N, C] in their places."""
        (_, C), B, dtype = self.cached_shape(branch), x.shape[:1].numel(), self.positions.dtype
        if x.shape[1:] != (self.config.in_channels, *[self.config.image_size] * 2) or not x.is_floating_point():
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, which is not what {self.config} takes")
        if not isinstance(t, Tensor) and not 0 <= t <= 999:  # a tensor is not looked at: that would stop the device
            raise ValueError(f"t={t} is not a timestep in 0..999")
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        token = None if context is None else [B, 1, C] if context.is_floating_point() else [B, 1]
        if len(t) not in (1, B) or (token and (not self.tokens or list(context.shape) != token)):
            raise ValueError(f"t of {len(t)} elements with the context {context} is not what {self.config} takes")
        time = timestep_embedding(t, C, adm=True).to(dtype)
        h = [time[:, None].expand(B, 1, C), rearrange(self.patches(x.to(dtype)), "b c h w -> b (h w) c")]
        if self.tokens:
            ids = torch.full((B, 1), self.config.null_token, device=x.device) if context is None else context
            h.insert(0, ids.to(dtype) if ids.is_floating_point() else self.tokens(ids))
        return torch.cat(h, dim=1) + self.positions

    def _end(self, h: Tensor, skips: list[Tensor]) -> Tensor:
        """Up through the pairs whose skips are left; then the patches' tokens become an image."""
        for U_i in reversed(self.U[: len(skips)]):
            h = U_i(h, skips.pop())
        size, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        pixels = self.pixels(self.norm_out(h[:, -(side**2) :]))
        return self.conv_out(rearrange(pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=size, q=size))

    def cached_shape(self, branch: int, *image: int) -> tuple[int, int]:
        """(N, C) of cached_U, the same at every branch."""
        if not 1 <= branch <= len(self.D):
            raise ValueError(f"branch={branch} is not in 1..{len(self.D)}, the pairs of this network")
        return tuple(self.positions.shape)
