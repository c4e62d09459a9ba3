"""Broken configurations: each message names the file, the line and the key, and what to write."""

import pytest

from lorafusion_jax.config import load_config
from lorafusion_jax.errors import ConfigError

GOOD = """\
base: {model: ./m}
output: runs/x
batching: {tokens_per_microbatch: 512}
defaults:
  lora: {r: 8}
  optim: {lr: 1e-3}
jobs:
  - name: sql
    data: {path: sql.jsonl}
    train: {max_steps: 30}
"""

# (what is replaced, by what, fragments of the message); the fragment @N is "file:N: ".
BROKEN = {
    "unknown key": ("r: 8", "rnak: 8", ["@5", "defaults.lora.rnak", "unknown key", "dropout"]),
    "misspelt key": ("max_steps", "max_step", ["@10", "jobs.sql.train.max_step", '"max_steps"']),
    "misspelt section": ("batching", "baching", ["@3", '"batching"']),
    "section in the wrong place": ("output", "lora: {r: 2}\noutput", ["@2", '"defaults.lora"']),
    "key in the wrong place": ("    train", "    lr: 2\n    train", ["@10", '"optim.lr"']),
    "text for a number": ("r: 8", "r: eight", ["@5", "got 'eight'", "a whole number"]),
    "quoted number": ("r: 8", "r: '8'", ["@5", "got '8'", "a whole number"]),
    "true for a number": ("r: 8", "r: true", ["@5", "got true", "a whole number"]),
    "fraction for a whole number": ("r: 8", "r: 8.5", ["@5", "got 8.5", "a whole number"]),
    "rank too large": ("r: 8", "r: 512", ["@5", "got 512", "at most 256"]),
    "rank zero": ("r: 8", "r: 0", ["@5", "got 0", "at least 1"]),
    "nan": ("1e-3", ".nan", ["@6", "defaults.optim.lr", "got nan"]),
    "infinity": ("1e-3", ".inf", ["@6", "got inf", "finite"]),
    "overflow": ("1e-3", "1e999", ["@6", "got inf", "finite"]),
    "negative rate": ("1e-3", "-1e-3", ["@6", "got -0.001", "more than 0"]),
    "choice": ("lr: 1e-3", "name: adamx", ["@6", "'adamx'", "'adamw', 'adam' or 'sgd'"]),
    "dropout of one": ("r: 8", "dropout: 1.0", ["@5", "got 1.0", "less than 1"]),
    "dropout too small": ("r: 8", "dropout: 0.001", ["@5", "0.001", "1/512"]),
    "regex": ("r: 8", "target_modules: '(q'", ["@5", "not a regular expression"]),
    "no modules": ("r: 8", "target_modules: []", ["@5", "got []", "all-linear"]),
    "betas": ("lr: 1e-3", "betas: [0.9, 1.0]", ["@6", "betas", "below 1"]),
    "three betas": ("lr: 1e-3", "betas: [0.9, 0.9, 0.9]", ["@6", "betas"]),
    "decay without adamw": ("lr: 1e-3", "name: sgd, weight_decay: 0.1", ["@6", "adamw"]),
    "both lengths": ("max_steps: 30", "max_steps: 30, epochs: 1", ["@10", "one of them"]),
    "alias twice": ("r: 8", "alpha: 1, lora_alpha: 2", ["@5", "lora_alpha", '"alpha"']),
    "missing section": ("base: {model: ./m}", "", ["base: missing"]),
    "missing key": ("path: sql.jsonl", "", ["@9", "jobs.sql.data: path: missing (or sources"]),
    "no jobs": ("jobs:", "jobs: []\nx:", ["@7", "jobs: got []", "at least 1"]),
    "jobs by name": ("  - name: sql", "  sql:", ["@7", "a list of jobs", "- name:"]),
    "capacity": ("512", "500", ["@3", "500", "multiple of the tile 128", "tile: 16"]),
    "longest sample": ("512", "512, max_length: 600", ["@3", "max_length=600", "at most"]),
    "buckets": ("512", "512, capacities: [256, 128]", ["@3", "[256, 128]", "ascending"]),
    "quantize": ("model: ./m", "model: ./m, quantize: nf4", ["@1", "base.quantize", "remove it"]),
    "other hubs": ("sql.jsonl", "s3://a/b", ["@9", "jobs.sql.data.path", "hf://OWNER/NAME"]),
    "hub path": ("sql.jsonl", "hf://a/b/c", ["@9", "jobs.sql.data.path", "hf://OWNER/NAME"]),
    "column": ("sql.jsonl", "a, columns: {promt: q}", ["@9", "columns.promt", "'prompt'"]),
    "two kinds of source": ("sql.jsonl", "a, sources: [{path: b}]", ["@9", "one of them"]),
    "half weighted": (
        "path: sql.jsonl",
        "sources: [{path: a, weight: 1.0}, {path: b}]",
        ["@9", "all or none"],
    ),
    "weight": ("path: sql.jsonl", "sources: [{path: a, weight: 0}]", ["@9", "more than 0"]),
    "masks": (
        "sql.jsonl",
        "a, train_on_prompt: true, last_turn_only: true",
        ["@9", "exclude each other"],
    ),
    "columns of all sources": (
        "path: sql.jsonl",
        "columns: {prompt: q}, sources: [{path: a}]",
        ["@9", "belong to each source"],
    ),
    "format of all sources": (
        "path: sql.jsonl",
        "format: chat, sources: [{path: a}]",
        ["jobs.sql", "format", "belong to each source"],
    ),
    "split of all sources": (
        "path: sql.jsonl",
        "split: test, sources: [{path: a}]",
        ["jobs.sql", "split", "belong to each source"],
    ),
    "layers": ("r: 8", "layers_to_transform: [0], target_modules: .*q", ["@5", "a regex can"]),
    "layer": ("r: 8", "layers_to_transform: [-1]", ["@5", "numbers from 0"]),
    "pattern": ("r: 8", "rank_pattern: {q: 300}", ["@5", "rank_pattern.q", "at most 256"]),
    "pattern regex": ("r: 8", "rank_pattern: {'(': 3}", ["@5", "not a regular expression"]),
    "lora plus": ("lr: 1e-3", "lora_plus_ratio: 0", ["@6", "lora_plus_ratio", "more than 0"]),
    "init_from": (
        "    train",
        "    init_from: ./a\n    train",
        ["@10", "init_from", "lora.init_from"],
    ),
    "sweep": ("output", "sweep: {job: sql}\noutput", ["@2", "sweep", "belongs to a job"]),
    "sweep of nothing": ("    train", "    sweep: {}\n    train", ["@10", "dotted keys"]),
    "swept name": ("    train", "    sweep: {name: [a]}\n    train", ["@10", "such as lora.r"]),
    "swept value": ("    train", "    sweep: {lora.r: 8}\n    train", ["@10", "a list of values"]),
    "swept twice": ("    train", "    sweep: {lora.r: [8, 8]}\n    train", ["@10", "given twice"]),
    "bad swept value": (
        "    train",
        "    sweep:\n      lora.r: [8, 0]\n    train",
        ["@11", "jobs.sql.sweep.lora.r", "got 0", "at least 1"],
    ),
    "unknown swept key": (
        "    train",
        "    sweep: {lora.rank: [8]}\n    train",
        ["@10", "jobs.sql.sweep.lora.rank", 'did you mean "r"'],
    ),
    "huge sweep": (
        "    train",
        f"    sweep: {{optim.lr: {list(range(1, 300))}}}\n    train",
        ["@10", "299 jobs"],
    ),
    "sink": ("output", "report: {to: [mlflow]}\noutput", ["@2", "report.to", "'tensorboard'"]),
    "patience": (
        "train:",
        "eval: {early_stopping_patience: 2}\n    train:",
        ["@10", "train.early_stopping.patience"],
    ),
    "stopping without rows": (
        "max_steps: 30",
        "max_steps: 30, early_stopping: {patience: 1}}\n    eval: {split: 0",
        ["jobs.sql", "needs held-out rows"],
    ),
    "version": ("output", "version: 2\noutput", ["@2", "version", "got 2", "expected 1"]),
    "split": ("train:", "eval: {split: 1.5}\n    train:", ["@10", "got 1.5", "a share"]),
    "name with a slash": ("name: sql", "name: a/b", ["@8", "'a/b'", "1 to 64 of"]),
    "name that climbs": ("name: sql", "name: ..", ["@8", "without a leading dot"]),
    "absolute name": ("name: sql", "name: /etc/x", ["@8", "1 to 64 of"]),
    "empty name": ("name: sql", "name: ''", ["@8", "1 to 64 of"]),
    "long name": ("name: sql", f"name: {'a' * 300}", ["@8", "1 to 64 of"]),
    "name with NUL": ("name: sql", 'name: "a\\0b"', ["@8", "1 to 64 of"]),
    "name of a device": ("name: sql", "name: CON", ["@8", "rename the job"]),
    "device with a suffix": ("name: sql", "name: nul.txt", ["@8", "rename the job"]),
    "name with a line end": ("name: sql", 'name: "sql\\n"', ["@8", "1 to 64 of"]),
    "number as a name": ("name: sql", "name: 3", ["@8", "got 3", "a text"]),
    "unicode name": ("name: sql", "name: \uff53ql", ["@8", "1 to 64 of"]),
    "same name": (
        "  - name: sql",
        "  - {name: SQL, data: {path: x}}\n  - name: sql",
        ["@9", "got 'sql' beside 'SQL'", "differ in more than case"],
    ),
    "syntax": ("base: {model: ./m}", "base: {model: ./m", [":2:7: ", "expected ',' or '}'"]),
    "tab": ("  lora", "\tlora", [":5:1: ", "'\\t'"]),
    "duplicate key": ("output", "base: 3\noutput", [":2:1: ", "'base' is given twice"]),
    "anchor": ("r: 8", "r: &a 8", [":5:", "anchors and aliases"]),
    "tag": ("r: 8", "r: !!python/name:os.system x", [":5:", "is refused"]),
    "object": ("r: 8", "r: !!python/object/apply:os.system [ls]", [":5:", "is refused"]),
    "wrong explicit tag": ("r: 8", "r: !!int x", [":5:", "is refused"]),
    "nesting": ("r: 8", "r: " + "[" * 10_000, [":5:", "nested deeper than 20"]),
    "long number": ("r: 8", "r: " + "9" * 5000, [":5:", "is refused"]),
    "two documents": ("output", "---\noutput", [":2:", "document"]),
    "list": (GOOD, "- 1\n- 2\n", ["got a list", "sections"]),
    "empty": (GOOD, "", ["got nothing", "sections"]),
    "control character": ("runs/x", "runs/\x07", ["special characters are not allowed"]),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.scenario("F3", "F4")
def test_broken_yaml(name, tmp_path):
    old, new, fragments = BROKEN[name]
    assert old in GOOD
    file = tmp_path / "run.yaml"
    file.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    _expect(file, fragments)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]  # nothing was written


def _expect(file, fragments, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    for fragment in fragments:
        wanted = f"{file}:{fragment[1:]}: " if fragment.startswith("@") else fragment
        assert wanted in message, message
    assert str(file) in message or overrides
    assert "Traceback" not in message and "pydantic" not in message
    assert len(message.splitlines()) <= 6 and max(map(len, message.splitlines())) < 400
    assert caught.value.exit_code == 2


@pytest.mark.scenario("F3")
def test_the_good_one_is_good(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    assert load_config(file).jobs[0].lora.r == 8


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        ("jobs.sqk.lora.r=3", 'did you mean "sql"?'),
        ("jobs.zzz.lora.r=3", "jobs are sql"),
        ("jobs.sql=3", "names a job that is not there"),
        ("output.x=3", "needs a section here"),
        ("jobs.sql.lora.rr=3", "--set: jobs.sql.lora.rr: unknown key"),
        ("seed=[", "--set seed:1:2: "),
        ("seed=x", "--set: seed: got 'x'"),
        ("jobs=3", "a list of jobs"),
        ("jobs.sql.lora=3", "got 3, expected a section with keys"),
    ],
)
@pytest.mark.scenario("F3")
def test_broken_overrides(override, fragment, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    _expect(file, [fragment], [override])


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"a: \xff\n", ":1: byte 3 is not UTF-8"),
        (b"a: 1\n" * 100_000, "larger than 256 KiB"),
        (b"[" * 200_000, "nested deeper than 20"),
    ],
)
@pytest.mark.scenario("F3")
def test_broken_bytes(content, fragment, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    _expect(file, [fragment])


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("a = \n", "line 1"),
        ("a = 1\na = 2\n", "line 2"),
        (f"a = {'[' * 5000}", "nested too deeply"),
        ("output = 1979-05-27\n[base]\nmodel='m'\n[[jobs]]\nname='a'\ndata={path='x'}", "a text"),
        ("output = 'x'\nseed = inf\n[base]\nmodel='m'\n[[jobs]]\nname='a'", "seed"),
    ],
)
@pytest.mark.scenario("F3")
def test_broken_toml(content, fragment, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(content)
    _expect(file, [fragment])


def test_unreadable_files(tmp_path):
    _expect(tmp_path / "none.yaml", ["cannot be read", "No such file"])
    _expect(tmp_path, ["cannot be read", "directory"])
    with pytest.raises(ConfigError, match="not a file name"):
        load_config("a\0b.yaml")
