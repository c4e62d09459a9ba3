"""Makes reference/config.md and reference/cli.md from the code that reads and parses them.

    python docs/_build/reference.py FOLDER    # writes both there, to look at them
"""

import inspect
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import annotated_types
import typer.main
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lorafusion_jax.config import schema
from lorafusion_jax.config.schema import Section

_CONFIG_INTRO = """\
# Configuration

One YAML or TOML file describes a run. This page is made from the schema that validates it: a key
that is not here is refused, with the nearest known key; so is a value of another type, and nothing
is converted (`r: "16"` is an error). `lorafusion init` writes a commented file to start from.

What stands under `defaults:` (any of the sections of a job) holds for all jobs; a job's own value
wins. Any key can be overridden on the command line with `--set`, as in
`--set jobs.sql.lora.r=32` or `--set batching.max_length=512`.
Relative paths start at the folder of the file.

A job may have one more section, which is no setting of it but makes several jobs of it, one for every
combination: `sweep: {lora.r: [8, 32], optim.lr: [1.0e-4, 3.0e-4]}`. See
[Try several settings](../howto/sweep.md).
"""

# Keys that the program writes for itself.
_OWN = ("swept",)

_CLI_INTRO = """\
# Commands

Made from the command line's own definition. All commands print errors as one message that says what
was got, what was expected and how to fix it; [Troubleshooting](../howto/troubleshooting.md) has the
exit codes.
"""


def pages() -> dict[str, str]:
    """Returns the made pages by file name."""
    return {"config.md": config_page(), "cli.md": cli_page()}


def attributes_of(section: type[Section]) -> dict[str, str]:
    """Reads the `Attributes:` of a section's docstring."""
    doc = inspect.cleandoc(section.__doc__ or "")
    _, _, listed = doc.partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.finditer(r"^    (\w+): (.*?)(?=^    \w|\Z)", listed, re.M | re.S):
        found[entry[1]] = " ".join(entry[2].split())
    return found


def sections() -> dict[str, type[Section]]:
    """Returns every section by its dotted place, in the order of the schema."""
    found: dict[str, type[Section]] = {}

    def walk(section: type[Section], place: str) -> None:
        found[place] = section
        for name, field in shown(section).items():
            for kind in _section_types(field.annotation):
                walk(kind, f"{place}.{name}".lstrip("."))

    walk(schema.RunConfig, "")
    return found


def shown(section: type[Section]) -> dict[str, FieldInfo]:
    """Returns the keys that a user may write."""
    return {k: v for k, v in section.model_fields.items() if k not in _OWN}


def _section_types(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [kind for part in typing.get_args(annotation) for kind in _section_types(part)]


def config_page() -> str:
    """Returns the configuration reference as Markdown."""
    parts = [_CONFIG_INTRO]
    for place, section in sections().items():
        intro = inspect.cleandoc(section.__doc__ or "").partition("Attributes:")[0].strip()
        parts.append(f"## {heading(place)}\n\n{intro}\n")
        described = attributes_of(section)
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in shown(section).items():
            meaning = described.get(name) or _below(field)
            cells = (f"`{name}`", type_text(field), default_text(field), meaning)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _below(field: FieldInfo) -> str:
    """Returns the first line of the section that a key holds."""
    kinds = _section_types(field.annotation)
    return inspect.cleandoc(kinds[0].__doc__ or "").partition("\n")[0] if kinds else ""


def heading(place: str) -> str:
    """Returns a section's heading: its place in the file."""
    if not place:
        return "The file"
    return f"`{re.sub('^jobs', 'jobs[]', place)}`"


def type_text(field: FieldInfo) -> str:
    """Returns a field's type and limits in words, such as `int`, at least 1."""
    limits = []
    for limit in field.metadata:
        match limit:
            case annotated_types.Ge(ge=value):
                limits.append(f"at least {value}")
            case annotated_types.Gt(gt=value):
                limits.append(f"above {value}")
            case annotated_types.Le(le=value):
                limits.append(f"at most {value}")
            case annotated_types.Lt(lt=value):
                limits.append(f"below {_power(value)}")
    return ", ".join([_annotation(field.annotation), *limits])


def _power(value: Any) -> str:
    return "2^63" if value == 2**63 else str(value)


def _annotation(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if _section_types(annotation):
        return "list of sections" if origin in (tuple, list) else "section"
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in parts).replace("\\|", "or")
    if origin is typing.Annotated:
        return _annotation(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_annotation(part) for part in parts))
    if origin in (tuple, list):
        return "list of " + " or ".join(dict.fromkeys(_annotation(p) for p in parts if p is not ...))
    if origin is dict:
        return f"mapping of {_annotation(parts[0])} to {_annotation(parts[1])}"
    names = {Any: "anything", str: "text", int: "whole number", float: "number", bool: "true or false"}
    return "null" if annotation is type(None) else names.get(annotation, str(annotation))


def default_text(field: FieldInfo) -> str:
    """Returns a field's default as it would stand in the file."""
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined:  # it depends on other keys
        return "see there"
    value = field.default
    if isinstance(value, Section) or value in ({}, ()):
        return "" if isinstance(value, Section) else "none"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def commands() -> dict[str, Any]:
    """Returns every command by its words, such as `jobs add`."""
    from lorafusion_jax.cli import app

    found: dict[str, Any] = {}

    def walk(group: Any, words: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{words}{name} ")
            elif not command.hidden:
                found[f"{words}{name}"] = command

    walk(typer.main.get_command(app), "")
    return found


def cli_page() -> str:
    """Returns the command reference as Markdown."""
    parts = [_CLI_INTRO]
    for name, command in commands().items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join(
            [f"lorafusion {name}", *(_usage(a) for a in arguments), "[OPTIONS]" if options else ""]
        ).strip()
        help_text = " ".join(inspect.cleandoc(command.help or "").split())
        parts.append(f"## `{name}`\n\n{help_text}\n\n```text\n{usage}\n```\n")
        if arguments or options:
            rows = ["| | meaning | default |", "|---|---|---|"]
            rows += [_parameter(p, p.name.upper()) for p in arguments]
            rows += [_parameter(p, ", ".join([*p.opts, *p.secondary_opts])) for p in options]
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _usage(argument: Any) -> str:
    name = argument.name.upper()
    return name if argument.required else f"[{name}]"


def _parameter(parameter: Any, name: str) -> str:
    value = parameter.default
    shown = "required" if parameter.required else ""
    if value not in (None, False, (), []) and not callable(value):
        shown = f"`{value}`"
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| `{name}` | {text} | {shown} |"


if __name__ == "__main__":
    for file_name, page in pages().items():
        (Path(sys.argv[1]) / file_name).write_text(page)
