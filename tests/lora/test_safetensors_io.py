"""The safetensors reader believes nothing; the writer agrees with the safetensors package."""

import json
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora import safetensors_io
from lorafusion_jax.lora.safetensors_io import read_safetensors, write_safetensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
    "c": np.zeros((0, 3), np.float16),
}


def _file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(shape=(1,), begin=0, end=4, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_round_trip(tmp_path):
    write_safetensors(tmp_path / "x", TENSORS, {"format": "pt"})
    tensors, metadata = read_safetensors(tmp_path / "x")
    assert metadata == {"format": "pt"} and set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors[name], tensor)


def test_the_safetensors_package_reads_what_we_write(tmp_path):
    write_safetensors(tmp_path / "x", TENSORS, {"format": "pt"})
    for name, tensor in safetensors.numpy.load_file(tmp_path / "x").items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


def test_we_read_what_the_safetensors_package_writes(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "x", {"format": "pt"})
    tensors, _ = read_safetensors(tmp_path / "x")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


def test_bytes_depend_on_values_only(tmp_path):
    write_safetensors(tmp_path / "x", TENSORS, {"format": "pt", "by": "us"})
    shuffled = {name: np.asfortranarray(TENSORS[name]) for name in ("c", "b", "a")}
    write_safetensors(tmp_path / "y", shuffled, {"by": "us", "format": "pt"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_transposed_views_are_written_right_where_the_raw_buffer_would_not_be(tmp_path):
    transposed = TENSORS["b"].T
    write_safetensors(tmp_path / "x", {"t": transposed}, {})
    np.testing.assert_array_equal(read_safetensors(tmp_path / "x")[0]["t"], transposed)
    raw = np.frombuffer(transposed.data.tobytes(order="A"), np.float32).reshape(3, 2)
    assert not np.array_equal(raw, transposed)  # the mistake this guards against


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CORPUS = {
    "empty": (b"", "too few"),
    "seven bytes": (b"\0" * 7, "too few"),
    "length lies": (_file({}, length=100), "cut off"),
    "length overflows": (_file({}, length=2**64 - 1), "cut off"),
    "long header": (_file(b"{" + b" " * (3 << 20) + b"}"), "at most"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 40, "cut off"),
    "no object": (_file([]), "start with"),
    "leading space": (_file(b" {}"), "start with"),
    "bad utf-8": (_file(b'{"\xff":1}'), "not valid JSON"),
    "cut json": (_file(b'{"a":'), "not valid JSON"),
    "nan": (_file(b'{"a":NaN}'), "not valid JSON"),
    "deep": (_file(DEEP), "recursion"),
    "huge number": (_file(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "many keys": (_file(b"{" + b'"a":1,' * 300_000 + b'"a":2}'), "duplicate key 'a'"),
    "duplicate tensor": (_file(b'{"a":1,"a":2}'), "duplicate key 'a'"),
    "duplicate field": (_file(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "duplicate key 'dtype'"),
    "metadata": (_file({"__metadata__": {"a": 1}}), "strings"),
    "metadata list": (_file({"__metadata__": []}), "strings"),
    "not an entry": (_file({"a": 1}), "must have"),
    "field missing": (_file({"a": {"dtype": "F32", "shape": []}}), "must have"),
    "field too many": (_file({"a": _entry() | {"x": 1}}, b"\0" * 4), "must have"),
    "dtype": (_file({"a": _entry(dtype="I64", end=8)}, b"\0" * 8), "dtype 'I64'"),
    "dtype list": (_file({"a": _entry(dtype=["F32"])}, b"\0" * 4), "dtype"),
    "negative": (_file({"a": _entry(shape=[-1, -1])}, b"\0" * 4), "impossible"),
    "bool": (_file({"a": _entry(shape=[True])}, b"\0" * 4), "impossible"),
    "float": (_file({"a": _entry(shape=[1.0])}, b"\0" * 4), "impossible"),
    "many axes": (_file({"a": _entry(shape=[1] * 9)}, b"\0" * 4), "impossible"),
    "three offsets": (_file({"a": _entry() | {"data_offsets": [0, 4, 4]}}), "impossible"),
    "reversed": (_file({"a": _entry(begin=4, end=0)}, b"\0" * 4), "does not take"),
    "overflow": (_file({"a": _entry(shape=[2**62, 4])}, b"\0" * 4), "does not take"),
    "short": (_file({"a": _entry()}, b"\0" * 3), "cut off"),
    "extra": (_file({"a": _entry()}, b"\0" * 5), "belong to no tensor"),
    "huge": (_file({"a": _entry(shape=[2**40], end=2**42)}), "cut off"),
    "overlap": (_file({"a": _entry(), "b": _entry()}, b"\0" * 4), "overlaps"),
    "hole": (_file({"a": _entry(), "b": _entry(begin=8, end=12)}, b"\0" * 12), "hole"),
    "starts late": (_file({"a": _entry(begin=4, end=8)}, b"\0" * 8), "hole"),
}


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.scenario("F5")
def test_malformed_files_are_refused_by_name_and_fast(tmp_path, name):
    content, words = CORPUS[name]
    (tmp_path / "x").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(AdapterError, match=words) as caught:
        read_safetensors(tmp_path / "x")
    assert time.perf_counter() - start < 1 and str(tmp_path / "x") in str(caught.value)


def _mutants(rng, content, count):
    """Flipped bytes, mostly of the header, cuts and insertions."""
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(0, len(mutant))
            kind = rng.integers(0, 10)
            if kind < 8:
                mutant[at] = rng.integers(0, 256)
            elif kind == 8:
                del mutant[at:]
            else:
                mutant[at:at] = rng.bytes(3)
            if not mutant:
                break
        yield bytes(mutant)


@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.scenario("F5")
def test_fuzz_only_typed_errors_and_never_more_permissive_than_safetensors(tmp_path, rng, count):
    path = tmp_path / "x"
    write_safetensors(path, TENSORS, {"format": "pt"})
    content, accepted = path.read_bytes(), 0
    for mutant in _mutants(rng, content, count):
        path.write_bytes(mutant)
        try:
            tensors, _ = read_safetensors(path)
        except AdapterError:
            continue
        accepted += 1
        theirs = safetensors.deserialize(mutant)  # what we accept, the reference accepts
        assert {name for name, _ in theirs} == set(tensors)
    assert 0 < accepted < count / 2


@pytest.mark.scenario("F5")
def test_the_fuzz_would_notice_an_unchecked_header(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_check_tiling", lambda *_: None)
    with pytest.raises((AssertionError, safetensors.SafetensorError)):
        test_fuzz_only_typed_errors_and_never_more_permissive_than_safetensors(tmp_path, rng, 500)
