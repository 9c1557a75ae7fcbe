"""The judge of prompts: what it calls right, on a stand-in network that paints what it is told, or something else."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_emoji, noise
from PIL import Image

from minicache import CachePlan, Diffusion, Recipe, UNetConfig, captions
from minicache.captions import captioned
from minicache.images import BAND, to_tensor
from minicache.tools import accuracy

NAMES = ("red apple", "green apple", "blue cat")


class Painter(torch.nn.Module):
    """Knows the pictures of a folder by heart: eps leads to that of the caption `says(i)`, told the caption i."""

    def __init__(self, folder: Path, says: Callable[[int], int]):
        super().__init__()
        words = captioned(folder)
        self.vocabulary, self.diffusion, self.says = words.vocabulary(), Diffusion(), says
        self.ids, self.pictures = self.vocabulary.encode(*words.captions), to_tensor(words.images(16))
        self.config = UNetConfig(image_size=16, model_channels=32, channel_mult=(1,), attention_resolutions=(),
                                 context_dim=8, num_tokens=1 + len(self.vocabulary.words))  # fmt: skip
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.passes = []

    def forward_full(self, x, t, branch, context):
        self.passes.append((len(x), "full"))
        told = (context[:, None] == self.ids).all(dim=2).float().argmax(dim=1).tolist()
        x0 = torch.stack([self.pictures[self.says(i)] for i in told]) * (context != 0).any(dim=1)[:, None, None, None]
        signal, noise = self.diffusion.scales(t, x)
        return (x - signal * x0) / noise, x0

    def forward_partial(self, x, t, cached_U, branch, context):
        eps, _ = self.forward_full(x, t, branch, context)
        self.passes[-1] = (len(x), "partial")
        return eps


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(captions, "HELD_OUT", 1 / 3)  # two pictures of six
    return draw_emoji(tmp_path / "emoji", NAMES)


def run(monkeypatch, folder, *flags, says: Callable[[int], int] = lambda i: i) -> tuple[Painter, dict[str, list[str]]]:
    """The network that was judged, and the rows of accuracy.md."""
    painter, out = Painter(folder, says), folder.parent / "out"
    monkeypatch.setattr(accuracy, "load", lambda name: painter)
    accuracy.main(accuracy.parse(["--ckpt", "x", "--data", str(folder), "--out", str(out), *map(str, flags)]))
    lines = [line.split("|")[1:-1] for line in (out / "accuracy.md").read_text().splitlines() if "|" in line]
    return painter, {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_who_paints_what_he_is_told_is_right(folder, monkeypatch, capsys):
    painter, rows = run(monkeypatch, folder, "--batch-size", 3)
    assert list(rows) == ["captions", "---", "held out", "trained"]
    assert rows["captions"] == ["n", "right", "+-", "among the 10 nearest", "by chance"]
    assert rows["held out"] == ["2", "1", "0", "1", "0.3333"] and rows["trained"] == ["4", "1", "0", "1", "0.3333"]
    assert painter.passes == [(2 * n, "full") for n in (2, 3, 1) for _ in range(50)]  # guided, hence twice as many
    assert "ddim, uniform, 50 steps, guidance 3, 100.0 full passes" in capsys.readouterr().out
    with Image.open(folder.parent / "out" / "accuracy.png") as image:
        assert image.size == (6 * (2 * 96 + 4) + 4, 96 + BAND + 8)
        left, right = (np.asarray(image)[4 : 4 + 96, x : x + 96] for x in (4, 4 + 96))
    assert (left == left[0, 0]).all() and (right == right[0, 0]).all()
    assert (left[0, 0] > 128).tolist() == (right[0, 0] > 128).tolist()  # the other style of the same name


def test_who_paints_another_name_is_wrong(folder, monkeypatch):
    rows = run(monkeypatch, folder, says=lambda i: (i + 1) % 3)[1]
    assert rows["held out"][1:4] == rows["trained"][1:4] == ["0", "0", "1"]
    right = [captioned(folder).names[i] == "red apple thing" for i in captioned(folder).training()]
    rows = run(monkeypatch, folder, says=lambda i: 0)[1]
    share = sum(right) / 4
    assert 0 < share < 1 and rows["trained"][1:3] == [f"{share:g}", f"{(share * (1 - share) / 4) ** 0.5:.4g}"]


def test_the_other_style_counts(folder, monkeypatch):
    rows = run(monkeypatch, folder, "--guidance", 1, says=lambda i: (i + 3) % 6)[1]
    assert rows["held out"][1] == rows["trained"][1] == "1"


def test_a_picture_may_have_several_captions(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for k in range(4):
        Image.new("RGB", (16, 16), tuple(200 * (k == c) for c in range(3))).save(tmp_path / "data" / f"{k}.png")
    said = [f"{k}.png,{way} {'abcd'[k]}\n" for way in ("cat", "a picture of cat") for k in range(4)]
    shutil.copy(tmp_path / "data" / "3.png", tmp_path / "data" / "copy.png")  # and it may have several files
    (tmp_path / "data" / "captions.csv").write_text("".join([*said, "copy.png,a copy\n"]))
    assert run(monkeypatch, tmp_path / "data")[1]["trained"] == ["9", "1", "0", "1", "0.25"]


def test_plans_are_judged(folder, monkeypatch, tmp_path):
    Recipe(CachePlan(6, 1, (0, 4)), "plms", "linspace", guidance=1.0).save(tmp_path / "plan.json")
    painter, rows = run(monkeypatch, folder, "--plan", tmp_path / "plan.json", "--num", 1)
    assert [rows[name][0] for name in ("held out", "trained")] == ["1", "1"]
    passes = [(1, "full" if i in (0, 4) else "partial") for i in range(6)]
    assert painter.passes == 2 * passes
    with pytest.raises(ValueError, match="--steps 9 contradicts"):
        run(monkeypatch, folder, "--plan", tmp_path / "plan.json", "--steps", 9)


def test_features_see_neither_contrast_nor_a_speck():
    x = noise(2, 3, 32, 32) / 4
    speck = x[:1].clone()
    speck[0, :, 5, 5] = 1
    one, other, stronger, specked = accuracy.features(torch.cat([x, 1.5 * x[:1], speck]))
    assert one.norm() == pytest.approx(1) and one @ stronger > 0.9 and one @ specked > one @ other


def test_nothing_held_out(tmp_path, monkeypatch):
    rows = run(monkeypatch, draw_emoji(tmp_path / "emoji", NAMES))[1]
    assert "held out" not in rows and rows["trained"][0] == "6"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num", "0"], "--num 0 must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--steps", "0"], "steps=0"),
        (["--guidance", "-1"], "guidance=-1"),
        (["--data", "."], r"--data \. has no captions"),
        (["--data", "nowhere"], "there is no folder nowhere"),
        (["--categories", "Flags"], "categories=Flags"),
    ],
)
def test_what_is_refused(folder, monkeypatch, flags, words):
    with pytest.raises(ValueError, match=words):
        run(monkeypatch, folder, *flags)
    assert not (folder.parent / "out").exists()


def test_files_of_others_stay(folder, monkeypatch):
    (out := folder.parent / "out").mkdir()
    for name in ("accuracy.md", "accuracy.png"):
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} exists, and is of no earlier run like this one"):
            run(monkeypatch, folder)
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    run(monkeypatch, folder, "--num", 1)
    run(monkeypatch, folder, "--num", 1)  # over its own


def test_networks_that_cannot_be_judged_are_refused(folder, monkeypatch):
    painter = Painter(folder, lambda i: i)
    monkeypatch.setattr(accuracy, "load", lambda name: painter)
    painter.config = replace(painter.config, in_channels=1, out_channels=1)
    with pytest.raises(ValueError, match="pictures of 3 channels are judged, and x draws 1"):
        accuracy.main(accuracy.parse(["--ckpt", "x", "--data", str(folder)]))
    painter.config = replace(painter.config, in_channels=3, out_channels=3)
    painter.vocabulary = replace(painter.vocabulary, words=(*painter.vocabulary.words, "zebra"))
    with pytest.warns(UserWarning, match="has not just the words that x knows: was it trained on these captions"):
        accuracy.main(accuracy.parse(["--ckpt", "x", "--data", str(folder), "--out", str(folder.parent / "out")]))
    painter.passes.clear()
    painter.vocabulary = None
    with pytest.raises(ValueError, match="--ckpt x knows no words"):
        accuracy.main(accuracy.parse(["--ckpt", "x", "--data", str(folder)]))
    assert not painter.passes
