"""What a plan costs: multiply-accumulates and bytes, counted on the meta device, where nothing is computed.

Conventions: for one image; MACs are those of convolutions and linear layers, as in the papers. The two products of
attention, q k and attention v, are reported apart: N K C MACs each, of N pixels with K pixels or tokens in C channels.
Activations are float32; attention's N x K matrix is among them, which a fused kernel never holds. A context has as
many tokens as a prompt: the length of the vocabulary, 1 where it is a class, else CLIP's 77.
"""

from __future__ import annotations

import math
import statistics
import time
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minicache.plan import CachePlan
from minicache.unet import UNet, UNetConfig

CLIP_TOKENS = 77  # of a prompt where the words are CLIP's, as in Stable Diffusion


class PassCost(NamedTuple):
    """What one pass costs, for one image."""

    macs: int  # convolutions and linear layers
    attention_macs: int  # the products q k and attention v
    peak_bytes: int  # most that is alive at once besides the weights: input, skips, cache, workspace of each operation


class _Peak(TorchDispatchMode):
    """Watches every tensor that is made, and remembers the most bytes that were alive at once."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.weights = {StorageWeakRef(p.untyped_storage()) for p in unet.parameters()}  # views of them are not made
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.alive[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        alive = ((made, size) for made, size in self.alive.items() if not made.expired() and made not in self.weights)
        self.alive = dict(alive)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def pass_cost(unet: UNet, branch: int | None = None) -> PassCost:
    """Of a full pass (branch None), or of a partial pass with `branch` live pairs. unet: a UNet, or a UViT."""
    kind = UNet if isinstance(unet.config, UNetConfig) else type(unet)  # also what stands in for a UNet, as `Compiled`
    return _count(kind, unet.config, branch, context_length(unet))


def context_length(unet: UNet) -> int:
    """Tokens of a context."""
    return unet.vocabulary.length if unet.vocabulary else 1 if unet.config.num_tokens else CLIP_TOKENS


@cache
@torch.no_grad()
def _count(kind: type[nn.Module], config: Any, branch: int | None, tokens: int) -> PassCost:
    size = config.image_size
    with torch.device("meta"):
        unet = kind(config).eval()
        x, t = torch.empty(1, config.in_channels, size, size), torch.zeros(1)
        context = torch.empty(1, tokens, config.context_dim) if config.context_dim else None
        cached_U = None if branch is None else torch.empty(1, *unet.cached_shape(branch, size, size))
    counter, peak = FlopCounterMode(display=False), _Peak(unet)
    for mode in (counter, peak):
        with mode:
            unet(x, t, context) if branch is None else unet.forward_partial(x, t, cached_U, branch, context)
    flops = {str(operation).split(".")[-1]: count for operation, count in counter.get_flop_counts()["Global"].items()}
    weighted = sum(flops.pop(name, 0) for name in ("convolution", "addmm", "mm"))
    inputs = sum(tensor.nbytes for tensor in (x, cached_U, context) if tensor is not None)
    return PassCost(weighted // 2, sum(flops.values()) // 2, inputs + peak.peak)


def macs(unet: UNet, branch: int | None = None) -> int:
    """Multiply-accumulates (convolutions and linear layers) of a full or partial pass, for one image."""
    return pass_cost(unet, branch).macs


def macs_so_far(unet: UNet, plan: CachePlan, guidance: float = 1.0) -> list[int]:
    """Multiply-accumulates of a plan up to each of its steps, for one image; guidance other than 1 doubles them."""
    times, refresh = 1 if guidance == 1 else 2, set(plan.refresh)
    return [*accumulate(times * macs(unet, None if i in refresh else plan.branch) for i in range(plan.steps))]


def plan_macs(unet: UNet, plan: CachePlan, guidance: float = 1.0) -> int:
    """Multiply-accumulates of all of a plan's steps together."""
    return macs_so_far(unet, plan, guidance)[-1]


def full_passes(unet: UNet, plan: CachePlan, guidance: float = 1.0) -> float:
    """A plan's MACs, in full passes of this network: what uncached sampling with as many steps would cost."""
    return plan_macs(unet, plan, guidance) / macs(unet)


@torch.no_grad()
def pass_seconds(unet: UNet, branch: int | None = None, batch: int = 16) -> float:
    """What one pass takes, for one image: the median of 7 passes, by the clock; a context is as long as a prompt."""
    config, device, context = unet.config, next(unet.parameters()).device, None
    x = torch.randn(batch, config.in_channels, *[config.image_size] * 2, device=device)
    if config.context_dim:
        context = torch.randn(batch, context_length(unet), config.context_dim, device=device)
    cached_U, times = unet.forward_full(x, 500, branch or 1, context)[1], []
    for _ in range(7):
        began = time.perf_counter()
        eps = unet(x, 500, context) if branch is None else unet.forward_partial(x, 500, cached_U, branch, context)
        eps.sum().item()  # waits for the device
        times.append(time.perf_counter() - began)
    return statistics.median(times) / batch


def cache_bytes(unet: UNet, plan: CachePlan, guidance: float = 1.0) -> int:
    """Bytes of cached_U that the loop keeps for one image: one tensor, two when forecasting, none uncached; twice as
    many under guidance."""
    shape = unet.cached_shape(plan.branch, unet.config.image_size, unet.config.image_size)
    tensors = 0 if len(plan.refresh) == plan.steps else (1 + plan.forecasts) * (1 if guidance == 1 else 2)
    return next(unet.parameters()).element_size() * math.prod(shape) * tensors


def weight_bytes(unet: UNet) -> int:
    return sum(p.numel() * p.element_size() for p in unet.parameters())
