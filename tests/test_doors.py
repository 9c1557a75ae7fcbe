"""What a reader may add without touching the loop: a sampler, a cache, a condition, a network, a file format; and
timesteps between the whole ones."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import noise, random_unet, relative
from torch import nn

from minicache import (
    CachePlan,
    Diffusion,
    PlanCache,
    UNet,
    UNetConfig,
    denoise,
    formats,
    load,
    sample,
    uncached,
    uniform,
)
from minicache.formats.family import Family
from minicache.formats.pesser import NAMES
from minicache.samplers import SAMPLERS, Sampler, ddim_step, half_log_snr, predict_x0

# --- a sampler -------------------------------------------------------------------------------------------------------


def test_a_sampler_is_one_entry(unet, monkeypatch):
    """Euler's method in sigma = sqrt((1 - a) / a), on x / sqrt(a), is DDIM by another name."""

    def euler_step(now, past, a_next):
        sigma, sigma_next = (math.sqrt((1 - a) / a) for a in (now.a, a_next))
        return math.sqrt(a_next) * (now.x / math.sqrt(now.a) + (sigma_next - sigma) * now.eps)

    monkeypatch.setitem(SAMPLERS, "euler", Sampler(euler_step, spacing="trailing"))
    x = sample(unet, [0, 1], sampler="euler", steps=10)
    assert relative(x, sample(unet, [0, 1], sampler="ddim", steps=10, spacing="trailing")) < 1e-5


def test_a_sampler_may_correct_x_after_its_evaluation(unet, monkeypatch):
    """Heun's corrector of DDIM: the step taken again with the mean of both ends' eps, at no further evaluation."""
    corrected = []

    def correct(now, past):
        corrected.append(now.a)
        mean = (now.eps + past[0].eps) / 2
        again = past[0]._replace(eps=mean, x0=predict_x0(past[0].x, mean, past[0].a))
        x = ddim_step(again, [], now.a)
        return now._replace(x=x, x0=predict_x0(x, now.eps, now.a))

    monkeypatch.setitem(SAMPLERS, "heun", Sampler(ddim_step, history=1, correct=correct))
    monkeypatch.setitem(SAMPLERS, "plain", Sampler(ddim_step, history=1))
    heun, plain = (sample(unet, [0], sampler=name, steps=40) for name in ("heun", "plain"))
    assert len(corrected) == 39 and not torch.equal(heun, plain)
    limit = sample(unet, [0], sampler="plain", steps=1000)
    assert relative(heun, limit) < relative(plain, limit)
    assert torch.equal(sample(unet, [0], sampler="heun", plan=uniform(40, 1)), heun)  # interval 1 is uncached


# --- a cache ---------------------------------------------------------------------------------------------------------


class HalfLine(PlanCache):
    """A forecast of one's own: half as far as the line through the last two features, in every second channel."""

    def stand_in(self, i):
        if self.older is None:
            return self.newer
        weight = torch.tensor([0.5, 0.0]).repeat(self.newer.shape[1] // 2)[:, None, None]
        return self.newer + weight * (self.newer - self.older)


class Guard(PlanCache):
    """A rule that decides while running: a full step once x has moved by a tenth since the last one."""

    def refreshes(self, i, x):
        moved = i == 0 or relative(x, self.x) > 0.1
        self.x = x if moved else self.x
        return moved


def test_a_forecast_is_one_small_class(unet):
    plan = uniform(9, 3, branch=2)
    steps = list(denoise(unet, [0, 1], plan=plan, cache=HalfLine))
    older, newer, got = (steps[i].cached_U for i in (0, 3, 5))
    assert torch.equal(got[:, 1::2], newer[:, 1::2])
    assert torch.allclose(got[:, ::2], (1.5 * newer - 0.5 * older)[:, ::2], atol=1e-5)
    alone = sample(unet, [1], plan=plan, cache=HalfLine)  # each batch has a cache of its own
    assert relative(sample(unet, [0, 1], plan=plan, cache=HalfLine, batch_size=1)[1:], alone) == 0


def test_a_plan_that_forecasts_nothing_keeps_one_feature(unet):
    caches = []

    def cache(plan):
        caches.append(PlanCache(plan))
        return caches[-1]

    sample(unet, [0], plan=uniform(7, 3), cache=cache)
    assert caches[0].older is None and caches[0].newer is not None
    mean = [0.0] * 4 + [-0.5] * 2 + [0.0]
    steps = list(denoise(unet, [0], plan=CachePlan(7, 3, (0, 3, 6), mean)))
    assert torch.allclose(steps[4].cached_U, (steps[0].cached_U + steps[3].cached_U) / 2, atol=1e-5)


def test_a_rule_may_decide_while_running(unet):
    full = 0

    class Counted(Guard):
        def keep(self, i, cached_U):
            nonlocal full
            full += 1
            super().keep(i, cached_U)

    cached = sample(unet, [0], steps=50, cache=Counted)
    assert 1 < full < 50 and relative(cached, sample(unet, [0], steps=50)) < 0.5


# --- a condition -----------------------------------------------------------------------------------------------------

WORDS = UNetConfig(16, 32, (1, 2), 1, (8,), context_dim=24, heads=2, num_tokens=7, pooled_context=True)


@pytest.fixture(scope="module")
def conditional() -> UNet:
    torch.manual_seed(0)
    unet = UNet(WORDS).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    unet.tokens.weight.data[0] = 0
    unet.diffusion = Diffusion()
    return unet


IDS = torch.tensor([[1, 2, 0], [3, 0, 0]])


@pytest.mark.parametrize("branch", range(1, 5))
def test_partial_equals_full_with_a_context(conditional, branch):
    x = noise(2, 3, 16, 16)
    eps, cached_U = conditional.forward_full(x, 500, branch, IDS)
    assert torch.equal(conditional.forward_partial(x, 500, cached_U, branch, IDS), eps)
    assert torch.equal(conditional(x, 500, conditional.tokens(IDS)), eps)  # tokens, looked up beforehand
    assert not torch.allclose(conditional(x, 500, IDS.flip(0)), eps, atol=1e-4)


def test_no_context_is_the_null_context(conditional):
    x = noise(2, 3, 16, 16)
    assert torch.allclose(conditional(x, 500), conditional(x, 500, torch.zeros(2, 3, dtype=torch.long)), atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_of_one_is_no_guidance_and_interval_one_is_uncached(conditional, sampler):
    settings = {"seeds": [0, 1], "context": IDS, "sampler": sampler}
    plain = sample(conditional, plan=uncached(5), **settings)
    assert torch.equal(sample(conditional, plan=uncached(5), guidance=1.0, **settings), plain)
    guided = sample(conditional, plan=uncached(5), guidance=3.0, **settings)
    assert torch.equal(sample(conditional, plan=uniform(5, 1), guidance=3.0, **settings), guided)
    assert not torch.equal(guided, plain)
    cached = sample(conditional, plan=uniform(5, 3, 1), guidance=3.0, **settings)
    assert not torch.equal(cached, guided)


def test_guidance_is_its_equation(conditional):
    """eps_null + s (eps_context - eps_null), in one batch; the cache has both halves."""
    x_T = noise(2, 3, 16, 16)
    first = next(iter(denoise(conditional, x_T=x_T, context=IDS, guidance=2.5, steps=4)))
    null, towards = conditional(x_T, first.t), conditional(x_T, first.t, IDS)
    assert torch.allclose(first.eps, null + 2.5 * (towards - null), atol=1e-4)
    assert len(first.cached_U) == 4
    away = next(iter(denoise(conditional, x_T=x_T, context=IDS, negative=IDS[:1], guidance=2.5, steps=4)))
    null = conditional(x_T, first.t, IDS[:1].expand(2, 3))
    assert torch.allclose(away.eps, null + 2.5 * (towards - null), atol=1e-4)


def test_a_context_is_sliced_with_its_seeds(conditional):
    together = sample(conditional, [0, 1], context=IDS, guidance=2.0, steps=4)
    assert relative(sample(conditional, [0, 1], context=IDS, guidance=2.0, steps=4, batch_size=1), together) < 1e-5
    same = sample(conditional, [0, 1], context=IDS[:1], steps=4, batch_size=1)
    assert relative(same, sample(conditional, [0, 1], context=IDS[:1].expand(2, 3), steps=4)) < 1e-5


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"context": IDS[:1].repeat(3, 1)}, "need a row for each of the 2 images, or one"),
        ({"context": noise(2, 3, 24), "guidance": 2.0}, "needs a negative one"),
        ({"context": noise(2, 3, 5)}, r"need \[2, K, 24\], or ids"),
        ({"context": IDS[0]}, "need a row for each"),
        ({"guidance": 3.0}, "need a context"),
        ({"negative": IDS}, "need a context"),
    ],
)
def test_wrong_contexts_are_refused(conditional, settings, words):
    with pytest.raises(ValueError, match=words):
        sample(conditional, [0, 1], steps=3, **settings)


# --- a network -------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Not a UNet: a shallow map of pixels around a deep one of their mean, which a context [B, 1, 1] shifts."""

    def __init__(self):
        super().__init__()
        self.config, self.diffusion = SimpleNamespace(in_channels=1, image_size=4), Diffusion(beta_end=0.01)
        self.shallow, self.deep, self.calls = nn.Conv2d(1, 1, 1), nn.Linear(1, 1), 0

    def forward_full(self, x, t, branch, context=None):
        self.calls += 1
        cached_U = self.deep(x.mean((2, 3))) + (0 if context is None else context[:, 0])
        return self.forward_partial(x, t, cached_U, branch, context), cached_U

    def forward_partial(self, x, t, cached_U, branch, context=None):
        return self.shallow(x) + cached_U[:, :, None, None]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_network_with_the_two_passes_is_sampled_and_cached(sampler):
    torch.manual_seed(0)
    toy = Toy()
    full = sample(toy, range(3), sampler=sampler, plan=uncached(12))
    assert full.shape == (3, 1, 4, 4) and toy.calls == 12
    assert torch.equal(sample(toy, range(3), sampler=sampler, plan=uniform(12, 1)), full)
    toy.calls = 0
    assert not torch.equal(sample(toy, range(3), sampler=sampler, plan=uniform(12, 4)), full) and toy.calls == 3
    context = torch.ones(3, 1, 1)
    towards = sample(toy, range(3), context=context, negative=-context, guidance=2.0, sampler=sampler, steps=12)
    assert towards.shape == full.shape and not torch.allclose(towards, full, atol=1e-2)


# --- a file format ---------------------------------------------------------------------------------------------------


def test_a_file_format_is_one_family(unet, monkeypatch, tmp_path):
    names = replace(NAMES, conv_in="stem")
    theirs = Family(mine=lambda content: "stem.weight" in content, keys=names.keys, infer=names.infer)
    content, ours = {}, unet.state_dict()
    for key, their_key in names.keys(unet).items():
        conv = key.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight"))  # theirs is a 1x1 one
        content[their_key] = ours[key][:, :, None, None] if conv else ours[key]
    torch.save(content, tmp_path / "theirs.ckpt")
    how = {"config": unet.config, "diffusion": Diffusion()}
    with pytest.raises(ValueError):
        load(tmp_path / "theirs.ckpt", **how)
    monkeypatch.setattr(formats, "FAMILIES", (theirs, *formats.FAMILIES))
    x = noise(1, 3, 16, 16)
    assert relative(load(tmp_path / "theirs.ckpt", **how)(x, 500), unet(x, 500)) < 1e-5  # memory formats differ


# --- timesteps between the whole ones --------------------------------------------------------------------------------


def test_timesteps_may_be_fractional(unet, monkeypatch):
    diffusion = Diffusion()
    assert [diffusion.alpha_bar(t) for t in (0, 7, 7.0, 999)] == diffusion.alphas_bar[[0, 7, 7, 999]].tolist()
    lam = [half_log_snr(diffusion.alpha_bar(t)) for t in (500, 500.25, 501)]
    assert lam[1] == pytest.approx(0.75 * lam[0] + 0.25 * lam[2])
    x = noise(1, 3, 16, 16)
    assert torch.equal(unet(x, 500.0), unet(x, 500)) and torch.equal(unet(x, torch.tensor([500.0])), unet(x, 500))
    near, far = (relative(unet(x, t), unet(x, 500)) for t in (500.01, 501))
    assert 0 < near < 0.1 * far

    whole = sample(unet, [0], steps=10, spacing="trailing")
    shifted = [t + 0.25 for t in range(899, -1, -100)]
    monkeypatch.setattr(Diffusion, "timesteps", lambda *_: [999, *shifted])
    moved = sample(unet, [0], steps=10)
    assert 0 < relative(moved, whole) < 0.05
    monkeypatch.setattr(Diffusion, "timesteps", lambda *_: [float(t) for t in range(999, -1, -100)])
    assert torch.equal(sample(unet, [0], steps=10), whole)


def test_networks_of_old_recipes_are_unchanged_by_new_fields():
    """The context's fields at their defaults add no parameter."""
    assert set(random_unet().state_dict()) == set(UNet(UNetConfig(16, 32, (1, 2), 1, (8,), heads=4)).state_dict())


def test_a_negative_context_has_the_shape_of_the_context(conditional):
    for settings in ({"negative": IDS}, {"negative": IDS[:, :2], "guidance": 2.0}):
        with pytest.raises(ValueError, match="a negative context needs"):
            sample(conditional, [0, 1], context=IDS, steps=3, **settings)


def test_start_and_clip_are_checked(unet):
    with pytest.raises(ValueError, match="clip_x0='no'"):
        sample(unet, [0], steps=3, clip_x0="no")
    short = random_unet()
    short.diffusion = Diffusion(num_timesteps=500)
    with pytest.raises(ValueError, match=r"start=700 .* below 500"):
        sample(short, x_T=noise(1, 3, 16, 16), start=700, steps=3, spacing="trailing")
