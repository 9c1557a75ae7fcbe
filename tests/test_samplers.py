"""Spacings against published lists, each step against its equation in numpy, and what a user may ask for."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, Recorder, noise, random_unet, relative

from minicache import CachePlan, Diffusion, denoise, sample, uncached, uniform
from minicache.samplers import (
    SAMPLERS,
    Point,
    adams_bashforth,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    passes,
    predict_x0,
)

ALPHAS_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


@pytest.mark.parametrize(
    "spacing, steps, expected",
    [
        ("uniform", 10, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ("trailing", 10, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        ("linspace", 10, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("uniform", 3, [666, 333, 0]),
        ("uniform", 1000, list(range(999, -1, -1))),
        ("trailing", 1, [999]),
        ("uniform", 2, [500, 0]),
        ("offset", 5, [801, 601, 401, 201, 1]),
        ("offset", 999, list(range(999, 0, -1))),
    ],
)
def test_spacings(spacing, steps, expected):
    assert Diffusion().timesteps(steps, spacing) == expected


def test_quad_spacing_begins_at_800_and_repeats():
    ts = Diffusion().timesteps(100, "quad")
    assert len(ts) == 100 and ts[:3] == [800, 783, 768]
    assert ts[::-1][:10] == [0, 0, 0, 0, 1, 2, 2, 3, 5, 6]
    assert len(set(ts)) == 96


@pytest.mark.parametrize("spacing, steps", [("uniform", 1), ("quad", 1), ("linspace", 1)])
def test_spacing_that_would_begin_at_zero_is_refused(spacing, steps):
    with pytest.raises(ValueError, match="t = 0"):
        Diffusion().timesteps(steps, spacing)


@pytest.mark.parametrize(
    "spacing, f", [("logsnr", np.log), ("rho7", lambda s: s ** (1 / 7)), ("rho2.5", lambda s: s**0.4)]
)
@pytest.mark.parametrize("start", [None, 700])
def test_spacings_in_the_noise(spacing, f, start):
    """f(s) is evenly spaced from t = T - 1 to 0, s = sqrt(1 - abar) / sqrt(abar)."""
    diffusion = Diffusion()
    ts = diffusion.timesteps(9, spacing, start)
    assert (ts[0], ts[-1], len(ts)) == ((start or 1000) - 1, 0, 9) and all(type(t) is int for t in (ts[0], ts[-1]))
    gaps = np.diff([f(math.sqrt(1 / diffusion.alpha_bar(t) - 1)) for t in ts])
    assert np.allclose(gaps, gaps[0], rtol=1e-6) and gaps[0] < 0
    assert diffusion.timesteps(1, spacing, start) == ts[:1]


def test_timestep_is_the_inverse_of_alpha_bar():
    diffusion = Diffusion()
    for t in (0, 0.25, 1, 431.7, 998.5, 999):
        assert diffusion.timestep(diffusion.alpha_bar(t)) == pytest.approx(t, abs=1e-6)


def test_offset_needs_room_for_its_one():
    with pytest.raises(ValueError, match="would begin at t = 1000, after the last one, 999"):
        Diffusion().timesteps(1000, "offset")


@pytest.mark.parametrize("steps, enough", [(334, 333), (350, 333), (501, 500), (999 - 300, 500)])
def test_offset_begins_where_there_is_but_noise(steps, enough):
    """T // S rounds down: 350 steps, 2 apart, would begin at t = 699 of 1000, as though that were pure noise."""
    with pytest.raises(ValueError, match=f"steps={steps} with spacing='offset' begin far below 999: take {enough}"):
        Diffusion().timesteps(steps, "offset")
    assert Diffusion().timesteps(enough, "offset")[0] > 990
    with pytest.raises(ValueError, match=r"steps=1 .* would begin at t = 1, where no noise is left"):
        Diffusion().timesteps(1, "offset")
    assert min(Diffusion().timesteps(S, "offset")[0] for S in range(10, 112)) > 890  # the usual ones are all taken


def test_offset_ends_at_the_noise_of_t_0(unet):
    """x_0 = sqrt(a) x_0 + sqrt(1 - a) eps with a of t = 0, where other spacings end without noise."""
    last = list(denoise(unet, [0], steps=5, spacing="offset"))[-1]
    a = ALPHAS_BAR[0]
    assert relative(last.x, math.sqrt(a) * last.x0 + math.sqrt(1 - a) * last.eps) < 1e-6
    assert relative(last.x, last.x0) > 1e-4


def coefficients(t: int, t_next: int) -> tuple[float, float]:
    return ALPHAS_BAR[t], ALPHAS_BAR[t_next] if t_next >= 0 else 1.0


@pytest.mark.parametrize("t, t_next", [(999, 979), (500, 499), (20, 0), (0, -1)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step(t, t_next, eta):
    a, b = coefficients(t, t_next)
    x0, eps, z = (noise(2, 3, 4, 4, seed=k) for k in range(3))
    sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    expected = np.sqrt(b) * x0.numpy() + np.sqrt(1 - b - sigma**2) * eps.numpy() + sigma * z.numpy()
    np.testing.assert_allclose(ddim_step(Point(a, x0, eps, x0), (), b, eta, z).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t, t_next", [(999, 998), (500, 480), (20, 0), (0, -1)])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_ddpm_step(t, t_next, variance):
    a, b = coefficients(t, t_next)
    x, x0, z = (noise(2, 3, 4, 4, seed=k) for k in range(3))
    beta = 1 - a / b
    mean = np.sqrt(b) * beta / (1 - a) * x0.numpy() + np.sqrt(a / b) * (1 - b) / (1 - a) * x.numpy()
    var = {"fixed_large": beta, "fixed_small": beta * (1 - b) / (1 - a)}[variance] * (t_next >= 0)
    expected = mean + np.sqrt(var) * z.numpy()
    np.testing.assert_allclose(
        ddpm_step(Point(a, x, x, x0), (), b, variance, z).numpy(), expected, rtol=1e-5, atol=1e-6
    )


def test_dpmpp_2m_is_exact_where_x0_is_constant_or_linear_in_lambda():
    """x' = sigma'/sigma x + sigma' * integral of exp(lambda) x0(lambda), done by quadrature."""
    a_last, a, b = 0.1, 0.3, 0.6
    lam = lambda a: 0.5 * math.log(a / (1 - a))  # noqa: E731
    x = torch.tensor([0.7], dtype=torch.float64)

    def exact(x0):
        grid = np.linspace(lam(a), lam(b), 200001)
        values = np.exp(grid) * x0(grid)
        integral = ((values[1:] + values[:-1]) / 2 * np.diff(grid)).sum()
        return math.sqrt((1 - b) / (1 - a)) * x.item() + math.sqrt(1 - b) * integral

    constant = torch.tensor([0.4], dtype=torch.float64)

    def point(a, x0):
        return Point(a, x, x, x0)

    for past in ([], [point(a_last, constant)]):
        got = dpmpp_2m_step(point(a, constant), past, b).item()
        assert got == pytest.approx(exact(lambda grid: 0.4 + 0 * grid), abs=1e-9)

    def line(value):
        return 0.4 + 0.2 * (value - lam(a))

    past = [point(a_last, torch.tensor([line(lam(a_last))], dtype=torch.float64))]
    second_order = dpmpp_2m_step(point(a, constant), past, b).item()
    middle = torch.tensor([line((lam(a) + lam(b)) / 2)], dtype=torch.float64)
    middle = dpmpp_2m_step(point(a, middle), [], b).item()
    assert second_order == pytest.approx(middle, abs=1e-12)  # a line, held at its middle
    assert torch.equal(dpmpp_2m_step(point(a, constant), past, 1.0), constant)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_adams_bashforth_integrates_polynomials_of_its_order(order):
    def f(time):
        return torch.tensor([time**order], dtype=torch.float64)

    got = adams_bashforth([f(0.0), f(-1.0), f(-2.0), f(-3.0)][: order + 1]).item()
    assert got == pytest.approx(1 / (order + 1))


def exact_point(lam: float) -> Point:
    """Where the probability flow of pixels N(0.3, 0.5**2) has led a pixel that began at x_T = 1, in float64."""
    a = 1 / (1 + math.exp(-2 * lam))
    alpha, variance = math.sqrt(a), 0.25 * a + 1 - a
    x = torch.tensor([alpha * 0.3 + math.sqrt(variance)], dtype=torch.float64)
    x0 = 0.3 + alpha * 0.25 / variance * (x - alpha * 0.3)
    return Point(a, x, (x - alpha * x0) / math.sqrt(1 - a), x0)


ORDERS = {
    "ddim": 1,
    "dpm++2m": 2,
    "dpm++3m": 2,
    "unipc": 2,
    "unipc3": 3,
    "deis": 3,
    "deis4": 4,
    "plms2": 2,
    "plms3": 3,
    "plms": 4,
}


def local_error(sampler: str, h: float, corrected: bool) -> float:
    """Of one step to lambda 0, from a past without error: uneven in lambda, or even in s = exp(-lambda) for plms."""
    lams = [-math.log(1 + k * h) for k in range(6)] if "plms" in sampler else [-h * k for k in (0, 1, 1.8, 3.1, 4, 5.2)]
    end, now, *past = map(exact_point, lams)
    history = SAMPLERS[sampler].history
    if corrected:
        x = SAMPLERS[sampler].correct(end._replace(x=None), [now, *past][:history]).x
    else:
        x = SAMPLERS[sampler].step(now, past[:history], end.a)
    return (x - end.x).abs().item()


@pytest.mark.parametrize(
    "sampler, order, corrected",
    [*((name, order, False) for name, order in ORDERS.items()), ("unipc", 3, True), ("unipc3", 4, True)],
)
def test_a_step_has_the_order_of_its_method(sampler, order, corrected):
    """Half the step: an error smaller by 2 ** (order + 1). A corrector adds an order to its predictor's. That of
    DPM-Solver++(3M) is 2, as half of the quadratic term is missing."""
    errors = [local_error(sampler, h, corrected) for h in (0.02, 0.01)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.2)


class Mixture(Recorder):
    """The exact eps of independent pixels, each N(-0.6, 0.2**2) or N(0.6, 0.2**2)."""

    def forward_full(self, x, t, branch, context=None):
        a = self.diffusion.alpha_bar(t.item())
        x, alpha, variance = x.double(), math.sqrt(a), 0.04 * a + 1 - a
        mean = 0.6 * torch.tanh(0.6 * alpha * x / variance)
        x0 = mean + alpha * 0.04 / variance * (x - alpha * mean)
        return ((x - alpha * x0) / math.sqrt(1 - a)).float(), x


def test_multistep_samplers_converge_faster_than_ddim():
    x_T = noise(4, 3, 16, 16)
    limit = sample(Mixture(), x_T=x_T, sampler="unipc", spacing="logsnr", steps=1000)

    def error(sampler, steps):
        return relative(sample(Mixture(), x_T=x_T, sampler=sampler, spacing="rho7", plan=uncached(steps)), limit)

    for sampler in [*ORDERS, "pndm"]:
        if sampler != "ddim":
            assert error(sampler, 80) < min(error(sampler, 40) / 2.8, error("ddim", 80) / 8), sampler


def test_unclipped_fixed_small_ddpm_is_ddim_with_eta_one(unet):
    ddpm = sample(unet, [0, 1], sampler="ddpm", variance="fixed_small", clip_x0=False, steps=20)
    ddim = sample(unet, [0, 1], sampler="ddim", eta=1.0, steps=20)
    assert torch.allclose(ddpm, ddim, atol=1e-4 * ddim.abs().max())


def test_variances_differ_and_clipping_clips(unet):
    large = sample(unet, [0], sampler="ddpm", steps=10, variance="fixed_large")
    small = sample(unet, [0], sampler="ddpm", steps=10, variance="fixed_small")
    assert not torch.equal(large, small)
    for step in denoise(unet, [0], sampler="ddpm", steps=10):
        assert step.x0.abs().max() <= 1
    assert sample(unet, [0], sampler="ddim", steps=10).abs().max() > 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_of_zero_length_change_nothing(unet, sampler):
    before = None
    ts, twice = [*Diffusion().timesteps(100, "quad"), -1], SAMPLERS[sampler].twice
    for step in denoise(unet, [0], sampler=sampler, spacing="quad", plan=uniform(passes(100, sampler), 20, branch=1)):
        if step.i > twice and step.t == ts[step.i - twice + 1]:
            assert torch.equal(step.x, before)
        before = step.x
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_land_on_the_image_that_a_perfect_network_sees(unet, sampler):
    """A network that always knows eps exactly makes every sampler return that image."""

    class Oracle(type(unet)):
        def forward_full(self, x, t, branch=3, context=None):
            a = torch.tensor(Diffusion().alpha_bar(t.item()))
            return ((x - a.sqrt() * image) / (1 - a).sqrt()).float(), x

    image = noise(1, 3, 16, 16, seed=5).clamp(-1, 1)
    oracle = Oracle(unet.config)
    oracle.diffusion = Diffusion()
    settings = {"spacing": "uniform"} if SAMPLERS[sampler].spacing == "offset" else {}  # which ends with some noise
    assert torch.allclose(sample(oracle, [0], sampler=sampler, steps=10, **settings), image, atol=2e-3)


class Wave(Recorder):
    """eps = sin(t) x: it changes from step to step, as the multistep samplers must notice."""

    def forward_full(self, x, t, branch, context=None):
        return x * math.sin(t.item()), x


def reference(sampler: str, x: np.ndarray, ts: list[int]) -> np.ndarray:
    """The loops of PLMS (Liu et al. 2022) and DPM-Solver++(2M) (Lu et al. 2022) in float64 numpy, for Wave."""
    past_eps, past_x0, past_lam = [], None, None
    for t, t_next in zip(ts, [*ts[1:], -1]):
        a, b = coefficients(t, t_next)
        eps = x * math.sin(t)
        lam = 0.5 * math.log(a / (1 - a))
        if sampler == "plms":
            order = min(len(past_eps), 3)
            weights = [[1], [3, -1], [23, -16, 5], [55, -59, 37, -9]][order]
            combined = sum(w * e for w, e in zip(weights, [eps, *past_eps])) / [1, 2, 12, 24][order]
            past_eps = [eps, *past_eps]
            x0 = (x - math.sqrt(1 - a) * combined) / math.sqrt(a)
            x = math.sqrt(b) * x0 + math.sqrt(1 - b) * combined
        else:
            x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            if t_next < 0:
                return x0
            h = 0.5 * math.log(b / (1 - b)) - lam
            slope = 0 if past_x0 is None else (x0 - past_x0) / (lam - past_lam)
            x = math.sqrt((1 - b) / (1 - a)) * x - math.sqrt(b) * math.expm1(-h) * (x0 + slope * h / 2)
            past_x0, past_lam = x0, lam
    return x


@pytest.mark.parametrize("sampler", ["plms", "dpm++2m"])
def test_multistep_loops(sampler):
    x_T = noise(1, 3, 16, 16, seed=2)
    got = sample(Wave(), x_T=x_T, sampler=sampler, steps=12, spacing="uniform")
    expected = reference(sampler, x_T.double().numpy(), Diffusion().timesteps(12))
    assert relative(got, expected) < 1e-5
    assert relative(sample(Wave(), x_T=x_T, steps=12), expected) > 1e-2  # and not DDIM


def test_noise_ignores_the_defaults_of_the_process(unet):
    before = sample(unet, [0], steps=2)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(sample(unet, [0], steps=2), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_checkpoint_s_own_variance_is_used(unet):
    own = random_unet()
    own.diffusion = Diffusion(variance="fixed_small")
    drawn = sample(own, [0], sampler="ddpm", steps=5)
    assert torch.equal(drawn, sample(unet, [0], sampler="ddpm", steps=5, variance="fixed_small"))
    assert not torch.equal(drawn, sample(unet, [0], sampler="ddpm", steps=5))


def test_dropout_in_training_mode_is_refused():
    unet = random_unet(replace(SMALL, dropout=0.5)).train()
    with pytest.raises(ValueError, match="eval"):
        sample(unet, [0], steps=2)


def test_x_T_and_seeds(unet):
    x_T = noise(2, 3, 16, 16, seed=9)
    assert torch.equal(sample(unet, x_T=x_T, steps=4), sample(unet, [7, 8], x_T=x_T, steps=4))
    own = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])
    assert torch.equal(
        sample(unet, [7, 8], sampler="ddpm", steps=4), sample(unet, [7, 8], x_T=own, sampler="ddpm", steps=4)
    )
    assert sample(unet, x_T=x_T, steps=4, batch_size=1).shape == x_T.shape


def test_steps_tell_what_happened(unet):
    plan = uniform(5, 2, branch=2)
    steps = list(denoise(unet, [0, 1], plan=plan))
    assert [step.i for step in steps] == [0, 1, 2, 3, 4] and [step.t for step in steps] == [800, 600, 400, 200, 0]
    assert torch.equal(steps[0].cached_U, steps[1].cached_U) and not torch.equal(steps[1].cached_U, steps[2].cached_U)
    assert torch.equal(steps[-1].x, steps[-1].x0) and torch.equal(steps[-1].x, sample(unet, [0, 1], plan=plan))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"sampler": "euler"}, "sampler='euler'"),
        ({"variance": "fixed_small"}, "variance='fixed_small' means nothing to sampler='ddim'"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta=0.5 means nothing to sampler='ddpm'"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"guidance": float("inf")}, "guidance=inf"),
        ({"guidance": 2.0}, "guidance=2.0 and a negative context need a context"),
        ({"context": torch.zeros(1, 4, 8)}, "need None"),
        ({"context": torch.zeros(3, 4, 8)}, "a row for each of the 1 images"),
        ({"start": 700, "spacing": "trailing"}, "start=700 needs x_T"),
        ({"start": -3, "x_T": noise(1, 3, 16, 16)}, "start=-3"),
        ({"start": 700, "x_T": noise(1, 3, 16, 16), "steps": 10}, "does not begin at t = 699"),
        ({"start": 700, "x_T": noise(1, 3, 16, 16), "steps": 10, "spacing": "quad"}, "does not begin at t = 699"),
        ({"spacing": "cubic"}, "spacing='cubic' is none of uniform, .*, logsnr, rho0.5 to rho100"),
        ({"spacing": "rho0.4"}, "spacing='rho0.4'"),
        ({"spacing": "rho101"}, "spacing='rho101'"),
        ({"spacing": "rho-3"}, "spacing='rho-3'"),
        ({"spacing": "rho"}, "spacing='rho'"),
        ({"spacing": 7}, "spacing=7 is none"),
        ({"eta": -1.0}, "eta=-1.0"),
        ({"eta": 0.5, "sampler": "dpm++2m"}, "eta=0.5"),
        ({"variance": "learned"}, "variance='learned'"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1001}, "steps=1001"),
        ({"steps": 10, "plan": uniform(5, 2)}, "contradicts"),
        ({"seeds": None}, "seeds are needed"),
        ({"seeds": []}, "0 seeds"),
        ({"seeds": [0, 2**32]}, "the seed 4294967296 must be at least 0 and at most 4294967295"),
        ({"seeds": [-1]}, "the seed -1 must be"),
        ({"seeds": None, "x_T": noise(1, 3, 16, 16), "sampler": "ddpm"}, "seeds are needed"),
        ({"x_T": noise(2, 3, 16, 16)}, "1 seeds for 2"),
        ({"x_T": noise(1, 3, 8, 8)}, "x_T has shape"),
        ({"plan": CachePlan(4, 99, (0,))}, "branch=99"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -1}, "batch_size=-1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_use_is_refused(unet, settings, words):
    with pytest.raises(ValueError, match=words):
        sample(unet, **{"seeds": [0], **settings})


def test_each_sampler_has_its_own_spacing_and_clipping(unet):
    for name, t in [("ddim", 900), ("ddpm", 900), ("pndm", 901), ("plms", 999), ("unipc3", 999)]:
        assert next(iter(denoise(unet, [0], sampler=name, steps=10))).t == t
    own, same, other = (sample(unet, [0], sampler="dpm++2m", steps=5, spacing=name) for name in (None, "rho7", "rho3"))
    assert torch.equal(own, same) and not torch.equal(own, other)
    assert {name for name, sampler in SAMPLERS.items() if sampler.clip_x0} == {"ddpm"}


def test_pndm_takes_its_first_step_twice(unet):
    """So its plan has one step more than there are timesteps, and the second of each is visited twice."""
    steps = list(denoise(unet, [0], sampler="pndm", steps=5))
    assert [step.t for step in steps] == [801, 601, 601, 401, 201, 1]
    assert torch.equal(sample(unet, [0], sampler="pndm", plan=uncached(6), steps=5), steps[-1].x)
    a, b = (Diffusion().alpha_bar(t) for t in (801, 601))
    eps = (steps[0].eps + steps[1].eps) / 2
    again = math.sqrt(b) * predict_x0(noise(1, 3, 16, 16), eps, a) + math.sqrt(1 - b) * eps
    assert relative(steps[1].x, again) < 1e-5
    with pytest.raises(ValueError, match="contradicts the plan, which has 5"):
        sample(unet, [0], sampler="pndm", plan=uncached(6), steps=6)
    with pytest.raises(ValueError, match="needs 2 timesteps or more"):
        sample(unet, [0], sampler="pndm", steps=1)


def test_a_network_that_does_not_say_how_it_was_trained_is_refused():
    unet = random_unet()
    unet.diffusion = None
    with pytest.raises(ValueError, match="does not say how it was trained"):
        sample(unet, [0], steps=2)


def test_noised_images_begin_where_their_noise_is(unet):
    """With start = 700 the network is asked about t = 699 first."""
    x_T = noise(1, 3, 16, 16)
    steps = list(denoise(unet, x_T=x_T, start=700, steps=7, spacing="trailing"))
    assert [step.t for step in steps] == [699, 599, 499, 399, 299, 199, 99]


def test_clipping_with_plms_clips_the_image_that_it_steps_to(unet):
    assert sample(unet, [0], sampler="plms", steps=6, clip_x0=True).abs().max() <= 1


def test_predict_x0_solves_eq_4():
    x0, eps = noise(1, 3, 4, 4), noise(1, 3, 4, 4, seed=1)
    x = math.sqrt(0.3) * x0 + math.sqrt(0.7) * eps
    assert torch.allclose(predict_x0(x, eps, 0.3), x0, atol=1e-5)
    assert torch.equal(predict_x0(x, eps, 0.3, clip=True), predict_x0(x, eps, 0.3).clamp(-1, 1))
