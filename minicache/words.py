"""Words to ids: what a network that was trained on captions understands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def words_in(caption: str) -> list[str]:
    """Lower-case words of letters, each once, in the order of their first occurrence: "Red, red rose" -> red, rose."""
    return list(dict.fromkeys(re.findall(r"[a-z]+", caption.lower())))


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


class Prompts(NamedTuple):
    """What is to be drawn: the picture of seed `first + i` shows prompt i modulo their number. No ids: no context."""

    texts: list[str]
    ids: Tensor | None = None  # [number of prompts, K]
    first: int = 0
    guidance: float = 1.0

    def context(self, seeds: Iterable[int]) -> dict[str, Tensor]:
        """Keyword arguments for `sample` and `denoise`: the ids of each seed's prompt, or none."""
        rows = [(seed - self.first) % len(self.texts) for seed in seeds] if self.texts else []
        return {} if self.ids is None else {"context": self.ids[rows]}

    def labels(self, seeds: Iterable[int]) -> list[str]:
        """The prompt of each seed."""
        return [self.texts[(seed - self.first) % len(self.texts)] for seed in seeds] if self.texts else []
