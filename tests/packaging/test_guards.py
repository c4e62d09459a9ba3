"""Cheap checks that keep decisions about packaging and style from rotting."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("lorafusion_jax", "pallas_kernels", "lorafusion_sched")
MAX_LINES = {"tests": 600}  # elsewhere 500
# Written in halves so that this file does not find itself.
FORBIDDEN = re.compile(
    "py" + r"pi\.org|python" + r"hosted\.org|npm" + r"js\.(org|com)|crates" + r"\.io"
    "|/wor" + r"k/\w|/ro" + r"ot/\w|/home" + r"/\w+/"
)


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def python_files() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def test_no_file_is_too_long():
    long = []
    for path in python_files():
        top = path.relative_to(ROOT).parts[0]
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES.get(top, 500):
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
    assert not long, "\n".join(long)


def test_annotations_are_real_objects():
    """Run-time checkers read annotations, so they must not become strings."""
    line = re.compile(r"^from __future__ import .*annotations", re.M)
    assert line.search("from __future__ import " + "annotations")
    assert not [path for path in python_files() if line.search(path.read_text())]


def test_no_registry_host_and_no_machine_path():
    assert FORBIDDEN.search("https://py" + "pi.org/simple")
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in FORBIDDEN.finditer(text)]
    assert not found, "\n".join(found)


@pytest.mark.scenario("G9")
def test_sched_is_the_standard_librarys():
    """`sched/` is a source root: a package of that name would hide the standard module."""
    assert not (ROOT / "sched" / "__init__.py").exists()
    code = "import sched; assert sched.scheduler, sched"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_planner_needs_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import lorafusion_sched;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - {'lorafusion_sched'};"
        "assert new <= set(sys.stdlib_module_names), new"
    )
    # -S: no site-packages at all
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT / "sched", check=True, timeout=60)


def test_import_has_no_side_effect():
    """Importing a package touches no device and leaves the environment alone."""
    code = (
        # jax sets variables of its own, before any of ours is imported.
        "import os, jax; from jax.experimental.pallas import mosaic_gpu;"
        "before = dict(os.environ); import lorafusion_jax, pallas_kernels;"
        "import pallas_kernels.lora.api;"
        "assert dict(os.environ) == before;"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_wheel_holds_exactly_three_typed_packages(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
