"""Several processes train what one process with as many devices trains, by the command users type.

Every process is started here: CPU devices, exchanges by gloo.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorafusion_jax.cli import main
from lorafusion_jax.cli.training import read_config
from lorafusion_jax.errors import CheckpointError, ConfigError
from lorafusion_jax.parallel.processes import (
    Votes,
    all_or_none,
    check_same,
    is_first,
    largest,
    start_processes,
)
from lorafusion_jax.train import prepare, together
from lorafusion_jax.train.checkpoint import Checkpoints, tree_hash
from tests.cli.conftest import write_model, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    return write_project(folder, write_model(folder / "tiny-llama"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Processes:
    """Processes of one command, each with its own virtual devices.

    Args:
        arguments: of `lorafusion`.
        processes: how many; of one, nothing tells that there could be others.
        devices: of each.
        cache: folder of compiled programs.
    """

    def __init__(self, arguments, *, processes: int, devices: int, cache: Path):
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "NPROC": "32",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self._environment, self._count = environment, processes
        self._command = [sys.executable, "-m", "lorafusion_jax.cli", *map(str, arguments)]
        self._port, self.all = free_port(), []
        for number in range(processes):
            self.all.append(self._started(number, ()))

    def start(self, number: int, options) -> None:
        """Starts a process again, otherwise than the others."""
        self.all[number].kill()
        self.all[number].communicate()
        self.all[number] = self._started(number, options)

    def _started(self, number: int, options) -> subprocess.Popen:
        command = [*self._command, *options]
        if self._count > 1:
            command += ["--coordinator", f"127.0.0.1:{self._port}", "--process", str(number)]
            command += ["--processes", str(self._count)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=self._environment, text=True, **pipes)

    def wait(self, timeout: float = 240) -> list[tuple[int, str]]:
        """Returns exit code and output of each; none is left behind."""
        deadline, found = time.monotonic() + timeout, []
        try:
            for process in self.all:
                text, _ = process.communicate(timeout=max(1, deadline - time.monotonic()))
                found.append((process.returncode, text))
        finally:
            for process in self.all:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
        return found


def train(project: Path, output: Path, mesh, *, processes=1, devices=1, more=()) -> Processes:
    data, stage = mesh
    settings = [f"parallel.data={data}", f"parallel.stage={stage}"]
    sets = [word for setting in settings for word in ("--set", setting)]
    return Processes(
        ["train", project, "--output", output, "--plain", *sets, *more],
        processes=processes,
        devices=devices,
        cache=project.parent / f"compiled{processes}x{devices}",
    )


def succeeded(processes: Processes, timeout: float = 240) -> list[str]:
    found = processes.wait(timeout)
    assert [code for code, _ in found] == [0] * len(found), "\n\n".join(text for _, text in found)
    return [text for _, text in found]


def final_state(output: Path) -> str:
    return tree_hash(Checkpoints(output / "checkpoints").restore().leaves)


def metrics(output: Path) -> dict:
    lines = {}
    for job in (path.name for path in (output / "jobs").iterdir()):
        text = (output / "jobs" / job / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        lines[job] = [{k: v for k, v in row.items() if k != "time"} for row in rows]
    return lines


@pytest.mark.slow
def test_two_processes_train_what_one_trains(project, tmp_path):
    """Bit by bit: a sum of two is the same in any order. Process 0 alone writes and prints."""
    one, two = tmp_path / "one", tmp_path / "two"
    few = ("--jobs", "numbers,chat", "--max-steps", "3")
    few += ("--set", "defaults.lora.target_modules=[q_proj]")
    mesh = [word for size in ("data=1", "stage=2") for word in ("--set", f"parallel.{size}")]
    assert main(["train", str(project), "--output", str(one), "--plain", *mesh, *few]) == 0
    first, second = succeeded(train(project, two, (1, 2), processes=2, more=few))
    assert final_state(two) == final_state(one)
    assert metrics(two) == metrics(one)
    assert "adapters" in first and "adapters" not in second
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_same_command_goes_on(project, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    steps = ("--max-steps", "10")
    succeeded(train(project, whole, (1, 2), devices=2, more=steps))
    stopped = train(project, output, (1, 2), processes=2, more=steps)
    for line in stopped.all[0].stdout:
        if line.startswith("numbers  step 2,"):
            stopped.all[1].send_signal(signal.SIGTERM)
            break
    codes, (_, second) = zip(*stopped.wait(), strict=True)
    assert codes == (128 + signal.SIGTERM,) * 2, second
    assert "stopped by a signal" in second
    assert final_state(output) != final_state(whole)
    first, _ = succeeded(train(project, output, (1, 2), processes=2, more=steps))
    assert "going on after microbatch" in first
    assert final_state(output) == final_state(whole)
    assert metrics(output) == metrics(whole)


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(project, tmp_path):
    """Four copies of a pipeline of two."""
    outputs = tmp_path / "one", tmp_path / "two"
    succeeded(train(project, outputs[0], (4, 2), devices=8))
    succeeded(train(project, outputs[1], (4, 2), processes=2, devices=4))
    assert final_state(outputs[0]) == final_state(outputs[1])
    assert metrics(outputs[0]) == metrics(outputs[1])


@pytest.mark.slow
def test_processes_that_cannot_train_together_are_refused(project, tmp_path):
    """A mesh that leaves one without a device, and processes that were started differently."""
    found = train(project, tmp_path / "run", (1, 2), processes=2, devices=2).wait()
    assert [code for code, _ in found] == [2, 2]
    assert all("data=2, stage=2" in text for _, text in found), found
    both = train(project, tmp_path / "run", (1, 2), processes=2, more=("--max-steps", "2"))
    both.start(1, ("--max-steps", "3"))
    found = both.wait()
    assert [code for code, _ in found] == [2, 2], found
    assert all("differ in configuration: " in text for _, text in found)
    assert not (tmp_path / "run" / "plan.json").exists()
    # One that does not find the base model must not leave the other waiting.
    both = train(project, tmp_path / "run", (1, 2), processes=2)
    both.start(1, ("--set", "base.model=nowhere"))
    (first, said), (second, why) = both.wait(120)
    assert (first, second) == (2, 2) and "another process of this run was refused" in said
    assert "nowhere: no such model" in why
    # Nor one that does not find the configuration, or cannot read the weights of its stage.
    both = train(project, tmp_path / "run", (1, 2), processes=2)
    both.start(1, ("--jobs", "nobody"))
    (first, said), (second, why) = both.wait(120)
    assert (first, second) == (2, 2) and "another process of this run was refused" in said
    assert "nobody" in why and "another process" not in why


def test_whoever_cannot_read_its_weights_tells_the_others(project, monkeypatch, tmp_path):
    votes = []

    def unreadable(*args, **kwargs):
        raise CheckpointError("a shard is gone")

    monkeypatch.setattr(prepare, "make_engine", unreadable)
    monkeypatch.setattr(
        "lorafusion_jax.parallel.processes.largest",
        lambda value: votes.append(bool(value)) or value,
    )
    mesh = ("--set", "parallel.stage=2")
    assert main(["train", str(project), "--output", str(tmp_path / "run"), "--plain", *mesh]) != 0
    assert votes[-1] and votes.count(True) == 1


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("jobs.numbers.optim.lr=0.5", False),
        ("seed=1", False),
        ("jobs.numbers.save.every=1", False),  # they would drain at different times
        ("parallel.stage=2", False),
        ("output=elsewhere", True),
        ("jobs.numbers.data.path=data/moved.jsonl", True),  # its fingerprint decides
        ("report.every=7", True),
    ],
)
def test_processes_must_have_the_same_settings(monkeypatch, project, change, same):
    """Other learning rates would train other adapters on every stage, and nobody would notice."""
    facts = []
    monkeypatch.setattr(together.jax, "process_count", lambda: 2)
    monkeypatch.setattr(together, "check_same", lambda what, text: facts.append(text))
    for overrides in ([], [change]):
        together.check_same_settings(read_config(project, overrides))
    assert (facts[0] == facts[1]) == same


@pytest.mark.slow
def test_the_benchmark_runs_on_two_processes_of_four_devices(tmp_path):
    command = ["bench", "scaling", "--quick", "--stages", "4", "--data", "2"]
    command += ["--systems", "ours", "--out", tmp_path]
    found = Processes(command, processes=2, devices=4, cache=tmp_path / "compiled")
    first, second = succeeded(found, timeout=900)  # programs of eight devices compile slowly
    rows = json.loads((tmp_path / "cpu" / "scaling.json").read_text())["rows"]
    assert [row["system"] for row in rows] == ["ours"]
    assert all(row["stale"] == 0 for row in rows)
    assert "tokens/s" in first and "tokens/s" not in second


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, 0, 2), ["--coordinator missing"]),
        (("127.0.0.1:1", None, None), ["--process, --processes missing"]),
        (("somewhere", 0, 2), ["somewhere", "HOST:PORT"]),
        (("127.0.0.1:1", 2, 2), ["--process 2", "0 to 1"]),
    ],
)
def test_unusable_options_are_refused(given, words):
    with pytest.raises(ConfigError) as error:
        start_processes(*given)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_one_process_pays_for_no_agreement():
    """Nothing is exchanged: values, signals and arrays are what they are."""
    assert is_first() and largest(7) == 7
    votes = Votes()
    assert votes.cast(None) is None and votes.cast(15) == 15
    with pytest.raises(ValueError, match="mine"), all_or_none():
        raise ValueError("mine")
    check_same("anything", "text")
