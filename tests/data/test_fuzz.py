"""Random damage to files: a typed, one-screen error or a correct result, never anything else."""

import json
import random

import pytest

from lorafusion_jax.config import load_config
from lorafusion_jax.data import read_records
from lorafusion_jax.errors import ConfigError, DataError
from tests.data.test_bad_config import GOOD

ROWS = [
    {"messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "1"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "do", "input": None, "output": "x"},
    {"text": "Straße \U0001f600"},
]
PIECES = [
    *(b'"', b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\\", b"\0", b"\xff", b"\xef\xbb\xbf"),
    *(b"NaN", b"1e999", b"-0", b"null", b"true", b"\\ud800", b"[" * 300, b"9" * 400, b"- ", b"? "),
    *(b"!!int ", b"&a ", b"*a", b"<<: ", b"---\n", b"%YAML 9\n", b"\t", b"| ", b"> ", b"'", b"#"),
]


def _damaged(content: bytes, choice: random.Random) -> bytes:
    for _ in range(choice.randint(1, 4)):
        at, to = sorted(choice.randrange(len(content) + 1) for _ in range(2))
        match choice.randrange(5):
            case 0:
                content = content[:at] + choice.choice(PIECES) + content[at:]
            case 1:
                content = content[:at] + content[to:] if to - at < 40 else content[:at]
            case 2:
                content = content[:at] + content[at : at + 40] * 2 + content[at + 40 :]
            case 3:
                content = content[:at] + bytes([choice.randrange(256)]) + content[at + 1 :]
            case 4:
                content = content[:at] + choice.choice(PIECES) + content[at + 1 :]
    return content


@pytest.mark.parametrize(("good", "suffix"), [(GOOD.encode(), ".yaml")])
@pytest.mark.scenario("F3")
def test_configurations(good, suffix, tmp_path):
    choice, file, refused = random.Random(1), tmp_path / f"run{suffix}", 0
    for _ in range(500):
        file.write_bytes(_damaged(good, choice))
        try:
            load_config(file)
        except ConfigError as error:
            refused += 1
            assert str(file) in str(error) and len(str(error)) < 6000
    assert refused > 250


@pytest.mark.parametrize("files", [1500, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.scenario("F1")
def test_data_files(tmp_path, files):
    choice, file, refused = random.Random(files), tmp_path / "data.jsonl", 0
    for number in range(files):
        row = json.dumps(ROWS[number % len(ROWS)], ensure_ascii=number % 2 == 0).encode()
        file.write_bytes(_damaged(row + b"\n" + row + b"\n", choice))
        try:
            records = read_records(file)
        except DataError as error:
            refused += 1
            assert str(error).startswith(str(file)) and len(str(error)) < 400
        else:
            for record in records:
                "".join([record.prompt, record.completion, *sum(record.messages, ())]).encode()
    assert refused > files / 2
