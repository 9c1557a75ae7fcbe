"""The command line: what it draws, and one clear sentence for whatever a person gets wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, random_unet
from PIL import Image

import sample as sample_py
from minicache import Diffusion, Recipe, UNet, UNetConfig, load, nonuniform, uncached, uniform
from minicache.checkpoints import fingerprint, save
from minicache.cost import full_passes
from minicache.images import grid, to_uint8
from minicache.recipe import nearest_recipe, recipe_from, recipe_from_file
from minicache.sampling import sample as sample_images
from minicache.tools import run
from minicache.words import Vocabulary
from sample import main, parse, recipe_within


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    unet = random_unet()
    unet.conv_out.weight.data *= 0.3  # so that pictures of a random network are not all black and white
    path = tmp_path_factory.mktemp("net") / "net.pt"
    save(path, unet)
    return path


def draw(net, *flags) -> None:
    main(parse(["--ckpt", str(net), "--steps", "6", "--num", "3", *map(str, flags)]))


def test_grid(net, tmp_path, capsys):
    draw(net, "--interval", "3", "--out", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (6 * (2 * 18 + 2), 6 * (2 * 18 + 2))
    out = capsys.readouterr().out
    for words in ("parameters, float32, channels_last on cpu", "6 steps (uniform): 2 in full, 4 at branch 1 of 4",
                  "GMACs an image", "3 images (seeds 0..2)", "images/s", "cache 0.", "x.png"):  # fmt: skip
        assert words in out, words


def test_npz_holds_exactly_what_sample_draws(net, tmp_path):
    draw(net, "--seed", "5", "--batch-size", "2", "--interval", "2", "--branch", "2", "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        drawn = arrays["arr_0"]
    expected = to_uint8(sample_images(load(net), [5, 6, 7], batch_size=2, plan=uniform(6, 2, 2)))
    assert drawn.dtype == np.uint8 and np.array_equal(drawn, expected)


def test_a_set_goes_on_with_the_same_noise_schedule_alone(net, tmp_path):
    (tmp_path / "net.pt").write_bytes(net.read_bytes())
    draw(tmp_path / "net.pt", "--out", tmp_path / "folder")
    unet = load(net)
    unet.diffusion = Diffusion(beta_end=0.0075)
    save(tmp_path / "net.pt", unet)
    (tmp_path / "folder" / "000001.png").unlink()
    with pytest.raises(ValueError, match="made with weights"):
        draw(tmp_path / "net.pt", "--out", tmp_path / "folder")


def test_folder_and_gif(net, tmp_path):
    draw(net, "--out", tmp_path / "deep" / "folder")
    names = [path.name for path in sorted((tmp_path / "deep" / "folder").iterdir())]
    assert names == ["000000.png", "000001.png", "000002.png", "manifest.json"]
    draw(net, "--out", tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "x.gif"]


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_compare_shows_uncached_on_the_left(net, tmp_path, capsys, ending):
    draw(net, "--compare", "--out", tmp_path / f"x.{ending}")
    out = capsys.readouterr().out
    for words in ("measured speed-up", "by MACs", "PSNR", "largest difference", "left: uncached"):
        assert words in out
    with Image.open(tmp_path / f"x.{ending}") as image:
        if ending == "gif":
            assert image.n_frames == 6
            return
        left, right = (np.asarray(image)[::6, x : x + 6 * 38 : 6] for x in (0, 6 * (38 + 8)))
    unet = load(net)
    for half, interval in ((left, 1), (right, 5)):
        assert np.array_equal(half, grid(to_uint8(sample_images(unet, [0, 1, 2], plan=uniform(6, interval, 1)))))
    assert not np.array_equal(left, right)


def test_compare_prepares_every_size_of_a_batch(net, tmp_path, monkeypatch):
    sizes, inner = [], sample_py.draw
    monkeypatch.setattr(sample_py, "draw", lambda *args: sizes.append((len(args[1]), args[2])) or inner(*args))
    draw(net, "--compare", "--batch-size", "2", "--out", tmp_path / "x.png")
    assert sorted(sizes[:2]) == [(1, 1), (2, 2)] and sizes[2:] == [(3, 2), (3, 2)]


def test_compare_at_interval_one_is_the_same_picture(net, tmp_path, capsys):
    draw(net, "--compare", "--interval", "1", "--out", tmp_path / "x.png")
    assert (
        "PSNR to uncached, of all pixels together inf dB; of single pictures inf dB (median), inf dB (worst); "
        in capsys.readouterr().out
    )


def test_gif_keeps_to_the_batch_size(net, tmp_path):
    draw(net, "--out", tmp_path / "all.gif")
    draw(net, "--out", tmp_path / "ones.gif", "--batch-size", "1")
    with Image.open(tmp_path / "all.gif") as together, Image.open(tmp_path / "ones.gif") as apart:
        assert together.n_frames == apart.n_frames == 6
        a, b = (np.asarray(image.convert("RGB")).astype(int) for image in (together, apart))
        assert abs(a - b).mean() < 2


@pytest.mark.parametrize(
    "flags, settings",
    [
        ([], {"plan": uniform(6, 5, 1)}),
        (["--center", "2"], {"plan": nonuniform(6, 5, 2, 1.2, 1)}),
        (["--power", "1.4", "--interval", "2"], {"plan": nonuniform(6, 2, 3, 1.4, 1)}),
        (["--interval", "2", "--forecast", "linear"], {"plan": uniform(6, 2, 1, "linear")}),
        (["--interval", "2", "--branch", "3"], {"plan": uniform(6, 2, 3)}),
        (["--sampler", "ddpm"], {"plan": uniform(6, 5, 1), "sampler": "ddpm"}),
        (["--sampler", "ddpm", "--no-clip"], {"plan": uniform(6, 5, 1), "sampler": "ddpm", "clip_x0": False}),
        (["--sampler", "ddpm", "--variance", "fixed_small"],
         {"plan": uniform(6, 5, 1), "sampler": "ddpm", "variance": "fixed_small"}),
        (["--sampler", "dpm++2m", "--spacing", "trailing"],
         {"plan": uniform(6, 5, 1), "sampler": "dpm++2m", "spacing": "trailing"}),
        (["--sampler", "plms"], {"plan": uniform(6, 5, 1), "sampler": "plms"}),
        (["--spacing", "rho3"], {"plan": uniform(6, 5, 1), "spacing": "rho3"}),
        (["--sampler", "pndm"], {"plan": uniform(7, 5, 1), "sampler": "pndm", "steps": 6}),
        (["--eta", "0.5"], {"plan": uniform(6, 5, 1), "eta": 0.5}),
        (["--clip"], {"plan": uniform(6, 5, 1), "clip_x0": True}),
        (["--dtype", "bfloat16"], {"plan": uniform(6, 5, 1), "dtype": torch.bfloat16}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_every_flag_does_what_it_says(net, tmp_path, flags, settings):
    draw(net, "--out", tmp_path / "x.npz", *flags)
    with np.load(tmp_path / "x.npz") as arrays:
        drawn = arrays["arr_0"]
    unet = load(net, dtype=settings.pop("dtype", torch.float32))
    assert np.array_equal(drawn, to_uint8(sample_images(unet, [0, 1, 2], **settings)))


def test_budget_takes_the_nearest_plan_unless_it_costs_much_more():
    unet = load("tiny_cifar10")
    for budget, nearest in ((9, 10), (21, 20), (1e9, 50)):
        plan = recipe_within(parse(["--budget", str(budget)]), unet, fingerprint(unet)).plan
        assert 0.8 * nearest <= full_passes(unet, plan) <= nearest
    with pytest.raises(ValueError, match=r"the cheapest plan .* costs 5.0 full passes: make one with .* --budget 3 "):
        recipe_within(parse(["--budget", "3"]), unet, fingerprint(unet))
    with pytest.raises(ValueError, match=r"costs 5.0 full passes$"):  # for 1, calibrate can make none
        recipe_within(parse(["--budget", "1"]), unet, fingerprint(unet))


def test_a_plan_nearer_to_the_budget_but_much_over_it_is_passed_over():
    cheap, dear = (Recipe(uniform(30, interval)) for interval in (30, 2))
    assert nearest_recipe([cheap, dear], 10, cost=lambda plan: len(plan.refresh)) == cheap
    assert nearest_recipe([cheap, dear], 13, cost=lambda plan: len(plan.refresh)) == dear


def test_steps_of_a_recipe_are_timesteps(tmp_path):
    recipe_from(steps=6, sampler="pndm").save(tmp_path / "r.json")
    recipe = recipe_from_file(tmp_path / "r.json", steps=6)
    assert (recipe.plan.steps, recipe.steps) == (7, 6)
    with pytest.raises(ValueError, match=r"--steps 7 contradicts .* which has 6"):
        recipe_from_file(tmp_path / "r.json", steps=7)


def test_pictures_that_are_not_finite_are_refused(net, tmp_path, monkeypatch):
    monkeypatch.setattr("sample.sample", lambda *args, **settings: torch.full((1, 3, 16, 16), float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        draw(net, "--out", tmp_path / "x.png")


def test_recipe(net, tmp_path, capsys):
    recipe = Recipe(uniform(5, 2, 2, "linear"), "dpm++2m", "trailing", fingerprint=fingerprint(load(net)))
    recipe.save(tmp_path / "r.json")
    flags = ["--ckpt", str(net), "--num", "2", "--plan", str(tmp_path / "r.json"), "--out", str(tmp_path / "x.npz")]
    main(parse([*flags, "--steps", "5", "--sampler", "dpm++2m"]))
    with np.load(tmp_path / "x.npz") as arrays:
        drawn = arrays["arr_0"]
    expected = sample_images(load(net), [0, 1], sampler="dpm++2m", spacing="trailing", plan=recipe.plan)
    assert np.array_equal(drawn, to_uint8(expected))
    assert "5 steps (trailing): 3 in full" in capsys.readouterr().out
    for extra in (["--steps", "6"], ["--sampler", "ddim"], ["--interval", "2"], ["--branch", "3"], ["--eta", "0.3"]):
        with pytest.raises(ValueError, match=f"{extra[0]}.* contradicts"):
            main(parse([*flags, *extra]))
    main(parse([*flags[:-1], str(tmp_path / "16.npz"), "--dtype", "bfloat16"]))  # rounded, but the same checkpoint


# --- what a person gets wrong ----------------------------------------------------------------------------------------

BAD = [
    (["--interval", "0"], "interval=0"),
    (["--interval", "-1"], "interval=-1"),
    (["--interval", "x"], "--interval: invalid int value: 'x'"),
    (["--branch", "0"], "branch=0"),
    (["--branch", "99"], "branch=99 is not in 1..4"),
    (["--steps", "0"], "steps=0"),
    (["--steps", "1001"], "steps=1001"),
    (["--steps", "1000000000"], "steps=1000000000"),
    (["--power", "1e17"], "power=1e+17"),
    (["--plan", "{dir}/eta.json"], "eta=None"),
    (["--steps", "1"], "t = 0"),
    (["--power", "0.5"], "power=0.5"),
    (["--center", "-1"], "center=-1"),
    (["--center", "101"], "center=101"),
    (["--eta", "-1"], "eta=-1"),
    (["--eta", "0.5", "--sampler", "dpm++2m"], "eta=0.5"),
    (["--sampler", "euler"], "euler"),
    (["--spacing", "cubic"], "spacing='cubic' is none of uniform, "),
    (["--sampler", "pndm", "--steps", "1"], "needs 2 timesteps or more"),
    (["--num", "0"], "--num"),
    (["--batch-size", "0"], "--batch-size"),
    (["--seed", "-3"], "--seed"),
    (["--ckpt", "emojy"], "did you mean emoji?"),
    (["--ckpt", "no/such.pt"], "there is no file or folder no/such.pt"),
    (["--ckpt", "{dir}/truncated.pt"], "truncated"),
    (["--ckpt", "{dir}/pickle.pt"], "pickle.pt cannot be read as a checkpoint: it holds something else than tensors"),
    (["--ckpt", "{dir}/list.pt"], "not a state dict"),
    (["--ckpt", "{dir}/missing.pt"], "lacks tensor conv_out.bias"),
    (["--ckpt", "{dir}/extra.pt"], "unexpected tensor more"),
    (["--ckpt", "{dir}/shape.pt"], "conv_out.bias has shape [4]"),
    (["--ckpt", "{dir}/nan.pt"], "NaN"),
    (["--plan", "{dir}/other.json"], "made for the weights 0123"),
    (["--plan", "{dir}/text.json"], "is not a recipe"),
    (["--plan", "{dir}/list.json"], "is not a recipe"),
    (["--plan", "{dir}/none.json"], "none.json"),
    (["--plan", "{dir}/plain.json", "--interval", "3"], "contradicts"),
    pytest.param(
        ["--device", "cuda"],
        "device cuda cannot",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
    ),
    (["--device", "meta"], "device meta cannot be used here"),
    (["--budget", "inf"], "--budget inf must be positive and finite"),
    (["--seed", "99999999999999999999"], "--seed 99999999999999999999 must be at least 0 and at most"),
    (["--num", "3", "--seed", "4294967294"], "--seed 4294967294 must be at least 0 and at most 4294967293"),
    (["--num", "2501"], "--num 2501: a .png holds 2500 pictures at most"),
    (["--num", "101", "--out", "{dir}/x.gif"], "--num 101: a .gif holds 100 pictures at most"),
    (["--ckpt", "{dir}/five.pt"], "five.pt draws 5 channels, as no picture has; an .npz holds them"),
    (["--num", "1000000000", "--out", "{dir}/x.npz"], "--num 1000000000 must be at least 1 and at most 100000000"),
    (["--batch-size", "1000000000000000000"], "--batch-size 1000000000000000000 must be"),
    (["--plan", "{dir}/nowhere.json"], "nowhere.json: No such file or directory"),
    (["--out", "."], "--out . needs a name"),
    (["--device", "toaster"], "device toaster cannot be used here"),
    (["--out", "{dir}/truncated.pt/x.png"], "folder cannot be made"),
    (["--out", "{dir}/x.jpg"], "ending"),
    (["--out", "{dir}/folder.png"], "there is a folder of that name"),
    (["--nonsense"], "--nonsense"),
]


@pytest.fixture(scope="module")
def bad(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    content = torch.load(net, weights_only=True)

    def variant(name, change):
        state = dict(content["state_dict"])
        change(state)
        torch.save({**content, "state_dict": state}, folder / f"{name}.pt")

    variant("missing", lambda state: state.pop("conv_out.bias"))
    variant("extra", lambda state: state.update(more=torch.zeros(1)))
    variant("shape", lambda state: state.update({"conv_out.bias": torch.zeros(4)}))
    variant("nan", lambda state: state.update({"conv_out.bias": torch.full((3,), float("nan"))}))
    (folder / "truncated.pt").write_bytes(net.read_bytes()[:-2000])
    (folder / "pickle.pt").write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    torch.save([1, 2], folder / "list.pt")
    save(folder / "five.pt", random_unet(replace(SMALL, in_channels=5, out_channels=5)))
    Recipe(uniform(6, 2), fingerprint="0123").save(folder / "other.json")
    Recipe(uniform(6, 2)).save(folder / "plain.json")
    eta = {"plan": {"steps": 4, "branch": 3, "refresh": [0]}, "eta": None}
    (folder / "eta.json").write_text(json.dumps(eta))
    (folder / "text.json").write_text("not JSON")
    (folder / "list.json").write_text(json.dumps([1]))
    (folder / "folder.png").mkdir()
    return folder


@pytest.mark.parametrize("flags, words", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input(net, bad, tmp_path, capsys, flags, words):
    flags = [flag.format(dir=bad) for flag in flags]
    flags = [*flags, *(["--ckpt", str(net)] if "--ckpt" not in flags else [])]
    flags = [*flags, *(["--out", str(tmp_path / "x.png")] if "--out" not in flags else []), "--num", "1"]
    if flags[0] == "--num":
        flags = flags[:-2]
    with pytest.raises(SystemExit) as end:
        run("sample.py", lambda: main(parse(flags)))
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error
    assert error.startswith("sample.py: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def program(*flags, limit: str = "") -> subprocess.CompletedProcess:
    command = f"{limit} exec {sys.executable} sample.py {' '.join(map(str, flags))}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)


def test_as_a_program(net, tmp_path):
    done = program("--ckpt", net, "--steps", 4, "--num", 1, "--out", tmp_path / "x.png")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "x.png").exists()
    wrong = program("--interval", 0)
    assert wrong.returncode == 2 and wrong.stderr == "sample.py: interval=0 must be a whole number of at least 1\n"
    assert "examples:" in program("--help").stdout


def test_a_full_disk_leaves_no_half_file(net, tmp_path):
    """A limit on the size of files stands for the full disk: writing fails half way."""
    flags = ["--ckpt", net, "--steps", 2, "--num", 8, "--batch-size", 4, "--out"]
    done = program(*flags, tmp_path / "x.png", limit="ulimit -f 1;")
    assert done.returncode == 2 and done.stderr.startswith("sample.py: ") and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    done = program(*flags, tmp_path / "x.npz", limit="ulimit -f 4;")
    assert done.returncode == 2 and done.stderr.startswith("sample.py: ") and "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "x.npz.parts").iterdir()} == {
        "manifest.json", "000000000.npy", "000000004.npy"}  # fmt: skip
    assert program(*flags, tmp_path / "x.npz").returncode == 0
    with np.load(tmp_path / "x.npz") as arrays:
        assert len(arrays["arr_0"]) == 8


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worded(tmp_path_factory) -> str:
    """A network that takes prompts, random in every weight."""
    torch.manual_seed(0)
    config = UNetConfig(16, 32, (1, 2), 1, (8,), context_dim=16, heads=2, num_tokens=5, pooled_context=True)
    unet = UNet(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        unet.tokens.weight[0] = 0
    unet.diffusion = Diffusion()
    unet.vocabulary = Vocabulary(("cat", "face", "heart", "red"), 3, guidance=2.0, examples=("red heart", "cat"))
    path = tmp_path_factory.mktemp("worded") / "worded.pt"
    save(path, unet)
    return str(path)


def test_a_checkpoint_keeps_its_words(worded):
    vocabulary = load(worded).vocabulary
    assert vocabulary.words == ("cat", "face", "heart", "red") and vocabulary.examples == ("red heart", "cat")


def drawn(out: Path, *flags: str) -> np.ndarray:
    main(parse([*flags, "--steps", "4", "--out", str(out)]))
    return np.load(out)["arr_0"]


def test_picture_i_shows_prompt_i(worded, tmp_path, capsys):
    both = ["--prompt", "cat face", "--prompt", "red"]
    images = drawn(tmp_path / "a.npz", "--ckpt", worded, *both, "--num", "4", "--seed", "3", "--guidance", "3")
    unet = load(worded)
    ids = unet.vocabulary.encode("cat face", "red", "cat face", "red")
    expected = sample_images(unet, range(3, 7), context=ids, guidance=3.0, plan=uniform(4, 5, 1))
    assert np.abs(images.astype(int) - to_uint8(expected)).max() <= 1
    (tmp_path / "p.txt").write_text("cat face\n\nred\n")
    flags = ["--num", "4", "--seed", "3", "--guidance", "3", "--batch-size", "3"]
    again = drawn(tmp_path / "b.npz", "--ckpt", worded, "--prompts", str(tmp_path / "p.txt"), *flags)
    assert np.abs(images.astype(int) - again).max() <= 1
    (tmp_path / "p.txt").write_text("cat face\nred\n" * 2 + "xylophone\n")  # what no picture shows is not encoded
    with pytest.warns(UserWarning, match="of 5 prompts or classes, only the first 4 are drawn"):
        again = drawn(tmp_path / "c.npz", "--ckpt", worded, "--prompts", str(tmp_path / "p.txt"), *flags)
    assert np.abs(images.astype(int) - again).max() <= 1
    assert "guidance 3, which takes two passes a step" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with another prompts"):
        main(parse(["--ckpt", worded, "--prompt", "cat", "--num", "4", "--seed", "3", "--guidance", "3", "--steps", "4",
                    "--out", str(tmp_path / "a.npz")]))  # fmt: skip


def test_without_a_prompt_the_examples_are_drawn_with_the_guidance_that_suits(worded, tmp_path):
    images = drawn(tmp_path / "a.npz", "--ckpt", worded, "--num", "3")
    unet = load(worded)
    ids = unet.vocabulary.encode("red heart", "cat", "red heart")
    expected = sample_images(unet, range(3), context=ids, guidance=2.0, plan=uniform(4, 5, 1))
    assert np.abs(images.astype(int) - to_uint8(expected)).max() <= 1


def test_guidance_leads_away_from_the_negative_prompt(worded, tmp_path):
    flags = ["--ckpt", worded, "--prompt", "cat", "--num", "2", "--guidance", "3"]
    images = drawn(tmp_path / "a.npz", *flags, "--negative", "red face")
    unet = load(worded)
    context, negative = unet.vocabulary.encode("cat", "cat"), unet.vocabulary.encode("red face")
    expected = sample_images(unet, range(2), context=context, negative=negative, guidance=3.0, plan=uniform(4, 5, 1))
    assert np.abs(images.astype(int) - to_uint8(expected)).max() <= 1
    assert np.abs(images.astype(int) - drawn(tmp_path / "b.npz", *flags)).max() > 1
    with pytest.raises(ValueError, match="choose another --out"):
        drawn(tmp_path / "b.npz", *flags, "--negative", "red face")


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_sheets_with_prompts_under_them(worded, tmp_path, ending):
    out = tmp_path / f"sheet.{ending}"
    main(parse(["--ckpt", worded, "--prompt", "cat", "--num", "4", "--steps", "4", "--compare", "--out", str(out)]))
    with Image.open(out) as sheet:
        assert sheet.height > 2 * 96 + 6  # more than the pictures need


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt", "dog"], "has not learned the word 'dog'"),
        (["--prompt", "hart"], "did you mean heart"),
        (["--prompt", ""], "holds no word"),
        (["--prompt", "cat face heart red"], "4 different words; at most 3"),
        (["--class", "1"], "knows words, not classes"),
        (["--prompt", "cat", "--guidance", "-1"], r"guidance=-1.0 must be a number in 0..100"),
        (["--prompt", "cat", "--guidance", "nan"], "guidance=nan"),
        (["--prompts", "nowhere.txt"], "No such file"),
        (["--negative", "dog"], "has not learned the word 'dog'"),
        (["--negative", "red", "--guidance", "1"], "negative context needs a guidance other than 1"),
    ],
)
def test_wrong_prompts(worded, tmp_path, flags, words):
    with pytest.raises((ValueError, OSError), match=words):
        main(parse(["--ckpt", worded, *flags, "--out", str(tmp_path / "x.png")]))
    assert not list(tmp_path.iterdir())


def test_guidance_1_needs_no_prompt(worded, tmp_path):
    unet = load(worded)
    unet.vocabulary = replace(unet.vocabulary, examples=())
    save(tmp_path / "net.pt", unet)
    Recipe(uncached(6)).save(tmp_path / "r.json")
    draw(tmp_path / "net.pt", "--plan", tmp_path / "r.json", "--out", tmp_path / "x.png")
    Recipe(uncached(6), guidance=2.0).save(tmp_path / "r.json")
    with pytest.raises(ValueError, match="guidance of a plan, needs prompts"):
        draw(tmp_path / "net.pt", "--plan", tmp_path / "r.json", "--out", tmp_path / "x.png")


@pytest.mark.parametrize("flags", [["--prompt", "cat"], ["--negative", "cat"], ["--guidance", "3"], ["--class", "3"]])
def test_a_network_without_words_refuses_prompts(tmp_path, flags):
    with pytest.raises(ValueError, match=f"{flags[0]}: tiny_cifar10 cannot be told what to draw"):
        main(parse(["--ckpt", "tiny_cifar10", *flags, "--out", str(tmp_path / "x.png")]))
