"""The laws that the rest of the project stands on."""

import pytest
import torch
from conftest import Recorder, noise, random_unet

from minicache import CachePlan, denoise, nonuniform, sample, uncached, uniform
from minicache.cost import macs, plan_macs
from minicache.samplers import SAMPLERS, passes

BRANCHES = range(1, 5)  # all of SMALL's


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("t", [0, 999, torch.tensor([640]), torch.tensor([3, 500])], ids=str)
def test_partial_pass_equals_full_pass_with_its_own_cache(unet, branch, t):
    x = noise(2, 3, 16, 16)
    eps, cached_U = unet.forward_full(x, t, branch)
    assert torch.equal(unet.forward_partial(x, t, cached_U, branch), eps)
    assert torch.equal(unet(x, t), eps)


@pytest.mark.parametrize("branch", BRANCHES)
def test_partial_pass_depends_on_its_cache_and_on_x(unet, branch):
    x = noise(2, 3, 16, 16)
    eps, cached_U = unet.forward_full(x, 100, branch)
    assert not torch.allclose(unet.forward_partial(x, 100, noise(*cached_U.shape), branch), eps, atol=1e-3)
    assert not torch.allclose(unet.forward_partial(x.flip(0), 100, cached_U, branch), eps, atol=1e-3)


@pytest.mark.parametrize("forecast", ["hold", "linear"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_interval_one_is_uncached(unet, sampler, forecast):
    settings, steps = {"seeds": [1, 2], "sampler": sampler}, passes(7, sampler)
    uncached = sample(unet, steps=7, **settings)
    assert torch.equal(sample(unet, plan=uniform(steps, 1, forecast=forecast), **settings), uncached)
    assert torch.equal(sample(unet, plan=nonuniform(steps, 1, 3, 1.4), **settings), uncached)
    assert not torch.equal(sample(unet, plan=uniform(steps, 3), **settings), uncached)


@pytest.mark.parametrize("branch", BRANCHES)
def test_partial_step_runs_no_block_beyond_its_branch(branch):
    unet, calls = random_unet(), []
    for kind, blocks in (("D", unet.D), ("M", unet.M), ("U", unet.U)):
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, name=(kind, i): calls.append(name))
    plan = uniform(7, 3, branch)
    for step in denoise(unet, [0], plan=plan):
        if step.i in plan.refresh:
            assert len(calls) == len(unet.D) + len(unet.M) + len(unet.U)
        else:
            assert calls == [("D", i) for i in range(branch)] + [("U", i) for i in reversed(range(branch))]
        calls.clear()


def test_plan_costs_what_its_passes_cost(unet):
    plan = nonuniform(10, 3, 4, 1.4, branch=2)
    assert plan_macs(unet, plan) == 4 * macs(unet) + 6 * macs(unet, 2)
    assert plan_macs(unet, uncached(10)) == 10 * macs(unet)


@pytest.mark.parametrize("steps, interval", [(1, 1), (7, 3), (9, 3), (10, 4), (5, 99)])
def test_uniform_plan_refreshes_every_interval(steps, interval):
    refresh = uniform(steps, interval).refresh
    assert refresh == tuple(i for i in range(steps) if i % interval == 0)
    assert len(refresh) == -(-steps // interval)


def test_nothing_leaks_between_calls(unet):
    first = sample(unet, [3, 4], plan=uniform(6, 3))
    sample(unet, [9], plan=uniform(5, 5, branch=1, forecast="linear"), sampler="dpm++2m")
    torch.manual_seed(123)
    assert torch.equal(sample(unet, [3, 4], plan=uniform(6, 3)), first)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_depends_on_its_seed_alone(unet, sampler):
    settings = {"plan": uniform(6, 3), "sampler": sampler, "eta": 0.5 if sampler == "ddim" else 0.0}
    everyone = sample(unet, range(8), **settings)
    for size in (1, 3):
        apart = sample(unet, range(8), batch_size=size, **settings)
        assert (apart - everyone).abs().max() <= 1e-4 * everyone.abs().max()
    assert torch.equal(sample(unet, [5, 5], **settings)[0], sample(unet, [5, 5], **settings)[1])


def test_noise_is_the_same_in_any_batch():
    def states(size: int) -> torch.Tensor:
        unet = Recorder()
        sample(unet, range(8), batch_size=size, sampler="ddpm", steps=4, clip_x0=False)
        steps = [torch.cat(unet.seen[i::4]) for i in range(4)]
        return torch.stack(steps)

    together = states(8)
    assert together[0].std() > 0.9 and not torch.equal(together[1], together[0])
    assert torch.equal(states(1), together) and torch.equal(states(3), together)


def test_linear_forecast_is_a_line_through_the_last_two_refreshes(unet):
    plan = CachePlan(6, 3, (0, 1, 3), (0, 0, 1, 0, 0.5, 1))
    assert uniform(5, 2, forecast="linear").alpha == (0, 0, 0, 0.5, 0)
    assert CachePlan(6, 3, (0, 1, 3)).alpha == (0,) * 6
    features = [step.cached_U for step in denoise(unet, [0], plan=plan)]
    for i, (older, newer) in {2: (0, 1), 4: (1, 3), 5: (1, 3)}.items():
        slope = (features[newer] - features[older]) / (newer - older)
        expected = features[newer] + slope * (i - newer)
        assert torch.allclose(features[i], expected, atol=1e-5)
        assert not torch.allclose(features[i], features[newer], atol=1e-3)


def test_alpha_zero_is_reuse_bit_for_bit(unet):
    held = sample(unet, [0], plan=uniform(7, 3))
    assert torch.equal(sample(unet, [0], plan=CachePlan(7, 3, (0, 3, 6), (0.0,) * 7)), held)
    assert not torch.equal(sample(unet, [0], plan=uniform(7, 3, forecast="linear")), held)
