"""Prompts become ids, and back come sentences about what is not known."""

import pytest

from minicache.words import Vocabulary, lines_of, words_in

WORDS = Vocabulary(("cat", "dog", "face", "noto", "red"), length=4)


def test_words_are_lower_case_letters_each_once():
    assert words_in("Red, red ROSE!  rose-hip _") == ["red", "rose", "hip"]
    assert words_in("  ") == []
    for caption in ("øre", "red кот", "łódź", "digit 3", "2²"):
        with pytest.raises(ValueError, match=r"has the sign '[øкł32]'; words are of the letters a to z"):
            words_in(caption)
    assert words_in("Café naïve cafe\u0301 Straße") == ["cafe", "naive", "strasse"]


def test_encode():
    assert WORDS.encode("cat face").tolist() == [[1, 3, 0, 0]]
    assert WORDS.encode("Dog, dog", "red face noto cat").tolist() == [[2, 0, 0, 0], [5, 3, 4, 1]]
    assert WORDS.encode().shape == (0, 4)


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("cat fase", "has not learned the word 'fase'; did you mean face"),
        ("xylophone", "has not learned the word 'xylophone'; it knows 5"),
        ("", "holds no word"),
        ("? +", "holds no word"),
        ("cat dog face noto red", "5 different words; at most 4"),
    ],
)
def test_what_cannot_be_encoded_is_said(prompt, words):
    with pytest.raises(ValueError, match=words):
        WORDS.encode(prompt)


def test_examples_are_encoded():
    assert Vocabulary(["cat"], 2, examples=["cat"]).examples == ("cat",)
    with pytest.raises(ValueError, match="'dog'"):
        Vocabulary(["cat"], 2, examples=["dog"])


@pytest.mark.parametrize(
    "words, length",
    [
        (("cat", "cat"), 4),
        (("Cat",), 4),
        (("red rose",), 4),
        ((7,), 4),
        (("cat",), 0),
        (("cat",), 2.0),
        (("cat",), 10**9),
    ],
)
def test_vocabularies_that_make_no_sense_are_refused(words, length):
    with pytest.raises(ValueError):
        Vocabulary(words, length)


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("red cat\n\nblue café\n".encode())
    assert lines_of(path) == ["red cat", "blue café"]
    path.write_bytes("red cat\r\nblue\u2028cat\x0cface\r".encode("utf-8-sig"))  # as some editors write it
    assert lines_of(path) == ["red cat", "blue\u2028cat\x0cface"]
    path.write_bytes(b"blue caf\xe9\n")
    with pytest.raises(ValueError, match=r"prompts\.txt is not a text in UTF-8"):
        lines_of(path)
    with open(path, "wb") as file:
        file.truncate(2**24 + 1)  # zeros, as from /dev/zero
    with pytest.raises(ValueError, match=r"prompts\.txt is not a text in UTF-8: it has more than 16,777,216 bytes"):
        lines_of(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"prompts\.txt holds no prompt"):
        lines_of(path)
