"""From noise to image: one loop runs every sampler, cached or not, guided or not, on any network with two passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from minicache.diffusion import VARIANCES, Diffusion, check_spacing
from minicache.plan import MAX_STEPS, CachePlan, PlanCache, uncached
from minicache.samplers import SAMPLERS, Point, Sampler, passes, predict_x0
from minicache.solver import Solver

STEPS = 50  # unless asked for others
Noise = Callable[[], Tensor] | None  # draws the next z [B, C, H, W], where the sampler needs one


@dataclass(frozen=True)
class Settings:
    """How to sample: all but the network, the noise and the context. ValueError for what the sampler does not take."""

    plan: CachePlan  # the steps, and what is cached
    sampler: str | Solver = "ddim"  # one of SAMPLERS, or a table of numbers
    spacing: str | None = None  # of the timesteps (`Diffusion.timesteps`); None: the sampler's own
    eta: float = 0.0  # ddim's noise, 0 to 1
    variance: str | None = None  # ddpm's, one of VARIANCES; None: the checkpoint's own
    clip_x0: bool | None = None  # clip the predicted image to [-1, 1]; None: as the sampler does by default
    start: int | None = None  # x_T is images noised to t = start - 1, and only timesteps below start are visited
    guidance: float = 1.0  # of the context, 0 to 100; 1 is none, and costs half

    def __post_init__(self):
        fitted = isinstance(self.sampler, Solver)
        samplers = {} if fitted else {"sampler": SAMPLERS}
        for name, allowed in {**samplers, "variance": (None, *VARIANCES), "clip_x0": (None, True, False)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(str, allowed))}")
        numbers = {"eta": (float, 0, 1), "guidance": (float, 0, 100), "start": (int, 1, MAX_STEPS)}
        for name, (kind, least, most) in numbers.items():
            value = getattr(self, name)
            if (value, name) != (None, "start") and (type(value) not in (kind, int) or not least <= value <= most):
                raise ValueError(f"{name}={value!r} must be a number in {least}..{most}")
        for name, default in (("eta", 0), ("variance", None)):
            if getattr(self, name) != default and self.entry.noise != name:
                raise ValueError(f"{name}={getattr(self, name)!r} means nothing to sampler={str(self.sampler)!r}")
        if self.entry.twice and self.plan.steps < 3:
            raise ValueError(f"sampler={self.sampler!r} takes its first step twice, and needs 2 timesteps or more")
        if fitted and (self.spacing, self.start) != (None, None):
            raise ValueError(f"spacing={self.spacing!r}, start={self.start!r}: a solver has timesteps of its own")
        if fitted and len(self.sampler.t) != self.plan.steps:
            raise ValueError(f"the solver has {len(self.sampler.t)} steps, and the plan {self.plan.steps}")
        if fitted and self.sampler.pulls and self.guidance == 1:
            raise ValueError("the solver weighs what guidance adds: it needs a guidance other than 1")
        if not fitted:
            object.__setattr__(self, "spacing", self.spacing or self.entry.spacing)
            check_spacing(self.spacing)

    @property
    def entry(self) -> Sampler:
        """What the loop must know of the sampler."""
        return self.sampler.entry if isinstance(self.sampler, Solver) else SAMPLERS[self.sampler]

    @property
    def steps(self) -> int:
        """How many timesteps are visited: as many as the plan has steps, unless the sampler takes its first twice."""
        return self.plan.steps - self.entry.twice

    def timesteps(self, diffusion: Diffusion) -> list[float]:
        """One for each step of the plan, noisiest first; ValueError where there are none such."""
        if isinstance(self.sampler, Solver):
            if self.sampler.t[0] > (last := diffusion.num_timesteps - 1):
                raise ValueError(f"the solver begins at t = {self.sampler.t[0]}, after the last one, {last}")
            return list(self.sampler.t)
        ts = diffusion.timesteps(self.steps, self.spacing, self.start)
        return [*ts[:2], *ts[1:]] if self.entry.twice else ts


class Network(Protocol):
    """What the loop asks of a network: UNet, or any other nn.Module that can leave out its deep half."""

    config: Any  # .in_channels and .image_size of the images; .null_token, where a context of ids is guided
    diffusion: Diffusion

    def forward_full(self, x: Tensor, t: Tensor, branch: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """(eps like x, cached_U [B, ...])"""

    def forward_partial(self, x: Tensor, t: Tensor, cached_U: Tensor, branch: int, context: Tensor | None) -> Tensor:
        """eps like x"""


class Step(NamedTuple):
    """What one step of `denoise` leaves behind."""

    i: int  # 0 is the noisiest step
    t: float
    x: Tensor  # the state after the step; after the last one, the image
    x0: Tensor  # the image as predicted at this step (clipped where clip_x0)
    eps: Tensor  # the network's output, guided
    cached_U: Tensor  # at a refresh the fresh feature, else what stood in for it


def denoise(
    unet: Network,
    seeds: Iterable[int] | None = None,
    *,
    x_T: Tensor | None = None,
    context: Tensor | None = None,
    negative: Tensor | None = None,
    steps: int | None = None,
    plan: CachePlan | None = None,
    cache: Callable[[CachePlan], PlanCache] = PlanCache,
    **settings,
) -> Iterator[Step]:
    """Denoise one batch, and yield a Step after each step. ValueError says what is wrong.

    seeds: a whole number below 2**32 an image; all of its noise (x_T, then each step's z) comes from it alone, on the
    CPU, so an image does not depend on its batch or device. x_T [B, C, H, W]: start here instead (stochastic samplers
    need seeds as well). context [B or 1, K] ids or [B or 1, K, context_dim]: what to draw; None: the null context.
    negative, likewise: what guidance leads away from; None: the null context. steps: how many timesteps are visited;
    None: the plan's, or STEPS. plan: what to cache; None: nothing. cache: makes what keeps the features of a batch.
    settings: the other fields of Settings (sampler, spacing, eta, variance, clip_x0, start, guidance).
    """
    if unet.training and getattr(unet.config, "dropout", 0):
        raise ValueError("the network is in training mode, where dropout spoils its output: call unet.eval() first")
    if unet.diffusion is None:
        raise ValueError("the network does not say how it was trained: set unet.diffusion = Diffusion(...)")
    s = Settings(plan or uncached(passes(STEPS if steps is None else steps, settings.get("sampler"))), **settings)
    if steps not in (None, s.steps):
        raise ValueError(f"steps={steps} contradicts the plan, which has {s.steps}")
    if s.start is not None and (x_T is None or s.start > unet.diffusion.num_timesteps):
        raise ValueError(f"start={s.start} needs x_T, noised to t = start - 1, below {unet.diffusion.num_timesteps}")
    ts = s.timesteps(unet.diffusion)
    stochastic = s.entry.noise == "variance" or s.eta > 0
    if seeds is None and (x_T is None or stochastic):
        raise ValueError("seeds are needed: for x_T, or for the noise of a stochastic sampler")
    seeds = None if seeds is None else [index(seed) for seed in seeds]
    if wrong := [seed for seed in seeds or () if not 0 <= seed < 2**32]:  # torch's generator takes 32 bits of it
        raise ValueError(f"the seed {wrong[0]} must be at least 0 and at most {2**32 - 1}")
    if seeds == [] or (seeds and x_T is not None and len(seeds) != len(x_T)):
        raise ValueError(f"{len(seeds)} seeds for {'no' if x_T is None else len(x_T)} images; need one for each")
    shape = (unet.config.in_channels, unet.config.image_size, unet.config.image_size)
    if x_T is not None and x_T.shape[1:] != shape:
        raise ValueError(f"x_T has shape {list(x_T.shape)}; need [B, {shape[0]}, {shape[1]}, {shape[2]}]")

    device = next(unet.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]

    def noise() -> Tensor:
        draws = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators]
        return torch.stack(draws).to(device)

    x = noise() if generators else x_T
    x = x if x_T is None else x_T.to(device, torch.float32)
    if context is None and (negative is not None or s.guidance != 1):
        raise ValueError(f"guidance={s.guidance} and a negative context need a context")
    if negative is not None and (s.guidance == 1 or negative.shape[1:] != context.shape[1:]):
        raise ValueError("a negative context needs a guidance other than 1, and the shape of the context")
    if s.guidance != 1:
        if negative is None and context.is_floating_point():
            raise ValueError("guidance of a context of tokens needs a negative one, as that of an empty prompt")
        negative = torch.full_like(context, unet.config.null_token) if negative is None else negative
    parts = [_rows(part, len(x)) for part in (negative, context) if part is not None]
    context = torch.cat(parts).to(device) if parts else None
    return _loop(unet, x, context, ts, cache(s.plan), s, noise if stochastic else None)


def _rows(context: Tensor, B: int) -> Tensor:
    """[B, ...], also from [1, ...]."""
    if context.ndim < 2 or len(context) not in (1, B):
        raise ValueError(f"the context has shape {list(context.shape)}; need a row for each of the {B} images, or one")
    return context.expand(B, *context.shape[1:])


@torch.no_grad()
def _loop(
    unet: Network, x: Tensor, context: Tensor | None, ts: list[float], cache: PlanCache, s: Settings, noise: Noise
) -> Iterator[Step]:
    sampler, alpha_bar, branch = s.entry, unet.diffusion.alpha_bar, s.plan.branch
    clip = sampler.clip_x0 if s.clip_x0 is None else s.clip_x0
    scale = s.eta if sampler.noise == "eta" else s.variance or unet.diffusion.variance
    a_last = alpha_bar(0) if s.spacing == "offset" else 1.0
    ts_device = torch.tensor(ts, device=x.device)
    past: list[Point] = []
    for i, t in enumerate(ts):
        t_i, x_i = ts_device[i : i + 1], x if s.guidance == 1 else torch.cat([x, x])
        if cache.refreshes(i, x):
            eps, cached_U = unet.forward_full(x_i, t_i, branch, context)
            cache.keep(i, cached_U)
        else:
            cached_U = cache.stand_in(i)
            eps = unet.forward_partial(x_i, t_i, cached_U, branch, context)
        pull = None
        if s.guidance != 1:  # Ho and Salimans 2022, with a scale of 1 where theirs is 0
            away, towards = eps.chunk(2)
            pull = towards - away
            eps = away + s.guidance * pull
        a, a_next = alpha_bar(t), alpha_bar(ts[i + 1]) if i + 1 < len(ts) else a_last
        now = Point(a, x, eps, predict_x0(x, eps, a, clip), clip, i, pull)
        now = sampler.correct(now, past) if sampler.correct and past else now
        z = noise() if noise and a_next < 1 else None
        if a_next != a or (i == 1 and sampler.twice):  # a step of zero length, as quad repeats t, changes nothing
            x = sampler.step(now, past, a_next, **({sampler.noise: scale, "z": z} if sampler.noise else {}))
            past = [now, *past][: sampler.history]
        yield Step(i, t, x, now.x0, eps, cached_U)


def sample(
    unet: Network,
    seeds: Iterable[int] | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = False,
    **settings,
) -> Tensor:
    """Images [B, C, H, W] near [-1, 1], float32 on the network's device: `denoise`, run to its end.

    seeds and settings as in `denoise`. batch_size: images at a time (default: all). progress: a bar on a terminal.
    """
    rows = {"seeds": None if seeds is None else list(seeds), "x_T": settings.pop("x_T", None)}
    count = max(0 if row is None else len(row) for row in rows.values())
    contexts = {name: settings.pop(name) for name in ("context", "negative") if settings.get(name) is not None}
    rows |= {name: _rows(context, count) for name, context in contexts.items()}
    size = max(count, 1) if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    plan = settings.get("plan") or uncached(passes(settings.get("steps") or STEPS, settings.get("sampler")))
    images = []
    with tqdm(total=-(-count // size) * plan.steps, unit="step", disable=None if progress else True) as bar:
        for k in range(0, max(count, 1), size):
            batch = {name: None if row is None else row[k : k + size] for name, row in rows.items()}
            for step in denoise(unet, **batch, **settings):
                bar.update()
                x = step.x
            images.append(x)
    return torch.cat(images)
