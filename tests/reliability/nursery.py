"""Starts child runs, watches their lines, and kills them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]


class Child:
    """One run of the nursery.

    Attributes:
        pid: of its process.
        seen: its lines so far.
    """

    def __init__(self, process: subprocess.Popen[str], pid: int, lines: TextIO):
        self._process, self.pid, self._lines = process, pid, lines
        self.seen: list[str] = []

    def until(self, start: str, count: int = 1) -> str:
        """Reads lines until so many have begun with `start`; returns the last.

        Raises:
            AssertionError: the run ended before.
        """
        for line in self._lines:
            self.seen.append(line.rstrip("\n"))
            count -= line.startswith(start)
            if count == 0:
                return self.seen[-1]
        raise AssertionError(f"the run ended without {start!r}: {self.seen[-5:]}")

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends a signal, if the run is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def end(self) -> int:
        """Reads the rest of the lines and returns the exit code; negative for a signal."""
        self.seen += [line.rstrip("\n") for line in self._lines]
        self._lines.close()
        word, code = self._process.stdout.readline().split()  # pyright: ignore
        assert word == "exit"
        return int(code)

    def numbers(self, start: str) -> list[int]:
        """The numbers on the lines that begin with a word."""
        return [int(x.split()[1]) for x in self.seen if x.split()[0] == start]


class Nursery:
    """A process that has imported everything and forks runs; they share compiled programs.

    Args:
        folder: for pipes and compiled programs.
        hash_seed: of Python.
    """

    def __init__(self, folder: Path, hash_seed: int = 0):
        self._folder: Path = folder
        self._child: Child | None = None
        env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)} | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "sched"), *filter(None, sys.path)]
            ),
            "PYTHONHASHSEED": str(hash_seed),
            "JAX_PLATFORMS": "cpu",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def start(self, output: Path, **order: Any) -> Child:
        """Starts a run; one at a time. See `child.Order`."""
        lines = Path(tempfile.mkdtemp(dir=self._folder)) / "lines"
        os.mkfifo(lines)
        cache = str(self._folder / "compiled")
        order = {"output": str(output), "lines": str(lines), "cache": cache} | order
        assert self._process.stdin is not None and self._process.stdout is not None
        # Open before there is a writer, blocking once there is one: no end can wait for the other.
        reader = os.open(lines, os.O_RDONLY | os.O_NONBLOCK)
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        word, pid = self._process.stdout.readline().split()
        assert word == "pid"
        os.set_blocking(reader, True)
        self._child = Child(self._process, int(pid), os.fdopen(reader, encoding="utf-8"))
        return self._child

    def run(self, output: Path, **order: Any) -> Child:
        """Runs to the end, which must be a good one."""
        child = self.start(output, **order)
        code = child.end()
        assert code == 0, child.seen[-3:]
        return child

    def close(self) -> None:
        """Ends the process and the run under way."""
        if self._child is not None:
            self._child.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def nursery(folder: Path, **options: Any) -> Iterator[Nursery]:
    """A nursery that is closed at the end."""
    made = Nursery(folder, **options)
    try:
        yield made
    finally:
        made.close()
