from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_margin_mse.students import TK, build_student, load_student, load_tokenizer, tokenize
from kd_plugin_margin_mse.students.tk import (
    KERNEL_MEANS,
    kernel_pooling,
    nearest_divisor,
    sinusoidal_positions,
)
from kd_plugin_margin_mse.students.tokenizer import read_word_vectors, word_vector_matrix
from transformers import AutoTokenizer

from kdcore.errors import InputError

WORDS = ["the", "drag", "wing", "sound", "speed", ",", ".", "of", "lift", "is"]


@pytest.fixture
def glove(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(WORDS), 20, generator=generator).tolist()
    lines = [" ".join([word, *(f"{value:.4f}" for value in vector)]) for word, vector in zip(WORDS, vectors)]
    path = tmp_path / "glove.20d.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def plain_kernel_pooling(cosines: list[list[float]], query: list[bool], passage: list[bool]) -> list[float]:
    log_sums, shares = [], []
    for mean in KERNEL_MEANS:
        log_sum = share = 0.0
        for row, is_word in zip(cosines, query):
            if is_word:
                count = sum(math.exp(-((c - mean) ** 2) / (2 * 0.1**2)) for c, real in zip(row, passage) if real)
                log_sum += math.log(max(count, 1e-10))
                share += count / sum(passage)
        log_sums.append(log_sum)
        shares.append(share)
    return log_sums + shares


def test_kernel_pooling_equals_a_plain_loop() -> None:
    cosines = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    query_mask = torch.arange(4) < torch.tensor([4, 2, 1]).unsqueeze(1)
    passage_mask = torch.arange(6) < torch.tensor([1, 6, 3]).unsqueeze(1)
    means = torch.tensor(KERNEL_MEANS, dtype=torch.float64)
    pooled = kernel_pooling(cosines, query_mask, passage_mask, means, 0.1)
    assert pooled.shape == (3, 22)
    for row, matrix, query, passage in zip(pooled, cosines, query_mask, passage_mask):
        expected = plain_kernel_pooling(matrix.tolist(), query.tolist(), passage.tolist())
        assert row.tolist() == pytest.approx(expected, rel=1e-10)


def test_kernel_pooling_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    cosines = (torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_()
    query_mask = torch.tensor([[True, True, False], [True, False, False]])
    passage_mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    means = torch.tensor(KERNEL_MEANS[:4], dtype=torch.float64)
    # a wide kernel, so that no count lies below the floor of the logarithm, where the gradient is cut off
    assert torch.autograd.gradcheck(lambda c: kernel_pooling(c, query_mask, passage_mask, means, 0.5), [cosines])


def test_student_equals_a_plain_reference_in_float64(glove: str) -> None:
    torch.manual_seed(0)
    student = build_student("tk", glove).eval()
    assert isinstance(student, TK)
    tokenizer = load_tokenizer(glove)
    query, passage = "drag of the wing", "The speed of sound , drag is lift"
    score = student(*tokenize(tokenizer, [query], 30), *tokenize(tokenizer, [passage], 200)).item()

    vectors = dict(read_word_vectors(Path(glove)))
    texts = [text.lower().split() for text in (query, passage)]
    words = [[torch.tensor(vectors[word], dtype=torch.float64) for word in text] for text in texts]
    student.double()
    mixed = []
    for sequence in words:
        static = torch.stack(sequence)
        states = (static + sinusoidal_positions(len(sequence), 20).double()).unsqueeze(0)
        for layer in student.context.layers:
            attended, _ = layer.self_attn(states, states, states, need_weights=True)
            states = layer.norm1(states + attended)
            states = layer.norm2(states + layer.linear2(torch.relu(layer.linear1(states))))
        mixed.append(student.alpha * static + (1 - student.alpha) * states[0])
    cosines = [[(q @ p / (q.norm() * p.norm())).item() for p in mixed[1]] for q in mixed[0]]
    pooled = plain_kernel_pooling(cosines, [True] * len(mixed[0]), [True] * len(mixed[1]))
    expected = sum(weight * value for weight, value in zip(student.kernels.linear.weight[0].tolist(), pooled))
    assert score == pytest.approx(expected, abs=1e-4)


def test_unknown_words_and_empty_texts_score_nothing(glove: str) -> None:
    student = build_student("tk", glove).eval()
    tokenizer = load_tokenizer(glove)

    def score(query: str, passage: str) -> float:
        scores: torch.Tensor = student(*tokenize(tokenizer, [query], 30), *tokenize(tokenizer, [passage], 200))
        return scores.item()

    assert score("zyzzyva", "quux") == score("", "quux") == 0.0
    # an unknown word takes part in nothing but the positions of the words after it
    assert score("drag quux", "wing of drag quux") == pytest.approx(score("drag", "wing of drag"), abs=1e-5)
    assert math.isfinite(score("drag", ""))
    both = student(*tokenize(tokenizer, ["", "drag"], 30), *tokenize(tokenizer, ["drag", ""], 200))
    both.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_model_without_word_file_lends_its_embeddings(tiny_bert: str, tokenizer: Any) -> None:
    student = build_student("tk", tiny_bert)
    assert isinstance(student, TK)
    assert student.vectors.weight.shape == (len(tokenizer), 32)
    assert student.heads == 8
    ids, mask = tokenize(tokenizer, ["drag of the wing"], 30)
    represented = student.represent_queries(ids, mask)
    assert represented.mask is not None
    assert represented.mask.tolist() == [[False, True, True, True, True, False]]  # [CLS] and [SEP] match nothing
    norms = represented.values.norm(dim=-1)
    torch.testing.assert_close(norms, represented.mask.float())


def test_layers_are_those_of_its_own_transformer_and_two_where_unset(glove: str, tiny_bert: str) -> None:
    for source in (glove, tiny_bert):
        for layers, built in ((None, 2), (3, 3)):
            student = build_student("tk", source, layers=layers)
            assert isinstance(student, TK)
            assert len(student.context.layers) == built


def test_kernel_parameters_have_a_name_of_their_own(glove: str) -> None:
    names = [name for name, _ in build_student("tk", glove).named_parameters()]
    assert [name for name in names if name.startswith("kernels.")] == ["kernels.linear.weight"]
    assert {name.split(".")[0] for name in names} == {"vectors", "context", "alpha", "kernels"}


def test_saved_with_its_word_tokenizer(glove: str, tmp_path: Path) -> None:
    student, tokenizer = build_student("tk", glove).eval(), load_tokenizer(glove)
    student.save(tmp_path / "student", tokenizer)
    loaded, reread = load_student(tmp_path / "student"), AutoTokenizer.from_pretrained(tmp_path / "student")
    texts = ["Speed, of SOUND.", "the wing's lift"]
    assert [reread(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    assert tokenizer(texts[0])["input_ids"] == [WORDS.index(w) + 2 for w in ("speed", ",", "of", "sound", ".")]
    pair = (*tokenize(reread, texts[:1], 30), *tokenize(reread, texts[1:], 200))
    assert torch.equal(loaded(*pair), student(*pair))


def test_word_vectors_keep_the_files_order_and_numbers(glove: str) -> None:
    matrix = word_vector_matrix(Path(glove))
    assert matrix.shape == (len(WORDS) + 2, 20)
    assert not matrix[:2].any()
    line = Path(glove).read_text().splitlines()[3].split(" ")
    torch.testing.assert_close(matrix[5], torch.tensor([float(value) for value in line[1:]]))


def test_word2vec_header_words_with_spaces_and_repeated_words(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("3 2\nDrag 1 2\n. . . 3 4\nDrag 5 6\n", encoding="utf-8")
    assert [(word, list(vector)) for word, vector in read_word_vectors(path)] == [("Drag", [1, 2]), (". . .", [3, 4])]
    assert load_tokenizer(str(path))("Drag drag")["input_ids"] == [2, 1]  # a cased file keeps capitals apart


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"drag 1 2\nwing 1\n", ":2: expected a word and 2 finite numbers"),
        (b"drag 1 2\nwing 1 two\n", ":2: expected a word and 2 finite numbers"),
        (b"drag 1 2\nwing 1 nan\n", ":2: expected a word and 2 finite numbers"),
        (b"drag 1 2\n\n", ":2: expected a word and 2 finite numbers"),
        (b"drag 1 2\nw\xff 1 2\n", ":2: no UTF-8"),
        (b"drag\n", ":1: expected a word and some finite numbers"),
        (b"", "no word vectors"),
    ],
)
def test_malformed_lines_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        build_student("tk", str(path))


@pytest.mark.parametrize(("dim", "heads"), [(300, 10), (384, 8), (768, 8), (7, 7), (50, 10)])
def test_heads_divide_the_dimension(dim: int, heads: int) -> None:
    assert nearest_divisor(dim, 10) == heads
