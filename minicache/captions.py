"""Pictures with words: a folder with a captions.csv, or the emoji of two vendors; and what of them is held out."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from minicache.data import CaptionedSource, all_files, decode
from minicache.images import to_tensor
from minicache.reading import read_whole, understood
from minicache.words import Vocabulary, words_in

CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
LEFT_OUT = {"Component", "Flags", "alphanum", "keycap"}  # categories and subcategories: signs more than pictures
STYLES = {"google": "noto", "twitter": "twemoji"}  # what the vendors call their emoji
LENGTH = 13  # ids of a prompt, unless a caption is longer: prompts may be longer than short captions
EXAMPLES = 16  # captions that a vocabulary shows
HELD_OUT = 0.05  # of the pictures
DROPOUT = 0.1  # of whole captions, for guidance; and of single words, so that each of them counts


@dataclass(frozen=True)
class Captioned:
    """Files of pictures, the caption of each, and the name of what each shows; files are read when asked."""

    files: tuple[Path, ...]
    captions: tuple[str, ...]
    names: tuple[str, ...]

    def images(self, image_size: int) -> Tensor:
        """uint8 [N, S, S, 3], scaled, and cropped about the centre; ValueError where one cannot be read."""
        files = tqdm(self.files, desc="reading", unit="image", disable=None, leave=False)
        size, method = (image_size, image_size), Image.Resampling.LANCZOS
        pictures = (decode(partial(read_whole, file), str(file)) for file in files)
        return torch.from_numpy(np.stack([ImageOps.fit(picture, size, method) for picture in pictures]))

    def vocabulary(self) -> Vocabulary:
        """All words of the captions, in the order of the alphabet; some captions from all over the set as examples."""
        said = [words_in(caption) for caption in self.captions]
        words = sorted({word for words in said for word in words})
        examples = dict.fromkeys(self.captions[k * len(said) // EXAMPLES] for k in range(EXAMPLES))  # each once
        return Vocabulary(tuple(words), max(LENGTH, *map(len, said)), examples=tuple(examples))

    def held_out(self) -> list[int]:
        """The captions of pictures that no training sees: HELD_OUT of all, each of names whose other pictures stay.

        They are drawn from the names that have two pictures, always the same ones; there may be fewer, or none.
        """
        shows: dict[str, list[Path]] = {}  # a picture may have several names, and a name several pictures
        names: dict[Path, list[str]] = {}
        for file, name in zip(self.files, self.names):
            shows.setdefault(name, []).append(file)
            names.setdefault(file, []).append(name)
        pairs = [shows[name] for name in sorted(shows) if len(shows[name]) == 2]
        random, held_out = np.random.RandomState(0), set()
        for k in random.permutation(len(pairs)):
            if len(held_out) < round(HELD_OUT * len(names)):
                drawn = pairs[k][random.randint(2)]
                if all({*shows[name]} - held_out - {drawn} for name in names[drawn]):
                    held_out.add(drawn)
        return [i for i, file in enumerate(self.files) if file in held_out]

    def training(self) -> list[int]:
        """The other captions."""
        return sorted({*range(len(self.files))} - {*self.held_out()})

    def source(self, vocabulary: Vocabulary, image_size: int) -> CaptionedSource:
        """A function draw(n, generator) -> x0 [n, 3, S, S] in [-1, 1], ids [n, length], some of them 0 (DROPOUT).

        Nothing is flipped: captions tell left from right. ValueError for a word that is not in the vocabulary.
        """
        training = self.training()
        ids, images = vocabulary.encode(*self.captions)[training], self.images(image_size)[training]

        def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            drawn = torch.randint(len(images), (n,), generator=generator)
            kept = torch.rand(n, vocabulary.length, generator=generator) > DROPOUT
            kept &= torch.rand(n, 1, generator=generator) > DROPOUT
            return to_tensor(images[drawn]), ids[drawn] * kept

        return draw


def captioned(folder: str | Path, categories: tuple[str, ...] = CATEGORIES) -> Captioned | None:
    """The pictures with words in a folder; None where there are no words, as in a zip.

    folder: holds a captions.csv, or, one or two levels down, the unpacked npm packages emoji-datasource-google and
    emoji-datasource-twitter (one of them, or others of their kind, will do). categories: those of the emoji to take.
    ValueError for what is not as it should be.
    """
    folder = Path(folder)
    if (folder / "captions.csv").is_file():
        return from_csv(folder / "captions.csv")
    vendors = {path.parent.name: path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/img/*/64")}
    if vendors:
        return from_emoji([vendors[name] for name in sorted(vendors)], categories)
    files = all_files(folder) if folder.exists() else []
    if found := [name for name, _ in files if Path(name).name.lower() == "captions.csv"]:
        what = "captions are those of a file captions.csv in the folder itself, which is no zip"
        raise ValueError(f"{folder}: {found[0]} would be overlooked; {what}")
    return None


def from_csv(path: Path) -> Captioned:
    """The pictures of a captions.csv: each line is a file beside it and a caption; the first may be a header."""
    found: list[tuple[Path, str, str]] = []
    with understood(path, "a CSV file in UTF-8"):
        text = io.StringIO(read_whole(path).decode("utf-8-sig"), newline="")
        rows = list(csv.reader(text, strict=True))  # who forgets to close a quote is told
    for number, row in enumerate(rows, start=1):
        cells, where = [cell.strip() for cell in row], f"{path}, line {number}"
        if not any(cells) or (number == 1 and [cell.lower() for cell in cells] == ["file", "caption"]):
            continue
        if len(cells) != 2:
            raise ValueError(f"{where}: need a file and a caption (in quotes, if it has commas), not {','.join(row)!r}")
        file, caption = cells
        if "\n" in caption or "\r" in caption:
            raise ValueError(f"{where}: the caption {caption[:80]!r} goes over several lines; is a quote not closed?")
        if not (path.parent / file).is_file():
            raise ValueError(f"{where}: there is no picture {file!r} in {path.parent}")
        with understood(where, "a caption in words"):
            words = words_in(caption)
        if not words:
            raise ValueError(f"{where}: the caption {caption!r} of {file} has no words of letters a to z")
        whole = Path(os.path.realpath(path.parent / file))  # c.png and ../pictures/c.png are one picture
        found.append((whole, caption, " ".join(words)))
    if not found:
        raise ValueError(f"{path} names no pictures")
    (file, said), often = Counter((file, said) for file, _, said in found).most_common(1)[0]
    if often > 1:  # training would see it so often
        raise ValueError(f"{path}: {file.name} has the caption {said!r} {often} times")
    return Captioned(*zip(*found))


def from_emoji(folders: list[Path], categories: tuple[str, ...]) -> Captioned:
    """The emoji in folders PACKAGE/img/VENDOR/64, as PACKAGE/emoji.json describes them, without skin variations.

    A caption is the words of the emoji's name, then those of its short names, each once, then the vendor's style; the
    name of what it shows is the caption without the style, so that vendors share it.
    """
    found: list[tuple[Path, str, str]] = []
    for folder in folders:
        vendor, table = folder.parent.name, folder.parents[2] / "emoji.json"
        with understood(table, "a table of emoji"):
            rows = [row for row in json.loads(read_whole(table)) if row[f"has_img_{vendor}"]]
            rows = [row for row in rows if not {row["category"], row["subcategory"]} & LEFT_OUT]
            known = {row["category"] for row in rows}
            rows = [row for row in rows if row["category"] in categories]
            named = [(row["image"], re.sub(r"\d", " ", " ".join([row["name"], *row["short_names"]]))) for row in rows]
            said = [(folder / image, words_in(name)) for image, name in named]
        if not categories or set(categories) - known:
            raise ValueError(f"categories={', '.join(categories)}: need some of {', '.join(sorted(known))}")
        for file, words in said:
            if not file.is_file():
                raise ValueError(f"there is no picture {file}, of which {table} tells")
            name = " ".join(words)
            found.append((file, f"{name} {STYLES.get(vendor, vendor)}", name))
    return Captioned(*zip(*found))
