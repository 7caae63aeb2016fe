from __future__ import annotations

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
