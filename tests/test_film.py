"""The film: three rows on one clock, their counters, what it weighs, and what it refuses."""

import re
import weakref
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, random_unet
from PIL import Image, ImageSequence

from minicache import Recipe, denoise, load, sample, uncached, uniform
from minicache.checkpoints import save
from minicache.cost import full_passes
from minicache.images import to_uint8
from minicache.tools import film

FLAGS = ["--num", "2", "--steps", "10", "--interval", "2"]  # costs as much as a plan that ships


def main(*flags) -> None:
    film.main(film.parse([*map(str, flags)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The frames of a film of the embedded network tiny_cifar10, and what each was made of."""
    drawn, frame = [], film.frame
    out = tmp_path_factory.mktemp("film") / "new" / "film.gif"
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(film, "frame", lambda *given: drawn.append(given) or frame(*given))
        main("--ckpt", "tiny_cifar10", *FLAGS, "--out", out)
    return out, drawn


def test_every_frame_is_worth_the_same_and_the_cheap_rows_wait(made):
    _, drawn = made
    rows, labels, costs, said = drawn[0][0], drawn[0][1], [given[2] for given in drawn], drawn[0][3]
    assert len(drawn) == film.FRAMES + 1 and labels == ["seed 0", "seed 1"]
    assert costs[0] == 0 and costs[-1] == pytest.approx(10) and np.allclose(np.diff(costs), 0.1)
    assert "each frame is worth 0.1 full passes of the network" in said
    assert [row.name for row in rows] == ["Uncached", "DeepCache", "Best plan"]
    assert [row.what for row in rows][:2] == ["DDIM, 10 steps", "DDIM, 10 steps, 1 in 2 in full"]
    totals = [row.spent[-1] for row in rows]
    assert totals[0] == 10 and totals[1] == pytest.approx(full_passes(load("tiny_cifar10"), uniform(10, 2, 1)))
    assert totals[2] <= 1.25 * totals[1]
    for row in rows:
        assert row.spent[0] == 0 and len(row.spent) == len(row.pictures)
        assert all(a < b for a, b in pairwise(row.spent))


def test_pictures_begin_as_one_noise_and_end_as_sample_draws_them(made):
    rows = made[1][0][0]
    for row in rows:
        assert (row.pictures[0] == rows[0].pictures[0]).all()
    for row, plan in zip(rows, (uniform(10, 1), uniform(10, 2, 1))):
        assert (row.pictures[-1] == to_uint8(sample(load("tiny_cifar10"), range(2), plan=plan))).all()
    near = abs(rows[2].pictures[-1].astype(float) - rows[0].pictures[-1]).mean()
    assert near < 0.2 * abs(rows[0].pictures[0].astype(float) - rows[0].pictures[-1]).mean()


def test_of_a_step_its_picture_alone_is_kept(unet, monkeypatch):
    """All else of many steps would be gigabytes."""
    made, left = [], []

    def watched(*args, **settings):
        for step in denoise(*args, **settings):
            left.append(sum(each() is not None for each in made))
            made.extend(weakref.ref(tensor) for tensor in (step.x, step.eps, step.cached_U))
            yield step

    monkeypatch.setattr(film, "denoise", watched)
    pictures, _ = film.emerging(unet, range(1), plan=uniform(6, 2, 1), guidance=1.0)
    assert len(pictures) == 7 and max(left) <= 4  # the last ones, and the cache


def test_counters_stop_with_the_pictures(made):
    rows, labels, _, said = made[1][0]
    total = rows[1].spent[-1]
    before, at, after, end = (
        np.asarray(film.frame(rows, labels, c, said)) for c in (total - 0.2, total, 10 - 1e-3, 10)
    )
    height = (len(end) - film.BAND - film.BOTTOM) // 3
    middle = slice(film.BAND + height, film.BAND + 2 * height)
    assert (before[middle] != at[middle]).any() and (at[middle] == end[middle]).all()
    first = slice(film.BAND, film.BAND + height)
    assert (after[first] != end[first]).any()


def test_file_is_small_loops_and_rests_at_the_end(made):
    out, drawn = made
    with Image.open(out) as gif:
        frames = [(each.convert("RGB"), each.info["duration"]) for each in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0
    assert len(frames) <= film.FRAMES + 1 and out.stat().st_size < 600_000
    assert frames[-1][1] >= 2000 and sum(each[1] for each in frames) == film.FRAMES * film.MILLISECONDS + film.PAUSE
    shown, meant = np.asarray(frames[-1][0]).astype(int), np.asarray(film.frame(*drawn[-1])).astype(int)
    assert (shown[0, 0] == 255).all() and abs(shown - meant).mean() < 5
    assert [each.name for each in out.parent.iterdir()] == [out.name]


def test_the_film_on_the_landing_page_is_quick_to_load():
    assert (ROOT / "weights" / "film.gif").stat().st_size <= 600_000


def test_prompts_and_a_plan_of_ones_own(tmp_path, monkeypatch):
    """All rows are drawn at the guidance that the plan was fitted for."""
    recipe, out, seen, emerging = tmp_path / "g2.json", tmp_path / "film.gif", [], film.emerging
    Recipe(uniform(4, 1), guidance=2.0, sampler="unipc").save(recipe)
    note = lambda *args, **settings: seen.append(settings["guidance"]) or emerging(*args, **settings)  # noqa: E731
    monkeypatch.setattr(film, "emerging", note)
    flags = ["--prompt", "red apple", "--num", 1, "--steps", 4, "--plan", recipe, "--out", out]
    main(*flags)
    assert out.stat().st_size > 0 and seen == [2.0] * 3
    for given, asked in (([*flags, "--guidance", 7], "7.0"), (["--ckpt", "tiny_cifar10", *flags[2:]], "1.0")):
        with pytest.raises(ValueError, match=rf"--guidance {asked} contradicts .*g2\.json, which has 2\.0"):
            main(*given)
    Recipe(uniform(4, 1), guidance=2.0, fingerprint="another").save(recipe)
    with pytest.raises(ValueError, match="made for the weights another"):
        main("--ckpt", "tiny_cifar10", *flags[2:])
    Recipe(uniform(4, 2, branch=19), guidance=2.0).save(recipe)
    seen.clear()
    with pytest.raises(ValueError, match=r"branch=19 is not in"):
        main(*flags)
    assert not seen


def test_wrong_flags(tmp_path):
    save(tmp_path / "net.pt", random_unet())
    save(tmp_path / "classes.pt", random_unet(replace(SMALL, context_dim=8, num_tokens=5)))
    Recipe(uncached(4), "ddpm").save(tmp_path / "ddpm.json")
    out = tmp_path / "film.gif"
    for flags, words in (
        (["--out", tmp_path / "film.mp4"], "must be .gif"),
        (["--out", tmp_path / "film"], "must be .gif"),
        (["--num", 0], "--num 0 must be at least 1"),
        (["--num", 9], "--num 9 must be at least 1 and at most 8"),
        (["--seed", -1], "--seed -1"),
        (["--steps", 0], "steps=0"),
        (["--interval", 0], "interval=0"),
        (["--branch", 99], "branch"),
        (["--guidance", 4], "no calibrated plan for these weights at guidance 4"),
        (["--prompt", "qwertz"], "has not learned"),
        (["--ckpt", tmp_path / "net.pt"], "no calibrated plan"),
        (["--ckpt", tmp_path / "classes.pt"], "takes a context, but no words"),
        (["--ckpt", "tiny_cifar10", "--steps", 20, "--interval", 20], "the cheapest plan"),
        (["--ckpt", tmp_path / "net.pt", "--plan", tmp_path / "ddpm.json"], "draws noise at each step"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            main("--out", out, *flags)
    assert {path.name for path in tmp_path.iterdir()} == {"net.pt", "classes.pt", "ddpm.json"}
