"""Solvers, samplers as tables of numbers: what they equal, what they refuse, their way through the loop and JSON."""

import json
from dataclasses import asdict, replace
from math import inf, nan

import pytest
import torch
from conftest import SMALL, Recorder, noise, random_unet, relative

from minicache import CachePlan, Diffusion, Recipe, denoise, sample, uncached, uniform
from minicache.recipe import recipe_from_file
from minicache.samplers import SAMPLERS, Point
from minicache.sampling import Settings
from minicache.solver import Solver, tabulated

DETERMINISTIC = [name for name, entry in SAMPLERS.items() if entry.noise != "variance" and not entry.twice]
SOLVER = Solver((999, 600.5, 200, 3.25), ((1.0,), (1.5, -0.5), (1.0, 0.25, -0.25), (1.0,)))


@pytest.fixture(scope="module")
def conditional():
    return random_unet(replace(SMALL, context_dim=16, heads=2, num_tokens=5, pooled_context=True))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_tabulated_sampler_is_the_sampler(unet, name):
    for spacing in ("uniform", "rho7"):
        expected = sample(unet, range(2), steps=7, sampler=name, spacing=spacing)
        table = tabulated(name, unet.diffusion.timesteps(7, spacing), unet.diffusion)
        assert table.name == name and len(table.t) == 7
        assert relative(sample(unet, range(2), sampler=table, plan=uncached(7)), expected) < 1e-5


def test_known_tables(unet):
    """DDIM's weights are ones, and PLMS' those of Adams and Bashforth; no row is longer than it must be."""
    ts = unet.diffusion.timesteps(5, "trailing")
    for row in tabulated("ddim", ts, unet.diffusion).weights:
        assert row == pytest.approx((1,))
    *_, third, fourth, fifth = tabulated("plms", ts, unet.diffusion).weights
    assert third == pytest.approx((23 / 12, -16 / 12, 5 / 12))
    for row in (fourth, fifth):
        assert row == pytest.approx((55 / 24, -59 / 24, 37 / 24, -9 / 24))
    for row in tabulated("dpm++2m", ts, unet.diffusion).weights:
        assert sum(row) == pytest.approx(1)  # a constant eps is followed exactly


@pytest.mark.parametrize("name", ["ddpm", "pndm"])
def test_some_samplers_are_no_tables(unet, name):
    with pytest.raises(ValueError, match=f"sampler='{name}' is no table of weights"):
        tabulated(name, [900, 500, 100], unet.diffusion)


def test_a_solver_of_ones_is_ddim(unet):
    ones = Solver((900, 500, 100), ((1,),) * 3)
    steps = list(denoise(unet, range(2), sampler=ones, plan=uncached(3)))
    assert [step.t for step in steps] == [900, 500, 100]
    x = noise(2, 3, 16, 16)
    for step, t_next in zip(steps, (500, 100, None)):
        a, a_next = unet.diffusion.alpha_bar(step.t), 1.0 if t_next is None else unet.diffusion.alpha_bar(t_next)
        eps = unet(x := x if step.i else first_noise(range(2)), torch.tensor([step.t]))
        x = (a_next / a) ** 0.5 * (x - (1 - a) ** 0.5 * eps) + (1 - a_next) ** 0.5 * eps
        assert relative(step.x, x) < 1e-5


def first_noise(seeds) -> torch.Tensor:
    return torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def test_the_step_is_the_equation_of_the_docstring(unet):
    """y' = y + (s' - s) sum_k weights[j][k] eps_{j-k}, in float64, with the eps that the loop saw."""
    steps = list(denoise(unet, [3], sampler=SOLVER, plan=uncached(4)))
    a = [unet.diffusion.alpha_bar(t) for t in SOLVER.t] + [1.0]
    s = [((1 - each) / each) ** 0.5 for each in a]
    y = first_noise([3]).double() / a[0] ** 0.5
    for j, row in enumerate(SOLVER.weights):
        y = y + (s[j + 1] - s[j]) * sum(w * steps[j - k].eps.double() for k, w in enumerate(row))
        assert relative(steps[j].x, y * a[j + 1] ** 0.5) < 1e-4


def test_a_pull_is_more_guidance(conditional):
    """eps of guidance g and v pulls are eps of guidance g + v; so they are at any time that the step looks back to."""
    t, context = (900, 500, 100), torch.tensor([[1, 2], [3, 4]])
    asked = {"seeds": range(2), "context": context, "plan": uncached(3)}
    for weights, v in ((((1.0,),) * 3, 1.5), (((1.0,), (1.5, -0.5), (1.5, -0.5)), -0.5)):
        pulls = tuple(tuple(v * w for w in row) for row in weights)
        pulled = sample(conditional, guidance=2.0, sampler=Solver(t, weights, pulls=pulls), **asked)
        guided = sample(conditional, guidance=2.0 + v, sampler=Solver(t, weights), **asked)
        assert relative(pulled, guided) < 1e-5
        assert relative(pulled, sample(conditional, guidance=2.0, sampler=Solver(t, weights), **asked)) > 1e-3


def test_pulls_alone_may_look_back(conditional):
    asked = {"seeds": range(2), "context": torch.tensor([[1, 2]]), "plan": uncached(2), "guidance": 2.0}
    ones, pulls = ((1.0,), (1.0,)), ((0.0,), (0.0, 0.7))
    first, second = denoise(conditional, sampler=Solver((900, 300), ones, pulls=pulls), **asked)
    before = next(denoise(conditional, sampler=Solver((900, 300), ones), **asked))
    assert torch.equal(first.x, before.x)
    x, asked_for = torch.cat([noise(1, 3, 16, 16, seed=seed) for seed in range(2)]), asked["context"].expand(2, 2)
    eps = [conditional.forward_full(x, 900, 1, ids)[0] for ids in (torch.zeros_like(asked_for), asked_for)]
    a = conditional.diffusion.alpha_bar(300)
    expected = (first.x - (1 - a) ** 0.5 * (second.eps + 0.7 * (eps[1] - eps[0]))) / a**0.5
    assert relative(second.x, expected) < 1e-5


def test_the_loop_remembers_as_much_as_the_longest_row_needs():
    assert SOLVER.entry.history == 2 and Solver((9,), ((1,),)).entry.history == 0
    x = torch.ones(1)
    points = [Point(0.5, x, eps * x, x, i=2) for eps in (1.0, 2.0, 4.0)]
    assert SOLVER.step(points[0], points[1:], 1.0).item() == pytest.approx(2**0.5 - (1 + 0.25 * 2 - 0.25 * 4))


@pytest.mark.parametrize(
    "t, weights, words",
    [
        ((9.0, nan), ((1.0,),) * 2, "finite numbers"),
        ((9.0, 5.0), ((1.0,), (inf,)), "finite numbers"),
        ((9.0, "5"), ((1.0,),) * 2, "finite numbers"),
        ((9.0, True), ((1.0,),) * 2, "finite numbers"),
        ((9.0, 5.0), ((1.0,), (None,)), "finite numbers"),
        ((5.0, 9.0), ((1.0,),) * 2, "must fall"),
        ((5.0, 5.0), ((1.0,),) * 2, "must fall"),
        ((5.0, -1.0), ((1.0,),) * 2, "must fall"),
        ((0,), ((1.0,),), "must fall"),
        ((), (), "must fall"),
        ((9.0, 5.0), ((1.0, 0.5), (1.0,)), "of 1 to j \\+ 1"),
        ((9.0, 5.0), ((1.0,), ()), "of 1 to j \\+ 1"),
        ((9.0, 5.0), ((1.0,),), "a row of weights for each"),
        ((9.0, 5.0), ((1.0,),) * 3, "a row of weights for each"),
        (9.0, ((1.0,),), "sequences"),
        ((9.0, 5.0), (1.0, 1.0), "sequences"),
    ],
)
def test_bad_tables_are_refused_in_a_sentence(t, weights, words):
    with pytest.raises(ValueError, match=words) as error:
        Solver(t, weights)
    assert "\n" not in str(error.value)


def test_a_name_is_a_text():
    with pytest.raises(ValueError, match="name=5"):
        Solver((9.0,), ((1.0,),), 5)
    assert str(SOLVER) == "fitted"


@pytest.mark.parametrize("pulls", [((1.0,),), ((1.0, 2.0), (1.0,)), ((inf,), (1.0,)), 5, ((1.0,), 5)])
def test_bad_pulls_are_refused(pulls):
    with pytest.raises(ValueError, match=r"^a solver('s t| of 2 steps)"):
        Solver((900, 500), ((1.0,), (1.0,)), pulls=pulls)


def test_pulls_need_guidance():
    with pytest.raises(ValueError, match="the solver weighs what guidance adds: it needs a guidance other than 1"):
        Settings(uncached(2), Solver((900, 500), ((1.0,), (1.0,)), pulls=((0.0,), (0.1,))))


def test_lists_become_tuples():
    made = Solver([9, 5.5], [[1], [1, 0.5]])
    assert made == Solver((9, 5.5), ((1,), (1, 0.5))) and type(made.t) is tuple and type(made.weights[1]) is tuple
    assert hash(made) == hash(Solver((9, 5.5), ((1,), (1, 0.5))))


def test_recipes_keep_solvers(tmp_path):
    recipe = Recipe(CachePlan(4, 1, (0, 1, 3), (0, 0, 0.5, 0)), SOLVER, guidance=3.0, fingerprint="abc", error=0.01)
    recipe.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == recipe
    pulled = replace(recipe, sampler=replace(SOLVER, pulls=SOLVER.weights), guidance=2.0)
    pulled.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == pulled
    assert recipe.settings("abc")["sampler"] is SOLVER and recipe.spacing is None


@pytest.mark.parametrize(
    "change",
    [
        {"t": [1, 2, 3, 4]},
        {"t": [9, 8]},
        {"t": None},
        {"weights": [[1, 1], [1], [1], [1]]},
        {"weights": 5},
        {"name": 5},
        {"more": 1},
        {"t": [1e999, 8, 7, 6]},
        {"t": [10**400, 8, 7, 6]},
    ],
)
def test_bad_recipes_are_refused(tmp_path, change):
    values = asdict(Recipe(uncached(4), SOLVER))
    values["sampler"] |= change
    (tmp_path / "r.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"r\.json is not a recipe: ") as error:
        Recipe.load(tmp_path / "r.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"spacing": "rho7"}, "spacing='rho7', .*: a solver has timesteps of its own"),
        ({"start": 500}, "start=500: a solver has timesteps of its own"),
        ({"eta": 0.5}, "eta=0.5 means nothing to sampler='fitted'"),
        ({"variance": "fixed_small"}, "variance='fixed_small' means nothing to sampler='fitted'"),
        ({"plan": uncached(5)}, "the solver has 4 steps, and the plan 5"),
    ],
)
def test_settings_that_a_solver_does_not_take(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        Settings(**{"plan": uncached(4), "sampler": SOLVER, **settings})
    assert len(str(error.value)) < 100


def test_the_steps_are_those_of_the_plan(unet):
    assert Settings(uncached(4), SOLVER).steps == 4
    assert Settings(uncached(4), SOLVER).timesteps(unet.diffusion) == list(SOLVER.t)
    with pytest.raises(ValueError, match="the solver has 4 steps, and the plan 50"):
        sample(unet, [0], sampler=SOLVER)
    assert torch.equal(sample(unet, [0], sampler=SOLVER, steps=4), sample(unet, [0], sampler=SOLVER, plan=uncached(4)))


def test_a_solver_for_more_timesteps_than_there_are_is_refused():
    network = Recorder()
    network.diffusion = Diffusion(40)
    with pytest.raises(ValueError, match=r"begins at t = 999, after the last one, 39"):
        sample(network, [0], sampler=SOLVER, plan=uncached(4))
    with pytest.raises(ValueError, match=r"t = 39.5, after the last one, 39"):
        sample(network, [0], sampler=Solver((39.5,), ((1,),)), plan=uncached(1))


def test_interval_1_is_uncached_with_a_solver_too(unet, conditional):
    context = torch.tensor([[1, 2], [3, 0]])
    for net, asked in ((unet, {}), (conditional, {"context": context, "guidance": 3.0})):
        whole = sample(net, range(2), sampler=SOLVER, steps=4, **asked)
        assert torch.equal(whole, sample(net, range(2), sampler=SOLVER, plan=uniform(4, 1, 1), **asked))
        assert relative(sample(net, range(2), sampler=SOLVER, plan=uniform(4, 2, 1), **asked), whole) > 1e-3


def test_a_guided_network_with_a_solver(conditional):
    """Guidance is linear in the two eps, and the solver takes what it gives."""
    context = torch.tensor([[1, 2], [3, 0]])
    steps = list(denoise(conditional, range(2), sampler=SOLVER, plan=uncached(4), context=context, guidance=3.0))
    x, t = first_noise(range(2)), torch.tensor([999])
    away, towards = conditional(x, t, torch.zeros_like(context)), conditional(x, t, context)
    assert relative(steps[0].eps, away + 3 * (towards - away)) < 1e-5
    one = sample(conditional, range(2), sampler=SOLVER, steps=4, context=context)
    assert relative(steps[-1].x, one) > 1e-3
    assert relative(sample(conditional, [1], sampler=SOLVER, steps=4, context=context[1:]), one[1:]) < 1e-5


def test_the_predicted_image_can_be_clipped(unet):
    *_, last = denoise(unet, [0], sampler=SOLVER, steps=4, clip_x0=True)
    assert last.x0.abs().max() <= 1 and last.x.abs().max() <= 1  # the last weights are ones


def test_flags_may_repeat_what_a_recipe_says(tmp_path):
    path = tmp_path / "r.json"
    Recipe(uncached(4), SOLVER, guidance=3.0).save(path)
    assert recipe_from_file(path, steps=4, branch=1, guidance=3.0).sampler == SOLVER
    for flags, words in (
        ({"sampler": "plms"}, "--sampler plms contradicts .*r.json, which has fitted$"),
        ({"steps": 5}, "--steps 5 contradicts .*r.json, which has 4$"),
        ({"spacing": "rho7"}, "--spacing rho7 contradicts"),
        ({"interval": 2}, "--interval contradicts"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe_from_file(path, **flags)
