"""The comparison of methods: its protocol, its table, and what is drawn, once."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, noise, random_unet

from minicache import CachePlan, Diffusion, Recipe, denoise, sample, uncached, uniform
from minicache.checkpoints import embedded_folder, fingerprint, save
from minicache.cost import macs, pass_seconds
from minicache.fit import FINEST, forecast
from minicache.images import save_png, to_uint8
from minicache.metrics import frechet_distance, moments, relative_l2
from minicache.plan import PlanCache
from minicache.samplers import SAMPLERS
from minicache.solver import tabulated
from minicache.tools import calibrate, evaluate
from minicache.tools import methods as rivals
from minicache.tools.calibrate import CALIBRATION, CHECK, HELD_OUT, Task
from minicache.tools.classifier import classifier_features
from minicache.tools.evaluate import Pictures, clock
from minicache.tools.methods import FLOOR, Method, Spectrum, methods, whole_run
from minicache.words import Prompts, Vocabulary


def stored(path: Path, size: int) -> Path:
    """So few timesteps that the reference is soon drawn."""
    unet = random_unet(replace(SMALL, image_size=size, attention_resolutions=(size // 2,)))
    unet.diffusion = Diffusion(num_timesteps=20, beta_end=0.2)
    save(path, unet)
    return path


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    return stored(tmp_path_factory.mktemp("net") / "net.pt", 16)


@pytest.fixture(scope="module")
def net32(tmp_path_factory) -> Path:
    """32 x 32 pixels, as the classifier's features need."""
    return stored(tmp_path_factory.mktemp("net") / "net32.pt", 32)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("real") / "real.npz"
    np.savez(path, arr_0=np.random.RandomState(0).randint(0, 256, (9, 32, 32, 3)).astype(np.uint8))
    return path


def run(*flags) -> None:
    evaluate.main(evaluate.parse([*map(str, flags)]))


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    names, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines())
    return {line[0]: dict(zip(names, line)) for line in lines}


@pytest.fixture(autouse=True)
def short_reference(monkeypatch):
    """There are as few timesteps as the reference has steps; and few rivals."""
    monkeypatch.setattr(calibrate, "FINEST", {**FINEST, "steps": 20})
    monkeypatch.setattr(calibrate, "RIVALS", ("ddim", "plms", "unipc"))
    monkeypatch.setattr(calibrate, "SPACINGS", (None, "rho7"))


@pytest.fixture
def few(monkeypatch):
    """Few methods, one of each kind, and no clock."""
    kinds = ("whole", "deepcache-n5-b3", "linear-n5-b1", "l2p-n5-b1", "spectrum-n5-b1", "uncached-5", FLOOR, "ddpm-5")

    def chosen(*args) -> dict[str, dict[str, Method]]:
        return {name: row for name, row in methods(*args).items() if name in kinds or "-cached-" in name}

    monkeypatch.setattr(evaluate, "methods", chosen)
    monkeypatch.setattr(evaluate, "clock", lambda task: lambda method: method.recipe.plan.steps)
    monkeypatch.setattr(rivals, "CALIBRATION", range(100, 102))


@pytest.fixture(scope="module")
def worded() -> Task:
    """A network that is told what to draw, under guidance."""
    unet = random_unet(replace(SMALL, context_dim=8, num_tokens=4))
    unet.vocabulary = Vocabulary(("red", "apple", "cat"), 3, examples=("red apple", "cat"))
    prompts = Prompts(list(unet.vocabulary.examples), unet.vocabulary.encode(*unet.vocabulary.examples), guidance=3.0)
    return Task(unet, "", prompts)


def of(task: Task, like: str = "ddim-100", budgets=(10, 20), recipes=(), **settings) -> dict[str, dict[str, Method]]:
    return methods(task, whole_run(task, like, **{"spacing": None, "eta": 0.0, **settings}), budgets, recipes)


def only(row: dict[str, Method]) -> Recipe:
    (method,) = row.values()
    return method.recipe


def test_seeds_of_different_purpose_are_different():
    assert len({*CALIBRATION, *CHECK, *HELD_OUT}) == len(CALIBRATION) + len(CHECK) + len(HELD_OUT)


def test_methods_are_those_of_the_papers_and_every_sampler(unet):
    found = of(Task(unet, "", Prompts([])))
    assert only(found["deepcache-n5-b3"]).plan.refresh == tuple(range(0, 100, 5))
    assert only(found["whole"]).plan == uncached(100) and list(found)[-1] == FLOOR
    assert {each.recipe.sampler for each in found["uncached-20"].values()} == {"ddim", "unipc", "plms"}
    assert all(each.recipe.plan == uncached(20) for each in found["uncached-20"].values())
    assert only(found["l2p-n5-b1"]).plan == only(found["linear-n5-b1"]).plan == uniform(100, 5, 1, "linear")
    assert all("/" not in name for row in found.values() for name in row)


def test_branches_that_a_network_lacks_are_left_out():
    found = of(Task(random_unet(replace(SMALL, channel_mult=(1,), attention_resolutions=())), "", Prompts([])))
    branches = {method.recipe.plan.branch for row in found.values() for method in row.values()}
    assert branches == {1} and "deepcache-n5-b1" in found and "deepcache-n5-b3" not in found


def test_guidance_takes_two_passes_a_step(worded):
    found = of(worded)
    assert {each.recipe.plan.steps for each in found["uncached-20"].values()} == {10}
    assert {each.recipe.guidance for row in found.values() for each in row.values()} == {3.0}


def test_of_each_sampler_the_best_spacing_is_listed(worded):
    """On the shortlist's seeds, with their prompts; the nearest first."""
    target, errors = worded.images(calibrate.finest(worded), calibrate.SHORTLIST), {}
    for sampler in calibrate.RIVALS:
        for spacing in (SAMPLERS[sampler].spacing, "rho7"):
            images = worded.images(worded.recipe(uncached(4), sampler, spacing=spacing), calibrate.SHORTLIST)
            errors[sampler, spacing] = relative_l2(images, target).mean().item()
    ranked = sorted(errors, key=errors.get)
    expected = [next(kind for kind in ranked if kind[0] == name) for name in dict.fromkeys(kind[0] for kind in ranked)]
    found = calibrate.nearest(worded, calibrate.off_the_shelf(worded, 4), target)
    assert [(each.sampler, each.spacing) for each in found] == expected and len(found) == 3


@pytest.mark.parametrize("flags", [("ddpm-250", 0.0), ("ddim-100", 1.0)])
def test_samplers_that_draw_noise_are_compared_in_their_own_steps(unet, flags):
    like, eta = flags
    found = of(Task(unet, "", Prompts([])), like, eta=eta)
    sampler, steps = like.split("-")
    assert {(r.recipe.sampler, r.recipe.eta) for row in found.values() for r in row.values()} == {(sampler, eta)}
    assert FLOOR not in found and only(found["whole"]).plan.steps == int(steps)
    assert only(found[f"{sampler}-20"]).plan == uncached(20)


def test_steps_that_somebody_else_has_fixed(unet):
    found = of(Task(unet, "", Prompts([])), "pndm-50")
    assert "pndm-2" not in of(Task(unet, "", Prompts([])), "pndm-50", budgets=[2])  # it takes 3 passes or more
    assert only(found["whole"]).plan.steps == 51 and only(found["deepcache-n3-b1"]).timesteps(unet.diffusion)[0] == 981


def test_recipes_are_named_for_what_they_are(unet, worded):
    t = unet.diffusion.timesteps(10, "rho7")
    solver = replace(tabulated("plms", t, unet.diffusion), name="anything")
    recipes = [
        Recipe(uncached(10), solver), Recipe(CachePlan(10, 1, (0, 2, 4, 6)), solver), Recipe(uncached(20), "plms"),
        Recipe(uniform(100, 5, 1), "ddim"), Recipe(uncached(250), "ddpm"), Recipe(uniform(250, 5, 4), "ddpm"),
        Recipe(uncached(10), solver, guidance=3.0),
    ]  # fmt: skip
    task, shelf = Task(unet, "", Prompts([])), {f"uncached-{budget}" for budget in (10, 20)}

    def names(*args) -> list[str]:
        return [name for name in of(*args[:1], *args[1:], recipes=recipes) if "cached-" in name and name not in shelf]

    assert [name.rpartition("-")[0] for name in names(task)] == [
        "fitted-uncached", "fitted-cached", "plms-uncached", "ddim-cached"]  # fmt: skip
    assert [name.rpartition("-")[0] for name in names(task, "ddpm-250")] == ["ddpm-uncached", "ddpm-cached"]
    assert names(worded) == ["fitted-uncached-20"]


def test_of_two_recipes_of_one_cost_calibration_has_chosen(unet):
    """Not the seeds of the table."""
    solver = tabulated("plms", unet.diffusion.timesteps(10, "rho7"), unet.diffusion)
    recipes = [Recipe(uncached(10), replace(solver, name=name), error=error) for name, error in
               (("none", None), ("worse", 0.2), ("best", 0.1), ("bad", 0.3))]  # fmt: skip
    task = Task(unet, "", Prompts([]))
    [row] = rivals.fitted(task, Recipe(uncached(100), "ddim"), recipes).values()
    assert [method.recipe.sampler.name for method in row.values()] == ["best"]


def test_the_same_run_has_the_same_variance_and_clipping(unet):
    whole = Recipe(uncached(50), "ddpm")
    cached = replace(whole, plan=uniform(50, 5, 1), error=0.1, fingerprint="a")
    assert rivals.same_run(cached, whole)
    for change in ({"variance": "fixed_small"}, {"clip_x0": False}, {"spacing": "trailing"}):
        assert not rivals.same_run(replace(cached, **change), whole)


def test_without_a_ridge_polynomials_are_forecast_exactly(monkeypatch):
    """From as many features on as a polynomial of degree 4 has coefficients."""
    monkeypatch.setattr(Spectrum, "RIDGE", 1e-12)
    plan, y = uniform(21, 2, 1, "linear"), torch.linspace(-1, 1, 21, dtype=torch.float64) ** 3 + 2
    spectrum, linear = Spectrum(plan), PlanCache(plan)
    for i in range(21):
        for features in (spectrum, linear):
            if i in plan.refresh:
                features.keep(i, y[i].reshape(1, 1))
        if i not in plan.refresh and i > 8:
            assert spectrum.stand_in(i).item() == pytest.approx((linear.stand_in(i).item() + y[i].item()) / 2, abs=1e-3)
            assert abs(linear.stand_in(i).item() - y[i].item()) > 4e-3 or i in (9, 11)


def test_alphas_are_learned_on_other_seeds_when_they_are_needed(unet):
    task = Task(unet, "", Prompts([]))
    method = rivals.learned(task, Recipe(uniform(10, 4, 1, "linear"), "ddim"))
    expected = forecast(unet, seeds=CALIBRATION, **method.recipe.settings())
    assert method.cache(method.recipe.plan).plan == expected != method.recipe.plan
    *_, last = denoise(unet, [0], **method.recipe.settings(), cache=method.cache)
    assert torch.equal(last.x, sample(unet, [0], **{**method.recipe.settings(), "plan": expected}))


def test_alphas_of_timesteps_that_quad_repeats_are_zero(unet):
    """Features do not change there, and nothing can be fitted."""
    ts = Diffusion().timesteps(100, "quad")
    assert ts[-4:] == [0, 0, 0, 0]
    plan = CachePlan(100, 1, (0, 96, 98))
    assert forecast(unet, seeds=[0], plan=plan, spacing="quad").alpha[99] == 0


def test_the_clock_knows_every_branch_and_times_it_once(unet, worded, monkeypatch):
    timed = []
    monkeypatch.setattr(evaluate, "pass_seconds", lambda unet, branch=None: timed.append(branch) or (branch or 10.0))
    seconds = clock(Task(unet, "", Prompts([])))
    plans = [*(CachePlan(5, branch, (0, 4)) for branch in (1, 4, 1)), uncached(3)]
    assert [seconds(Method(Recipe(plan))) for plan in plans] == [23.0, 32.0, 23.0, 30.0] and timed == [1, None, 4]
    assert clock(worded)(Method(Recipe(uncached(3)))) == 60.0


def test_a_pass_is_timed_with_a_context_as_long_as_a_prompt(worded, monkeypatch):
    seen, unet = [], worded.unet
    monkeypatch.setattr(unet.D[1], "forward", lambda h, temb, context, own=unet.D[1].forward: (
        seen.append(context.shape) or own(h, temb, context)))  # fmt: skip
    assert pass_seconds(unet, 2, batch=2) > 0 and pass_seconds(unet, batch=2) > 0
    assert {*seen} == {(2, 3, 8)}


def test_table_of_errors(net, tmp_path, few, capsys):
    made_for = fingerprint(evaluate.load(net))
    Recipe(CachePlan(12, 4, (0, 3, 11)), fingerprint=made_for).save(tmp_path / "r" / "x.json")
    flags = ["--like", "ddim-12", "--budgets", 5, "--pairs", 2, "--recipes", tmp_path / "r", "--out", tmp_path / "out"]
    run("--ckpt", net, *flags)
    rows = rows_of(tmp_path / "out" / "table.md")
    cached = [name for name in rows if name.startswith("ddim-cached-")]
    published = ["deepcache-n5-b3", "linear-n5-b1", "l2p-n5-b1", "spectrum-n5-b1"]
    assert list(rows) == ["whole", *published, *cached, "uncached-5", FLOOR] and len(cached) == 1
    unet = evaluate.load(net)
    reference = sample(unet, range(2), sampler="dpm++2m", spacing="rho4", steps=20)
    kinds = [(name, spacing) for name in calibrate.RIVALS for spacing in (SAMPLERS[name].spacing, "rho7")]
    errors = {kind: relative_l2(sample(unet, range(2), sampler=kind[0], spacing=kind[1], steps=5), reference)
              for kind in kinds}  # fmt: skip
    best = min(errors, key=lambda kind: errors[kind].mean())
    shown = rows["uncached-5"]
    assert shown["sampler"] == ", ".join(best)
    for name, value in {"error": errors[best].mean(), "worst": errors[best].max(),
                        "+-": (errors[best][0] - errors[best][1]).abs() / 2}.items():  # fmt: skip
        assert float(shown[name]) == pytest.approx(value.item(), rel=1e-3)
    assert (shown["steps"], shown["in full"], shown["branch"], shown["full passes"]) == ("5", "5", "", "5")
    held = rows["deepcache-n5-b3"]
    assert float(held["GMACs"]) == pytest.approx((3 * macs(unet) + 9 * macs(unet, 3)) / 1e9, rel=1e-3)
    whole, cached_run = (sample(unet, range(2), plan=plan) for plan in (uncached(12), uniform(12, 5, 3)))
    same = "to whole"
    assert float(held[same]) == pytest.approx(relative_l2(cached_run, whole).mean().item(), rel=1e-3)
    sampler, spacing = best
    five = sample(unet, range(2), sampler=sampler, spacing=spacing, steps=5)
    assert float(shown[same]) == pytest.approx(relative_l2(five, whole).mean().item(), rel=1e-3)
    assert rows["whole"][same] == "0" and float(rows[cached[0]][same]) > 0
    assert len({rows[name]["error"] for name in published}) == 4
    assert f"about {2 * (12 * 6 + 3 * 5 + 10) / 3600:.1f} hours" in capsys.readouterr().out
    drawn = {"error.png"} if find_spec("matplotlib") else set()  # an extra
    assert {"table.md", "samples.png", "pairs"} | drawn == {path.name for path in (tmp_path / "out").iterdir()}


def test_a_smaller_network_has_a_row_with_its_own_cost_and_distance(net32, real, tmp_path, few):
    other = random_unet(replace(SMALL, image_size=32, attention_resolutions=(), channel_mult=(1, 1)))
    other.diffusion = Diffusion(num_timesteps=20, beta_end=0.2)
    save(tmp_path / "other.pt", other)
    flags = ["--like", "ddim-12", "--budgets", 5, "--pairs", 2, "--num", 3, "--real", real, "--out", tmp_path / "out"]
    run("--ckpt", net32, *flags, "--smaller", tmp_path / "other.pt")
    row, unet = rows_of(tmp_path / "out" / "table.md")["smaller"], evaluate.load(net32)
    assert float(row["GMACs"]) == pytest.approx(12 * macs(other) / 1e9, rel=1e-3)
    assert float(row["full passes"]) == pytest.approx(12 * macs(other) / macs(unet), rel=1e-3)
    images = np.load(tmp_path / "out" / "smaller.npz")["arr_0"]
    drawn = to_uint8(sample(evaluate.load(tmp_path / "other.pt"), range(3), steps=12))
    assert np.array_equal(images, drawn) and float(row["Frechet distance"]) > 0


def test_a_smaller_network_must_draw_the_same_kind_of_picture(net, net32):
    with pytest.raises(ValueError, match=f"--smaller {net32} has another image_size than --ckpt: 32, not 16"):
        run("--ckpt", net, "--smaller", net32)
    with pytest.raises(ValueError, match=r"takes 0\.\d\d GMACs a pass, not fewer than --ckpt, 0\.\d\d"):
        run("--ckpt", net, "--smaller", net)


def test_prompts_and_guidance(worded, tmp_path, few):
    save(tmp_path / "net.pt", worded.unet)
    (tmp_path / "prompts.txt").write_text("red cat\n" * CHECK.stop + "xylophone\n")  # no seed is for the last one
    flags = ["--ckpt", tmp_path / "net.pt", "--like", "ddim-8", "--budgets", 6, "--pairs", 2, "--out", tmp_path / "out"]
    with pytest.warns(UserWarning, match="of 10025 prompts or classes, only the first 2 are drawn"):
        run(*flags, "--guidance", 2, "--prompts", tmp_path / "prompts.txt")
    rows = rows_of(tmp_path / "out" / "table.md")
    context = worded.unet.vocabulary.encode("red cat")
    settings = {"seeds": range(2), "context": context, "guidance": 2.0}
    whole, cached_run = (sample(worded.unet, **settings, plan=plan) for plan in (uncached(8), uniform(8, 5, 3)))
    shown = rows["deepcache-n5-b3"]["to whole"]
    assert float(shown) == pytest.approx(relative_l2(cached_run, whole).mean().item(), rel=1e-3)
    assert rows["whole"]["full passes"] == "16"
    with pytest.raises(ValueError, match="another prompts"):
        run(*flags, "--guidance", 2)


def test_no_table_is_of_two_networks(net, net32, tmp_path, few, monkeypatch):
    flags = ["--like", "ddpm-6", "--budgets", 4, "--pairs", 2, "--out", tmp_path / "out", "--only"]
    run("--ckpt", net, *flags, "deepcache-n5-b3")
    before = (tmp_path / "out" / "table.md").read_text()
    monkeypatch.setattr(evaluate, "shortlisted", lambda *_: pytest.fail("worked"))
    with pytest.raises(ValueError, match=r"npz was made with weights \w+, not \w+; choose another --out"):
        run("--ckpt", net32, *flags, "linear-n5-b1")
    for change, words in (
        (["--like", "ddpm-7"], "is of no earlier run like this one"),
        (["--spacing", "trailing"], "is of no earlier run like this one"),
        (["--pairs", 3], "num 2, not 3"),
        (["--batch-size", 7], "batch_size 100, not 7"),
        (["--dtype", "bfloat16"], "dtype float32, not bfloat16"),
    ):
        with pytest.raises(ValueError, match=words):
            run("--ckpt", net, *flags, "linear-n5-b1", *change)
    assert (tmp_path / "out" / "table.md").read_text() == before


def test_nothing_is_added_to_the_real_pictures(net32, tmp_path):
    save_png(tmp_path / "real" / "a.png", np.zeros((32, 32, 3), np.uint8))
    for out in (tmp_path / "real", tmp_path / "real" / "out"):
        with pytest.raises(ValueError, match="whose pictures are read"):
            run("--ckpt", net32, "--budgets", 5, "--like", "ddim-5", "--real", tmp_path / "real", "--out", out)
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["a.png"]


def test_distances_are_of_the_same_pictures_and_nothing_is_drawn_twice(net32, real, tmp_path, few, monkeypatch):
    out, drawn = tmp_path / "out", []
    draw = Pictures.draw

    def counted(self, method, seeds):
        drawn.extend((method, seed) for seed in seeds)
        return draw(self, method, seeds)

    monkeypatch.setattr(Pictures, "draw", counted)
    flags = ["--ckpt", net32, "--like", "ddim-8", "--budgets", 5, "--pairs", 3, "--num", 7, "--real", real]
    run(*flags, "--batch-size", 2, "--out", out)
    assert len(drawn) == len(set(drawn))
    pairs = np.load(out / "pairs" / "linear-n5-b1.npz")["arr_0"]
    pictures = np.load(out / "linear-n5-b1.npz")["arr_0"]
    assert pairs.dtype == np.float32 and pictures.dtype == np.uint8 and len(pictures) == 7
    assert np.array_equal(to_uint8(torch.from_numpy(pairs)), pictures[:3])
    rows = rows_of(out / "table.md")
    assert float(rows["whole"]["Frechet distance"]) > 0 and rows[FLOOR]["Frechet distance"] == ""
    drawn.clear()
    run(*flags, "--batch-size", 2, "--out", out)
    again = rows_of(out / "table.md")
    assert not drawn
    for name in rows:
        assert {**rows[name], "speed-up": ""} == {**again[name], "speed-up": ""}
    with pytest.raises(ValueError, match="dtype float32, not bfloat16"):
        run(*flags, "--batch-size", 2, "--out", out, "--dtype", "bfloat16")


def test_auto_is_kept_as_what_was_chosen(net, tmp_path, few, monkeypatch):
    """A set that is begun on another machine would otherwise go on in another dtype."""
    from minicache import placement

    monkeypatch.setattr(placement, "fastest_dtype", lambda device: (torch.float32, ""))
    flags = ["--ckpt", net, "--like", "ddim-5", "--budgets", 5, "--pairs", 2, "--dtype", "auto"]
    run(*flags, "--out", tmp_path / "out")
    monkeypatch.setattr(placement, "fastest_dtype", lambda device: (torch.bfloat16, ""))
    with pytest.raises(ValueError, match="dtype float32, not bfloat16"):
        run(*flags, "--out", tmp_path / "out")


def test_real_images_are_seen_by_inception_once(net32, real, tmp_path, few, inception):
    flags = ["--like", "ddim-5", "--budgets", 5, "--pairs", 2, "--num", 4, "--real", real, "--fid"]
    run("--ckpt", net32, *flags, "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "table.md")
    assert inception == [9, 4, 4, 4, 4, 4, 4] and "FID" in rows["whole"]


def test_chosen_rows_and_the_error_of_a_distance(net32, real, tmp_path, few):
    flags = ["--like", "ddpm-8", "--budgets", 5, "--pairs", 2, "--num", 6, "--sets", 3, "--real", real]
    run("--ckpt", net32, *flags, "--only", "l*-n5-b?", "ddpm-*", "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "table.md")
    assert list(rows) == ["whole", "linear-n5-b1", "l2p-n5-b1", "ddpm-5"]
    pictures = np.load(tmp_path / "out" / "ddpm-5.npz")["arr_0"]
    reals = moments([classifier_features(np.load(real)["arr_0"])])
    parts = np.array([frechet_distance(classifier_features(part), reals) for part in np.split(pictures, 3)])
    assert float(rows["ddpm-5"]["Frechet distance"]) == pytest.approx(parts.mean(), rel=1e-3)
    assert float(rows["ddpm-5"]["Frechet distance +-"]) == pytest.approx(parts.std(ddof=1) / 3**0.5, rel=1e-3)


def test_the_reference_needs_its_timesteps(net32, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "FINEST", FINEST)
    with pytest.raises(ValueError, match="the reference takes 200 timesteps, and the network has 20"):
        run("--ckpt", net32, "--like", "ddim-10", "--budgets", 5, "--out", tmp_path / "out")


def test_other_sizes_than_the_classifiers_need_inception(net, tmp_path, monkeypatch):
    """What is missing is said before the search."""
    monkeypatch.setattr(Task, "images", lambda *_: pytest.fail("searched"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    np.savez(tmp_path / "real.npz", arr_0=to_uint8(noise(9, 3, 16, 16)))
    flags = ["--ckpt", net, "--real", tmp_path / "real.npz", "--like", "ddim-8", "--budgets", 5, "--out", tmp_path]
    with pytest.raises(ValueError, match=r"need \(16, 16, 3\), and --fid if not 32 x 32"):
        run(*flags)
    with pytest.raises(ValueError, match="FID needs torch-fidelity"):
        run(*flags, "--fid")


def test_a_network_of_classes_is_refused(tmp_path):
    save(tmp_path / "net.pt", random_unet(replace(SMALL, context_dim=8, num_tokens=5)))
    with pytest.raises(ValueError, match="takes a context, but no words"):
        run("--ckpt", tmp_path / "net.pt", "--out", tmp_path / "out")


def test_files_of_others_stay(net, tmp_path, few):
    flags = ["--ckpt", net, "--like", "ddim-8", "--budgets", 5, "--pairs", 2, "--only", "linear-*", "--out", tmp_path]
    for name in ("table.md", "error.png", "samples.png"):
        (tmp_path / name).write_bytes(b"| mine |\xff")
        with pytest.raises(ValueError, match=f"{name} exists, and is of no earlier run like this one"):
            run(*flags)
        assert (tmp_path / name).read_bytes() == b"| mine |\xff"
        (tmp_path / name).unlink()
    run(*flags)
    run(*flags)  # over its own
    damaged = next((tmp_path / "pairs").iterdir())
    damaged.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{damaged.name} exists, and nothing tells how it was made"):
        run(*flags)


def test_a_part_of_a_table_replaces_none_that_is_whole(net, tmp_path, few, monkeypatch):
    flags = ["--ckpt", net, "--like", "ddpm-6", "--budgets", 4, "--pairs", 2, "--out", tmp_path, "--only", "linear-*"]

    def interrupted(name, *arguments):
        if name != "whole":
            raise KeyboardInterrupt
        return measured(name, *arguments)

    measured = evaluate.measured
    for begun in (False, True):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluate, "measured", interrupted)
            run(*flags)
        assert len(rows_of(tmp_path / "table.md")) == (2 if begun else 1)
        run(*flags)
        assert len(rows_of(tmp_path / "table.md")) == 2


def test_a_name_with_dollars_is_no_mathematics(net, tmp_path, few):
    pytest.importorskip("matplotlib")
    (tmp_path / "a$b_$c.pt").write_bytes(net.read_bytes())
    flags = ["--like", "ddim-8", "--budgets", 5, "--pairs", 2, "--only", "linear-*", "--out", tmp_path / "out"]
    run("--ckpt", tmp_path / "a$b_$c.pt", *flags)
    assert (tmp_path / "out" / "error.png").exists()


def test_what_is_not_chosen_is_not_searched(net, tmp_path, few, monkeypatch):
    monkeypatch.setattr(Task, "images", lambda *_: pytest.fail("searched"))
    flags = ["--like", "ddim-8", "--budgets", 5, "--pairs", 2, "--only", "linear-*"]
    run("--ckpt", net, *flags, "--out", tmp_path / "out")
    assert list(rows_of(tmp_path / "out" / "table.md")) == ["whole", "linear-n5-b1"]


def test_ancestral_plans(net, tmp_path, few):
    run("--ckpt", net, "--ancestral", 8, "--budgets", 5, "--pairs", 2, "--out", tmp_path)
    rows = rows_of(tmp_path / "table.md")
    assert rows["whole"]["error"] == "0" and float(rows["deepcache-n5-b3"]["error"]) > 0
    assert all(row["sampler"] == "ddpm, uniform" and "uncached" not in "".join(row) for row in rows.values())
    assert float(rows["ddpm-5"]["error"]) > float(rows["deepcache-n5-b3"]["error"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--pairs", "1"], "--pairs 1 must be at least 2"),
        (["--num", "50"], "give --real"),
        (["--sets", "5"], "give --real"),
        (["--sets", "0"], "--sets 0 must be at least 1"),
        (["--real", "REAL", "--num", "64", "--sets", "5"], "--num 64 cannot be parted into 5 equal sets"),
        (["--real", "REAL", "--num", "64", "--sets", "64"], "equal sets of two pictures or more"),
        (
            ["--like", "ddim-10", "--budgets", "5", "--only", "whole", "no-*"],
            "--only no-. fits no row; there are whole, deepcache-n2-b3",
        ),
        (["--fid"], "give --real"),
        (["--recipes", "WEIGHTS"], "--recipes .*recipes holds no recipe for .*, the weights "),
        (["--real", "REAL", "--num", "5"], "--num 5 must be at least 32"),
        (["--real", "SMALL"], "images of .*16, 16, 3.*; need .32, 32, 3"),
        (["--ancestral", "0"], "steps=0 must be a whole number of at least 1"),
        (["--ancestral", "many"], "--like ddpm-many: need a sampler and its steps"),
        (["--like", "euler-50"], "--like euler-50: need a sampler and its steps"),
        (["--like", "dpm++2m-10", "--eta", "1"], "means nothing"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--guidance", "3"], "cannot be told what to draw"),
        (["--like", "ddim-10", "--budgets", "5", "21"], "--budgets 21: rows of 2 to 20 steps cost 2 to 20 full passes"),
        (["--like", "ddim-10", "--budgets", "1"], "--budgets 1: rows of 2 to 20"),
        (["--like", "ddim-10", "--budgets", "1001"], "--budgets 1001: rows of 2 to 20"),
        (["--budgets", "5", "1e400"], "--budgets inf must be at least 0"),
        (["--budgets", "nan"], "--budgets nan must be at least 0"),
        (["--like", "ddim-10", "--budgets", "0.5"], "--budgets 0.5: rows of 2 to 20"),
        (["--like", "ddim-10", "--budgets", "5", "--out", "SMALL"], "small.npz: this folder cannot be made"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn_or_written(net32, real, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(Task, "images", lambda *_: pytest.fail("drawn"))
    np.savez(tmp_path / "small.npz", arr_0=to_uint8(noise(4, 3, 16, 16)))
    paths = {"REAL": real, "SMALL": tmp_path / "small.npz", "WEIGHTS": embedded_folder() / "recipes"}
    flags = [paths.get(flag, flag) for flag in flags]
    with pytest.raises(ValueError, match=words):
        run("--ckpt", net32, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
