"""The comparison of methods: its protocol, its table, and what is drawn, once."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, noise, random_unet

from minicache import CachePlan, Diffusion, Recipe, sample, uncached
from minicache.checkpoints import fingerprint, save
from minicache.cost import macs
from minicache.data import shapes
from minicache.images import to_uint8
from minicache.metrics import relative_l2
from minicache.tools import evaluate
from minicache.tools.calibrate import CALIBRATION, CHECK
from minicache.tools.evaluate import FLOOR, HELD_OUT, Benchmark, clock


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    """32 x 32 pixels, as the classifier's features need, and so few timesteps that the reference is soon drawn."""
    unet = random_unet(replace(SMALL, image_size=32, attention_resolutions=(16,)))
    unet.diffusion = Diffusion(num_timesteps=20, beta_end=0.2)
    path = tmp_path_factory.mktemp("net") / "net.pt"
    save(path, unet)
    return path


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


@pytest.fixture
def few(monkeypatch):
    """Few methods, one of each kind, and no clock."""
    methods = evaluate.methods
    kinds = ("ddim-20", "deepcache-n5-b3", "linear-n5-b1", "plms-5", FLOOR, "ddpm-8")

    def chosen(*args) -> dict[str, list[Recipe]]:
        return {name: recipes for name, recipes in methods(*args).items() if name in kinds or "calibrated" in name}

    monkeypatch.setattr(evaluate, "methods", chosen)
    monkeypatch.setattr(evaluate, "clock", lambda unet: lambda plan: plan.steps)


def test_protocol(unet):
    assert len({*CALIBRATION, *CHECK, *HELD_OUT}) == len(CALIBRATION) + len(CHECK) + len(HELD_OUT)
    unet.diffusion = Diffusion(num_timesteps=20)
    try:
        pure = Benchmark(unet, "")
        reference = pure.images(pure.finest, [3, 4])
        assert torch.equal(reference, sample(unet, [3, 4], sampler="dpm++2m", steps=20, spacing="trailing"))
        recipes = pure.fewer_steps(20, ("dpm++2m", "ddim"))
        exact, *others = (relative_l2(pure.images(recipe, [3, 4]), reference) for recipe in recipes)
        assert len(others) == 7 and min(error.max() for error in [exact, *others]) == 0
        begun = Benchmark(unet, "", 10, lambda n, generator: shapes(n, 16, generator))
        assert torch.equal(begun.x_T([3, 4])[1:], begun.x_T([4]))
        assert begun.finest.plan.steps == 10 and pure.x_T([3]) is None
        assert {recipe.spacing for recipe in begun.fewer_steps(5)} == {"trailing", "linspace"}
        assert all(recipe.start == 10 for recipe in begun.fewer_steps(5))
        with pytest.raises(ValueError, match="go together"):
            Benchmark(unet, "", 10)
    finally:
        unet.diffusion = Diffusion()


def test_methods_are_those_of_the_paper_and_more(unet):
    found = evaluate.methods(evaluate.parse([]), Benchmark(unet, ""), [])
    assert found["deepcache-n5-b3"][0].plan.refresh == tuple(range(0, 100, 5))
    assert found["ddim-100"][0].plan == uncached(100)
    assert {recipe.spacing for recipe in found["plms-20"]} == {"uniform", "quad", "trailing", "linspace"}
    assert all("/" not in name for name in found) and list(found)[-1] == FLOOR
    ancestral = evaluate.methods(evaluate.parse(["--ancestral", "250"]), Benchmark(unet, ""), [])
    assert {(recipe.sampler, recipe.plan.steps) for recipes in ancestral.values() for recipe in recipes} == {
        ("ddpm", 250)
    }
    mine = [Recipe(uncached(250), "ddpm"), Recipe(uncached(50), "ddpm"), Recipe(uncached(20), "plms")]
    for flags, name in (([], "calibrated-20"), (["--ancestral", "250"], "calibrated-250")):
        found = evaluate.methods(evaluate.parse(flags), Benchmark(unet, ""), mine)
        assert [each for each in found if each.startswith("calibrated")] == [name]


def test_the_clock_knows_every_branch_and_times_it_once(unet, monkeypatch):
    timed = []
    monkeypatch.setattr(evaluate, "pass_seconds", lambda unet, branch=None: timed.append(branch) or (branch or 10.0))
    seconds = clock(unet)
    assert [seconds(CachePlan(5, branch, (0, 4))) for branch in (1, 4, 1)] == [23.0, 32.0, 23.0]
    assert seconds(uncached(3)) == 30.0 and timed == [None, 1, 4]


def test_table_of_errors(net, tmp_path, few, capsys):
    Recipe(CachePlan(12, 4, (0, 3, 11)), "ddim", fingerprint=fingerprint(evaluate.load(net))).save(
        tmp_path / "r" / "x.json"
    )
    run("--ckpt", net, "--budgets", 5, "--pairs", 2, "--recipes", tmp_path / "r", "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "table.md")
    assert list(rows) == [
        "ddim-20",
        "deepcache-n5-b3",
        "linear-n5-b1",
        *(n for n in rows if "calib" in n),
        "plms-5",
        FLOOR,
    ]
    unet = evaluate.load(net)
    reference = sample(unet, range(2), sampler="dpm++2m", spacing="trailing", plan=uncached(20))
    spacings = [relative_l2(sample(unet, range(2), sampler="plms", spacing=spacing, steps=5), reference)
                for spacing in ("uniform", "quad", "trailing", "linspace")]  # fmt: skip
    best = min(spacings, key=lambda errors: errors.mean())
    shown = rows["plms-5"]
    assert float(shown["error"]) == pytest.approx(best.mean().item(), rel=1e-3)
    assert float(shown["worst"]) == pytest.approx(best.max().item(), rel=1e-3)
    assert (shown["steps"], shown["in full"], shown["branch"], shown["full passes"]) == ("5", "5", "", "5")
    assert float(rows["deepcache-n5-b3"]["GMACs"]) == pytest.approx(
        (4 * macs(unet) + 16 * macs(unet, 3)) / 1e9, rel=1e-3
    )
    assert f"about {2 * (20 + 20 + 20 + 20 + 12 + 4 * 5 + 10) / 3600:.1f} hours" in capsys.readouterr().out
    drawn = {"error.png"} if find_spec("matplotlib") else set()  # an extra
    assert {"table.md", "samples.png", "pairs"} | drawn == {path.name for path in (tmp_path / "out").iterdir()}


def test_distances_are_of_the_same_pictures_and_nothing_is_drawn_twice(net, real, tmp_path, few, monkeypatch):
    out, drawn = tmp_path / "out", []
    images = Benchmark.images

    def counted(self, recipe, seeds):
        drawn.extend((recipe.plan, recipe.sampler, recipe.spacing, seed) for seed in seeds)
        return images(self, recipe, seeds)

    monkeypatch.setattr(Benchmark, "images", counted)
    flags = ["--ckpt", net, "--budgets", 5, "--pairs", 3, "--num", 7, "--real", real, "--batch-size", 2, "--out", out]
    run(*flags)
    assert len(drawn) == len(set(drawn))
    pairs = np.load(out / "pairs" / "linear-n5-b1-0.npz")["arr_0"]
    pictures = np.load(out / "linear-n5-b1.npz")["arr_0"]
    assert pairs.dtype == np.float32 and pictures.dtype == np.uint8 and len(pictures) == 7
    assert np.array_equal(to_uint8(torch.from_numpy(pairs)), pictures[:3])
    rows = rows_of(out / "table.md")
    assert float(rows["ddim-20"]["Frechet distance"]) > 0 and rows[FLOOR]["Frechet distance"] == ""
    drawn.clear()
    run(*flags)
    again = rows_of(out / "table.md")
    assert not drawn
    for name in rows:
        assert {**rows[name], "speed-up": ""} == {**again[name], "speed-up": ""}
    with pytest.raises(ValueError, match="dtype float32, not bfloat16"):
        run(*flags, "--dtype", "bfloat16")


def test_auto_is_kept_as_what_was_chosen(net, tmp_path, few, monkeypatch):
    """A set that is begun on another machine would otherwise go on in another dtype."""
    from minicache import placement

    monkeypatch.setattr(placement, "fastest_dtype", lambda device: (torch.float32, ""))
    flags = ["--ckpt", net, "--budgets", 5, "--pairs", 2, "--dtype", "auto", "--out", tmp_path / "out"]
    run(*flags)
    monkeypatch.setattr(placement, "fastest_dtype", lambda device: (torch.bfloat16, ""))
    with pytest.raises(ValueError, match="dtype float32, not bfloat16"):
        run(*flags)


def test_real_images_are_seen_by_inception_once(net, real, tmp_path, few, inception):
    run("--ckpt", net, "--budgets", 5, "--pairs", 2, "--num", 4, "--real", real, "--fid", "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "table.md")
    assert inception == [9, 4, 4, 4, 4] and "FID" in rows["ddim-20"]


def test_ancestral_plans(net, tmp_path, few):
    run("--ckpt", net, "--ancestral", 8, "--pairs", 2, "--out", tmp_path)
    rows = rows_of(tmp_path / "table.md")
    assert rows["ddpm-8"]["error"] == "0" and float(rows["deepcache-n5-b3"]["error"]) > 0
    assert all(row["sampler"] == "ddpm, uniform" for row in rows.values())


def test_from_noised_images(net, tmp_path, few):
    run("--ckpt", net, "--data", "shapes", "--start", 10, "--budgets", 5, "--pairs", 2, "--out", tmp_path)
    rows = rows_of(tmp_path / "table.md")
    assert rows["plms-5"]["sampler"] in ("plms, trailing", "plms, linspace")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--pairs", "1"], "--pairs 1 must be at least 2"),
        (["--num", "50"], "give --real"),
        (["--fid"], "give --real"),
        (["--real", "REAL", "--num", "5"], "--num 5 must be at least 32"),
        (["--real", "SMALL"], "images of .*16, 16, 3.*; need .32, 32, 3"),
        (["--ancestral", "0"], "--ancestral 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--start", "10"], "go together"),
        (["--data", "shapes", "--start", "10", "--spacing", "quad"], "spacing=.quad. does not begin at start - 1"),
        (["--budgets", "5", "50"], "steps=50 is not in 1..20"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(net, real, tmp_path, flags, words):
    np.savez(tmp_path / "small.npz", arr_0=to_uint8(noise(4, 3, 16, 16)))
    flags = [{"REAL": real, "SMALL": tmp_path / "small.npz"}.get(flag, flag) for flag in flags]
    with pytest.raises(ValueError, match=words):
        run("--ckpt", net, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
