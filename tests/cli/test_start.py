"""Starting the command: help, usage errors, exit codes, files it must not touch."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorafusion_jax import cli, errors
from lorafusion_jax.cli import status, training
from lorafusion_jax.cli.progress import bytes_text
from lorafusion_jax.config import load_config
from lorafusion_jax.train import sinks

COMMANDS = """
bench check env eval export generate import init jobs plan plot report
schema status sweep train verify-checkpoint
""".split()
# Wherever the packages come from (a checkout, an installation), a child finds them too.
CHILD = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from lorafusion_jax.cli import main; code = main(['--help']);"
        "heavy = {'jax', 'flax', 'numpy', 'pydantic', 'matplotlib', 'transformers', 'optax'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); sys.exit(code)"
    )
    child = [sys.executable, "-c", code]
    env = CHILD | {"COLUMNS": "80"}
    done = subprocess.run(child, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line]
    assert sorted(listed) == sorted(COMMANDS)
    assert "..." not in done.stdout.split("Commands:")[1]  # each in a line, whole


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(lorafusion, command):
    code, out, _ = lorafusion(command, "--help")
    assert code == 0 and "Usage: lorafusion" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["nosuch"], "No such command"),
        (["train"], "Missing argument"),
        (["train", "x.yaml", "--max-steps", "0"], "--max-steps"),
        (["bench", "nosuch"], "no benchmark 'nosuch'"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["status", "."], "holds no run"),
        (["generate", "."], "--prompt"),
        (["generate", ".", "--prompt", "x", "--top-p", "0.9"], "give --temperature too"),
        (["init", "--demo", "--jobs", "3"], "--demo has four jobs of its own"),
        (["generate", ".", "--prompt", "x", "--checkpoint", "bset"], "--checkpoint"),
        (["eval", ".", "--checkpoint", "bset"], "--checkpoint"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_is_exit_code_2_and_a_message(lorafusion, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = lorafusion(*words)
    assert code == 2
    assert message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_program_ends_with_the_code(tmp_path):
    command = [sys.executable, "-m", "lorafusion_jax.cli", "train", "missing.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=CHILD, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) < 10


@pytest.mark.parametrize(
    "error, code, message",
    [
        (errors.ConfigError("bad key"), 2, "error: bad key"),
        (errors.CheckpointError("damaged"), 3, "error: damaged"),
        (errors.NonFiniteError("nan"), 4, "error: nan"),
        (errors.ResourceError("full"), 5, "error: full"),
        (errors.WatchdogError("stuck"), 6, "error: stuck"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "out.json"), 5, "out.json"),
        (PermissionError(errno.EACCES, "Permission denied", "run"), 2, "run: Permission denied"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), 5, "tokens_per_microbatch"),
        (MemoryError(), 5, "out of memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_messages_and_codes(lorafusion, monkeypatch, tmp_path, error, code, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(status, "draw", fail)
    monkeypatch.setattr("lorafusion_jax.train.run_folder.open_run", lambda path: path)
    got, _, err = lorafusion("plot", tmp_path)
    assert got == code
    assert message in err and "Traceback" not in err


def test_our_own_bugs_are_not_hidden(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("lorafusion_jax.train.run_folder.open_run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["plot", str(tmp_path)])


def test_init_writes_a_valid_configuration_once(lorafusion, tmp_path):
    code, out, _ = lorafusion("init", "--directory", tmp_path / "new")
    path = tmp_path / "new/lorafusion.yaml"
    assert code == 0 and f"lorafusion check {path}" in out
    assert [job.name for job in load_config(path).jobs] == ["first", "second"]
    path.write_text("mine")
    assert lorafusion("init", "--directory", tmp_path / "new")[0] == 2
    assert path.read_text() == "mine"
    assert lorafusion("init", "--directory", tmp_path / "new", "--force")[0] == 0
    assert path.read_text() != "mine"


def test_env_names_versions_and_device(lorafusion):
    code, out, _ = lorafusion("env")
    assert code == 0 and "jax " in out and "device" in out


@pytest.mark.parametrize(("devices", "kept"), [(1, True), (2, False)])
def test_compiled_programs_are_kept_in_the_cache_folder(tmp_path, devices, kept):
    """Not on several CPU devices, where a program from the cache once crashed."""
    code = (
        "from lorafusion_jax.cli.session import start_jax; start_jax();"
        "import jax; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
        "jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()"
    )
    env = CHILD | {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert bool(list(tmp_path.glob("lorafusion-jax/compiled/*"))) == kept


class TestCheck:
    def test_shows_what_training_would_do_and_writes_nothing(self, lorafusion, project):
        before = sorted(project.parent.rglob("*"))
        code, out, err = lorafusion("check", project)
        assert code == 0, err
        assert "is valid" in out and "tiny-llama" in out
        numbers = next(line for line in out.splitlines() if line.startswith("numbers"))
        # samples, held out, steps ... r, modules, parameters of 2 layers of 7 linears
        assert numbers.split()[1:4] == ["8", "2", "4"]
        per_layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
        assert numbers.split()[-3:] == ["4", "14", f"{4 * 2 * per_layer:,}"]
        bank = bytes_text(16 * 3 * 4 * 2 * per_layer)  # 3 slots with room for the largest rank
        assert f"adapters with optimizer state {bank}" in out
        assert "given   'German for" in out and "learnt" in out
        assert sorted(project.parent.rglob("*")) == before

    def test_overrides_count(self, lorafusion, project):
        code, out, _ = lorafusion("check", project, "--set", "jobs.numbers.lora.r=8")
        assert code == 0
        assert next(x for x in out.splitlines() if x.startswith("numbers")).split()[-3] == "8"

    def test_plans_for_the_mesh_that_training_would_use(self, lorafusion, project):
        alone = lorafusion("check", project)[1]
        code, out, err = lorafusion("check", project, "--set", "parallel.stage=2")
        assert code == 0, err
        assert "mesh     1 x 2 devices; this machine has" in out and "\nmesh" not in alone
        # Two global batches of a job are three slots apart at least: 4 batches are 10 slots.
        slots = [
            int(re.search(r"^packing  (\d+) microbatches", text, re.M)[1]) for text in (alone, out)
        ]
        assert slots[0] < 10 <= slots[1]

    def test_a_mesh_that_cannot_work_is_refused(self, lorafusion, project):
        code, out, err = lorafusion("check", project, "--set", "parallel.stage=3")
        assert code == 2 and "is valid" not in out
        assert "3 stages are more than the model's 2 layers" in err and "stage=2" in err

    def test_bad_data_names_file_and_line(self, lorafusion, project):
        path = project.parent / "data/chat.jsonl"
        path.write_text(path.read_text() + '{"messages": 3}\n')
        code, _, err = lorafusion("check", project)
        assert code == 2 and f"{path}:11" in err

    def test_unknown_target_is_refused(self, lorafusion, project):
        code, _, err = lorafusion(
            "check", project, "--set", "jobs.numbers.lora.target_modules=[nosuch_proj]"
        )
        assert code == 2 and "nosuch_proj" in err

    def test_missing_model_is_refused(self, lorafusion, project):
        code, _, err = lorafusion("check", project, "--set", "base.model=nowhere")
        assert code == 2 and "nowhere" in err


def test_plan_compares_with_training_one_by_one(lorafusion, project):
    code, out, _ = lorafusion("plan", project)
    assert code == 0
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert {"together", "numbers, alone", "chat, alone", "plain, alone"} <= set(rows)
    tokens = [int(rows[name][-2].replace(",", "")) for name in rows if name.endswith("alone")]
    assert int(rows["together"][-2].replace(",", "")) == sum(tokens)
    assert "x the rows" in out


def test_status_of_a_run_that_has_only_begun(lorafusion, project):
    from lorafusion_jax.config import resolved_yaml

    run = project.parent / "run"
    run.mkdir()
    (run / "config.resolved.yaml").write_text(resolved_yaml(load_config(project)))
    code, out, _ = lorafusion("status", run)
    assert code == 0 and "nothing has happened yet" in out and "numbers" in out


def test_status_reads_metrics_and_events():
    metrics = [
        {"step": 0, "loss": None, "eval_loss": 5.0, "time": 1.0, "microbatch": -1},
        {"step": 1, "loss": 4.0, "tokens": 100, "time": 2.0, "microbatch": 0},
        {"step": 3, "loss": 2.0, "tokens": 300, "time": 4.0, "microbatch": 2},
        {"step": 3, "loss": None, "eval_loss": 2.5, "time": 5.0, "microbatch": 2},
    ]
    events = [
        {"event": "RunPlanned", "time": 0.0, "jobs": [{"name": "a", "steps": 4}]},
        {"event": "JobEnded", "time": 5.0, "job": "a", "status": "done", "step": 4},
        {"event": "RunEnded", "time": 6.0, "seconds": 65.0},
    ]
    line = status.job_line(metrics, events, "a")
    assert (line.step, line.total, line.loss, line.eval_loss) == (4, 4, 2.0, 2.5)
    assert line.tokens_per_s == 100.0 and line.note == "done"
    assert status.run_state(events, 10.0) == "ended after 1:05"
    assert status.run_state(events[:2], 70.0) == "last event 1:05 ago (JobEnded)"


def test_results_files_of_this_repository_are_well_formed():
    folder = Path(__file__).parents[2] / "docs/results"
    for path in folder.glob("*/*.json"):
        record = json.loads(path.read_text())
        assert {"bench", "command", "device", "date", "versions", "rows"} <= set(record), path
        assert record["bench"] == path.stem and record["device"] == path.parent.name


def test_a_damaged_model_folder_is_explained_by_check(lorafusion, tmp_path):
    model, path = tmp_path / "model", tmp_path / "run.yaml"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": ')
    path.write_text("base: {model: model}\noutput: o\njobs: [{name: a, data: {path: b}}]\n")
    code, _, err = lorafusion("check", path)
    assert code == 2 and "config.json: not valid JSON" in err


def test_check_finds_weights_that_are_cut_off(lorafusion, project, tmp_path):
    shared = load_config(project).base.model
    shutil.copytree(shared, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    base = f"base.model={tmp_path / 'cut'}"
    assert lorafusion("check", project, "--set", base)[0] == 0
    with open(weights, "r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    code, _, err = lorafusion("check", project, "--set", base)
    assert code == 2 and "model.safetensors" in err


def test_check_finds_a_sink_without_its_package(lorafusion, project, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda _: None)
    code, _, err = lorafusion("check", project, "--set", "report.to=[wandb]")
    assert code == 2 and "report.to: wandb needs the package" in err


def test_a_program_that_is_not_on_the_path_is_named_by_its_place(monkeypatch, tmp_path):
    monkeypatch.setattr(training.sys, "executable", str(tmp_path / "bin" / "python"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(training.shutil, "which", lambda _: None)
    assert training._program() == "lorafusion"  # nothing is beside this interpreter either
    (tmp_path / "bin" / "lorafusion").touch()
    monkeypatch.chdir(tmp_path)
    assert training._program() == "bin/lorafusion"
    monkeypatch.setattr(training.shutil, "which", lambda _: "/usr/bin/lorafusion")
    assert training._program() == "lorafusion"
