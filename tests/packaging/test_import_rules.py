"""Who may import whom, read from the syntax tree (so lazy imports count too)."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STDLIB = frozenset(sys.stdlib_module_names)

# room: (folder, what it may import beside the standard library and itself, what it never may)
ROOMS = {
    "lorafusion_sched": ("sched/lorafusion_sched", frozenset(), frozenset()),
    "pallas_kernels": ("pallas_kernels", frozenset({"jax", "numpy", "jaxtyping"}), frozenset()),
    "lorafusion_jax": ("lorafusion_jax", None, frozenset({"examples", "tests", "torch", "peft"})),
    "examples": ("examples", None, frozenset({"tests", "torch", "peft"})),
}
OURS = frozenset(ROOMS)

# Inside lorafusion_jax a module imports its own layer and the ones below, never one above.
LAYERS = (
    {"errors", "config"},
    {"data", "models", "lora", "generate", "plots"},
    {"train", "parallel"},
    {"cli", "bench", "report"},
)


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """Returns (line, absolute dotted name) of every import; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def package_of(path: Path, folder: Path, room: str) -> str:
    return ".".join([room, *path.relative_to(folder).parent.parts])


def room_problems(room: str, name: str) -> str | None:
    """Says what is wrong with `room` importing the dotted `name`, or None."""
    _, allowed, never = ROOMS[room]
    top = name.split(".")[0]
    if top in never:
        return f"{room} must not import {top}"
    if top not in STDLIB | {room} and allowed is not None and top not in allowed:
        return f"{room} must not import {top}"
    if room in ("lorafusion_sched", "pallas_kernels") and top in OURS - {room}:
        return f"{room} must not import {top}"
    private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    if top in OURS - {room} and private:
        return f"{room} imports the private name {name}"
    return None


def layer_of(module: str) -> int | None:
    """Returns the layer of lorafusion_jax.<module>...; cli_*.py counts as cli."""
    head = "cli" if module.startswith("cli_") else module
    return next((i for i, layer in enumerate(LAYERS) if head in layer), None)


def layer_problem(path: Path, name: str) -> str | None:
    parts = name.split(".")
    relative = path.relative_to(ROOT / "lorafusion_jax")
    if (
        parts[0] != "lorafusion_jax"
        or len(parts) < 2
        or (relative.name == "__init__.py" and (len(relative.parts) == 1))
    ):  # the package's own front door shows every layer
        return None
    here, there = layer_of(relative.parts[0].removesuffix(".py")), layer_of(parts[1])
    if there is None:
        return None  # a name of the front door, such as __version__
    assert here is not None, f"{relative} has no layer; add it to LAYERS"
    return f"layer {here} imports {name} of layer {there}" if there > here else None


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    folder = ROOT / ROOMS[room][0]
    problems = []
    for path in sorted(folder.rglob("*.py")):
        for line, name in imports(path.read_text(), package_of(path, folder, room)):
            problem = room_problems(room, name)
            if problem is None and room == "lorafusion_jax":
                problem = layer_problem(path, name)
            if problem:
                problems.append(f"{path.relative_to(ROOT)}:{line}: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "room, name",
    [
        ("lorafusion_sched", "numpy"),
        ("lorafusion_sched", "pallas_kernels.dropout"),
        ("pallas_kernels", "flax.nnx"),
        ("pallas_kernels", "lorafusion_sched.plan"),
        ("lorafusion_jax", "tests.tolerance"),
        ("lorafusion_jax", "pallas_kernels._mgpu"),
        ("examples", "lorafusion_jax.train._x"),
    ],
)
def test_broken_room_rule_is_caught(room, name):
    assert room_problems(room, name)


@pytest.mark.parametrize(
    "file, name",
    [
        ("errors.py", "lorafusion_jax.data.records"),
        ("lora/bank.py", "lorafusion_jax.train.trainer"),
        ("train/step.py", "lorafusion_jax.cli"),
        ("train/step.py", "lorafusion_jax.bench.layer"),
    ],
)
def test_broken_layer_rule_is_caught(file, name):
    assert layer_problem(ROOT / "lorafusion_jax" / file, name)


def test_relative_and_lazy_imports_are_seen():
    source = "def f():\n    from ..train import step\n    import flax.nnx as n\n"
    assert imports(source, "lorafusion_jax.lora") == [
        (2, "lorafusion_jax.train.step"),
        (3, "flax.nnx"),
    ]
