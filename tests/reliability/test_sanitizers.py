"""NVIDIA's sanitizer finds nothing in the kernels, and finds an overrun that was put there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.kernels.shipped import lowering_for
from tests.reliability.overrun import operands, overrun

ROOT = Path(__file__).parents[2]
KERNELS, OVERRUN = "tests.kernels.two_shapes", "tests.reliability.overrun"
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9
"""Exit code of the sanitizer when it has found something."""

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
    pytest.mark.scenario("D5"),
]


def sanitizer() -> str:
    """Returns the path of compute-sanitizer, which comes with CUDA's toolkit."""
    places = sorted(Path("/usr/local").glob("cuda*/bin"))
    path = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, places))
    )
    return path or pytest.skip("compute-sanitizer is not installed")


def start(tool: str, module: str) -> subprocess.Popen[str]:
    """Runs a module of the tests under a tool of the sanitizer, looking at our kernels only."""
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "sched"), *filter(None, sys.path)]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",  # one allocation per array: no slack between
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }
    options = ["--tool", tool, "--error-exitcode", str(FOUND)]
    only = ["--kernel-name", "kernel_substring=lora_"]
    command = [sanitizer(), *options, *only, sys.executable, "-m", module]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def sanitized():
    """Returns what a tool said of a module; all run at the same time, compiling takes longest."""
    runs = {(tool, KERNELS): start(tool, KERNELS) for tool in TOOLS}
    runs["memcheck", OVERRUN] = start("memcheck", OVERRUN)

    def of(tool: str, module: str) -> tuple[int, str]:
        process = runs[tool, module]
        said, _ = process.communicate(timeout=400)
        return process.returncode, said

    yield of
    for process in runs.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("tool", [pytest.param(tool, marks=on_gpu) for tool in TOOLS])
def test_nothing_is_found_in_the_kernels(sanitized, tool):
    code, said = sanitized(tool, KERNELS)
    assert code == 0, said[-4000:]
    assert "largest error" in said
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 " in said, said[-1000:]


@pytest.mark.parametrize("tool", [pytest.param("memcheck", marks=on_gpu)])
def test_a_planted_overrun_is_found(sanitized, tool):
    """The twin."""
    code, said = sanitized(tool, OVERRUN)
    assert code == FOUND, said[-4000:]
    assert "Invalid __global__ read" in said and "lora_down" in said


def test_the_planted_overrun_lowers_for_hopper():
    """So that on a GPU it is the overrun that fails, and not the compiler."""
    with lowering_for((9, 0)):
        traced = jax.jit(overrun).trace(*jax.eval_shape(operands))
        assert "lora_down" in traced.lower(lowering_platforms=("cuda",)).as_text()
