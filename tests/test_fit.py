"""The fit of a solver: the path that it runs beside, its weights, its timesteps, and the alphas of a cache."""

from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from conftest import SMALL, random_unet, relative

from minicache import CachePlan, Diffusion, denoise, sample, uncached, uniform
from minicache import fit as module
from minicache.fit import FINEST, Forecasting, Path, fitted, forecast, nested, noise_level, search
from minicache.metrics import relative_l2
from minicache.samplers import SAMPLERS
from minicache.sampling import Settings

SEEDS = range(10, 13)


@pytest.fixture(scope="module")
def net():
    return random_unet(replace(SMALL, image_size=8, attention_resolutions=()))


@pytest.fixture(scope="module")
def path(net):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FINEST, "steps", 40)
        return Path(net, seeds=SEEDS)


def error(net, path, sampler, plan) -> float:
    return relative_l2(sample(net, sampler=sampler, plan=plan, **path.where), path.image).mean().item()


def test_the_path_passes_through_the_fine_steps(net, path):
    steps = list(denoise(net, SEEDS, **{**FINEST, "steps": 40}))
    for step, after in pairwise(steps):
        a = net.diffusion.alpha_bar(after.t)
        assert relative(path(noise_level(a)), step.x / a**0.5) < 1e-4
    assert torch.equal(path.image, steps[-1].x) and relative(path(0.0), path.image) < 1e-6
    assert torch.equal(path.norm.flatten(), path.image.flatten(1).norm(dim=1))


def test_between_the_steps_the_path_is_smooth_and_its_slope_is_eps(net, path):
    """dy/ds = eps: at a step, from both sides."""
    k = 20
    s, eps = path.s[k], path.eps[k]
    for h in (1e-3 * (path.s[k - 1] - s), 1e-3 * (path.s[k + 1] - s)):
        assert relative((path(s + h).double() - path(s).double()) / h, eps) < 0.05
    middle = (path.s[k] + path.s[k + 1]) / 2
    chord = (path.y[k] + path.y[k + 1]) / 2
    assert relative(path(middle), chord) < 0.1


def test_a_fit_says_what_its_error_is(net, path):
    for plan in (uncached(5), nested(4, 2)):
        found = fitted(net, path, net.diffusion.timesteps(plan.steps, "rho5"), plan, "mine")
        assert found.solver.name == "mine" and found.plan.refresh == plan.refresh
        assert found.plan.forecasts == (plan != uncached(5))
        assert error(net, path, found.solver, found.plan) == pytest.approx(found.error, rel=1e-3)
        assert [len(row) for row in found.solver.weights] == [*range(1, plan.steps + 1)]


def test_a_fit_weighs_so_many_eps_at_most(net, path):
    found = fitted(net, path, net.diffusion.timesteps(11, "rho5"), uncached(11))
    assert max(map(len, found.solver.weights)) == module.LAGS


def test_each_step_ends_as_near_to_the_path_as_it_can(net, path):
    """Other weights of one step, the steps before it the same: farther from the path there, in parts of the image."""
    t = net.diffusion.timesteps(4, "rho5")
    solver = fitted(net, path, t, uncached(4)).solver

    def distance(weights, j: int) -> float:
        steps = denoise(net, sampler=replace(solver, weights=weights), plan=uncached(4), **path.where)
        a = net.diffusion.alpha_bar(t[j + 1]) if j < 3 else 1.0
        off = next(islice(steps, j, None)).x / a**0.5 - path(noise_level(a))
        return (off / path.norm).double().square().sum().item()

    for j in range(4):
        best = distance(solver.weights, j)
        for k in range(j + 1):
            for change in (-0.05, 0.05):
                rows = [list(row) for row in solver.weights]
                rows[j][k] += change
                assert distance(rows, j) > best * (1 - 1e-5)  # some eps are nearly parallel


def test_a_fit_beats_what_is_on_the_shelf(net, path):
    """On the seeds that it was fitted on, every deterministic sampler with its own spacing."""
    *_, best = search(net, path, uncached(4), 5)
    for name, entry in SAMPLERS.items():
        if entry.noise != "variance":
            assert best.error < error(net, path, name, uncached(4 + entry.twice))


def test_a_search_never_gets_worse(net, path):
    for plan in (uncached(5), nested(5, 2)):
        fits = list(search(net, path, plan, 5))
        errors = [fit.error for fit in fits]
        assert len(fits) > 1 and errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)
        assert all(fit.plan.refresh == plan.refresh and fit.solver.t[0] == 999 for fit in fits)
        t = net.diffusion.timesteps(5, "rho5")
        assert [fits[0].solver.t[i] for i in plan.refresh] == pytest.approx(t, abs=1e-3)


def test_conditional_and_guided(path):
    unet = random_unet(replace(SMALL, image_size=8, attention_resolutions=(), context_dim=16, heads=2, num_tokens=5,
                               pooled_context=True))  # fmt: skip
    asked = {"seeds": range(2), "context": torch.tensor([[1, 2], [3, 0]]), "guidance": 2.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FINEST, "steps", 20)
        path = Path(unet, **asked)
    assert torch.equal(path.image, sample(unet, **{**FINEST, "steps": 20}, **asked))
    plan = nested(4, 2)
    found = fitted(unet, path, unet.diffusion.timesteps(6, "rho5"), plan)
    assert error(unet, path, found.solver, found.plan) == pytest.approx(found.error, rel=1e-3)
    assert [len(row) for row in found.solver.pulls] == [len(row) for row in found.solver.weights]


def test_what_guidance_adds_is_weighed_apart(path):
    """The first step is the least squares over both directions, so that no common weight ends nearer to the path."""
    unet = random_unet(replace(SMALL, image_size=8, attention_resolutions=(), context_dim=16, heads=2, num_tokens=5))
    asked = {"seeds": range(2), "context": torch.tensor([[1, 2], [3, 0]]), "guidance": 3.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FINEST, "steps", 20)
        path = Path(unet, **asked)
    found = fitted(unet, path, [999, 500], uncached(2)).solver
    with torch.no_grad():
        away, towards = (unet.forward_full(path.y[0] * unet.diffusion.alpha_bar(999) ** 0.5, 999, 1, ids)[0]
                         for ids in (torch.zeros_like(asked["context"]), asked["context"]))  # fmt: skip
    s, s_next = (noise_level(unet.diffusion.alpha_bar(t)) for t in (999, 500))
    directions = torch.stack([away + 3 * (towards - away), towards - away]) / path.norm
    needed = (path(s_next) - path.y[0]) / (s_next - s) / path.norm
    expected = torch.linalg.lstsq(directions.flatten(1).T.double(), needed.flatten()[:, None].double()).solution
    assert (*found.weights[0], *found.pulls[0]) == pytest.approx(tuple(expected.flatten().tolist()), rel=1e-3)


def test_a_network_with_dropout_is_fitted(net):
    """It is in evaluation mode; so must be what is wrapped around it."""
    unet = random_unet(replace(net.config, dropout=0.1))
    assert forecast(unet, seeds=[0], plan=uniform(4, 2, 1), sampler="ddim").steps == 4
    with pytest.raises(ValueError, match="training mode"):
        forecast(unet.train(), seeds=[0], plan=uniform(4, 2, 1), sampler="ddim")


def test_nested_plans():
    for full in range(3, 12):
        for partial in range(full - 1):
            plan = nested(full, partial)
            assert len(plan.refresh) == full and plan.steps == full + partial and plan.branch == 1
            assert plan.refresh[1] == 1 and plan.refresh[-1] == plan.steps - 1
            gaps = [b - a - 1 for a, b in zip(plan.refresh[1:], plan.refresh[2:])]
            assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert nested(2, 0) == uncached(2) and nested(4, 2) == CachePlan(6, 1, (0, 1, 3, 5))


class Watched(Forecasting):
    """Keeps, of each partial pass with two features: those, what was needed, and the alpha."""

    def forward_partial(self, x, t, cached_U, branch, context):
        eps = super().forward_partial(x, t, cached_U, branch, context)
        if self.older is not None:
            needed = self.unet.forward_full(x, t, branch, context)[1]
            vars(self).setdefault("kept", []).append((self.older, self.newer, needed, self.alpha[-1]))
        return eps


def test_alphas_are_the_least_squares(net):
    """No forecast is nearer to the features: not those of hold and of linear, and not those beside it."""
    watched, plan = Watched(net), uniform(10, 4, 1)
    list(denoise(watched, SEEDS, plan=plan, sampler="ddim"))
    linear = uniform(10, 4, 1, "linear").alpha
    partial = [i for i in range(5, 10) if i not in plan.refresh]
    assert len(watched.kept) == len(partial) and not any(watched.alpha[:5])
    for i, (older, newer, needed, alpha) in zip(partial, watched.kept):
        errors = [(newer + each * (newer - older) - needed).double().square().sum().item()
                  for each in (alpha, 0.0, linear[i], alpha - 0.01, alpha + 0.01)]  # fmt: skip
        assert errors[0] == min(errors) and errors[0] < errors[1]
        assert alpha == watched.alpha[i] != 0


def test_alphas_of_a_network_in_float16():
    """Its features' squares are beyond float16's numbers."""

    class Half(torch.nn.Module):
        config, diffusion = SMALL, Diffusion()

        def forward_full(self, x, t, branch, context):
            return x, torch.full((1, 8), t, dtype=torch.float16)

        def forward_partial(self, x, t, cached_U, branch, context):
            assert cached_U.dtype == torch.float16
            return x

    network, x = Forecasting(Half()), torch.zeros(1)
    network.forward_full(x, 2000.0, 1, None)
    _, cached_U = network.forward_full(x, 1000.0, 1, None)
    network.forward_partial(x, 500.0, cached_U, 1, None)
    assert network.alpha == [0.0, 0.0, 0.5]


@pytest.mark.parametrize("settings", [{"sampler": "ddim"}, {"sampler": "ddpm"}, {"sampler": "plms"}])
def test_forecasts_are_plans_of_the_same_steps(net, settings):
    plan = uniform(9, 3, 2)
    found = forecast(net, seeds=SEEDS, plan=plan, **settings)
    assert (found.steps, found.refresh, found.branch) == (9, plan.refresh, 2) and found.forecasts
    Settings(found, **settings)
    watched = Forecasting(net)
    *_, last = denoise(watched, SEEDS, plan=plan, **settings)
    assert relative(sample(net, SEEDS, plan=found, **settings), last.x) < 1e-4


def test_two_refreshes_at_one_timestep_have_no_slope(net):
    """quad repeats timesteps."""
    unet = random_unet(net.config)
    unet.diffusion = Diffusion(40)
    assert unet.diffusion.timesteps(16, "quad")[-3:] == [0, 0, 0]
    found = forecast(unet, seeds=[0], plan=CachePlan(16, 1, (0, 4, 8, 13, 14)), sampler="ddim", spacing="quad")
    assert any(found.alpha[5:12]) and found.alpha[15] == 0


def test_a_network_that_says_nothing_can_be_fitted():
    unet = random_unet(replace(SMALL, image_size=8, attention_resolutions=()))
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FINEST, "steps", 10)
        silent = Path(unet, seeds=SEEDS)
    found = fitted(unet, silent, unet.diffusion.timesteps(3, "rho7"), uncached(3))
    assert found.error < 1e-5 and found.solver.weights[2][0] == 1
