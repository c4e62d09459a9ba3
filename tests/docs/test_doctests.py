"""Examples in docstrings (`>>>`) give what they say."""

import doctest
import importlib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"lorafusion_jax": ROOT, "pallas_kernels": ROOT, "lorafusion_sched": ROOT / "sched"}


def modules_with_examples() -> list[str]:
    found = []
    for room, root in ROOMS.items():
        for path in sorted((root / room).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                found.append(".".join(path.relative_to(root).with_suffix("").parts))
    return found


def run(module: types.ModuleType) -> tuple[int, int]:
    """Returns (failed, tried) examples of a module."""
    # Names that a module takes from another would be tried twice, or in the wrong module.
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    return results.failed, results.attempted


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_docstrings(name):
    failed, tried = run(importlib.import_module(name))
    assert tried and not failed


def test_there_are_examples_in_every_room():
    rooms = {name.split(".")[0] for name in modules_with_examples()}
    assert rooms == set(ROOMS)


def test_wrong_example_is_caught(capsys):
    module = types.ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert run(module) == (1, 1)
