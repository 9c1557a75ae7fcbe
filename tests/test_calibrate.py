"""The search for plans: its laws on a random network, and the commands around it."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import random_unet
from minicache.tools.judge import Judge, fit, gauss_newton
from tqdm import tqdm

from minicache import CachePlan, Diffusion, Recipe, denoise, load, uncached, uniform
from minicache.checkpoints import fingerprint, save
from minicache.cost import full_passes, macs, pass_seconds
from minicache.plan import from_refreshes
from minicache.tools import calibrate
from minicache.tools.calibrate import widest
from minicache.tools.evaluate import Benchmark
from sample import main as sample_main
from sample import parse as sample_parse


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    unet = random_unet()
    unet.diffusion = Diffusion(num_timesteps=40, beta_end=0.1)
    path = tmp_path_factory.mktemp("net") / "net.pt"
    save(path, unet)
    return path


def benchmark(net) -> Benchmark:
    unet = load(net)
    return Benchmark(unet, fingerprint(unet))


@pytest.fixture(scope="module")
def calibration(net):
    with torch.no_grad():
        return Judge.on(benchmark(net), range(100, 103))


def test_widest_plan_fits_the_budget(calibration):
    costs = partial(full_passes, calibration.benchmark.unet)
    plan = widest(6.0, costs, 3, 1, 40)
    longer = uniform(plan.steps + 3, 3, 1)
    assert costs(plan) <= 6.0 < costs(longer) and plan.steps - 1 in plan.refresh
    assert widest(1.5, costs, 3, 1, 40) is None


def test_fitted_alphas_are_the_least_squares(calibration):
    """Of the uncached features, so any other alpha forecasts them worse."""
    recipe = Recipe(uniform(10, 4, 2), "dpm++2m", fingerprint=calibration.benchmark.fingerprint)
    plan = fit(calibration, recipe)
    assert plan.refresh == recipe.plan.refresh and plan.forecasts
    Y = [
        step.cached_U
        for step in denoise(calibration.benchmark.unet, calibration.seeds, sampler="dpm++2m", plan=uncached(10, 2))
    ]

    def error(i: int, alpha: float) -> float:
        newer = max(k for k in plan.refresh if k <= i)
        return (Y[i] - Y[newer] - alpha * (Y[newer] - Y[newer - 4])).double().square().sum().item()

    for i in (5, 6, 7, 9):
        assert error(i, plan.alpha[i]) < min(error(i, plan.alpha[i] - 0.01), error(i, plan.alpha[i] + 0.01))
    assert not any(plan.alpha[:5])


def test_gauss_newton_lowers_the_error_of_the_image(calibration):
    recipe = Recipe(uniform(13, 4, 1, "linear"), "ddim", "trailing", fingerprint=calibration.benchmark.fingerprint)
    recipe = calibration.score(recipe)
    better = gauss_newton(calibration, recipe, tqdm(disable=True))
    assert better.error < 0.95 * recipe.error
    assert calibration.score(better).error == pytest.approx(better.error, rel=1e-4)
    assert better.plan.refresh == recipe.plan.refresh
    nothing_to_fit = calibration.score(replace(recipe, plan=uncached(5)))
    assert gauss_newton(calibration, nothing_to_fit, tqdm(disable=True)) == nothing_to_fit


@pytest.mark.parametrize("refresh", [(0, 4, 8, 12), (0, 4, 8, 13, 14)])
def test_alphas_without_effect_stay_as_they_are(calibration, refresh):
    """quad repeats timesteps: such a step has no length, and two refreshes at one timestep have no slope."""
    assert Diffusion(40).timesteps(16, "quad")[-3:] == [0, 0, 0]
    recipe = calibration.score(Recipe(from_refreshes(16, 1, refresh, "linear"), "ddim", "quad"))
    better = gauss_newton(calibration, recipe, tqdm(disable=True))
    assert better.error <= recipe.error and better.plan.alpha[13:15] == recipe.plan.alpha[13:15]
    fitted = fit(calibration, recipe).alpha
    assert any(fitted[5:12]) and (fitted[15] == 0 or 14 not in refresh)


def test_command(net, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "CHECK", range(10, 13))
    monkeypatch.setattr(calibrate, "HELD_OUT", range(3))
    calibrate.main(calibrate.parse(["--ckpt", str(net), "--budget", "4", "5", "--out", str(tmp_path)]))
    out = capsys.readouterr().out
    assert out.count("| ddim, 4 steps") == 1 and "| plms, 5 steps" in out
    for budget in (4, 5):
        recipe = Recipe.load(tmp_path / f"net-{budget}.json")
        unet = load(net)
        assert full_passes(unet, recipe.plan) <= budget and recipe.fingerprint == fingerprint(unet)
        check = Judge.on(benchmark(net), calibrate.CHECK)
        assert check.errors(recipe).mean().item() == pytest.approx(recipe.error, rel=1e-4)
        plms = [check.errors(fewer).mean().item() for fewer in check.benchmark.fewer_steps(budget, ("plms",))]
        assert recipe.error <= max(plms)
    sample_main(sample_parse(["--ckpt", str(net), "--plan", str(tmp_path / "net-4.json"), "--num", "1",
                              "--out", str(tmp_path / "x.png")]))  # fmt: skip
    with pytest.raises(ValueError, match="was made for the weights"):
        sample_main(sample_parse(["--ckpt", "tiny_cifar10", "--plan", str(tmp_path / "net-4.json")]))


def test_interrupted_before_the_check_it_keeps_what_was_found(net, tmp_path, monkeypatch):
    on = Judge.on

    def interrupted(benchmark, seeds, reference):
        if seeds == calibrate.CHECK:
            raise KeyboardInterrupt
        return on(benchmark, range(2), reference)

    monkeypatch.setattr(Judge, "on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate.main(calibrate.parse(["--ckpt", str(net), "--budget", "4", "--out", str(tmp_path / "r.json")]))
    assert full_passes(load(net), Recipe.load(tmp_path / "r.json").plan) <= 4


@pytest.mark.parametrize("unit", ["gmacs", "seconds"])
def test_budgets_in_other_units(net, tmp_path, monkeypatch, unit):
    for seeds in ("CALIBRATION", "CHECK", "HELD_OUT"):
        monkeypatch.setattr(calibrate, seeds, range(2))
    full_pass = pass_seconds(load(net)) if unit == "seconds" else macs(load(net)) / 1e9
    flags = ["--ckpt", str(net), "--unit", unit, "--sampler", "plms", "--out", str(tmp_path / "r.json")]
    calibrate.main(calibrate.parse([*flags, "--budget", str(4 * full_pass)]))
    steps = full_passes(load(net), Recipe.load(tmp_path / "r.json").plan)
    assert steps <= 4 if unit == "gmacs" else steps > 0
    with pytest.raises(ValueError, match=rf"can be planned for 2 to 1000 full passes \(.* to .* {unit}\)"):
        calibrate.main(calibrate.parse([*flags, "--budget", str(0.1 * full_pass)]))


def test_a_plan_that_is_worse_than_fewer_steps_is_not_returned(calibration):
    """Where the search was misled by its few seeds."""
    good, bad = (Recipe(plan, "ddim", "trailing", fingerprint=calibration.benchmark.fingerprint)
                 for plan in (uncached(8), CachePlan(20, 1, (0,))))  # fmt: skip
    found = calibrate.checked(calibration, replace(bad, error=0.0), [replace(good, error=1.0)])
    assert found.plan == good.plan and found.error == pytest.approx(calibration.errors(good).mean().item())


def test_ancestral_sampling_keeps_its_steps(net, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "HELD_OUT", range(2))
    flags = [
        "--ckpt",
        str(net),
        "--sampler",
        "ddpm",
        "--steps",
        "12",
        "--budget",
        "6",
        "--out",
        str(tmp_path / "r.json"),
    ]
    calibrate.main(calibrate.parse(flags))
    recipe = Recipe.load(tmp_path / "r.json")
    assert recipe.sampler == "ddpm" and recipe.plan.steps == 12 and len(recipe.plan.refresh) < 9


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--budget", "1"], "can be planned for 2 to 1000 full passes"),
        (["--budget", "3", "4", "--out", "x.json"], "need a folder"),
        (["--sampler", "ddpm"], "--sampler ddpm needs --steps"),
        (["--steps", "10"], "--sampler auto contradicts --steps"),
        (["--start", "10"], "go together"),
        (["--sampler", "ddim", "--steps", "10", "--budget", "2"], "no plan of 10 steps costs 2"),
    ],
)
def test_bad_input(net, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        calibrate.main(calibrate.parse(["--ckpt", str(net), *flags]))


def test_budget_of_the_command_line(net, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"python -m minicache calibrate --ckpt .*net.pt --budget 7"):
        sample_main(sample_parse(["--ckpt", str(net), "--budget", "7"]))
    for flags in (["--interval", "2"], ["--plan", "x.json"], ["--sampler", "ddim"]):
        with pytest.raises(ValueError, match=f"{flags[0]} contradicts --budget"):
            sample_main(sample_parse(["--ckpt", "tiny_cifar10", "--budget", "7", *flags]))
    flags = ["--ckpt", "tiny_cifar10", "--budget", "9", "--num", "1", "--out", str(tmp_path / "x.png")]
    sample_main(sample_parse(flags))
    shipped = Recipe.load(calibrate.Path(__file__).parent.parent / "weights" / "recipes" / "tiny_cifar10-10.json")
    assert f"{shipped.sampler}, {shipped.plan.steps} steps" in capsys.readouterr().out


def test_shipped_recipes_fit_the_shipped_weights():
    folder = calibrate.Path(__file__).parent.parent / "weights" / "recipes"
    unet = load("tiny_cifar10")
    for budget in (10, 15, 20, 30, 50):
        recipe = Recipe.load(folder / f"tiny_cifar10-{budget}.json")
        assert recipe.fingerprint == fingerprint(unet) and recipe.start is None
        assert 0.8 * budget <= full_passes(unet, recipe.plan) <= budget


def test_recipes_for_noised_images_are_no_recipes_for_noise(net, tmp_path):
    Recipe(CachePlan(4, 1, (0,)), spacing="trailing", start=10).save(tmp_path / "r.json")
    with pytest.raises(ValueError, match="noised to t = 9,"):
        sample_main(sample_parse(["--ckpt", str(net), "--plan", str(tmp_path / "r.json")]))
    with pytest.raises(ValueError, match="start"):
        (tmp_path / "s.json").write_text(json.dumps({"plan": {"steps": 2, "branch": 1, "refresh": [0]}, "start": "x"}))
        Recipe.load(tmp_path / "s.json")
