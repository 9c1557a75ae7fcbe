"""DeepCache for a pipeline of diffusers that you already have: `with deepcache(pipe): pipe("a red apple")`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from minicache.plan import MAX_STEPS, CachePlan, PlanCache, uniform
from minicache.unet import UNet

PLAIN = {"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"}  # all compute the same


@contextmanager
def deepcache(pipe: Any, interval: int = 5, branch: int = 1, forecast: str = "hold") -> Iterator[None]:
    """Inside this context `pipe` draws with DeepCache; after it, or after an error, it has its own network again.

    pipe: diffusers' StableDiffusionPipeline or StableDiffusionImg2ImgPipeline, with any scheduler; its weights are
    shared, not copied. interval, branch, forecast: as in `uniform`, where a step is one pass of the network (Heun's
    method takes two from one timestep to the next). The sides of pictures must be multiples of 64. ValueError for what
    changes the network besides its weights: adapters that are not fused into them, FreeU, offloading, patches (which
    one pass of both networks, over a small x, shows).
    """
    plan, theirs = uniform(MAX_STEPS, interval, branch, forecast), pipe.unet
    refuse_others(pipe)
    pipe.unet = CachedUNet(pipe, plan)
    try:
        yield
    finally:
        pipe.unet = theirs


def refuse_others(pipe: Any) -> None:
    """ValueError for a pipeline that calls its network in another way, or whose network is changed from outside."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel

    kind, unet = type(pipe).__name__, pipe.unet
    if not isinstance(pipe, (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline)):
        raise ValueError(f"deepcache knows StableDiffusionPipeline and StableDiffusionImg2ImgPipeline, not {kind}")
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"deepcache needs a UNet2DConditionModel as pipe.unet, not a {type(unet).__name__}")
    for wrong, what in (
        (hasattr(unet, "_hf_hook"), "offloading moves its weights while it runs"),
        (any(getattr(block, "s1", None) is not None for block in unet.up_blocks), "FreeU is enabled"),
        ({type(each).__name__ for each in unet.attn_processors.values()} - PLAIN, "its attention is not the plain one"),
    ):
        if wrong:
            raise ValueError(f"deepcache cannot stand in for this network: {what}")


def shared(theirs: Any) -> UNet:
    """A UNet2DConditionModel as a network of ours, on the same weights: changes of one are changes of the other."""
    from minicache.formats.diffusers import NAMES, config_from_diffusers

    config = config_from_diffusers("pipe.unet", theirs.to_json_string())
    with torch.device("meta"):
        unet = UNet(config)
    state, needed, keys = theirs.state_dict(), unet.state_dict(), NAMES.keys(unet)
    if strangers := sorted(state.keys() - set(keys.values())):
        raise ValueError(f"pipe.unet has the unexpected tensor {strangers[0]}: fuse adapters into its weights first")
    unet.load_state_dict({ours: state[key].view(needed[ours].shape) for ours, key in keys.items()}, assign=True)
    return unet.eval()


@torch.no_grad()
def refuse_patched(theirs: Any, ours: UNet) -> None:
    """ValueError where their network gives something else than its weights and its config say, as under a hook."""
    config, side, generator = ours.config, 2 ** len(ours.config.channel_mult), torch.Generator().manual_seed(0)
    shapes = (1, config.in_channels, side, side), (1, 77, config.context_dim)
    x, context = (torch.randn(shape, generator=generator).to(theirs.device, theirs.dtype) for shape in shapes)
    t = torch.tensor([500], device=theirs.device)
    one, other = theirs(x, t, context).sample, ours(x, t, context)
    near = 1e-3 if theirs.dtype in (torch.float32, torch.float64) else 0.1
    if (one - other).norm() > near * one.norm():
        raise ValueError("deepcache cannot stand in for this network: it is changed otherwise than in its weights")


@dataclass
class Trajectory:
    """What is kept on the way from noise to one batch of pictures, under one context."""

    cache: PlanCache
    timesteps: Tensor  # of the scheduler
    shape: torch.Size  # of x
    i: int = 0  # passes so far
    t: float = inf  # of the latest pass


class CachedUNet(nn.Module):
    """Stands in for a pipeline's UNet2DConditionModel: is called as that one is, and remembers from call to call.

    Each context tensor has its own trajectory, of one batch at a time: guidance in two calls has two. It is known by
    its identity, as pipelines make one at each call, and nothing is kept of it when it is gone. A trajectory begins
    anew where the scheduler has new timesteps, where t rises, and where the latents have another shape.
    """

    def __init__(self, pipe: Any, plan: CachePlan):
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        super().__init__()
        self.theirs, self.ours = pipe.unet, shared(pipe.unet)  # both, so that pipe.to() moves both
        self.ours.cached_shape(plan.branch, 64, 64)  # refuses a branch that there is not
        refuse_patched(self.theirs, self.ours)
        self.config, self.output, self.plan = pipe.unet.config, UNet2DConditionOutput, plan
        self.timesteps = lambda: pipe.scheduler.timesteps
        self.trajectories = WeakTensorKeyDictionary()

    device = property(lambda self: self.theirs.device)
    dtype = property(lambda self: self.theirs.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **others,
    ) -> Any:
        """UNet2DConditionModel's; ValueError for arguments that our network has nothing for."""
        if given := [name for name, value in others.items() if value not in (None, {})]:
            raise ValueError(f"deepcache cannot take {given[0]}, which changes the network from outside")
        t, now = float(torch.as_tensor(timestep).max()), self.trajectories.get(encoder_hidden_states)
        same = now and now.timesteps is self.timesteps() and now.shape == sample.shape
        if not same or t > now.t or now.i == self.plan.steps:
            now = Trajectory(PlanCache(self.plan), self.timesteps(), sample.shape)
            self.trajectories[encoder_hidden_states] = now
        at = {"branch": self.plan.branch, "context": encoder_hidden_states}
        if now.cache.refreshes(now.i, sample):
            eps, cached_U = self.ours.forward_full(sample, timestep, **at)
            now.cache.keep(now.i, cached_U)
        else:
            eps = self.ours.forward_partial(sample, timestep, now.cache.stand_in(now.i), **at)
        now.i, now.t = now.i + 1, t
        return self.output(sample=eps) if return_dict else (eps,)
