"""Words to ids: what a network that was trained on captions understands, and what is asked of it."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minicache.reading import understood
from minicache.unet import UNet, UNetConfig

LONGEST = 1 << 24  # bytes of a file of prompts


def words_in(caption: str) -> list[str]:
    """Lower-case words of the letters a to z, without accents, each once, in the order of their first occurrence:
    "Red, red rosé" -> red, rose. ValueError for digits and other letters, without which other words are left."""
    parts = unicodedata.normalize("NFD", caption.casefold())  # an accent is a part of its own
    plain = "".join(part for part in parts if not unicodedata.combining(part))
    if other := next((sign for sign in plain if sign.isalnum() and not "a" <= sign <= "z"), None):
        raise ValueError(f"{caption[:80]!r} has the sign {other!r}; words are of the letters a to z")
    return list(dict.fromkeys(re.findall(r"[a-z]+", plain)))


@dataclass(frozen=True)
class Vocabulary:
    """The words that a network knows: words[i] has the id i + 1; id 0 says nothing, and fills a prompt up."""

    words: tuple[str, ...]
    length: int  # ids of a prompt
    guidance: float = 3.0  # that suits the network, unless another is asked for
    examples: tuple[str, ...] = ()  # prompts to show what it can do

    def __post_init__(self):
        for name in ("words", "examples"):  # lists from checkpoints become tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if type(self.length) is not int or not 1 <= self.length <= 1000:
            raise ValueError(f"length={self.length!r} must be a whole number in 1..1000")
        if any(not isinstance(word, str) or words_in(word) != [word] for word in self.words):
            raise ValueError("words must be lower-case words of letters a to z")
        if len(set(self.words)) != len(self.words):
            raise ValueError("a word stands twice in the vocabulary")
        if type(self.guidance) not in (int, float) or not 0 <= self.guidance <= 100:
            raise ValueError(f"guidance={self.guidance!r} must be a number in 0..100")
        self.encode(*self.examples)

    def encode(self, *prompts: str) -> Tensor:
        """Ids [B, length] of B prompts. ValueError for none or too many words, and for one that is not known."""
        ids = torch.zeros(len(prompts), self.length, dtype=torch.long)
        id_of = {word: i for i, word in enumerate(self.words, start=1)}  # tuples are slow to search
        for row, prompt in zip(ids, prompts):
            words = words_in(prompt)
            if not words:
                raise ValueError(f"the prompt {prompt!r} holds no word")
            for word in words:
                if word not in id_of:
                    near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.6)
                    hint = f"did you mean {', '.join(near)}?" if near else f"it knows {len(self.words)} others"
                    raise ValueError(f"{prompt!r}: the network has not learned the word {word!r}; {hint}")
            if len(words) > self.length:
                raise ValueError(f"{prompt!r} has {len(words)} different words; at most {self.length} are taken")
            row[: len(words)] = torch.tensor([id_of[word] for word in words], dtype=torch.long)
        return ids


CLASS_GUIDANCE = 1.5  # that suits LDM-4-G, unless another is asked for


class Prompts(NamedTuple):
    """What is to be drawn: the picture of seed `first + i` shows prompt i modulo their number. No rows: no context."""

    texts: list[str]
    rows: Tensor | None = None  # [N, K] ids, or tokens [N, K, context_dim], of all prompts, or of the first N
    first: int = 0
    guidance: float = 1.0
    negative: Tensor | None = None  # [1, ...], what guidance leads away from; None: the null context

    def context(self, seeds: Iterable[int]) -> dict[str, Tensor]:
        """Keyword arguments for `sample` and `denoise`: the context of each seed's prompt, and the negative one."""
        which = [(seed - self.first) % len(self.texts) for seed in seeds] if self.texts else []
        contexts = {"context": None if self.rows is None else self.rows[which], "negative": self.negative}
        return {name: context for name, context in contexts.items() if context is not None}

    def labels(self, seeds: Iterable[int]) -> list[str]:
        """The prompt of each seed."""
        return [self.texts[(seed - self.first) % len(self.texts)] for seed in seeds] if self.texts else []


def prompts_for(
    name: str,
    unet: UNet,
    words: Any,
    *,
    prompt: list[str] | None = None,
    prompts: str | Path | None = None,
    label: list[int] | None = None,
    negative: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    num: int | None = None,
) -> Prompts:
    """What is asked for by sample.py's flags, else the network's own examples.

    name: the network's. words: what it understands, a Vocabulary or its like; None: nothing, or classes. prompts: a
    file of a prompt a line. seed: of the first picture. num: of pictures; no more prompts are encoded, as a file may
    hold many. ValueError for what the network does not understand.
    """
    asked = {"prompt": prompt, "prompts": prompts, "class": label, "negative": negative, "guidance": guidance}
    flag = next((flag for flag, value in asked.items() if value is not None), None)
    if unet.config.context_dim is None:
        if flag:
            raise ValueError(f"--{flag}: {name} cannot be told what to draw")
        return Prompts([])
    if words is None:
        if unet.config.num_tokens is None:
            raise ValueError(f"{name} takes a context of tokens, which Python alone can give it")
        if prompt or prompts or negative or not label:
            raise ValueError(f"{name} knows classes, not words: say which with --class")
        return Prompts(*classes(label, unet.config), seed, CLASS_GUIDANCE if guidance is None else guidance)
    if label:
        raise ValueError(f"--class: {name} knows words, not classes: use --prompt")
    texts = [*(prompt or ()), *(lines_of(prompts) if prompts else ())] or list(words.examples)
    if not texts:
        if flag and (flag, guidance) != ("guidance", 1):  # which asks for no prompt to be followed
            raise ValueError(f"--{flag}, or guidance of a plan, needs prompts, as {name} has no examples")
        return Prompts([])
    guidance = words.guidance if guidance is None else guidance
    if negative is None and unet.config.num_tokens is None and guidance != 1:
        negative = ""  # there is no null token, but an empty prompt
    away = None if negative is None else words.encode(negative)
    return Prompts(texts, words.encode(*texts[:num]), seed, guidance, away)


def classes(labels: list[int], config: UNetConfig) -> tuple[list[str], Tensor]:
    """What to write under pictures of these classes, and their ids [B, 1]; ValueError for a class that there is not."""
    if not all(0 <= label < config.num_tokens and label != config.null_token for label in labels):
        nothing = f"{config.null_token}, which stands for none"
        raise ValueError(f"--class {labels}: the classes are 0..{config.num_tokens - 1} without {nothing}")
    return [f"class {label}" for label in labels], torch.tensor(labels)[:, None]


def lines_of(path: str | Path) -> list[str]:
    """The lines of a file of prompts that hold one; ValueError where none does."""
    with open(path, "rb") as file:  # perhaps a pipe, and perhaps without an end
        content = file.read(LONGEST + 1)
    with understood(path, "a text in UTF-8"):
        if len(content) > LONGEST:
            raise ValueError(f"it has more than {LONGEST:,} bytes")
        lines = [line for line in re.split(r"\r\n|\r|\n", content.decode("utf-8-sig")) if line.strip()]
    if not lines:
        raise ValueError(f"--prompts {path} holds no prompt")
    return lines
