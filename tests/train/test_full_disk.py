"""What a terminal shows when a checkpoint cannot be written."""

import subprocess
import sys

import pytest

FILLS_UP = """
import contextlib, resource, sys
from pathlib import Path
import numpy as np
from lorafusion_jax.errors import ResourceError
from lorafusion_jax.train import orbax_alone
from lorafusion_jax.train.checkpoint import Checkpoints

if sys.argv[2] == "broken":
    orbax_alone._errors_told_once = contextlib.nullcontext
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.prepare()
state = {f"leaf{n}": np.random.rand(100, 100) for n in range(40)}
checkpoints.save(1, state, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, state, {})
except ResourceError as error:
    print(error)
"""


@pytest.mark.scenario("A6")
@pytest.mark.parametrize("how, tracebacks", [("whole", False), ("broken", True)])
def test_a_full_disk_is_told_once(tmp_path, how, tracebacks):
    told = subprocess.run(
        [sys.executable, "-c", FILLS_UP, str(tmp_path / "checkpoints"), how],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "the disk is full" in told.stdout
    assert ("Traceback" in told.stderr) == tracebacks, told.stderr
