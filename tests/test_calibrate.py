"""calibrate from end to end on tiny random networks, and sample.py with what it writes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, random_unet

import sample as sample_py
from minicache import CachePlan, Diffusion, Recipe, fit, load, sample, uncached
from minicache.checkpoints import fingerprint, save
from minicache.cost import full_passes
from minicache.fit import FINEST, nested
from minicache.metrics import relative_l2
from minicache.recipe import nearest_recipe
from minicache.solver import Solver
from minicache.tools import calibrate
from minicache.tools import run as run_command
from minicache.words import Vocabulary

TINY = replace(SMALL, image_size=8, attention_resolutions=())
SOLVER = Solver((999, 600.5, 200, 3.25), ((1.0,), (1.5, -0.5), (1.0, 0.25, -0.25), (1.0,)))


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.pt"
    save(path, random_unet(TINY))
    return path


@pytest.fixture(scope="module")
def worded(tmp_path_factory) -> Path:
    unet = random_unet(replace(TINY, context_dim=16, heads=2, num_tokens=5, pooled_context=True))
    unet.vocabulary = Vocabulary(("cat", "face", "heart", "red"), 3, guidance=2.0, examples=("red heart", "cat"))
    path = tmp_path_factory.mktemp("worded") / "worded.pt"
    save(path, unet)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(FINEST, "steps", 12)
    monkeypatch.setattr(fit, "SWEEPS", 1)
    monkeypatch.setattr(calibrate, "RHOS", (5,))
    for name, seeds in (("CALIBRATION", range(100, 102)), ("CHECK", range(102, 104)), ("HELD_OUT", range(2))):
        monkeypatch.setattr(calibrate, name, seeds)


def run(*flags) -> None:
    calibrate.main(calibrate.parse([*map(str, flags)]))


def draw(*flags) -> None:
    sample_py.main(sample_py.parse([*map(str, flags)]))


def test_the_seeds_are_apart(monkeypatch):
    monkeypatch.undo()
    seeds = [*calibrate.CALIBRATION, *calibrate.CHECK, *calibrate.HELD_OUT]
    assert len(set(seeds)) == len(seeds)


def test_an_unconditional_network(net, tmp_path, capsys):
    out, unet = tmp_path / "new" / "r.json", load(net)
    run("--ckpt", net, "--budget", 4, "--out", out)
    recipe = Recipe.load(out)
    assert isinstance(recipe.sampler, Solver) and recipe.plan == uncached(4)
    assert recipe.fingerprint == fingerprint(unet) and recipe.guidance == 1
    reference = sample(unet, calibrate.CHECK, **FINEST)
    error = relative_l2(sample(unet, calibrate.CHECK, **recipe.settings(fingerprint(unet))), reference).mean().item()
    assert recipe.error == pytest.approx(error, rel=1e-3)
    for name in calibrate.RIVALS:
        assert error <= relative_l2(sample(unet, calibrate.CHECK, sampler=name, steps=4), reference).mean().item()
    said = capsys.readouterr().out
    assert "| fitted | 4 full, 0 partial | 4 |" in said and said.count(" +- ") == 3
    fitted, shelf, gain = map(float, re.findall(r"(\S+) \+- ", said))
    assert gain == pytest.approx(fitted - shelf, abs=2e-5)
    assert said.endswith(f"{out}: fitted, 4 steps, 4 in full\n") and [*out.parent.iterdir()] == [out]


def test_several_budgets_into_a_folder_and_a_cache(net, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "CACHED_FROM", 6)
    run("--ckpt", net, "--budget", 3, 6, "--out", tmp_path / "found")
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"net-3.json", "net-6.json"}
    unet = load(net)
    for budget in (3, 6):
        assert full_passes(unet, Recipe.load(tmp_path / "found" / f"net-{budget}.json").plan) <= budget
    assert "| fitted | 5 full, " in capsys.readouterr().out  # the cached one is in the table, chosen or not


def test_what_is_there_is_not_replaced(net, tmp_path):
    """Not even by another recipe of the same cost: the first that a search finds is worse than the last."""
    (tmp_path / "net-4.json").write_text("mine")
    Recipe(uncached(3), fingerprint=fingerprint(load(net))).save(tmp_path / "net-3.json")
    before = [path.read_text() for path in sorted(tmp_path.iterdir())]
    for budgets, words in (((3,), "net-3.json exists"), ((5, 4), "net-4.json exists"), ((6, 6.0000001), "one name in")):
        with pytest.raises(ValueError, match=words):
            run("--ckpt", net, "--budget", *budgets, "--out", tmp_path)
    with pytest.raises(ValueError, match=r"net-3\.json exists"):
        run("--ckpt", net, "--budget", 3, "--out", tmp_path / "net-3.json")
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == before


def test_what_another_process_wrote_meanwhile_is_not_replaced(net, tmp_path, monkeypatch):
    fits = calibrate.fits

    def meanwhile(*arguments):
        for recipe in fits(*arguments):
            (tmp_path / "r.json").write_text("theirs")
            yield recipe

    monkeypatch.setattr(calibrate, "fits", meanwhile)
    with pytest.raises(ValueError, match=r"r\.json exists"):
        run("--ckpt", net, "--budget", 3, "--out", tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text() == "theirs"


def test_a_network_of_words(worded, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("cat face\nred\n" * 52 + "xylophone\n")  # no seed is for the last one
    run("--ckpt", worded, "--budget", 6.5, "--guidance", 3, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "r")
    recipe, unet = Recipe.load(tmp_path / "r" / "worded-g3-6.5.json"), load(worded)
    assert recipe.plan == uncached(3) and recipe.guidance == 3  # two passes a step
    asked = {"context": unet.vocabulary.encode("cat face", "red"), "guidance": 3.0}
    reference = sample(unet, calibrate.CHECK, **FINEST, **asked)
    settings = {**recipe.settings(fingerprint(unet)), **asked}
    error = relative_l2(sample(unet, calibrate.CHECK, **settings), reference).mean().item()
    assert recipe.error == pytest.approx(error, rel=1e-3)
    run("--ckpt", worded, "--budget", 6, "--out", tmp_path / "s.json")
    assert Recipe.load(tmp_path / "s.json").guidance == 2  # what suits the network


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "pndm"])
def test_a_cache_for_a_sampler_and_its_steps(net, tmp_path, capsys, sampler):
    run("--ckpt", net, "--steps", 8, "--sampler", sampler, "--budget", 6, "--out", tmp_path / "r.json")
    recipe, unet = Recipe.load(tmp_path / "r.json"), load(net)
    assert (recipe.sampler, recipe.steps) == (sampler, 8) and full_passes(unet, recipe.plan) <= 6
    whole = sample(unet, calibrate.CHECK, sampler=sampler, steps=8)
    error = relative_l2(sample(unet, calibrate.CHECK, **recipe.settings(fingerprint(unet))), whole).mean().item()
    assert recipe.error == pytest.approx(error, rel=1e-3)
    assert capsys.readouterr().out.count(" +- ") == 5


def test_an_interrupted_search_keeps_the_best(net, tmp_path, monkeypatch):
    """Also where the first fit with a cache is worse than what was found without one."""

    def interrupted(task, path, budget):
        for plan, error in ((uncached(4), 0.1), (uncached(4), 0.05), (nested(4, 2), 0.2)):
            yield task.recipe(plan, "ddim", error=error)
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "fits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--ckpt", net, "--budget", 4, "--out", tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json").error == 0.05


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--budget", "1"], "--budget 1: a sampler can be fitted for 2 to 12 full passes"),
        (["--budget", "nan"], "--budget nan: "),
        (["--budget", "4", "inf", "--out", "folder"], "--budget inf: "),
        (["--budget", "3", "4", "--out", "x.json"], "2 budgets need a folder"),
        (
            ["--budget", "9", "2", "--sampler", "ddim", "--steps", "10", "--out", "folder"],
            "--budget 2: the 10 steps cost at least 2.195 full passes with a cache, and 10 without",
        ),
        (["--budget", "4", "--sampler", "ddim", "--steps", "4"], "--budget 4: the 4 steps cost .*, and 4 without"),
        (["--budget", "nan", "--sampler", "ddim", "--steps", "4"], "--budget nan: "),
        (["--sampler", "plms", "--steps", "1"], "--steps 1 must be"),
        (["--sampler", "ddpm"], "--sampler and --steps go together"),
        (["--steps", "10"], "--sampler and --steps go together"),
        (["--sampler", "ddim", "--steps", "0"], "--steps 0 must be at least 2"),
        (["--sampler", "ddim", "--steps", "1001"], "steps=1001"),
        (["--prompts", "nowhere.txt"], "--prompts: .* cannot be told what to draw"),
        (["--guidance", "3"], "--guidance: .* cannot be told what to draw"),
        (["--budget", "3", "--out", "x.png"], "--out x.png: the ending"),
        (["--budget", "3", "--out", ".json"], "--out .json needs a name"),
    ],
)
def test_bad_flags_write_nothing(net, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        run("--ckpt", net, *flags)
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]


def test_a_long_name_of_a_checkpoint_is_refused_before_the_search(net, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "best_for", lambda *_: pytest.fail("searched"))
    (tmp_path / ("x" * 235 + ".pt")).symlink_to(net)
    with pytest.raises(ValueError, match=r"-4\.json: no file of that name can be written"):
        run("--ckpt", tmp_path / ("x" * 235 + ".pt"), "--budget", 4, "--out", tmp_path / "r")


def test_the_least_budget_that_is_told_is_enough(net, tmp_path):
    flags = ["--ckpt", net, "--sampler", "ddim", "--steps", 2, "--out", tmp_path / "r.json"]
    with pytest.raises(ValueError, match="--budget 1: the 2 steps cost at least") as error:
        run(*flags, "--budget", 1)
    assert not [*tmp_path.iterdir()]
    run(*flags, "--budget", re.search(r"at least ([\d.]+)", str(error.value))[1])
    assert Recipe.load(tmp_path / "r.json").plan.refresh == (0,)


def test_networks_that_cannot_be_fitted(worded, tmp_path):
    unet = load(worded)
    unet.vocabulary = None
    save(tmp_path / "classes.pt", unet)
    with pytest.raises(ValueError, match="takes a context, but no words"):
        run("--ckpt", tmp_path / "classes.pt", "--out", tmp_path / "r.json")
    unet = random_unet(TINY)
    unet.diffusion = Diffusion(10)
    save(tmp_path / "short.pt", unet)
    with pytest.raises(ValueError, match="the reference takes 12 timesteps, and the network has 10"):
        run("--ckpt", tmp_path / "short.pt", "--budget", 4, "--out", tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_an_unknown_file_of_prompts_is_one_sentence_and_exit_code_2(worded, tmp_path, capsys):
    flags = ["--ckpt", worded, "--prompts", "nowhere.txt", "--out", tmp_path / "r.json"]
    with pytest.raises(SystemExit) as ended:
        run_command("calibrate", lambda: run(*flags))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "nowhere.txt: No such file" in said
    assert not [*tmp_path.iterdir()]


def test_sample_draws_by_a_solver(net, tmp_path, capsys):
    unet = load(net)
    recipe = Recipe(CachePlan(4, 1, (0, 1, 3), (0, 0, 0.5, 0)), SOLVER, fingerprint=fingerprint(unet))
    recipe.save(tmp_path / "r.json")
    flags = ["--ckpt", net, "--plan", tmp_path / "r.json", "--num", 3]
    draw(*flags, "--out", tmp_path / "a.npz")
    assert "fitted, 4 steps: 3 in full, 1 at branch 1 of 4" in capsys.readouterr().out
    expected = sample_py.to_uint8(sample(unet, range(3), **recipe.settings(fingerprint(unet))))
    assert np.abs(np.load(tmp_path / "a.npz")["arr_0"].astype(int) - expected).max() <= 1
    draw(*flags, "--out", tmp_path / "a.npz")  # its manifest is this recipe's
    assert "all drawn before" in capsys.readouterr().out
    draw(*flags, "--compare", "--out", tmp_path / "a.png")
    replace(recipe, sampler=replace(SOLVER, t=(999, 600.5, 200, 3.5))).save(tmp_path / "r.json")
    with pytest.raises(ValueError, match="was made with another sampler"):
        draw(*flags, "--out", tmp_path / "a.npz")
    with pytest.raises(ValueError, match="--steps 5 contradicts"):
        draw(*flags, "--steps", 5, "--out", tmp_path / "b.npz")
    replace(recipe, fingerprint="others").save(tmp_path / "r.json")
    with pytest.raises(ValueError, match="was made for the weights others"):
        draw(*flags, "--out", tmp_path / "b.npz")


def test_sample_finds_the_nearest_recipe(worded, tmp_path, monkeypatch, capsys):
    unet = load(worded)
    for steps, name in ((4, "near"), (3, "cheap")):
        solver = Solver(SOLVER.t[:steps], SOLVER.weights[:steps], name)
        Recipe(uncached(steps), solver, guidance=2.0, fingerprint=fingerprint(unet)).save(
            tmp_path / "recipes" / f"{name}.json"
        )
    monkeypatch.setattr("minicache.recipe.embedded_folder", lambda: tmp_path)
    for budget, name in ((8, "near, 4 steps"), (6, "cheap, 3 steps")):  # guidance: two passes a step
        draw("--ckpt", worded, "--budget", budget, "--num", 2, "--out", tmp_path / "x.png")
        assert name in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"the cheapest .* costs 6.0 .* --guidance 2 --budget 4 --out recipe.json"):
        draw("--ckpt", worded, "--budget", 4, "--out", tmp_path / "y.png")
    with pytest.raises(ValueError, match=r"no calibrated plan .* --guidance 3 --budget 8"):
        draw("--ckpt", worded, "--budget", 8, "--guidance", 3, "--out", tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()


def test_nearest_recipe_counts_as_it_is_told(worded):
    unet, recipes = load(worded), [Recipe(uncached(steps)) for steps in (3, 6)]
    cost = lambda guidance: lambda plan: full_passes(unet, plan, guidance)  # noqa: E731
    assert nearest_recipe(recipes, 6, cost(1.0)).steps == 6 and nearest_recipe(recipes, 6, cost(2.0)).steps == 3


def test_the_budget_of_sample_py_stands_alone(net, tmp_path):
    with pytest.raises(ValueError, match=r"calibrate --ckpt .*net.pt --budget 7 --out recipe.json"):
        draw("--ckpt", net, "--budget", 7)
    for flags in (["--interval", "2"], ["--plan", "x.json"], ["--sampler", "ddim"]):
        with pytest.raises(ValueError, match=f"{flags[0]} contradicts --budget"):
            draw("--ckpt", net, "--budget", 7, *flags)


def test_shipped_recipes_fit_the_shipped_weights():
    """Those of an older form, without guidance and with samplers by name, too."""
    for path in (ROOT / "weights" / "recipes").glob("*.json"):
        recipe, unet = Recipe.load(path), load(path.name.split("-")[0])
        assert recipe.fingerprint == fingerprint(unet) and recipe.start is None
        budget = float(path.stem.rsplit("-", 1)[1])
        assert 0.7 * budget <= full_passes(unet, recipe.plan, recipe.guidance) <= 1.0001 * budget


def test_recipes_of_an_older_form_load(tmp_path):
    old = {"plan": {"steps": 4, "branch": 1, "refresh": [0, 2], "alpha": [0.0, 0.0, 0.0, 0.5]}, "sampler": "plms",
           "spacing": "linspace", "eta": 0.0, "variance": None, "start": None, "fingerprint": "a",
           "error": 0.03}  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(old))
    plan = CachePlan(4, 1, (0, 2), (0, 0, 0, 0.5))
    assert Recipe.load(tmp_path / "r.json") == Recipe(plan, "plms", "linspace", fingerprint="a", error=0.03)


def test_recipes_for_noised_images_are_no_recipes_for_noise(net, tmp_path):
    Recipe(CachePlan(4, 1, (0,)), spacing="trailing", start=10).save(tmp_path / "r.json")
    with pytest.raises(ValueError, match="noised to t = 9,"):
        draw("--ckpt", net, "--plan", tmp_path / "r.json")
    with pytest.raises(ValueError, match="start"):
        (tmp_path / "s.json").write_text(json.dumps({"plan": {"steps": 2, "branch": 1, "refresh": [0]}, "start": "x"}))
        Recipe.load(tmp_path / "s.json")
