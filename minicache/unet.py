"""The U-Net of DDPM (Ho et al. 2020), with the context of latent diffusion (Rombach et al. 2022), and the two forward
passes of DeepCache (Ma et al. 2023). Read from leaf to root: time embedding -> attention -> ResBlock -> the blocks of
D and U -> UNetConfig -> UNet. Shapes: B images, C channels, H x W pixels, N = H W pixels in a row, K tokens of context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Time = float | Tensor  # 0 to 999, whole or not: a number, or a tensor of one element (for all) or of B, not looked at
Context = Tensor | None  # ids [B, K], or tokens [B, K, context_dim]; None says nothing


def timestep_embedding(t: Tensor, dim: int, adm: bool = False) -> Tensor:
    """Sinusoids of t [B] -> [B, dim], wavelengths from 2 pi to 10000 * 2 pi, sines first, or ADM's cosines first."""
    half = dim // 2
    steps = half if adm else half - 1  # ADM's wavelengths would reach 10000 * 2 pi with one more
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / steps))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()] if adm else [angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """t [B] -> [B, 4 * channels]."""

    def __init__(self, channels: int, adm: bool):
        super().__init__()
        self.channels, self.adm = channels, adm
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        sinusoids = timestep_embedding(t, self.channels, self.adm).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(sinusoids)))


class Attention(nn.Module):
    """Each token [B, N, channels] takes from the context [B, K, context_dim] what it asks for (Vaswani et al. 2017)."""

    def __init__(self, channels: int, context_dim: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias)
        self.k = nn.Linear(context_dim, channels, bias)
        self.v = nn.Linear(context_dim, channels, bias)
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)  # every residual branch starts as zero: scale 1e-10 in Ho et al.

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        qkv = self.q(tokens), self.k(context), self.v(context)
        q, k, v = (rearrange(part, "b n (heads c) -> b heads n c", heads=self.heads) for part in qkv)
        return self.proj_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)"))


class SelfAttention(Attention):
    """DDPM's attention: of the pixels to each other, in one head, with a residual connection. h [B, C, H, W]."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__(channels, channels, heads=1, bias=True)
        self.norm = nn.GroupNorm(config.groups, channels, eps=config.norm_eps)

    def forward(self, h: Tensor, context: Tensor | None) -> Tensor:
        pixels = rearrange(self.norm(h), "b c h w -> b (h w) c")  # [B, N, C]
        return h + rearrange(super().forward(pixels, pixels), "b (h w) c -> b c h w", h=h.shape[2])


class Transformer(nn.Module):
    """Latent diffusion's attention: of the pixels to each other, then to the context [B, K, context_dim], then a gated
    MLP (GEGLU). Each has a residual connection, and there is one around all of it. h [B, C, H, W]."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)  # in ADM's lineage, too
        self.proj_in = nn.Linear(channels, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, channels, config.heads, bias=False)
        self.attn2 = Attention(channels, config.context_dim, config.heads, bias=False)
        self.mlp_in = nn.Linear(channels, 8 * channels)  # values and gates
        self.mlp_out = nn.Linear(4 * channels, channels)
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        pixels = self.proj_in(rearrange(self.norm(h), "b c h w -> b (h w) c"))  # [B, N, C]
        normed = self.norm1(pixels)
        pixels = pixels + self.attn1(normed, normed)
        pixels = pixels + self.attn2(self.norm2(pixels), context)
        value, gate = self.mlp_in(self.norm3(pixels)).chunk(2, dim=-1)
        pixels = pixels + self.mlp_out(value * F.gelu(gate))
        return h + rearrange(self.proj_out(pixels), "b (h w) c -> b c h w", h=h.shape[2])


class ResBlock(nn.Module):
    """h [B, c_in, H, W], temb [B or 1, 4 * model_channels] -> [B, c_out, H, W]; ends in attention where asked to."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, attention: bool):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(4 * config.model_channels, c_out)
        self.norm2 = nn.GroupNorm(config.groups, c_out, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attn = (Transformer if config.context_dim else SelfAttention)(c_out, config) if attention else None

    def forward(self, h: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        r = self.conv1(F.silu(self.norm1(h))) + self.temb_proj(temb)[:, :, None, None]
        r = self.conv2(self.dropout(F.silu(self.norm2(r))))
        h = self.shortcut(h) + r
        return h if self.attn is None else self.attn(h, context)


class ConvIn(nn.Conv2d):
    """D[0]: from pixels to features."""

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        return super().forward(x)


class Downsample(nn.Conv2d):
    """Half the resolution, by stride 2; DDPM's is padded on the right and bottom only, as TensorFlow's SAME does."""

    def forward(self, h: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        return super().forward(h if self.padding[0] else F.pad(h, (0, 1, 0, 1)))


class UpBlock(nn.Module):
    """U_i: joins the feature from below with the skip of D_i; doubles the resolution where D_i is a Downsample."""

    def __init__(self, c_below: int, c_skip: int, c_out: int, config: UNetConfig, attention: bool, up: bool):
        super().__init__()
        self.c_below = c_below
        self.block = ResBlock(c_below + c_skip, c_out, config, attention)
        self.upsample = nn.Conv2d(c_out, c_out, 3, padding=1) if up else None

    def forward(self, h: Tensor, skip: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        h = self.block(torch.cat([h, skip], dim=1), temb, context)
        return self.upsample(F.interpolate(h, scale_factor=2.0, mode="nearest")) if self.upsample else h


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. Level l works at image_size / 2**l with model_channels * channel_mult[l] channels."""

    image_size: int  # pixels a side
    model_channels: int  # even, and a multiple of groups, as is every width
    channel_mult: tuple[int, ...]
    num_res_blocks: int = 2  # a level, on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (16,)  # besides the middle, which always has it
    in_channels: int = 3
    out_channels: int = 3
    dropout: float = 0.0
    groups: int = 32  # of every GroupNorm; one of a single channel cannot see how strong the noise is
    context_dim: int | None = None  # width of the context's tokens; None: an unconditional network
    heads: int = 1  # of a Transformer's attention
    num_tokens: int | None = None  # rows of a table that turns ids (words, or a class) into the context; None: no table
    null_token: int = 0  # the id that says nothing; its row is zero, or a checkpoint's, and has no gradient
    pooled_context: bool = False  # every ResBlock sees the sum of the context's tokens, too, through temb
    adm: bool = False  # timestep embedding, Downsample's padding and norm_eps are ADM's, as in latent diffusion

    def __post_init__(self):
        for name in ("channel_mult", "attention_resolutions"):  # lists from JSON become tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for field, value in zip(fields(self), vars(self).values()):
            sizes = value if isinstance(value, tuple) else [value] if "int" in field.type else []
            if value is not field.default and any(type(n) is not int or not 1 <= n <= 2**16 for n in sizes):
                raise ValueError(f"{field.name}={value!r}: need whole numbers in 1..65536")
        C, mult, multiple = self.model_channels, self.channel_mult, math.lcm(2, self.groups, self.heads)
        sides, widest = [self.image_size / 2**level for level in range(len(mult))], C * max(mult, default=0)
        for fine, rule in (
            (1 <= len(mult) <= 16 and self.num_res_blocks <= 32, "channel_mult must be 1 to 16, num_res_blocks <= 32"),
            (self.image_size <= 2**13 >= widest, "image_size, model_channels * channel_mult must be 8192 at most"),
            (C >= 4 and C % multiple == 0, "model_channels must be a multiple of 2, groups and heads, and at least 4"),
            (sides and sides[-1] % 1 == 0, "image_size must be even at every level of channel_mult but the last"),
            (set(self.attention_resolutions) <= set(sides), "attention_resolutions must be image_size / 2**level"),
            (self.out_channels == self.in_channels, "out_channels must equal in_channels"),
            (type(self.dropout) in (int, float) and 0 <= self.dropout < 1, "dropout must be a number in [0, 1)"),
            (type(self.adm) is type(self.pooled_context) is bool, "adm and pooled_context must be True or False"),
            (self.context_dim or not (self.num_tokens or self.pooled_context), "context_dim is missing for a context"),
            (self.null_token in range(self.num_tokens or 1), "null_token must be below num_tokens, or 0"),
        ):
            if not fine:
                raise ValueError(f"{', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k in rule)}: {rule}")

    @property
    def norm_eps(self) -> float:
        """Of every GroupNorm, but for a Transformer's own."""
        return 1e-5 if self.adm else 1e-6


class UNet(nn.Module):
    """eps = unet(x, t, context): two flat lists and a middle.

    Each D_i emits one skip and U_i consumes it, so len(D) == len(U): 12 for CIFAR-10, 18 for LSUN_256. Branch b of
    DeepCache (its own numbering, Table 12) keeps the b outermost pairs alive, D[:b] and U[:b]; `cached_U`, the output
    of U[b] (of M, if b == len(D)), stands in for all that lies deeper. The network keeps no state between calls, and
    of cached_U it sees the shape alone, which two branches may share. x: [B, in_channels, H, W] in [-1, 1] plus noise,
    H and W multiples of 2**(levels - 1). Computes in the weights' dtype; eps has the shape and dtype of x.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config, self.diffusion, self.vocabulary = config, None, None  # the last two: set by who loads or trains it
        c, n = config.model_channels, config.num_res_blocks  # c: what D_i emits
        widths = [config.model_channels * mult for mult in config.channel_mult]
        self.time = TimeEmbedding(config.model_channels, config.adm)
        if config.num_tokens:
            self.tokens = nn.Embedding(config.num_tokens, config.context_dim, padding_idx=config.null_token)
        if config.pooled_context:
            self.pooled = nn.Linear(config.context_dim, 4 * config.model_channels)
        self.D, self.U = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            attention = config.image_size // 2**level in config.attention_resolutions
            for j in range(n + 1):
                if j > 0:
                    D_i, c = ResBlock(c, width, config, attention), width
                elif level > 0:
                    D_i = Downsample(c, c, 3, stride=2, padding=int(config.adm))
                else:
                    D_i = ConvIn(config.in_channels, c, 3, padding=1)
                c_below = widths[min(level + 1, len(widths) - 1)] if j == n else width
                self.D.append(D_i)
                self.U.append(UpBlock(c_below, c, width, config, attention, up=isinstance(D_i, Downsample)))
        self.M = nn.ModuleList([ResBlock(c, c, config, attention=True), ResBlock(c, c, config, attention=False)])
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, t: Time, context: Context = None) -> Tensor:
        """eps(x, t), uncached."""
        return self.forward_full(x, t, 1, context)[0]

    def forward_full(self, x: Tensor, t: Time, branch: int = 3, context: Context = None) -> tuple[Tensor, Tensor]:
        """The whole network: (eps, cached_U), cached_U [B, *cached_shape(branch, H, W)]."""
        h, temb, context = self._begin(x, t, branch, context)
        skips = []
        for D_i in self.D:
            skips.append(h := D_i(h, temb, context))
        for M_i in self.M:
            h = M_i(h, temb, context)
        for U_i in reversed(self.U[branch:]):
            h = U_i(h, skips.pop(), temb, context)
        cached_U = h
        for U_i in reversed(self.U[:branch]):
            h = U_i(h, skips.pop(), temb, context)
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype), cached_U

    def forward_partial(self, x: Tensor, t: Time, cached_U: Tensor, branch: int = 3, context: Context = None) -> Tensor:
        """Only the `branch` outermost pairs, around cached_U from a full pass at an earlier, noisier step: eps."""
        h, temb, context = self._begin(x, t, branch, context, cached_U)
        skips = []
        for D_i in self.D[:branch]:
            skips.append(h := D_i(h, temb, context))
        h = cached_U
        for U_i in reversed(self.U[:branch]):
            h = U_i(h, skips.pop(), temb, context)
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)

    def _begin(self, x, t, branch, context, cached_U=None):
        """x, SiLU(temb) and the tokens, in the weights' dtype; or a ValueError that says which argument is wrong."""
        C, multiple = self.config.in_channels, 2 ** (len(self.config.channel_mult) - 1)
        if x.ndim != 4 or x.shape[1] != C or any(n % multiple for n in x.shape[2:]) or not x.is_floating_point():
            raise ValueError(f"x is {x.dtype} {[*x.shape]}; need floats [B, {C}, H, W], H, W multiples of {multiple}")
        needed = [B := x.shape[0], *self.cached_shape(branch, *x.shape[2:])]
        if cached_U is not None and list(cached_U.shape) != needed:
            raise ValueError(f"cached_U has shape {list(cached_U.shape)}; branch={branch} of this x needs {needed}")
        if not isinstance(t, Tensor) and not 0 <= t <= 999:  # a tensor is not looked at: that would stop the device
            raise ValueError(f"t={t} is not a timestep in 0..999")
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        if t.shape[0] not in (1, B):
            raise ValueError(f"t has {t.shape[0]} elements; need 1, or one for each of the {B} images")
        if context is None and self.config.num_tokens:
            context = torch.full((B, 1), self.config.null_token, device=x.device)
        if self.config.num_tokens and not context.is_floating_point():
            context = self.tokens(context)
        given, width = None if context is None else list(context.shape), self.config.context_dim
        if (given and [given[0], len(given), given[-1]]) != (width and [B, 3, width]):
            raise ValueError(f"context is {given}; need {width and f'[{B}, K, {width}]'}, or ids if there is a table")
        temb, dtype = self.time(t), self.conv_out.weight.dtype
        context = None if context is None else context.to(dtype)
        if self.config.pooled_context:
            temb = temb + self.pooled(context.sum(1))
        return x.to(dtype), F.silu(temb), context  # every ResBlock begins with SiLU(temb)

    def cached_shape(self, branch: int, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of cached_U for images of height x width."""
        if not 1 <= branch <= len(self.D):
            raise ValueError(f"branch={branch} is not in 1..{len(self.D)}, the pairs of this network")
        level = (branch - 1) // (self.config.num_res_blocks + 1)
        return self.U[branch - 1].c_below, height >> level, width >> level
