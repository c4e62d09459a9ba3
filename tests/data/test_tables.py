"""CSV, TSV, Parquet, saved data sets and the Hub: same rows as JSONL, errors with their place."""

import json
import sys
import types

import pytest

from lorafusion_jax.data import load_dataset, read_records, read_source, tables
from lorafusion_jax.data.tables import rows_of
from lorafusion_jax.errors import DataError

ROWS = [
    {"question": "Germany?", "answer": 'Alle"magne, oui', "id": 1},
    {"question": "two\nlines?", "answer": "Ünïcode", "id": 2},
]
COLUMNS = {"prompt": "question", "completion": "answer"}


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.fixture
def jsonl(tmp_path):
    return write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))


CSV = 'question,answer,id\r\nGermany?,"Alle""magne, oui",1\r\n\r\n"two\nlines?",Ünïcode,2\r\n'


def same_rows(records, expected):
    return [r._replace(line=0) for r in records] == [r._replace(line=0) for r in expected]


def test_csv_and_tsv_are_the_rows_of_jsonl(tmp_path, jsonl):
    expected = read_records(jsonl, columns=COLUMNS)
    for name, text in (("a.csv", CSV), ("b.tsv", CSV.replace(", oui", "; oui").replace(",", "\t"))):
        records = read_source(write(tmp_path / name, text), columns=COLUMNS)
        assert [record.line for record in records] == [2, 4]
        if name == "a.csv":
            assert same_rows(records, expected)
    bom = write(tmp_path / "bom.csv", "\ufeff" + CSV)
    assert same_rows(read_source(bom, columns=COLUMNS), expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "x.csv: has no first line"),
        ("prompt,completion\n", "x.csv: has no rows"),
        ("prompt,prompt\na,b\n", "x.csv:1: column 'prompt' is given twice"),
        ("prompt,completion\na,b\nc\n", "x.csv:3: 1 cells, expected 2"),
        ('prompt,completion\n"a\nb",c\nd,e,f\n', "x.csv:4: 3 cells, expected 2"),
        ('prompt,completion\na,"b\n', "x.csv:2: not CSV"),
        ("prompt,completion\na,\n", "x.csv:2: completion is empty"),
        ("prompt,completion\na,b\0\n", "x.csv:2: holds a NUL"),
        ("wrong,names\na,b\n", "x.csv:2: got keys 'wrong', 'names'"),
    ],
)
def test_broken_csv_is_refused_by_line(tmp_path, text, words):
    with pytest.raises(DataError) as caught:
        read_source(write(tmp_path / "x.csv", text))
    assert words in str(caught.value)


def test_csv_that_is_not_utf8_or_not_there(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"prompt,completion\na,\xff\n")
    with pytest.raises(DataError, match=r"x\.csv:2:3: byte 0xff"):
        read_source(tmp_path / "x.csv")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_source(tmp_path / "y.csv")


def test_parquet(tmp_path, jsonl):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    records = read_source(path, columns=COLUMNS)
    assert records == read_records(jsonl, columns=COLUMNS)  # rows are numbered as the lines are
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parquet.write_table(pa.Table.from_pylist([{"messages": turns}]), path)
    assert [turn.content for turn in read_source(path)[0].messages] == ["a", "b"]
    parquet.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}]), path)
    with pytest.raises(DataError, match=r"rows\.parquet:2: text is null"):
        read_source(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not Parquet"):
        read_source(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_source(tmp_path / "none.parquet")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_that_datasets_saved(tmp_path, jsonl):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "d")
    expected = read_records(jsonl, columns=COLUMNS)
    assert read_source(tmp_path / "d", columns=COLUMNS) == expected
    assert len(read_source(tmp_path / "d", columns=COLUMNS, split="test")) == 1
    with pytest.raises(DataError, match="has no split 'dev', there are: train, test"):
        read_source(tmp_path / "d", split="dev")
    rows.save_to_disk(tmp_path / "one")
    assert read_source(tmp_path / "one", columns=COLUMNS) == expected
    with pytest.raises(DataError, match="holds one data set without splits, got split 'test'"):
        read_source(tmp_path / "one", columns=COLUMNS, split="test")
    with pytest.raises(DataError, match="is no folder that `datasets` saved"):
        read_source(tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv", "x.parquet", "none.jsonl"])
def test_a_file_has_no_splits(tmp_path, name):
    """The whole file would be read in place of the split that was asked for."""
    if name != "none.jsonl":
        (tmp_path / name).touch()
    for options, words in (
        ({"split": "test"}, "got split 'test', but a file has no splits: remove data.split"),
        ({"subset": "en"}, "got subset 'en', which only data sets of the Hub"),
    ):
        with pytest.raises(DataError) as caught:
            read_source(tmp_path / name, **options)
        assert name in str(caught.value) and words in str(caught.value)
    with pytest.raises(DataError, match="got split 'test'"):  # not hidden by a cached file either
        options = {"split": "test", "cache_dir": tmp_path}
        load_dataset(tmp_path / name, None, max_length=8, **options)


def test_the_hub_goes_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        if name == "no/such":
            raise RuntimeError("not found\nmore")
        return [{"text": "a"}, {"text": 3}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert next(iter(rows_of("hf://a/b", split="test", subset="en"))) == (1, {"text": "a"})
    assert asked == [("a/b", "en", "test")]
    with pytest.raises(DataError, match="hf://a/b:2: text is 3, expected a text"):
        read_source("hf://a/b")
    with pytest.raises(DataError, match=r"hf://no/such: cannot be loaded .*: not found"):
        read_source("hf://no/such")


@pytest.mark.parametrize("path", ["rows.parquet", "folder", "hf://a/b"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, path):
    (tmp_path / "folder").mkdir()

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(tables, "import_module", missing)
    where = path if path.startswith("hf") else tmp_path / path
    with pytest.raises(DataError, match=r"needs the package \w+: pip install 'lorafusion-jax\[dat"):
        read_source(where)


def test_columns_of_other_names(tmp_path, jsonl):
    first = read_records(jsonl, columns=COLUMNS)[0]
    assert (first.kind, first.prompt) == ("prompt_completion", "Germany?")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: data\.columns\.prompt: there is no 'qu'"):
        read_records(jsonl, columns={"prompt": "qu", "completion": "answer"})
    row = {"text": "whole", "q": "Q", "completion": "old", "a": "A"}
    path = write(tmp_path / "both.jsonl", json.dumps(row))
    mapped = read_records(path, columns={"prompt": "q", "completion": "a"})[0]
    assert (mapped.kind, mapped.prompt, mapped.completion) == ("prompt_completion", "Q", "A")
    with pytest.raises(DataError, match="'prompt' is missing, expected for format"):
        read_records(path, "prompt_completion")


def test_swapped_columns(tmp_path):
    path = write(tmp_path / "x.jsonl", json.dumps({"prompt": "p", "completion": "c"}))
    (record,) = read_records(path, columns={"prompt": "completion", "completion": "prompt"})
    assert (record.prompt, record.completion) == ("c", "p")
