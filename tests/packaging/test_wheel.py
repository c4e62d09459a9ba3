"""The built wheel works in a fresh environment, far from the repository."""

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """Yields (run, folder): run(*args) starts the fresh environment's Python in the folder.

    Our wheel is installed into an environment of its own. The libraries come from the environment
    that runs the tests, by a path entry, so that nothing is downloaded; path files of that
    environment (an editable install of this repository) are not followed by such an entry.
    """
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("away")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")

    home = folder / "env"
    venv.create(home, with_pip=False)
    python = home / "bin/python"
    (packages,) = home.glob("lib/python3*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    install += ["--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=120)
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*args, check=True, timeout=300):
        done = subprocess.run(
            [python, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run, folder


@pytest.mark.scenario("G9")
def test_every_module_imports_from_the_wheel(away):
    run, folder = away
    code = (
        "import importlib, pkgutil, sys\n"
        "for name in ('lorafusion_jax', 'pallas_kernels', 'lorafusion_sched'):\n"
        "    package = importlib.import_module(name)\n"
        "    print(package.__file__)\n"
        "    for module in pkgutil.walk_packages(package.__path__, name + '.'):\n"
        "        if not module.name.endswith('__main__'):\n"
        "            importlib.import_module(module.name)\n"
    )
    found = run("-c", code).stdout.split()
    assert len(found) == 3
    assert all(str(folder / "env") in path for path in found), found


@pytest.mark.scenario("G9")
def test_sched_is_the_standard_librarys(away):
    run, _ = away
    run("-c", "import sched; assert sched.scheduler")


@pytest.mark.scenario("G9")
def test_command_line_starts(away):
    run, folder = away
    assert "train" in run(folder / "env/bin/lorafusion", "--help").stdout
    assert "train" in run("-m", "lorafusion_jax.cli", "--help").stdout


@pytest.mark.scenario("G9")
def test_tests_pass_away_from_the_root(away):
    run, folder = away
    shutil.copytree(
        ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("packaging", "__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", folder)  # pytest's settings; its paths do not exist here
    # Of the planner's tests, these two need the repository: its programs and its results.
    left_out = [f"--ignore=tests/sched_/{name}" for name in ("test_cli.py", "test_bench.py")]
    quick = ["tests/sched_", *left_out, "tests/cli/test_start.py"]
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *quick)
    assert " passed" in done.stdout
