"""Reads training rows in one of four structures, every error with its line or row.

| format | keys of a row |
|---|---|
| text | `text` |
| prompt_completion | `prompt`, `completion` |
| alpaca | `instruction`, optional `input`, `output` |
| chat | `messages` of `role`, `content`, or `conversations` of `from`, `value` |

Other keys of a row are ignored; keys of other names can be mapped to these. Of JSON Lines, blank
lines, CRLF and a byte order mark are accepted, and memory is bounded by the longest allowed line,
not by the longest line. `lorafusion_jax.data.tables` reads the other kinds of files.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorafusion_jax.errors import DataError

MAX_LINE_BYTES = 8 << 20

type Format = Literal["auto", "text", "prompt_completion", "alpaca", "chat"]
type Columns = Mapping[str, str]
type Kind = Literal["text", "prompt_completion", "alpaca", "chat"]

_REQUIRED: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
_KEYS: dict[Kind, tuple[str, ...]] = {**_REQUIRED, "chat": ("messages", "conversations")}
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
# They would be lost, and the sample would mean something else without them.
_REFUSED_KEYS = ("tools", "images", "tool_calls", "function_call")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Record(NamedTuple):
    """One training row.

    Attributes:
        kind: structure it had.
        line: 1-based line in its file, or row where there are no lines.
        prompt: what the model is given; empty for text and chat.
        completion: what it learns to answer; the whole text for text; empty for chat.
        messages: turns of a chat, the last one the assistant's; empty otherwise.
    """

    kind: Kind
    line: int
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()


def read_records(
    path: str | Path, format: Format = "auto", columns: Columns | None = None
) -> list[Record]:
    """Reads all rows of a JSONL file.

    Args:
        path: the file.
        format: structure of the rows; auto takes it from the keys of the first row.
        columns: the file's own name of a key, by the name in the table above.

    Raises:
        DataError: names file, line and column of what cannot be used.
    """
    return records_of(json_rows(path), str(path), format, columns)


def records_from_rows(
    rows: Iterable[dict[str, Any]],
    format: Format = "auto",
    name: str = "data",
    columns: Columns | None = None,
) -> list[Record]:
    """Reads rows that are already in memory; `name` and the row's number are what errors say."""
    return records_of(enumerate(rows, start=1), name, format, columns)


def records_of(
    rows: Iterable[tuple[int, Any]], name: str, format: Format, columns: Columns | None = None
) -> list[Record]:
    """Reads numbered rows; see `read_records`."""
    return list(_records(rows, name, format, columns or {}))


def with_system(records: Iterable[Record], system: str, name: str = "data") -> list[Record]:
    """Gives rows a system prompt: chats that have none as their first turn, others in the prompt.

    Raises:
        DataError: a row is a text, which has no prompt.
    """
    changed = []
    for record in records:
        if record.kind == "text":
            message = "is a text, which has no room for data.system: remove it"
            raise DataError(message, path=name, line=record.line)
        if record.kind == "chat":
            if record.messages[0].role != "system":
                turns = (Message("system", system), *record.messages)
                record = record._replace(messages=turns)
        else:
            record = record._replace(prompt=f"{system}\n\n{record.prompt}")
        changed.append(record)
    return changed


def json_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields the line and content of each row of a JSONL file."""
    try:
        with Path(path).open("rb") as file:
            yield from _rows(file, str(path))
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read: {reason}", path=str(path)) from None


def _rows(file: Any, path: str) -> Iterator[tuple[int, Any]]:
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            message = f"longer than {MAX_LINE_BYTES >> 20} MiB, expected one JSON object a line"
            raise DataError(message, path=path, line=number)
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield number, _parse(raw, path, number)


def _parse(raw: bytes, path: str, line: int) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
        raise DataError(message, path=path, line=line, column=error.start + 1) from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        problem = f"not a JSON object: {error.msg[:1].lower()}{error.msg[1:]}"
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            problem = "the line is cut off: expected a whole JSON object on one line"
        raise DataError(problem, path=path, line=line, column=error.colno) from None
    except RecursionError:
        raise DataError("nested too deeply", path=path, line=line) from None
    except ValueError as error:
        raise DataError(str(error), path=path, line=line) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:60]!r} is given twice")
    return row


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _records(
    rows: Iterable[tuple[int, Any]], path: str, format: Format, columns: Columns
) -> Iterator[Record]:
    kind = None
    for line, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError(f"got {_shown(row)}, expected one JSON object a line")
            row = _renamed(row, columns)
            if kind is None:
                kind = _detect(row, columns) if format == "auto" else format
            yield _record(row, kind, line)
        except ValueError as error:
            raise DataError(str(error), path=path, line=line) from None
    if kind is None:
        raise DataError("has no rows, expected one JSON object a line", path=path)


def _renamed(row: dict[Any, Any], columns: Columns) -> dict[Any, Any]:
    """The row with the mapped keys under the names of the format; an own key of that name goes."""
    for name, own in columns.items():
        if own not in row:
            there = _names(row)
            raise ValueError(f"data.columns.{name}: there is no {own!r}, the row has {there}")
    kept = {key: value for key, value in row.items() if key not in {*columns, *columns.values()}}
    return kept | {name: row[own] for name, own in columns.items()}


def _detect(row: dict[Any, Any], columns: Columns) -> Kind:
    found: list[Kind] = [
        kind for kind, keys in _REQUIRED.items() if all(key in row for key in keys)
    ]
    if "messages" in row or "conversations" in row:
        found.append("chat")
    if len(found) > 1 and columns:  # the mapped keys say which is meant
        found = [kind for kind in found if set(_KEYS[kind]) & set(columns)] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"could be {' or '.join(found)}: set data.format to one of them")
    raise ValueError(
        f"got keys {_names(row)}, expected text, or prompt and completion, or instruction and "
        "output, or messages; data.columns maps other names: {prompt: question, completion: answer}"
    )


def _names(row: dict[Any, Any]) -> str:
    """The first keys of a row for a message; rows in memory may have keys that are no text."""
    keys = [key if isinstance(key, str) else repr(key) for key in list(row)[:8]]
    return ", ".join(repr(key[:30]) for key in keys) or "none"


def _record(row: dict[str, Any], kind: Kind, line: int) -> Record:
    if kind == "chat":
        return Record(kind, line, messages=_messages(row))
    missing = [key for key in _REQUIRED[kind] if key not in row]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing, expected for format {kind}")
    match kind:
        case "text":
            return Record(kind, line, completion=_text(row, "text"))
        case "prompt_completion":
            prompt = _text(row, "prompt", may_be_empty=True)
            return Record(kind, line, prompt, _text(row, "completion"))
    given = _text(row, "input", may_be_empty=True) if row.get("input") is not None else ""
    prompt = f"### Instruction:\n{_text(row, 'instruction')}\n\n"
    prompt += f"### Input:\n{given}\n\n" if given else ""
    return Record(kind, line, f"{prompt}### Response:\n", _text(row, "output"))


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    if "messages" in row and "conversations" in row:
        raise ValueError("messages and conversations are both given, expected one of them")
    key = "messages" if "messages" in row else "conversations"
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key} is {_shown(turns)}, expected a list of turns")
    _refuse_keys(row, "")
    messages = [_message(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise ValueError(f"{key} has no assistant turn, so there is nothing to learn from")
    return tuple(messages[: answers[-1] + 1])


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {_shown(turn)}, expected an object with role and content")
    _refuse_keys(turn, f"{where}.")
    role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    if role_key not in turn or content_key not in turn:
        raise ValueError(f"{where} has no role and content (or from and value)")
    role = turn[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(
            f"{where}.{role_key} is {_shown(role)}, expected {', '.join(sorted(_ROLES))}"
        )
    may_be_empty = _ROLES[role] != "assistant"
    return Message(_ROLES[role], _text(turn, content_key, f"{where}.", may_be_empty=may_be_empty))


def _refuse_keys(value: dict[str, Any], where: str) -> None:
    for key in _REFUSED_KEYS:
        found = value.get(key)
        # By length, because an array of several elements is neither true nor false.
        if len(found) if isinstance(found, Sized) else found:
            raise ValueError(f"{where}{key} is not supported, expected turns of plain text")


def _text(row: dict[str, Any], key: str, where: str = "", *, may_be_empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}{key} is {_shown(value)}, expected a text")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{where}{key} is empty, so there is nothing to learn from")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise ValueError(f"{where}{key} has half a character, \\u{code:04x}") from None
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
