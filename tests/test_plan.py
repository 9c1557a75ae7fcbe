import json

import numpy as np
import pytest

from minicache import CachePlan, Recipe, nonuniform, uncached, uniform
from minicache.recipe import recipes_in


def test_nonuniform_golden_lists():
    """Eq. 7 with a signed power, worked out by hand or taken from the formula in exact arithmetic."""
    assert nonuniform(100, 5, 15, 1.4).refresh[:6] == (0, 4, 8, 11, 14, 15)
    assert nonuniform(250, 10, 110, 1.2).refresh[9:14] == (94, 102, 108, 114, 121)
    assert nonuniform(10, 5, 0, 2.0).refresh == (0, 2)  # l = 0, sqrt(10) / 2: 10 / 4 = 2.5
    assert nonuniform(12, 4, 6, 1.0).refresh == (0, 4, 8)
    assert nonuniform(50, 10, 50, 2.0).refresh == (0, 18, 32, 42, 48)  # 50 - 2 (5 - i)**2, whole, but not to rounding


@pytest.mark.parametrize("official", [False, True])
def test_nonuniform_lowers_the_power_until_steps_are_distinct(official):
    plan = nonuniform(20, 2, 10, 3.0, official=official)
    assert len(plan.refresh) == len(set(plan.refresh)) == 10 and plan.refresh[0] == 0


@pytest.mark.parametrize("center", [0, 1, 7.5, 19, 20])
@pytest.mark.parametrize("power", [1, 1.2, 3])
@pytest.mark.parametrize("interval", [1, 3, 20, 50])
def test_nonuniform_always_has_as_many_refreshes_as_uniform(center, power, interval):
    plan = nonuniform(20, interval, center, power)
    assert len(plan.refresh) == len(uniform(20, interval).refresh)
    assert nonuniform(1, 5, 0, 1.2).refresh == (0,)
    assert nonuniform(3, 2, 3, 50.0).refresh == (0, 2)  # rounding would say 3, after the last step


def test_nonuniform_is_densest_about_the_center():
    refresh = nonuniform(100, 5, 50, 2.0).refresh
    assert sum(40 <= i < 60 for i in refresh) > 2 * sum(i < 20 for i in refresh)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: uniform(0, 1), "steps=0"),
        (lambda: uniform(10, 0), "interval=0"),
        (lambda: uniform(10, 2.5), "interval=2.5"),
        (lambda: uniform(10, 2, branch=0), "branch=0"),
        (lambda: uniform(10, 2, forecast="cubic"), "forecast='cubic'"),
        (lambda: nonuniform(10, 2, -1, 1.2), "center=-1"),
        (lambda: nonuniform(10, 2, 11, 1.2), "center=11"),
        (lambda: nonuniform(10, 2, 5, 0.5), "power=0.5"),
        (lambda: nonuniform(10, 2, 5, float("nan")), "power=nan"),
        (lambda: nonuniform(10, 2, 5, 1, official=True), "power=1"),
        (lambda: CachePlan(10, 3, ()), "refresh"),
        (lambda: CachePlan(10, 3, (1, 5)), "refresh"),
        (lambda: CachePlan(10, 3, (0, 5, 5)), "refresh"),
        (lambda: CachePlan(10, 3, (0, 10)), "refresh"),
        (lambda: CachePlan(3, 3, (0, 1), (0, 0)), "alpha must be 3"),
        (lambda: CachePlan(3, 3, (0, 1), (0, 1, 0)), r"alpha\[1\]"),
        (lambda: CachePlan(4, 3, (0, 2), (0, 0.5, 0, 1)), r"alpha\[1\]"),
        (lambda: CachePlan(4, 3, (0, 2), (0, 0, 0, float("inf"))), r"in -1000\.\.1000"),
        (lambda: CachePlan(4, 3, (0, 2), (0, 0, 0, float("nan"))), r"in -1000\.\.1000"),
        (lambda: CachePlan(4, 3, (0, 2), (0, 0, 0, 1e308)), r"in -1000\.\.1000"),
    ],
)
def test_wrong_plans_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_plan_is_a_value():
    assert uniform(10, 5) == CachePlan(10, 3, (0, 5)) and hash(uniform(10, 5)) == hash(CachePlan(10, 3, [0, 5]))
    assert (
        uncached(3).refresh == (0, 1, 2) and not uncached(3).forecasts and uniform(10, 3, forecast="linear").forecasts
    )


def test_a_folder_of_recipes_is_asked_for_those_that_fit(tmp_path):
    recipes = [Recipe(uniform(9, 3, 1), "ddim", "trailing", fingerprint=its, start=start)
               for its in (None, "abc", "def") for start in (None, 500)]  # fmt: skip
    for k, recipe in enumerate(recipes):
        recipe.save(tmp_path / f"{k}.json")
    assert recipes_in(tmp_path, "abc") == [recipes[0], recipes[2]]
    assert recipes_in(tmp_path, "abc", start=500) == [recipes[1], recipes[3]]
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere of recipes"):
        recipes_in(tmp_path / "nowhere", "abc")


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)  # as root, who runs many a test, may read all
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError):
        recipes_in(tmp_path, "abc")


def test_a_recipe_is_a_file(tmp_path):
    with pytest.raises(ValueError, match="is no file, but a folder"):
        Recipe.load(tmp_path)


def test_recipe_round_trip(tmp_path):
    recipe = Recipe(uniform(20, 4, 2, "linear"), "dpm++2m", "trailing", fingerprint="abc", error=0.031)
    recipe.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == recipe
    assert recipe.settings("abc")["plan"] == recipe.plan
    with pytest.raises(ValueError, match="made for the weights abc, and these are def"):
        recipe.settings("def")
    assert Recipe(uniform(5, 5)).settings("anything")["sampler"] == "ddim"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        "{}",
        '"text"',
        "null",
        '{"plan": 3}',
        '{"plan": {"steps": 10}}',
        '{"plan": {"steps": 4, "branch": 3, "refresh": [1]}}',
        '{"plan": {"steps": 4, "branch": 3, "refresh": [0]}, "extra": 1}',
        '{"plan": {"steps": 3, "branch": 3, "refresh": [0, 1], "alpha": [0, 0, 1e308]}}',
        '{"plan": {"steps": 3, "branch": 3, "refresh": [0, 1], "alpha": [0, 0, 1' + "0" * 400 + "]}}",
        '{"plan": {"steps": 1, "branch": 3, "refresh": [0]}, "sampler": {"t": [9], "weights": [[1e308]]}}',
        '{"plan": {"steps": 1, "branch": 3, "refresh": [0]}, "sampler": {"t": [1' + "0" * 400 + '], "weights": [[1]]}}',
        "[" * 100_000,
        "[{}]",
        "5",
        '{"plan": {"steps": 1, "branch": 3, "refresh": [0]}, "error": NaN}',
        '{"plan": {"steps": 1, "branch": 3, "refresh": [0]}, "error": -0.1}',
    ],
)
def test_what_is_not_a_recipe_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match="is not a recipe"):
        Recipe.load(tmp_path / "r.json")


def test_recipe_is_json(tmp_path):
    Recipe(uniform(4, 2)).save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["plan"]["refresh"] == [0, 2]


def test_a_recipe_may_hold_numbers_of_numpy(tmp_path):
    steps, two = np.arange(4, 6), np.int64(2)
    recipe = Recipe(uniform(steps[0], two, two), clip_x0=np.True_, error=np.float64(0.5))
    recipe.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == recipe
