"""Pictures with words: what is read, in which order, what is refused, and what is held out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import draw_emoji
from PIL import Image

from minicache.captions import Captioned, captioned

NAMES = ("red apple", "green apple", "blue cat")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_emoji_of_two_vendors(tmp_path):
    found = captioned(draw_emoji(tmp_path, NAMES))
    names = tuple(f"{name} thing" for name in NAMES)
    assert found.names == 2 * names
    assert found.captions == tuple(f"{name} {style}" for style in ("noto", "twemoji") for name in names)
    images = found.images(16)
    assert images.shape == (6, 16, 16, 3) and images.dtype == torch.uint8
    assert images[:, 5, 5].tolist() == [[v * (c == k) for c in range(3)] for v in (255, 200) for k in range(3)]
    assert found.vocabulary().words == ("apple", "blue", "cat", "green", "noto", "red", "thing", "twemoji")
    assert found.vocabulary().length == 13
    assert found.vocabulary().examples == found.captions  # each once, as there are but six


def test_categories_are_chosen(tmp_path):
    draw_emoji(tmp_path, NAMES)
    assert captioned(tmp_path, ("Animals & Nature",)).names == ("green apple thing",) * 2
    for wrong in (("Flags",), ("Symbols", "Food & Drink"), ()):
        with pytest.raises(ValueError, match="need some of Animals & Nature, Food & Drink, Smileys & Emotion"):
            captioned(tmp_path, wrong)


def test_damaged_emoji_are_refused(tmp_path):
    draw_emoji(tmp_path)
    table = tmp_path / "twitter" / "emoji.json"
    (tmp_path / "twitter" / "img" / "twitter" / "64" / "blue-cat.png").unlink()
    with pytest.raises(ValueError, match=r"there is no picture .*blue-cat\.png"):
        captioned(tmp_path)
    for content in ("{", "[1]", json.dumps([{"has_img_twitter": True}])):
        table.write_text(content)
        with pytest.raises(ValueError, match=r"emoji\.json is not a table of emoji"):
            captioned(tmp_path)
    table.unlink()
    with pytest.raises(ValueError, match=r"emoji\.json is not a table of emoji"):
        captioned(tmp_path)


def pictures(folder, *names: str):
    for name in names:
        Image.new("RGB", (20, 10), (100, 0, 0)).save(folder / name)
    return folder / "captions.csv"


@pytest.mark.parametrize("name", ["Captions.CSV", "pictures/captions.csv"])
@pytest.mark.parametrize("packed", [False, True])
def test_captions_are_not_overlooked(tmp_path, name, packed):
    """Training would go on for hours, without words."""
    (tmp_path / "data" / name).parent.mkdir(parents=True)
    (tmp_path / "data" / name).write_text("a.png,a cat\n")
    data = shutil.make_archive(tmp_path / "data", "zip", tmp_path / "data") if packed else tmp_path / "data"
    if packed or not (data / "captions.csv").is_file():  # it is, where file systems do not tell A from a
        with pytest.raises(ValueError, match=r"(?i)captions\.csv/? would be overlooked; captions are those of"):
            captioned(data)


@pytest.mark.parametrize("header", ["", "File, Caption\n", "\ufefffile,caption\n"])
def test_a_table_of_captions(tmp_path, header):
    table = pictures(tmp_path, "a.png", "b.png", "c.png")
    table.write_text(header + 'a.png,"A red, red rose!"\n\n b.png , a cat \nc.png,A rose (red)\n', encoding="utf-8")
    found = captioned(tmp_path)
    assert [file.name for file in found.files] == ["a.png", "b.png", "c.png"]
    assert found.captions == ("A red, red rose!", "a cat", "A rose (red)")
    assert found.names == ("a red rose", "a cat", "a rose red") and found.images(8).shape == (3, 8, 8, 3)
    assert found.vocabulary().words == ("a", "cat", "red", "rose")


def test_a_long_caption_makes_room_for_itself(tmp_path):
    pictures(tmp_path, "a.png").write_text("a.png,a b c d e f g h i j k l m n o")
    assert captioned(tmp_path).vocabulary().length == 15


@pytest.mark.parametrize(
    "content, words",
    [
        ("a.png,a cat\nb.png,a dog", r"captions\.csv, line 2: there is no picture 'b\.png'"),
        (
            "a.png,a cat, red",
            r"line 1: need a file and a caption \(in quotes, .*\), not 'a.png,a cat, red'",
        ),
        ('a.png,"a cat\na.png,a dog', "is not a CSV file"),
        ('a.png,"a cat\na.png,a ""dog"', "line 1: the caption 'a cat.* goes over several lines"),
        ("a.png", "line 1: need a file and a caption"),
        ("a.png, ", "line 1: the caption '' of a.png has no words"),
        ("a.png,red кот", "line 1 is not a caption in words: 'red кот' has the sign 'к'"),
        ("a.png,Red cat\n./a.png,red cat", r"captions\.csv: a\.png has the caption 'red cat' 2 times"),
        ("a.png,cat\n../{name}/a.png,cat", r"captions\.csv: a\.png has the caption 'cat' 2 times"),
        ("a\0.png,cat", r"line 1: there is no picture 'a\\x00.png'"),
        ("a.png,digit 3", "line 1 is not a caption in words: 'digit 3' has the sign '3'"),
        ("a.png,!", "line 1: the caption '!' of a.png has no words"),
        (",a cat", "line 1: there is no picture ''"),
        ("file,caption\n", "names no pictures"),
        (b"a.png,\xff", "is not a CSV file in UTF-8"),
    ],
)
def test_what_a_table_may_not_say(tmp_path, content, words):
    content = content if isinstance(content, bytes) else content.replace("{name}", tmp_path.name).encode()
    pictures(tmp_path, "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        captioned(tmp_path)


def test_no_words(tmp_path):
    assert captioned(tmp_path) is None and captioned("shapes") is None and captioned(tmp_path / "x.zip") is None


def made_up(*names: str) -> Captioned:
    return Captioned(tuple(Path(str(k)) for k in range(len(names))), names, names)


def test_a_picture_is_held_out_only_where_its_twin_stays():
    names = [f"word{chr(97 + k)}{chr(97 + j)}" for k in range(10) for j in range(10)]
    found = made_up(*names, *names, "alone", "three", "three", "three")
    held_out = found.held_out()
    assert len(held_out) == round(0.05 * 204) and held_out == sorted(set(held_out)) == found.held_out()
    assert sorted(held_out + found.training()) == list(range(204))
    left = [found.names[i] for i in found.training()]
    assert all(left.count(found.names[i]) == 1 for i in held_out) and max(held_out) < 200
    assert min(held_out) < 100 <= max(held_out)  # of both vendors
    assert made_up("a", "b", "c").held_out() == [] and made_up(*"aabb").held_out() == []


def test_a_picture_of_several_captions_is_held_out_only_where_each_name_stays():
    said = [(style, thing, k) for style in "ab" for thing in range(50) for k in range(5)]
    files = tuple(Path(f"{style}{thing}") for style, thing, _ in said)
    found = Captioned(files, names := tuple(f"{thing} in way {k}" for _, thing, k in said), names)
    held_out, training = ({files[i] for i in part} for part in (found.held_out(), found.training()))
    assert len(held_out) == 5 and len(training) == 95 and not held_out & training  # of pictures, not of captions
    assert sorted(found.held_out() + found.training()) == list(range(500))
    assert {names[i] for i in found.training()} == {*names}


def test_a_source_draws_pictures_with_their_words_and_drops_some(tmp_path, monkeypatch):
    found = captioned(draw_emoji(tmp_path))
    words = found.vocabulary()
    monkeypatch.setattr(Captioned, "held_out", lambda self: [2])
    draw = found.source(words, 16)
    x0, ids = draw(2000, generator())
    assert x0.shape == (2000, 3, 16, 16) and ids.shape == (2000, 13) and not ids[:, 4:].any()
    again = draw(2000, generator())
    assert torch.equal(x0, again[0]) and torch.equal(ids, again[1])
    whole = words.encode(*found.captions)
    seen = set()
    for pixel, row in zip(((x0[:, :, 0, 0] + 1) * 127.5).round().int().tolist(), ids):
        seen.add(tuple(pixel))
        light = max(pixel)
        of = 3 * (light == 200) + pixel.index(light)
        assert torch.equal(row, whole[of] * (row != 0))
    assert len(seen) == 5 and (0, 0, 255) not in seen  # that one is held out
    silent = (ids == 0).all(dim=1)
    assert 0.08 < silent.float().mean() < 0.12
    assert 0.08 < (ids[~silent][:, :4] == 0).float().mean() < 0.12
    with pytest.raises(ValueError, match="has not learned the word 'cat'"):
        found.source(type(words)(("apple", "blue", "green", "noto", "red", "thing", "twemoji"), 13), 16)
