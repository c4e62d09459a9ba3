"""Training files: what is read, and what is refused with its line and column."""

import json
import tracemalloc

import numpy as np
import pytest

from lorafusion_jax.data import Message, read_records, records_from_rows
from lorafusion_jax.data.records import records_of
from lorafusion_jax.errors import DataError

ROW = b'{"prompt": "a", "completion": "b"}\n'


def _write(tmp_path, content):
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("row", "kind", "prompt", "completion"),
    [
        ({"text": "abc"}, "text", "", "abc"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", "a", "b"),
        ({"prompt": "", "completion": "b"}, "prompt_completion", "", "b"),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "alpaca",
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
            "3",
        ),
        (
            {"instruction": "Add.", "input": "", "output": "3", "id": 9},
            "alpaca",
            "### Instruction:\nAdd.\n\n### Response:\n",
            "3",
        ),
    ],
)
def test_formats(row, kind, prompt, completion, tmp_path):
    (record,) = read_records(_write(tmp_path, json.dumps(row).encode()))
    assert (record.kind, record.prompt, record.completion) == (kind, prompt, completion)
    assert records_from_rows([row]) == [record]


def test_chat_roles_and_trailing_turns():
    chat = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "unanswered"},
    ]
    (record,) = records_from_rows([{"conversations": chat}])
    assert record.messages == (
        Message("system", "s"),
        Message("user", "u"),
        Message("assistant", "a"),
    )


@pytest.mark.scenario("F1")
def test_tolerated_bytes(tmp_path):
    """Byte order mark, CRLF, blank lines, no final newline; line numbers count them all."""
    row = ROW.strip()
    content = b"\xef\xbb\xbf" + row + b"\r\n\r\n  \n" + row + b"\n\n" + row
    assert [record.line for record in read_records(_write(tmp_path, content))] == [1, 4, 6]


def _chat(turns):
    return json.dumps({"messages": turns}).encode()


BAD = {
    "cut line": (ROW + b'{"prompt": "a", "comp', ":2:", "the line is cut off"),
    "cut number": (ROW + b'{"prompt": 1', ":2:", "cut off"),
    "bad UTF-8": (ROW + b'{"prompt": "\xff"}', ":2:13: ", "byte 0xff is not UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), ":1:1: ", "not UTF-8"),
    "NUL byte": (ROW + b'{"prompt": "a\0"}', ":2:14: ", "control character"),
    "NaN": (ROW + b'{"prompt": NaN}', ":2: ", "NaN is not JSON"),
    "infinity": (ROW + b'{"prompt": -Infinity}', ":2: ", "-Infinity is not JSON"),
    "long number": (ROW + b'{"prompt": ' + b"9" * 5000 + b"}", ":2: ", "digits"),
    "duplicate key": (ROW + b'{"prompt": "a", "prompt": "b"}', ":2: ", "'prompt' is given twice"),
    "nesting": (ROW + b'{"a": ' + b"[" * 100_000 + b"\n", ":2: ", "nested too deeply"),
    "single quotes": (b"{'prompt': 'a'}\n", ":1:2: ", "double quotes"),
    "two objects": (b'{"text": "a"} {"text": "b"}\n', ":1:15: ", "extra data"),
    "JSON array": (b'[{"text": "a"},\n{"text": "b"}]\n', ":1:", "whole JSON object on one line"),
    "pretty-printed": (b'{\n  "text": "a"\n}\n', ":1:", "whole JSON object on one line"),
    "list row": (b"[1]\n", ":1: ", "got a list, expected one JSON object"),
    "null row": (b"null\n", ":1: ", "got null"),
    "empty file": (b"", "data.jsonl: ", "has no rows"),
    "blank file": (b"\n \n\r\n", "data.jsonl: ", "has no rows"),
    "unknown keys": (b'{"question": "a", "answer": "b"}', ":1: ", "'question', 'answer'"),
    "no keys": (b"{}", ":1: ", "got keys none"),
    "two formats": (b'{"text": "a", "messages": []}', ":1: ", "set data.format"),
    "other format later": (ROW + b'{"text": "a"}', ":2: ", "'prompt' is missing"),
    "number": (ROW + b'{"prompt": 3, "completion": "b"}', ":2: ", "prompt is 3, expected a text"),
    "null": (b'{"prompt": "a", "completion": null}', ":1: ", "completion is null"),
    "list of turns": (b'{"prompt": [1], "completion": "b"}', ":1: ", "prompt is a list"),
    "empty completion": (b'{"prompt": "a", "completion": " "}', ":1: ", "completion is empty"),
    "empty text": (b'{"text": ""}', ":1: ", "text is empty"),
    "half a character": (b'{"text": "\\ud800"}', ":1: ", "half a character"),
    "no turns": (b'{"messages": []}', ":1: ", "messages is a list"),
    "turns are text": (b'{"messages": "hi"}', ":1: ", 'messages is "hi"'),
    "turn is text": (b'{"messages": ["hi"]}', ":1: ", "messages[0] is"),
    "unknown role": (_chat([{"role": "bot", "content": "a"}]), ":1: ", 'role is "bot"'),
    "no role": (_chat([{"content": "a"}]), ":1: ", "messages[0] has no role"),
    "parts": (_chat([{"role": "user", "content": [1]}]), ":1: ", "content is a list"),
    "no answer": (_chat([{"role": "user", "content": "a"}]), ":1: ", "no assistant turn"),
    "empty answer": (_chat([{"role": "assistant", "content": ""}]), ":1: ", "content is empty"),
    "tool calls": (
        _chat([{"role": "assistant", "content": "a", "tool_calls": [1]}]),
        ":1: ",
        "tool_calls is not supported",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.scenario("F1")
def test_refused(name, tmp_path):
    content, where, fragment = BAD[name]
    file = _write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_records(file)
    message = str(caught.value)
    assert message.startswith(str(file)) and where in message and fragment in message, message
    assert len(message) < 400 and caught.value.exit_code == 2
    assert caught.value.path == str(file)
    if where.startswith(":2:"):
        assert caught.value.line == 2


@pytest.mark.scenario("F1")
def test_a_huge_line_is_refused_in_bounded_memory(tmp_path):
    file = tmp_path / "data.jsonl"
    with file.open("wb") as out:
        out.write(ROW + b'{"text": "')
        for _ in range(100):
            out.write(b"x" * (1 << 20))
        out.write(b'"}\n')
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r":2: longer than 8 MiB"):
            read_records(file)
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


def test_unreadable_files(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            read_records(path)


def test_rows_in_memory_are_named_by_number():
    with pytest.raises(DataError, match=r"^mine:2: completion is 3, expected a text"):
        records_from_rows([{"prompt": "", "completion": c} for c in ("a", 3)], name="mine")


@pytest.mark.parametrize("tools", [["t"], ("t",), np.asarray(["t", "u"]), {"a": 1}, "t", 1])
def test_what_would_be_lost_is_refused_whatever_holds_it(tools):
    turns = [{"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match="tools is not supported"):
        records_of([(1, {"messages": turns, "tools": tools})], "data", "auto")
    for none in (None, [], np.asarray([]), "", {}):
        assert records_of([(1, {"messages": turns, "tools": none})], "data", "auto")


def test_keys_that_are_no_text_are_shown():
    """Rows in memory come from anywhere."""
    rows = [{1: "a", None: "b", ("x", 2): "c", "y" * 50: "d"}]
    shown = f"'1', 'None', \"('x', 2)\", '{'y' * 30}'"
    with pytest.raises(DataError) as caught:
        records_of(enumerate(rows), "data", "auto")
    assert f"got keys {shown}, expected text" in str(caught.value)
    with pytest.raises(DataError) as caught:
        records_of(enumerate(rows), "data", "auto", {"prompt": "q"})
    assert f"there is no 'q', the row has {shown}" in str(caught.value)
