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


def sanitized(tool: str, module: str) -> subprocess.CompletedProcess[str]:
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
    return subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
    )


@pytest.mark.parametrize("tool", [pytest.param(tool, marks=on_gpu) for tool in TOOLS])
def test_nothing_is_found_in_the_kernels(tool):
    done = sanitized(tool, "tests.kernels.two_shapes")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "largest error" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0 " in done.stdout


@pytest.mark.parametrize("tool", [pytest.param("memcheck", marks=on_gpu)])
def test_a_planted_overrun_is_found(tool):
    """The twin."""
    done = sanitized(tool, "tests.reliability.overrun")
    assert done.returncode == FOUND, done.stdout[-4000:]
    assert "Invalid __global__ read" in done.stdout and "lora_down" in done.stdout


def test_the_planted_overrun_lowers_for_hopper():
    """So that on a GPU it is the overrun that fails, and not the compiler."""
    with lowering_for((9, 0)):
        traced = jax.jit(overrun).trace(*jax.eval_shape(operands))
        assert "lora_down" in traced.lower(lowering_platforms=("cuda",)).as_text()
