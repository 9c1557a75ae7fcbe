"""Training learns, is reproducible, and goes on after an interruption as if nothing had happened."""

import csv
import math
import os
import signal
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import SMALL, draw_emoji, random_unet
from PIL import Image

import train_tiny
from minicache import Diffusion, UNet, load, sample
from minicache.captions import CATEGORIES, captioned
from minicache.checkpoints import save
from minicache.data import batch, wordless
from minicache.images import BAND, save_png
from minicache.tools.log import log
from minicache.words import Vocabulary
from train_tiny import BINS, Settings, Training, main, parse

QUICK = {
    "image_size": 16,
    "model_channels": 32,
    "channel_mult": (1,),
    "attention_resolutions": (),
    "batch_size": 8,
    "dtype": "float32",
    "preview_every": 100,
    "save_every": 100,
    "steps": 6,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    if "preview" not in request.function.__name__:
        monkeypatch.setattr(train_tiny, "preview", lambda unet, path: path.touch())
    with torch.enable_grad():
        yield


def black(n, generator):
    return torch.zeros(n, 3, 16, 16), None


@pytest.fixture
def words(tmp_path) -> dict:
    """A run on emoji with words, a small one."""
    return {**QUICK, "data": str(draw_emoji(tmp_path / "emoji")), "context_dim": 16}


def fresh(vocabulary: Vocabulary) -> UNet:
    """A network that takes these words, and has learned nothing."""
    unet = UNet(replace(SMALL, context_dim=16, num_tokens=1 + len(vocabulary.words), pooled_context=True)).eval()
    unet.diffusion, unet.vocabulary = Diffusion(), vocabulary
    return unet


def test_it_learns_and_its_checkpoint_samples(tmp_path):
    last = main(out=str(tmp_path), **{**QUICK, "steps": 150, "batch_size": 16, "lr": 3e-3, "ema": 0.9})
    rows = list(csv.reader((tmp_path / "log.csv").read_text().splitlines()))
    assert rows[0] == ["step", "loss", "loss_noisiest_tenth", "seconds"] and [row[0] for row in rows[1:]] == [
        "100",
        "150",
    ]
    assert float(rows[2][1]) < 0.5 * float(rows[1][1]) < 0.5
    unet = load(last)
    assert unet.config.image_size == 16 and unet.diffusion.beta_end == train_tiny.BETA_END
    assert torch.isfinite(sample(unet, [0], steps=5)).all()
    x0, t, eps, _ = batch(black, 32, 1000, 0.0, 7, 0)
    assert unet.diffusion.loss(unet, x0, t, eps).mean() < 0.5
    assert (tmp_path / "preview_000150.png").exists()


@pytest.mark.parametrize("killed_at", [2, 4, 5])
def test_a_picture_that_was_being_drawn_when_all_ended_is_drawn_again(tmp_path, monkeypatch, killed_at):
    flags = {**QUICK, "steps": 5, "save_every": 1, "preview_every": 2, "out": str(tmp_path)}

    def killed(unet, path):
        if path.name == f"preview_{killed_at:06d}.png":
            raise MemoryError  # as good as any other end
        path.touch()

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train_tiny, "preview", killed)
        main(**flags)
    main(resume=True, **flags)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"preview_{k:06d}.png" for k in (2, 4, 5)]


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("with_words", [False, True])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, monkeypatch, dropout, with_words, words):
    flags = {**(words if with_words else QUICK), "dropout": dropout}
    whole = weights(main(out=str(tmp_path / "whole"), **flags))

    def interrupted(*args):
        if args[-1] == 2:
            assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL  # a terminal that is closed is noted, too
            os.kill(os.getpid(), signal.SIGINT)
        return batch(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tiny, "batch", interrupted)
        main(out=str(tmp_path / "parts"), **flags)
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["training"]["step"] == 3
    resumed = weights(main(out=str(tmp_path / "parts"), resume=True, **flags))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_batch_depends_on_seed_and_step_alone():
    draw = wordless(lambda n, generator: torch.rand(n, 3, 4, 4, generator=generator))
    first, again, other = (batch(draw, 8, 1000, 0.05, 0, step) for step in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again)) and not torch.equal(first[0], other[0])
    assert [int(t) // 125 for t in first[1]] == list(range(8))
    amplitudes = batch(black, 3000, 1000, 0.05, 0, 0)[2].flatten(1).std(dim=1)
    assert 0.04 < amplitudes.std() < 0.06 and abs(amplitudes.mean() - 1) < 0.01


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no file"):
        main(out=str(tmp_path), resume=True, **QUICK)
    main(out=str(tmp_path), **{**QUICK, "steps": 1})
    with pytest.raises(ValueError, match="add --resume"):
        main(out=str(tmp_path), **QUICK)
    with pytest.raises(ValueError, match="seed=0, not 1"):
        main(out=str(tmp_path), resume=True, seed=1, **QUICK)
    with pytest.raises(ValueError, match="use the same flags"):
        main(out=str(tmp_path), resume=True, **{**QUICK, "channel_mult": (1, 1)})
    save(tmp_path / "last.pt", load(tmp_path / "last.pt"))
    with pytest.raises(ValueError, match="weights alone"):
        main(out=str(tmp_path), resume=True, **QUICK)
    with pytest.raises(ValueError, match="no folder or zip of images"):
        main(data="nowhere", out=str(tmp_path / "other"), **QUICK)
    with pytest.raises(ValueError, match="--steps 0 must be at least 1"):
        main(out=str(tmp_path / "other"), **{**QUICK, "steps": 0})
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(train_tiny, "train", lambda *_: pytest.fail("worked"))
    with pytest.raises(ValueError, match="cannot be made or written to"):
        main(out=str(tmp_path / "last.pt" / "x"), **QUICK)


def test_a_state_that_is_not_whole_is_refused(tmp_path):
    last = main(out=str(tmp_path), **{**QUICK, "steps": 1})
    content = torch.load(last, weights_only=True)
    for name, value in (
        ("optimizer", None), ("arguments", None), ("unet", None), ("step", None), ("step", "abc"), ("step", -1),
        ("step", 2.0), ("optimizer", 5), ("optimizer", {**content["training"]["optimizer"], "state": {}}),
        ("arguments", "abc"), ("unet", {}), ("usual", 7), ("usual", [1.0]),
    ):  # fmt: skip
        training = {**content["training"], name: value}
        if value is None:
            del training[name]
        torch.save({**content, "training": training}, last)
        with pytest.raises(ValueError, match=r"cannot be resumed from|or damaged") as error:
            main(out=str(tmp_path), resume=True, **QUICK)
        assert "\n" not in str(error.value)
    for name in ("training", "config", "state_dict", "vocabulary"):
        torch.save({**content, name: "abc"}, last)
        with pytest.raises(ValueError, match="cannot be resumed from"):
            main(out=str(tmp_path), resume=True, **QUICK)


@pytest.mark.parametrize("flags", [
    {"batch_size": 10**18}, {"steps": 10**24}, {"seed": 2**32}, {"seed": -1}, {"save_every": 0}, {"lr": math.nan},
    {"lr": math.inf}, {"weight_decay": math.nan}, {"weight_decay": -1.0}, {"ema": math.nan}, {"jitter": math.nan},
], ids=str)  # fmt: skip
def test_numbers_that_no_run_can_have(flags):
    with pytest.raises(ValueError, match=r"must be at least|need finite"):
        Settings(**flags)


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_a_second_run_is_refused_while_one_is_at_work(tmp_path, monkeypatch):
    def meanwhile(*args):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"out: another run trains there"):
            patch.setattr(train_tiny, "batch", batch)
            main(out=str(tmp_path / "out"), resume=True, **QUICK)
        return batch(*args)

    monkeypatch.setattr(train_tiny, "batch", meanwhile)
    last = main(out=str(tmp_path / "out"), **{**QUICK, "steps": 1})
    assert torch.load(last, weights_only=True)["training"]["step"] == 1


def test_a_run_that_ended_while_another_read_its_data_is_not_replaced(tmp_path, monkeypatch):
    source = train_tiny.source

    def meanwhile(*args):
        with monkeypatch.context() as patch:
            patch.setattr(train_tiny, "source", source)
            main(out=str(tmp_path), **{**QUICK, "seed": 1, "steps": 1})
        return source(*args)

    monkeypatch.setattr(train_tiny, "source", meanwhile)
    with pytest.raises(ValueError, match=r"last\.pt exists: add --resume"):
        main(out=str(tmp_path), **QUICK)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["training"]["arguments"]["seed"] == 1


def test_previews_never_become_pictures_to_learn_from(tmp_path, monkeypatch):
    save_png(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    for out in (tmp_path, tmp_path / "runs" / "a"):
        with pytest.raises(ValueError, match="its own previews"):
            main(data=str(tmp_path), out=str(out), **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    monkeypatch.chdir(tmp_path.parent)
    main(data="shapes", out="shapes/1", **{**QUICK, "steps": 1})  # no folder, though there is one of that name


@pytest.mark.parametrize("name, content", [
    ("log.csv", b"id,amount\n1,10\n"), ("log.csv", b""), ("log.csv", b"\xff"), ("log.csv", None),
    ("preview_000006.png", b"mine"),
])  # fmt: skip
def test_logs_and_previews_of_others_stay(tmp_path, name, content):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} (is not the log of a training run|exists, and no log)"):
        main(out=str(tmp_path), **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert content is None or (tmp_path / name).read_bytes() == content


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    def killed(*_):
        raise RuntimeError("killed")

    flags = {**QUICK, "preview_every": 1, "save_every": 2, "steps": 3, "out": str(tmp_path)}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Training, "save", killed)  # before it is first in place
        main(**flags)
    assert not (tmp_path / "last.pt").exists()
    last = main(**flags)
    last.rename(tmp_path / "kept.pt")
    before = (tmp_path / "log.csv").read_text()
    with pytest.raises(ValueError, match=r"log\.csv tells of a run whose last\.pt is gone"):
        main(**flags)
    assert (tmp_path / "log.csv").read_text() == before


def test_a_folder_with_the_name_of_a_source(tmp_path, monkeypatch):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "captions.csv").write_text("a.png,a cat\n")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"shapes is a built-in source; the folder of that name is \./shapes"):
        assert main(**{**QUICK, "steps": 1}).exists()  # without words


def test_what_has_gone_further_is_not_called_done(tmp_path):
    main(out=str(tmp_path), **{**QUICK, "steps": 2})
    main(out=str(tmp_path), resume=True, **{**QUICK, "steps": 2})
    with pytest.raises(ValueError, match=r"last\.pt has taken 2 steps, more than --steps 1"):
        main(out=str(tmp_path), resume=True, **{**QUICK, "steps": 1})


def test_a_run_that_ends_before_its_first_save_can_be_resumed(tmp_path, monkeypatch):
    def cut(*arguments):
        if arguments[-1] == 4:
            raise SystemExit
        return batch(*arguments)

    whole = weights(main(out=str(tmp_path / "whole"), **QUICK))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_tiny, "batch", cut)
        main(out=str(tmp_path / "cut"), **QUICK)
    with pytest.raises(ValueError, match="add --resume to go on with it"):
        main(out=str(tmp_path / "cut"), **QUICK)
    resumed = weights(main(out=str(tmp_path / "cut"), resume=True, **QUICK))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("change, words", [
    ({"image_size": 32, "dropout": 0.0}, "--image-size 32 contradicts --init .*net.pt: it has 16"),  # the defaults
    ({"image_size": 64}, "--image-size 64 contradicts --init .*net.pt: it has 16"),
    ({"dropout": 0.5}, r"--dropout 0\.5 contradicts --init"),
])  # fmt: skip
def test_flags_that_the_given_weights_do_not_allow(tmp_path, change, words):
    save(tmp_path / "net.pt", random_unet())
    with pytest.raises(ValueError, match=words):
        main(init=str(tmp_path / "net.pt"), out=str(tmp_path / "out"), steps=1, **change)
    assert not (tmp_path / "out").exists()


def test_weights_that_no_pictures_here_can_train(tmp_path):
    for change in ({"in_channels": 1, "out_channels": 1}, {"context_dim": 8}):
        save(tmp_path / "net.pt", random_unet(replace(SMALL, **change)))
        with pytest.raises(ValueError, match=r"--init .*net\.pt: need 3 channels, and a context of words or none"):
            main(init=str(tmp_path / "net.pt"), out=str(tmp_path / "out"), steps=1)
    assert not (tmp_path / "out").exists()


def test_the_log_has_one_line_a_step(tmp_path):
    for step in (100, 200, 300, 200, 300):  # killed, and gone on after step 100
        log(tmp_path / "log.csv", step, 0.5, math.nan, 1.0)
    assert [row.split(",")[0] for row in (tmp_path / "log.csv").read_text().splitlines()] == [
        "step",
        "100",
        "200",
        "300",
    ]


def test_flags_are_the_settings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert vars(parse([])) == asdict(Settings())
    assert parse(["--channel-mult", "1,2", "--resume"]).channel_mult == (1, 2)
    assert parse([]).categories == CATEGORIES and not parse(["--no-pooled-context"]).pooled_context
    assert parse(["--categories", "Objects,Food & Drink"]).categories == ("Objects", "Food & Drink")
    with pytest.raises(SystemExit) as error:
        parse(["--channel-mult", "1,x"])
    assert error.value.code == 2
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert (
        "peak learning rate, after 500 steps; it decays to 0 along a cosine (default: 0.001)" in capsys.readouterr().out
    )


def test_preview_draws_both_samplers(tmp_path):
    unet = random_unet()
    train_tiny.preview(unet, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (6 * (2 * (4 * 18 + 2) + 8), 6 * (4 * 18 + 2))


def test_preview_of_a_network_of_few_timesteps(tmp_path):
    unet = random_unet()
    unet.diffusion = Diffusion(num_timesteps=20, beta_end=0.2)
    train_tiny.preview(unet, tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


def test_preview_has_captions_under_the_pictures(tmp_path):
    unet = fresh(Vocabulary(("cat", "dog", "red"), 5, examples=("red cat",) * 3))
    train_tiny.preview(unet, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (2 * (2 * (96 + 4) + 4) + 8, 2 * (96 + BAND + 4) + 4)


def test_words_reach_the_network(words, monkeypatch):
    monkeypatch.setattr(train_tiny, "WARMUP", 1)
    vocabulary = captioned(words["data"]).vocabulary()
    training = Training(Settings(**words), vocabulary)
    config, before = training.unet.config, training.unet.tokens.weight.clone()
    assert (config.num_tokens, config.context_dim, config.heads, config.pooled_context) == (9, 16, 4, True)
    assert training.unet.vocabulary == training.average.vocabulary == vocabulary
    draw = captioned(words["data"]).source(vocabulary, 16)
    for step in range(4):  # the last layers begin at zero, and nothing comes through at first
        training.update(*batch(draw, 32, 1000, 0.05, 0, step))
    assert training.unet.tokens.weight.grad[1:].abs().sum(dim=1).min() > 0
    for unet in (training.unet, training.average):
        assert not unet.tokens.weight[0].any() and ((unet.tokens.weight - before)[1:] != 0).any(dim=1).all()


def test_the_checkpoint_keeps_the_words(tmp_path, words):
    last = main(out=str(tmp_path / "out"), **{**words, "steps": 1})
    known = load(last).vocabulary
    assert known == captioned(words["data"]).vocabulary()
    assert known.examples == captioned(words["data"]).captions
    draw_emoji(tmp_path / "other", ("red apple", "green apple", "blue dog"))
    with pytest.raises(ValueError, match="was trained with other words"):
        main(out=str(tmp_path / "out"), resume=True, **{**words, "data": str(tmp_path / "other")})


def test_with_words_each_loss_counts_by_its_ratio_to_the_usual_one(words, monkeypatch):
    vocabulary = captioned(words["data"]).vocabulary()
    training, t, ids = Training(Settings(**words), vocabulary), torch.tensor([0, 49, 50, 999]), torch.ones(4, 1).long()
    losses, factor = torch.tensor([4.0, 2.0, 3.0, 0.5]), torch.ones(1, requires_grad=True)
    monkeypatch.setattr(Diffusion, "loss", lambda *args: losses * factor)
    x = torch.zeros(4, 3, 16, 16)
    for given in (ids, None):
        training.usual = [1.0, 2.0] + [1.0] * (BINS - 2)
        factor.grad = None
        assert torch.equal(training.update(x, t, x, given), losses)
        assert factor.grad.item() == pytest.approx((4 + 2 + 3 / 2 + 0.5) / 4)
        usual = [1.0397, 2.01, 0.995] if given is not None else [1.0, 2.0, 1.0]
        assert [training.usual[k] for k in (0, 1, -1)] == pytest.approx(usual) and training.usual[2:-1] == [1.0] * 17


def test_a_network_begins_with_words_or_without(tmp_path, words, monkeypatch):
    unet = fresh(Vocabulary(("apple",), 13))
    monkeypatch.setattr(train_tiny, "load", lambda name: unet)
    with pytest.raises(ValueError, match=r"--init net.pt has words, and --data shapes has no captions"):
        main(out=str(tmp_path / "out"), init="net.pt", **QUICK)
    with pytest.raises(ValueError, match="the network has not learned the word 'red'"):
        main(out=str(tmp_path / "out"), init="net.pt", data=words["data"])
    unet.vocabulary = None
    with pytest.raises(ValueError, match=r"--init net.pt has no words, and --data .*emoji has captions"):
        main(out=str(tmp_path / "out"), init="net.pt", data=words["data"])
    assert not (tmp_path / "out").exists()


def test_average_moves_towards_the_weights():
    average, unet = random_unet(), random_unet()
    before = average.conv_out.weight.clone()
    torch.nn.init.constant_(unet.conv_out.weight, 2.0)
    train_tiny.update_average(average, unet, 0.9)
    assert torch.allclose(average.conv_out.weight, 0.9 * before + 0.1 * 2.0, atol=1e-6)


def test_learning_rate_warms_up_and_decays(tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    monkeypatch.setattr(train_tiny, "WARMUP", 2)
    main(out=str(tmp_path), **{**QUICK, "lr": 1.0e-4})
    assert rates[0] == pytest.approx(0.5e-4) and rates[1] == pytest.approx(0.933e-4, rel=1e-3)
    assert rates[-1] == pytest.approx(0.067e-4, rel=1e-2)


def test_divergence_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    last = main(out=str(tmp_path), **{**QUICK, "steps": 2})
    before = last.read_bytes()
    with pytest.raises(ValueError, match="lower --lr"):
        main(out=str(tmp_path), resume=True, **{**QUICK, "steps": 60, "lr": 1e30})
    assert last.read_bytes() == before


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """The step that spoils them is also the one that is saved, and its own loss does not tell yet."""
    last = main(out=str(tmp_path), **{**QUICK, "steps": 2})
    before = last.read_bytes()
    with pytest.raises(ValueError, match=r"the loss of step 3 is .*begin again, or --resume if last.pt is still good"):
        main(out=str(tmp_path), resume=True, **{**QUICK, "steps": 3, "lr": 1e300})
    assert last.read_bytes() == before

    def with_nan_gradients(diffusion, unet, x0, t, eps):
        return (
            loss(diffusion, unet, x0, t, eps) + (0 * unet.func.conv_out.bias.sum()).sqrt()
        )  # adds 0, with slope 0 * inf

    loss = Diffusion.loss
    monkeypatch.setattr(Diffusion, "loss", with_nan_gradients)
    with pytest.raises(ValueError, match=r"the loss of step 3 is .*begin again, or --resume if last.pt is still good"):
        main(out=str(tmp_path), resume=True, **{**QUICK, "steps": 3})
    assert last.read_bytes() == before


def test_init_begins_with_given_weights(tmp_path):
    first = main(out=str(tmp_path / "a"), **QUICK)
    second = main(out=str(tmp_path / "b"), init=str(first), steps=1, lr=1e-12, batch_size=8, dtype="float32")
    a, b = weights(first), weights(second)
    assert load(second).config.image_size == 16 and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_beta_end_changes_nothing_else_of_the_given_schedule(tmp_path):
    unet = random_unet()
    unet.diffusion = Diffusion(num_timesteps=40, beta_end=0.1, variance="fixed_small")
    save(tmp_path / "net.pt", unet)
    last = main(out=str(tmp_path), init=str(tmp_path / "net.pt"), steps=1, batch_size=8, beta_end=0.2)
    assert load(last).diffusion == Diffusion(num_timesteps=40, beta_end=0.2, variance="fixed_small")
