"""The configuration as JSON schema, for editors: completion, types and descriptions while typing.

    # yaml-language-server: $schema=lorafusion.schema.json

It describes the file a user writes, so it differs from the records in what loading adds: defaults,
aliases, sweeps.
"""

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from lorafusion_jax.config import schema
from lorafusion_jax.config.load import ALIASES, INHERITED
from lorafusion_jax.config.schema import RunConfig, SweptConfig

_ENTRY = re.compile(r"^([a-z0-9_]+(?:, [a-z0-9_]+)*): ", re.MULTILINE)


def config_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a configuration file."""
    whole = RunConfig.model_json_schema()
    definitions = whole["$defs"]
    for model in sections():
        described = whole if model is RunConfig else definitions[model.__name__]
        described["description"] = (inspect.getdoc(model) or "").partition("\n\n")[0]
        described.pop("title", None)
        for name, text in field_descriptions(model).items():
            field = described["properties"][name]
            described["properties"][name] = {**field, "description": text}
            described["properties"][name].pop("title", None)
    job = definitions["JobConfig"]
    _add_aliases(job, definitions)
    job["properties"].pop("swept")
    definitions.pop(SweptConfig.__name__)
    defaults = {name: copy.deepcopy(job["properties"][name]) for name in INHERITED}
    job["properties"]["sweep"] = {
        "description": "Values to try, by dotted key: one job for each combination.",
        "type": "object",
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    job["required"] = ["name"]  # the data may come from the defaults
    whole["properties"]["defaults"] = {
        "description": "What every job inherits and may set for itself.",
        "type": "object",
        "properties": defaults,
        "additionalProperties": False,
    }
    _drop_computed_defaults(whole)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorafusion configuration",
        **whole,
    }


def sections() -> Iterator[type[BaseModel]]:
    """Yields the record of every section of a configuration."""
    for value in vars(schema).values():
        if isinstance(value, type) and issubclass(value, schema.Section):
            if value is not schema.Section:
                yield value


def field_descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Returns what the docstring of a section says of each of its keys."""
    text = inspect.getdoc(model) or ""
    _, _, attributes = text.partition("Attributes:\n")
    attributes = inspect.cleandoc(attributes.split("\n\n")[0])
    parts = _ENTRY.split(attributes)[1:]
    found = {}
    for names, words in zip(parts[::2], parts[1::2], strict=True):
        for name in names.split(", "):
            if name in model.model_fields:
                found[name] = " ".join(words.split())
    return found


def _add_aliases(job: dict[str, Any], definitions: dict[str, Any]) -> None:
    for section, aliases in ALIASES.items():
        reference = job["properties"][section]["$ref"].rpartition("/")[2]
        properties = definitions[reference]["properties"]
        for alias, name in aliases.items():
            properties[alias] = {**properties[name], "description": f"The same as {name}."}


def _drop_computed_defaults(node: Any) -> None:
    """Removes the defaults of whole sections: they repeat what is below, and are long."""
    if isinstance(node, dict):
        if isinstance(node.get("default"), dict) and node["default"]:
            del node["default"]
        for value in node.values():
            _drop_computed_defaults(value)
    elif isinstance(node, list):
        for value in node:
            _drop_computed_defaults(value)
