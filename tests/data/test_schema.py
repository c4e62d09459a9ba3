"""The JSON schema for editors: complete, described, and the same as the committed copy."""

import json
from pathlib import Path

import pytest
import yaml

from lorafusion_jax.config import template_yaml
from lorafusion_jax.config.json_schema import config_schema, field_descriptions, sections

COPY = Path(__file__).parents[2] / "docs/lorafusion.schema.json"


def test_the_committed_copy_is_current():
    made = json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"
    assert COPY.read_text(encoding="utf-8") == made, (
        "write it again: lorafusion schema > docs/lorafusion.schema.json"
    )


@pytest.mark.parametrize("model", list(sections()), ids=lambda model: model.__name__)
def test_every_key_is_described_in_the_docstring_of_its_section(model):
    described = field_descriptions(model)
    assert set(described) == set(model.model_fields)
    assert all(described.values())


def resolve(node, schema):
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def problems(value, node, schema, where="file"):
    """Keys of a file that the schema does not know: what an editor would underline."""
    node = resolve(node, schema)
    for option in node.get("anyOf", ()):
        if resolve(option, schema).get("type") in ("object", "array"):
            node = resolve(option, schema)
    found = []
    if isinstance(value, dict) and "properties" in node:
        for key, inner in value.items():
            if key not in node["properties"]:
                found.append(f"{where}.{key}")
            else:
                found += problems(inner, node["properties"][key], schema, f"{where}.{key}")
    elif isinstance(value, list) and "items" in node:
        for inner in value:
            found += problems(inner, node["items"], schema, f"{where}[]")
    return found


FILE = """
base: {model: m}
output: o
defaults: {lora: {lora_alpha: 3}, train: {early_stopping: {patience: 2}}}
jobs:
  - name: a
    data: {sources: [{path: x, weight: 1.0}], system: s}
    optim: {learning_rate: 1.0}
    sweep: {lora.r: [1, 2]}
"""


def test_what_loads_is_known_to_the_schema():
    schema = config_schema()
    for text in (template_yaml(), FILE):
        assert problems(yaml.safe_load(text), schema, schema) == []


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("output", "outptu", "file.outptu"),
        ("lora_alpha", "lora_alhpa", "file.defaults.lora.lora_alhpa"),
        ("patience", "patiense", "file.defaults.train.early_stopping.patiense"),
        ("weight", "wieght", "file.jobs[].data.sources[].wieght"),
        ("sweep", "swept", "file.jobs[].swept"),
    ],
)
def test_a_misspelt_key_is_not(old, new, where):
    schema = config_schema()
    assert problems(yaml.safe_load(FILE.replace(old, new)), schema, schema) == [where]
