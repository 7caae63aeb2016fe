"""mergekit's YAML: what it says as a plan, and one line for what kdcore does not do."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcore.errors import InputError
from kdcore.merging.merge import merge
from kdcore.merging.mergekit import plan_of_yaml
from kdcore.merging.plan import Merge, Model, Plan, Source
from kdcore.merging.plan_file import read_plan

SOUP = """
models:
  - model: hub/alpaca
    parameters:
      weight: 1.0
  - model: hub/beaver
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
"""


def read(text: str) -> Plan:
    return plan_of_yaml(dedent(text))


def result(text: str) -> Merge:
    plan = read(text)
    return plan.merges[plan.out]


def test_linear() -> None:
    plan = read(SOUP)
    assert plan.models == {"alpaca": Model("hub/alpaca"), "beaver": Model("hub/beaver")}
    sources = [Source("alpaca", None, {"weight": 1.0}), Source("beaver", None, {"weight": 0.3})]
    assert plan.merges == {"merged": Merge("linear", [sources])}
    assert (plan.out, plan.dtype, plan.tokenizer, plan.missing) == ("merged", "float16", "", "refuse")


def test_two_models_whose_folders_are_called_alike_and_one_with_an_adapter() -> None:
    plan = read("""
        merge_method: linear
        models: [{model: runs/a/final/}, {model: runs/b/final}, {model: runs/b/final+adapters/polite}]
        """)
    assert plan.models == {
        "final": Model("runs/a/final/"),
        "final-2": Model("runs/b/final"),
        "final+polite": Model("runs/b/final", "adapters/polite"),
    }


def test_slerp_goes_from_the_base_and_has_gradients_by_filter() -> None:
    plan = read("""
        slices:
          - sources:
              - {model: hub/beaver, layer_range: [0, 4]}
              - {model: hub/alpaca, layer_range: [0, 4]}
        merge_method: slerp
        base_model: hub/alpaca
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
        dtype: bfloat16
        """)
    t = {"*self_attn*": [0, 0.5, 0.3, 0.7, 1], "*mlp*": [1, 0.5, 0.7, 0.3, 0], "*": 0.5}
    assert plan.merges["merged"] == Merge(
        "slerp", [[Source("alpaca", (0, 4)), Source("beaver", (0, 4))]], parameters={"t": t}
    )
    assert plan.carrier() == "alpaca"


def test_a_base_that_is_no_model_of_the_list_is_the_first_of_slerp() -> None:
    made = result("{merge_method: slerp, base_model: x/a, models: [{model: x/b}], parameters: {t: 0.25}}")
    assert made == Merge("slerp", [[Source("a"), Source("b")]], parameters={"t": 0.25})


def test_ties_with_its_base_in_the_list_and_settings_of_all_kinds() -> None:
    made = result("""
        models:
          - model: hub/base
          - model: hub/orca
            parameters: {density: [1, 0.7, 0.1], weight: 1.0}
          - model: hub/math
            parameters:
              weight: [{filter: mlp, value: 0.5}, {filter: self_attn, value: 1e-3}]
        merge_method: ties
        base_model: hub/base
        parameters: {weight: 0.2, density: 0.33, normalize: true, int8_mask: true, lambda: 0.9}
        dtype: float16
        """)
    first = Source("orca", None, {"density": [1, 0.7, 0.1], "weight": 1.0})
    second = Source("math", None, {"weight": {"*mlp*": 0.5, "*self_attn*": 1e-3, "*": 0.2}, "density": 0.33})
    assert made == Merge("ties", [[first, second]], "base", {"normalize": True, "scale": 0.9})


@pytest.mark.parametrize(
    ("method", "given", "parameters"),
    [
        ("task_arithmetic", "rescale: true", {}),
        ("ties", "rescale: true", {"rescale": "norm"}),
        ("ties", "rescale: false", {"rescale": "none"}),
        ("dare_ties", "", {"rescale": "norm"}),
        ("dare_linear", "rescale: false", {"rescale": "none"}),
        ("della", "normalize: false", {"rescale": "norm", "normalize": False}),
        ("della_linear", "", {"rescale": "norm"}),
        ("breadcrumbs", "lambda: 2", {"scale": 2}),
        ("breadcrumbs_ties", "t: 0.5", {}),
        ("model_stock", "filter_wise: false", {}),
        ("multislerp", "normalize_weights: true", {}),
    ],
)
def test_methods_of_task_vectors(method: str, given: str, parameters: dict[str, object]) -> None:
    models = "models: [{model: a}, {model: b}, {model: base}]"
    made = result(f"{{merge_method: {method}, base_model: base, {models}, parameters: {{{given}}}}}")
    assert made == Merge(method, [[Source("a"), Source("b")]], "base", parameters)


def test_settings_of_sources_under_their_names_here() -> None:
    models = "models: [{model: a, parameters: {weight: 1, density: 0.5, gamma: 0.02, epsilon: 0.1}}]"
    [crumbs] = result(f"{{merge_method: breadcrumbs, base_model: b, {models}}}").slices[0]
    assert crumbs.parameters == {"weight": 1, "density": 0.5, "gamma": 0.02}
    [della] = result(f"{{merge_method: della, base_model: b, {models}}}").slices[0]
    assert della.parameters == {"weight": 1, "density": 0.5, "epsilon": 0.1}
    [scaled] = result("{merge_method: passthrough, models: [{model: a, parameters: {scale: 0.5}}]}").slices[0]
    assert scaled.parameters == {"weight": 0.5}
    assert result("{merge_method: karcher, models: [{model: a}, {model: b}], parameters: {max_iter: 5}}") == Merge(
        "karcher", [[Source("a"), Source("b")]]
    )


@pytest.mark.parametrize(
    ("first", "second", "t"),
    [
        ("1", "3", 0.75),
        ("[1, 0]", "[0, 1]", [0, 1]),
        ("[{filter: mlp, value: 1}, {value: 3}]", "[{filter: mlp, value: 1}, {value: 1}]", {"*mlp*": 0.5, "*": 0.25}),
        ("1", "-1", 0.5),
    ],
)
def test_nuslerp_is_slerp_by_the_share_of_the_weights(first: str, second: str, t: object) -> None:
    models = f"[{{model: a, parameters: {{weight: {first}}}}}, {{model: b, parameters: {{weight: {second}}}}}]"
    sources = [[Source("a"), Source("b")]]
    assert result(f"{{merge_method: nuslerp, models: {models}}}") == Merge("slerp", sources, "", {"t": t})
    made = result(f"{{merge_method: nuslerp, base_model: base, models: {models}}}")
    assert made == Merge("slerp", sources, "base", {"t": t})


def test_layers_stacked() -> None:
    plan = read("""
        slices:
          - sources: [{model: hub/alpaca, layer_range: [0, 3]}]
          - sources: [{model: hub/beaver, layer_range: [1, 4], parameters: {scale: {filter: o_proj, value: 0.0}}}]
        merge_method: passthrough
        """)
    last = Source("beaver", (1, 4), {"weight": {"*o_proj*": 0.0}})
    assert plan.merges == {"merged": Merge("passthrough", [[Source("alpaca", (0, 3))], [last]])}


def test_filters_are_text_not_patterns() -> None:
    made = result("{merge_method: linear, models: [{model: a}], parameters: {weight: {filter: 'a[0].*?', value: 2}}}")
    assert made.slices[0][0].parameters == {"weight": {"*a[[]0].[*][?]*": 2}}


@pytest.mark.parametrize(
    ("keys", "dtype", "tokenizer"),
    [
        ("tokenizer_source: base, dtype: torch.float32, out_dtype: bfloat16", "bfloat16", "base"),
        ("tokenizer: {source: hub/orca}, dtype: float32", "float32", "orca"),
        ("tokenizer_source: null, chat_template: null, modules: null", "", ""),
    ],
)
def test_dtype_and_tokenizer(keys: str, dtype: str, tokenizer: str) -> None:
    models = "models: [{model: hub/orca}, {model: hub/math}]"
    plan = read(f"{{merge_method: ties, base_model: hub/base, {models}, {keys}}}")
    assert (plan.dtype, plan.tokenizer) == (dtype, tokenizer)


def test_several_documents_are_several_merges() -> None:
    plan = read("""
        name: middle
        merge_method: linear
        models: [{model: hub/instruct}, {model: hub/reasoning}]
        ---
        merge_method: linear
        models:
          - {model: middle, parameters: {weight: 0.6}}
          - {model: hub/pretrained, parameters: {weight: 0.4}}
        missing: keep
        """)
    assert (plan.order(), plan.out, plan.missing) == (["middle", "merged"], "merged", "keep")
    assert plan.merges["merged"].inputs == ["middle", "pretrained"]


def write_model(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight", "model.norm.weight", *(f"model.layers.{k}.mlp.weight" for k in range(4))]
    tensors = {name: torch.randn(6, 5, generator=generator) for name in names}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_hidden_layers": 4}', encoding="utf-8")
    return tensors


def test_slices_with_a_base_and_settings_of_their_own(tmp_path: Path) -> None:
    base, tuned = write_model(tmp_path / "base", 1), write_model(tmp_path / "tuned", 2)
    (tmp_path / "plan.yaml").write_text(
        dedent(f"""
        slices:
          - sources:
              - {{model: {tmp_path}/base, layer_range: [0, 2]}}
              - {{model: {tmp_path}/tuned, layer_range: [1, 3], parameters: {{weight: [0, 1]}}}}
          - sources:
              - {{model: {tmp_path}/base, layer_range: [3, 4]}}
              - {{model: {tmp_path}/tuned, layer_range: [3, 4]}}
            parameters: {{weight: 2, lambda: 0.25}}
        merge_method: task_arithmetic
        base_model: {tmp_path}/base
        """),
        encoding="utf-8",
    )
    plan = read_plan(tmp_path / "plan.yaml")
    assert plan.carrier() == "base"
    merged = load_file(merge(plan, tmp_path / "out") / "model.safetensors")
    name = "model.layers.{}.mlp.weight"
    between = base["model.norm.weight"] + 0.5 * (tuned["model.norm.weight"] - base["model.norm.weight"])
    assert merged["model.embed_tokens.weight"].equal(base["model.embed_tokens.weight"])
    assert merged[name.format(0)].equal(base[name.format(0)])
    torch.testing.assert_close(merged[name.format(1)], tuned[name.format(2)])
    torch.testing.assert_close(
        merged[name.format(2)], base[name.format(3)] + 0.5 * (tuned[name.format(3)] - base[name.format(3)])
    )
    torch.testing.assert_close(merged["model.norm.weight"], between)
    assert len(merged) == 5


def test_settings_of_slices_without_a_base() -> None:
    plan = read("""
        slices:
          - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
            parameters: {t: 0.1}
          - sources: [{model: a, layer_range: [2, 5]}, {model: b, layer_range: [2, 5]}]
        merge_method: slerp
        base_model: a
        parameters: {t: 0.9}
        """)
    assert plan.merges == {
        "slices-0": Merge("slerp", [[Source("a", (0, 2)), Source("b", (0, 2))]], parameters={"t": 0.1}),
        "slices-1": Merge("slerp", [[Source("a", (2, 5)), Source("b", (2, 5))]], parameters={"t": 0.9}),
        "merged": Merge("passthrough", [[Source("slices-0", (0, 2))], [Source("slices-1", (0, 3))]]),
    }


TWO = "models: [{model: a}, {model: b}]"
CUT = "{model: a, layer_range: [0, 2]}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [", "no valid YAML"),
        ("name: 2001-99-99", "no valid YAML: month must be in 1..12"),
        ("name: !!int x", "no valid YAML"),
        ("name: !!bool x", "no valid YAML"),
        ("name: !!timestamp x", "no valid YAML"),
        ("name: " + 5000 * "[", "no valid YAML"),
        ("- linear", "is no configuration of mergekit"),
        ("", "is no configuration of mergekit"),
        (f"{{{TWO}}}", "merge_method = "),
        (f"{{merge_method: sce, {TWO}}}", "merge_method = sce: kdcore has no such method; there are: linear"),
        (f"{{merge_method: [ties], {TWO}}}", "no such method"),
        ("{merge_method: linear}", "models and slices"),
        (f"{{merge_method: linear, {TWO}, slices: [{{sources: [{CUT}]}}]}}", "models and slices"),
        (f"{{merge_method: linear, {TWO}, modules: {{text: 1}}}}", "modules: kdcore does not do this; write"),
        (f"{{merge_method: linear, {TWO}, chat_template: auto}}", "chat_template: kdcore does not do this; leave"),
        (f"{{merge_method: linear, {TWO}, merge_metod: ties}}", "merge_metod: kdcore knows no such key"),
        (f"{{merge_method: linear, {TWO}, tokenizer_source: union}}", "tokenizer_source = union"),
        (f"{{merge_method: linear, {TWO}, tokenizer_source: base}}", "there is no base_model"),
        (f"{{merge_method: linear, {TWO}, tokenizer: {{}}}}", "tokenizer.source = "),
        (f"{{merge_method: linear, {TWO}, tokenizer: {{source: a, tokens: {{x: 1}}}}}}", "tokenizer.tokens"),
        (f"{{merge_method: linear, {TWO}, tokenizer: {{source: a, pad_to_multiple_of: 8}}}}", "pad_to_multiple_of"),
        (f"{{merge_method: linear, {TWO}, dtype: int64}}", "dtype = "),
        (f"{{merge_method: linear, {TWO}, missing: some}}", "missing = "),
        (f"{{merge_method: linear, {TWO}, parameters: {{wieght: 1}}}}", "parameters.wieght"),
        (f"{{merge_method: linear, {TWO}, parameters: [1]}}", "parameters = "),
        (f"{{merge_method: linear, {TWO}, parameters: {{weight: heavy}}}}", "parameters.weight = "),
        (f"{{merge_method: linear, {TWO}, parameters: {{weight: []}}}}", "parameters.weight is empty"),
        (f"{{merge_method: linear, {TWO}, parameters: {{weight: [1, {{value: 2}}]}}}}", "conditions with value"),
        (f"{{merge_method: linear, {TWO}, parameters: {{weight: {{filter: mlp}}}}}}", "conditions with value"),
        (f"{{merge_method: linear, {TWO}, parameters: {{weight: {{filter: 3, value: 1}}}}}}", "filter = 3"),
        (f"{{merge_method: linear, {TWO}, parameters: {{normalize: maybe}}}}", "parameters.normalize = "),
        ("{merge_method: linear, models: [{model: a, parameters: {normalize: true}}]}", "move it to the file's"),
        ("{merge_method: linear, models: [a]}", "models[0] = "),
        ("{merge_method: linear, models: []}", "models must be a list"),
        ("{merge_method: linear, models: [{model: a}, {model: a}]}", "models[1].model: is there twice"),
        ("{merge_method: linear, models: [{model: a@main}]}", "names a revision"),
        ("{merge_method: linear, models: [{model: a+b+c}]}", "must be a folder"),
        ("{merge_method: linear, models: [{model: a, weight: 1}]}", "models[0].weight"),
        (f"{{merge_method: slerp, base_model: a, {TWO}}}", "slerp needs t"),
        (f"{{merge_method: slerp, {TWO}, parameters: {{t: 1}}}}", "base_model: slerp needs one"),
        (f"{{merge_method: slerp, base_model: c, {TWO}, parameters: {{t: 1}}}}", "two models"),
        (f"{{merge_method: ties, {TWO}}}", "base_model: ties needs one"),
        ("{merge_method: ties, base_model: a, models: [{model: a}]}", "needs a model beside"),
        (f"{{merge_method: ties, base_model: c, {TWO}, parameters: {{density: 2}}}}", "density = 2 must be"),
        (f"{{merge_method: model_stock, base_model: c, {TWO}, parameters: {{filter_wise: true}}}}", "whole tensors"),
        (f"{{merge_method: nuslerp, {TWO}, parameters: {{nuslerp_flatten: false}}}}", "leave it true"),
        ("{merge_method: nuslerp, models: [{model: a}]}", "nuslerp takes two"),
        (f"{{merge_method: passthrough, {TWO}}}", "passthrough takes one model, not 2"),
        ("{merge_method: linear, slices: [{sources: [{model: a}]}]}", "slices[0].sources[0].layer_range"),
        ("{merge_method: linear, slices: [{sources: [{model: a, layer_range: [2, 1]}]}]}", "0 <= first < last"),
        (f"{{merge_method: linear, slices: [{{sources: [{CUT}, {{model: b, layer_range: [0, 3]}}]}}]}}", "lengths"),
        (f"{{merge_method: linear, slices: [{{sources: [{CUT}], residual_weight: 1}}]}}", "slices[0].residual_weight"),
        ("{merge_method: linear, slices: [1]}", "slices[0] must be"),
        (f"{{merge_method: ties, base_model: c, slices: [{{sources: [{CUT}]}}]}}", "lacks the base_model"),
        (f"{{merge_method: passthrough, base_model: c, slices: [{{sources: [{CUT}]}}]}}", "tokenizer_source: base"),
        (f"{{merge_method: linear, {TWO}}}\n---\n{{merge_method: linear, {TWO}}}", "name: several documents"),
        (f"{{name: x, merge_method: linear, {TWO}}}\n---\n{{name: y, merge_method: linear, {TWO}}}", "there are 2"),
    ],
)
def test_what_kdcore_does_not_do(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_of_yaml(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nuslerp_with_weights_that_no_t_stands_for() -> None:
    models = "[{model: a, parameters: {weight: [1, 2]}}, {model: b, parameters: {weight: [1, 1]}}]"
    with pytest.raises(InputError, match="add up to one number"):
        read(f"{{merge_method: nuslerp, models: {models}}}")
