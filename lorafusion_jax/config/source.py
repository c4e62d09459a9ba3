"""Reads YAML or TOML text into plain dicts, remembering the line of every key.

Stricter than YAML asks for, because a configuration is input: JSON's types only, `2e-4` is a number
and `no` is a word (YAML 1.2), no tags, no anchors, no duplicate keys, bounded size and depth.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from lorafusion_jax.errors import ConfigError

MAX_BYTES = 256 << 10
MAX_DEPTH = 20

type Key = tuple[str | int, ...]
type Lines = dict[Key, int]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain scalars and without aliases."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (replaces the class's own table)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not supported; put shared settings under defaults",
                problem_mark=event.start_mark,
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _kind_name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind_name}", re.compile(f"(?:{_pattern})$"), _first
    )


def read_source(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """Reads a configuration file; a `.toml` suffix means TOML, anything else YAML.

    Returns:
        The content as plain types, and the 1-based line of each key path (empty for TOML).

    Raises:
        ConfigError: unreadable, too large, not UTF-8, bad syntax, or not a mapping.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise ConfigError(f"{str(path)!r} is not a file name") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES >> 10} KiB, not a configuration file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: byte {error.start} is not UTF-8") from None
    return parse_toml(text, str(path)) if path.suffix == ".toml" else parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """Parses YAML text; `name` is what error messages call it."""
    lines: Lines = {}
    value = parse_value(text, name, lines)
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: got {_kind(value)}, expected sections such as `base:`, `jobs:`")
    return value, lines


def parse_toml(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """Parses TOML text; `name` is what error messages call it."""
    try:
        return tomllib.loads(text), {}
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None


def parse_value(text: str, name: str, lines: Lines | None = None) -> Any:
    """Parses one YAML value, as in `--set key=value`; an empty text is null."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _plain(node, (), {} if lines is None else lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(f"{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{name}: not YAML: {reason}") from None


def _plain(node: yaml.Node, key: Key, lines: Lines) -> Any:
    lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        _expect_tag(node, "seq")
        return [_plain(item, (*key, i), lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        _expect_tag(node, "map")
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise _error(name_node, "a key must be a word")
            name = name_node.value
            if name in result:
                raise _error(name_node, f"key {name!r} is given twice")
            lines[(*key, name)] = name_node.start_mark.line + 1
            result[name] = _plain(value_node, (*key, name), lines)
        return result
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
    try:
        match kind:
            case "null":
                return None
            case "bool" if text.lower() in ("true", "false"):
                return text.lower() == "true"
            case "int" if len(text) <= 30:
                return int(text)
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return text
    except ValueError:
        pass
    raise _error(node, f"{text[:40]!r} as {node.tag!r} is refused")


def _expect_tag(node: yaml.Node, kind: str) -> None:
    if node.tag != f"tag:yaml.org,2002:{kind}":
        raise _error(node, f"tag {node.tag!r} is refused")


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {list: "a list", str: "a text", bool: "true/false"}.get(type(value), "a number")
