"""Strangers' files: nothing is executed, nothing is fetched, nothing is written elsewhere."""

import ast
import json
import socket
from pathlib import Path

import pytest

from lorafusion_jax.cli import main
from lorafusion_jax.train import trainer as trainer_module  # noqa: F401
from tests.cli.conftest import write_model

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for package in ("lorafusion_jax", "pallas_kernels", "sched/lorafusion_sched")
    for path in sorted((ROOT / package).rglob("*.py"))
]
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "imp"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load"),
}
FETCHING = {"urllib", "http", "requests", "ftplib", "aiohttp", "httpx", "huggingface_hub"}


def findings(source: str) -> list[str]:
    """What code would execute or fetch a stranger's content."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call in FORBIDDEN_CALLS:
                found.append(call)
            if call == "np.load" or call == "numpy.load":
                allowed = [k for k in node.keywords if k.arg == "allow_pickle"]
                if any(getattr(k.value, "value", True) for k in allowed):
                    found.append("np.load with pickles")
            found += [
                "shell=True"
                for keyword in node.keywords
                if keyword.arg == "shell" and getattr(keyword.value, "value", True)
            ]
            found += [
                "trust_remote_code"
                for keyword in node.keywords
                if keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", True)
            ]
        roots = {name.partition(".")[0] for name in names}
        found += sorted(roots & (FORBIDDEN_MODULES | FETCHING))
    return found


def names_of(module: str, source: str) -> set[str]:
    """What code takes from a module that it imports whole."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == module
    }


def only_walks(source: str) -> bool:
    """Whether code takes from pickle what walks through an object, and nothing that reads one."""
    return findings(source) == ["pickle"] and names_of("pickle", source) == {
        "Pickler",
        "PicklingError",
    }


@pytest.mark.scenario("F8")
def test_no_code_executes_or_fetches_a_strangers_content():
    assert len(SOURCES) > 50
    found = {p.name: f for p in SOURCES if (f := findings(p.read_text("utf-8")))}
    asked_for = set(found.pop("hub.py", ()))  # downloads what the user names, and only then
    found.pop("stored.py")
    assert only_walks(next(p for p in SOURCES if p.name == "stored.py").read_text("utf-8"))
    assert found == {} and asked_for <= {"huggingface_hub"}


@pytest.mark.scenario("F8")
@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "eval('1')", "yaml.load(text)", "import requests",
     "np.load(p, allow_pickle=True)", "subprocess.run(c, shell=True)", "import urllib.request",
     "AutoTokenizer.from_pretrained(p, trust_remote_code=True)", "exec(code)"],
)  # fmt: skip
def test_the_search_finds_each(line):
    """The twin."""
    assert findings(line)


@pytest.mark.scenario("F8")
@pytest.mark.parametrize(
    "line",
    ["eval('1')", "import marshal", "from pickle import loads", "pickle.loads(b'')",
     "pickle.Unpickler(f)"],
)  # fmt: skip
def test_nothing_else_is_forgiven_where_pickle_is(line):
    """The twin."""
    stored = next(p for p in SOURCES if p.name == "stored.py").read_text("utf-8")
    assert not only_walks(f"{stored}\n{line}\n")


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in folder.rglob("*")}


def configuration(model: Path, output: str, name: str = "sql") -> str:
    return json.dumps(
        {
            "base": {"model": str(model), "dtype": "float32"},
            "output": output,
            "batching": {"tokens_per_microbatch": 128, "tile": 16},
            "jobs": [
                {
                    "name": name,
                    "data": {"path": "data.jsonl"},
                    "lora": {"r": 2},
                    "train": {"max_steps": 1, "global_batch_size": 2},
                    "eval": {"split": 1},
                }
            ],
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "model")


ROWS = "".join(json.dumps({"prompt": f"one {i}", "completion": "two"}) + "\n" for i in range(6))
NAMES = [
    "..",
    ".",
    "",
    "/etc/x",
    "a/b",
    "a\\b",
    "x" * 300,
    "CON",
    "a\0b",
    ".hidden",
    "ﬁne",
    "e\u0301",
]


@pytest.mark.scenario("F4")
def test_nothing_is_written_outside_the_run_folder(tmp_path, model, monkeypatch):
    """A whole run through a symlinked output, with sockets that refuse everybody."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "cache" / "matplotlib"))

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "data.jsonl").write_text(ROWS)
    (tmp_path / "run.yaml").write_text(configuration(model, "link/run"))
    base = tree(model)
    before = tree(tmp_path)
    assert main(["train", str(tmp_path / "run.yaml"), "--plain", "--samples", "0"]) == 0
    assert tree(model) == base
    new = {path for path in tree(tmp_path) if path not in before}
    assert "real/run/jobs/sql/adapter/adapter_model.safetensors" in new
    assert all(path.startswith(("real/run", "cache")) for path in new), new


@pytest.mark.scenario("F4")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_folder_writes_nothing(tmp_path, model, name):
    (tmp_path / "data.jsonl").write_text(ROWS)
    (tmp_path / "run.yaml").write_text(configuration(model, "run", name))
    before = tree(tmp_path)
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert tree(tmp_path) == before
