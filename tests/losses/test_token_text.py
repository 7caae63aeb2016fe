from __future__ import annotations

from types import SimpleNamespace

import pytest

from kdcore.losses.token_text import kind, texts


def tokenizer(*tokens: str) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: {token: index for index, token in enumerate(tokens)})


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("byte-level", ["Ġhot", "Ġtea", "hot", "##", "####"]),
        ("sentencepiece", ["▁hot", "▁tea", "hot", "##", "Ġ"]),
        ("wordpiece", ["hot", "tea", "##s", "##ing", "▁"]),
        ("", ["hot", "tea"]),
    ],
)
def test_the_kind_is_that_of_most_markers(name, tokens):
    assert kind({token: index for index, token in enumerate(tokens)}) == name


def test_one_odd_token_makes_no_kind():
    assert kind({"##": 0, **{f"word{index}": index for index in range(1, 100)}}) == ""


BYTES = tokenizer("Ġhot", "hot", "ĠcafÃ©", "Ã", "Ċ", "Ġ##", ",", "ä¸Ń")
PIECES = tokenizer("▁hot", "hot", "▁café", "<0x0A>", "▁##", "▁▁", ",", "中")
WORD_PIECES = tokenizer("hot", "##hot", "café", "##", ",", "##,", "##café", "中")


def test_texts_of_byte_level_tokens():
    assert texts(BYTES, PIECES)[0] == {" hot": 0, "hot": 1, " café": 2, "\n": 4, " ##": 5, ",": 6, "中": 7}


def test_texts_of_sentencepiece_tokens():
    assert texts(BYTES, PIECES)[1] == {" hot": 0, "hot": 1, " café": 2, " ##": 4, "  ": 5, ",": 6, "中": 7}


def test_texts_of_wordpiece_tokens():
    assert texts(WORD_PIECES, PIECES)[0] == {" hot": 0, "hot": 1, " café": 2, "café": 6}


def test_tokens_of_one_kind_are_their_own_texts():
    assert texts(WORD_PIECES, WORD_PIECES)[0] == WORD_PIECES.get_vocab()


def test_special_tokens_are_apart_from_texts():
    special = SimpleNamespace(content="▁hot", special=True)
    marked = SimpleNamespace(get_vocab=PIECES.get_vocab, added_tokens_decoder={0: special})
    assert texts(marked, BYTES)[0]["\0▁hot"] == 0
    assert " hot" not in texts(marked, BYTES)[0]


def test_a_text_that_is_there_twice_is_left_out():
    twice = SimpleNamespace(get_vocab=lambda: {"▁hot": 0, " hot": 1, "▁tea": 2})
    assert texts(twice, BYTES)[0] == {" tea": 2}
