"""Words to ids: what a network that was trained on captions understands."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

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

    def __post_init__(self):
        object.__setattr__(self, "words", tuple(self.words))  # lists from checkpoints become tuples
        if type(self.length) is not int or not 1 <= self.length <= 1000:
            raise ValueError(f"length={self.length!r} must be a whole number in 1..1000")
        if any(not isinstance(word, str) or words_in(word) != [word] for word in self.words):
            raise ValueError("words must be lower-case words of letters a to z")
        if len(set(self.words)) != len(self.words):
            raise ValueError("a word stands twice in the vocabulary")

    def encode(self, *prompts: str) -> Tensor:
        """Ids [B, length] of B prompts. An empty prompt says nothing: what it draws is left to the network.

        ValueError names a word that is not known, with the nearest known ones, or tells of too many words.
        """
        ids = torch.zeros(len(prompts), self.length, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            words = words_in(prompt)
            for word in words:
                if word not in self.words:
                    near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.6)
                    hint = f"did you mean {', '.join(near)}?" if near else f"it knows {len(self.words)} others"
                    raise ValueError(f"{prompt!r}: the network has not learned the word {word!r}; {hint}")
            if len(words) > self.length:
                raise ValueError(f"{prompt!r} has {len(words)} different words; at most {self.length} are taken")
            row[: len(words)] = torch.tensor([self.words.index(word) + 1 for word in words], dtype=torch.long)
        return ids
