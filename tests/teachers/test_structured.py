from __future__ import annotations

import time

import pytest

from kdcore.errors import PluginError
from kdcore.teachers.structured import validated

SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["joy", "fear"]},
        "texts": {"type": "array", "items": {"type": "string", "minLength": 1}},
    },
    "required": ["label"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "text",
    [
        '{"label": "joy"}',
        '```json\n{"label": "joy"}\n```',
        '\n```\n{"label": "joy"}```\n',
        ' ```JSON \n{"label": "joy"}\n```',
        '```json\n\n\n{"label": "joy"}\n\n```',
    ],
)
def test_a_value_with_or_without_a_fence(text):
    assert validated(SCHEMA, text) == {"label": "joy"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"label": "joy"', r"no JSON: Expecting ',' delimiter in line 1, column 16"),
        ('Sure! {"label": "joy"}', "no JSON: Expecting value in line 1, column 1"),
        ('{"label": "joy"} and more', "no JSON: Extra data"),
        ("", "no JSON"),
        ("NaN", "no JSON: NaN is no JSON value"),
        ("[" * 100_000, "no JSON: nested too deeply"),
        ("-1e400", "no JSON: -1e400 is no number that can be held"),
        (f"{'9' * 400}.5", "no JSON: 9999"),
        (r'{"label": "\ud83d"}', "no JSON: holds half of a surrogate pair"),
        ('{"\udc00": "joy"}', "no JSON: holds half of a surrogate pair"),
        ("```\n```", "no JSON"),
        ("```", "no JSON"),
        ('```python\n{"label": "joy"}\n```', "no JSON"),
        ("[]", r"^breaks the schema: \$: \[\] is not of type 'object'$"),
        ("{}", r"^breaks the schema: \$: 'label' is a required property$"),
        ('{"label": "rage"}', r"^breaks the schema: \$\.label: 'rage' is not one of \['joy', 'fear'\]$"),
        ('{"label": "joy", "texts": ["a", "", "b"]}', r"^breaks the schema: \$\.texts\[1\]: '' should be non-empty$"),
        ('{"label": "joy", "more": 1}', r"^breaks the schema: \$: Additional properties are not allowed \('more' was"),
    ],
)
def test_the_message_names_the_place(text, message):
    with pytest.raises(ValueError, match=message):
        validated(SCHEMA, text)


@pytest.mark.parametrize("text", ["```json" + "\n" * 20_000 + "x", "```json\n" + " \n" * 20_000])
def test_a_fence_that_never_ends_takes_no_time(text):
    began = time.process_time()
    with pytest.raises(ValueError, match="no JSON"):
        validated(SCHEMA, text)
    assert time.process_time() - began < 1


def test_a_whole_pair_of_surrogates_is_one_character():
    assert validated({"type": "string", "maxLength": 1}, r'"\ud83d\ude00"') == "\U0001f600"


def test_messages_are_short_and_on_one_line():
    with pytest.raises(ValueError) as caught:
        validated({"type": "integer"}, '"' + "long \\n text " * 1000 + '"')
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)


def test_a_wrong_schema_is_the_plugins_mistake():
    with pytest.raises(PluginError, match=r"JSON schema, \$\.type: 'strin' is not valid"):
        validated({"type": "strin"}, "1")


def test_references_stay_inside_of_the_schema():
    inside = {"$ref": "#/$defs/number", "$defs": {"number": {"type": "integer"}}}
    assert validated(inside, "3") == 3
    with pytest.raises(PluginError, match="inside of the schema"):
        validated({"$ref": "http://127.0.0.1:9/schema.json"}, "3")
