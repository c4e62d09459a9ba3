"""verify-checkpoint: the right verdict and exit code for each folder, and nothing is written."""

import hashlib
import shutil

import numpy as np
import pytest

from lorafusion_jax.cli import main
from lorafusion_jax.train.checkpoint import Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def run(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep_last=3)
    checkpoints.prepare()
    for step in (4, 8):
        checkpoints.save(step, {"a": np.arange(5000.0), "count": np.int32(step)}, {"cursor": step})
    return tmp_path / "run"


def contents(folder):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def damage(step):
    largest = max(step.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(255 - byte for byte in largest.read_bytes()))


@pytest.mark.scenario("A14")
@pytest.mark.parametrize("state", ["whole", "one damaged", "all damaged", "half-written", "none"])
def test_verdicts(run, capsys, state):
    folder = run / "checkpoints"
    if state == "one damaged":
        damage(folder / "8")
    if state == "all damaged":
        damage(folder / "4"), damage(folder / "8")
    if state == "half-written":
        shutil.copytree(folder / "8", folder / "12.partial")
        (folder / "12").mkdir()
    if state == "none":
        shutil.rmtree(folder / "4"), shutil.rmtree(folder / "8")
    before = contents(run)
    code = main(["verify-checkpoint", str(run)])
    out, err = capsys.readouterr()
    assert contents(run) == before
    assert code == (0 if state == "whole" else 3)
    words = {
        "whole": ["4  whole    2 arrays, 40004 bytes", "8  whole"],
        "one damaged": ["4  whole", "8  damaged", "1 of 2", "goes on from 4"],
        "all damaged": ["4  damaged", "2 of 2", "none can be used"],
        "half-written": ["12.partial  unfinished", "12  damaged", "goes on from 8"],
        "none": ["holds no checkpoint"],
    }
    assert all(word in out + err for word in words[state]), out + err


@pytest.mark.scenario("A14")
def test_one_step_and_wrong_places(run, tmp_path, capsys):
    damage(run / "checkpoints" / "8")
    assert main(["verify-checkpoint", str(run / "checkpoints" / "4")]) == 0
    assert main(["verify-checkpoint", str(run / "checkpoints" / "8")]) == 3
    assert main(["verify-checkpoint", str(tmp_path / "nothing")]) == 2
    assert "Traceback" not in capsys.readouterr().err
