"""The cache of tokenised files: found by content, whole or rebuilt."""

import json
import os

import numpy as np
import pytest

from lorafusion_jax.data import cache, load_dataset, tokenize_dataset, tokenizer_fingerprint
from lorafusion_jax.errors import DataError
from tests.data.tiny_tokenizer import PLAIN_ROWS, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Loader:
    """Loads a file; `built` counts how often it was really tokenised."""

    def __init__(self, folder, tokenizer):
        self.file, self.folder, self.tokenizer = folder / "data.jsonl", folder / "cache", tokenizer
        self.file.write_text("".join(json.dumps(row) + "\n" for row in PLAIN_ROWS))
        self.built = 0

    def __call__(self, **options):
        options = {"max_length": 64, "cache_dir": self.folder, **options}
        return load_dataset(self.file, options.pop("tokenizer", self.tokenizer), **options)

    def tokenize(self, *args, **options):
        self.built += 1
        return tokenize_dataset(*args, **options)


@pytest.fixture
def load(tmp_path, tokenizer, monkeypatch):
    load = Loader(tmp_path, tokenizer)
    monkeypatch.setattr(cache, "tokenize_dataset", load.tokenize)
    return load


def _same(a, b):
    return a.fingerprint == b.fingerprint and (a.lines == b.lines).all() and a.dropped == b.dropped


def test_a_second_load_is_from_the_cache(load):
    first, second = load(), load()
    assert load.built == 1 and _same(first, second)
    assert [path.suffix for path in load.folder.iterdir()] == [".npz"]


def test_without_a_folder_nothing_is_written(load):
    load(cache_dir=None)
    assert not load.folder.exists()


def test_touching_or_moving_the_file_changes_nothing(load):
    load()
    os.utime(load.file, (1, 1))
    load()
    assert load.built == 1


@pytest.mark.parametrize("what", ["row", "max_length", "overlong", "format", "template", "eos"])
def test_whatever_decides_the_tokens_is_part_of_the_key(what, load):
    load()
    options = {"max_length": {"max_length": 63}, "overlong": {"overlong": "drop"}}.get(what, {})
    if what == "format":
        options = {"format": "prompt_completion"}
    if what == "row":
        load.file.write_text(load.file.read_text().replace("Paris", "Rome"))
    if what == "template":
        options = {"tokenizer": tiny_tokenizer("{{ messages }}")}
    if what == "eos":
        options = {"tokenizer": tiny_tokenizer()}
        options["tokenizer"].eos_token = "<|endoftext|>"
    load(**options)
    assert load.built == 2


def test_the_tokenizers_fingerprint_does_not_depend_on_its_use(tokenizer):
    other = tiny_tokenizer()
    other(["a", "bb bb"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)


def test_damage_is_noticed_and_repaired(load, rng):
    """Every kind of damage: cut anywhere, any bit flipped, emptied, another file's content."""
    good = load()
    (path,) = load.folder.iterdir()
    whole = path.read_bytes()
    flips = rng.integers(0, len(whole) * 8, 60)
    damaged = [whole[:cut] for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for flip in flips:
        content = bytearray(whole)
        content[flip // 8] ^= 1 << (flip % 8)
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        assert _same(load(), good)
    assert load.built > 30  # the rest hit bytes without meaning, such as dates
    assert path.read_bytes() != damaged[-1] or load.built < len(damaged) + 1


def test_a_wrong_fingerprint_is_not_believed(load, tmp_path):
    good = load()
    (path,) = load.folder.iterdir()
    with np.load(path) as arrays:
        content = dict(arrays)
    content["tokens"] = content["tokens"] + 1
    np.savez(path, **content)
    assert _same(load(), good) and load.built == 2


def test_a_failed_write_leaves_nothing(load, monkeypatch):
    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        load()
    assert list(load.folder.iterdir()) == []


def test_a_bad_file_is_not_cached(load):
    load.file.write_text('{"prompt": 3}')
    with pytest.raises(DataError):
        load()
    assert not load.folder.exists()
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(load.file.parent / "none", None, max_length=3, cache_dir=load.folder)
