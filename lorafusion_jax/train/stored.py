"""Lowered programs, kept on disk beside the compiled ones of jax.

jax finds a compiled program by its text. To have that text, a step must be traced and its kernels
lowered, in Python: 14 of the 20 seconds of a warm start at 8B. Here the text is found by what it
depends on: the source files of this project, versions, device, settings, the step's static half,
and the shapes of its arguments. A file that cannot be read is written anew. One that nothing has
taken for a month goes when another is written.

What cannot be told by that is not kept: models with modules or functions of a user's own. Whoever
replaces functions of this project while it runs calls `Program.compile_anew`.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
from jaxtyping import PyTree

import lorafusion_jax
import lorafusion_sched
import pallas_kernels
from pallas_kernels import tables

_OURS = (lorafusion_jax, lorafusion_sched, pallas_kernels)
_VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "numpy")
_KNOWN = frozenset(
    (*(package.__name__ for package in _OURS), *_VERSIONS_OF, "ml_dtypes", *sys.stdlib_module_names)
)
_KEPT_SECONDS = 30 * 24 * 3600
_UNRELATED = ("jax_compilation_cache_", "jax_persistent_cache_")  # settings of where and when
# Programs are read by the very versions that wrote them, so what jax promises nothing of is safe.
_CALLS = ("mosaic_gpu_v2", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


class Compiled(Protocol):
    """A compiled program, of jax's kind or ours."""

    def __call__(self, *args: Any) -> Any:
        """Runs it."""
        ...

    def memory_analysis(self) -> Any:
        """As of `jax.stages.Compiled`."""
        ...


@dataclass(frozen=True)
class Program:
    """A step to be compiled.

    Attributes:
        step: the function, or a `functools.partial` of it over static arguments.
        like: from the arguments to something with the structure of the results.
        donate: the buffers of the first argument are taken for results.
        options: of the compiler.
    """

    step: Callable[..., Any]
    like: Callable[..., PyTree]
    donate: bool
    options: dict[str, Any] | None = None

    def compile(self, args: tuple) -> Compiled:
        """Compiles for arguments of these shapes, by a stored text where there is one.

        Args:
            args: arrays, or their `jax.ShapeDtypeStruct`.

        Returns:
            The program, for arguments of the same structure.
        """
        folder = jax.config.jax_compilation_cache_dir
        # jax also takes addresses of buckets, which are no paths.
        usable = folder and "://" not in folder and jax.config.jax_enable_compilation_cache
        if usable and _is_known(self.step):
            try:
                return self._compile_stored(args, Path(folder) / "lowered")
            except (ValueError, NotImplementedError, OSError, ImportError):
                pass  # jax.export does not take every program
        return self.compile_anew(args)

    def compile_anew(self, args: tuple) -> Compiled:
        """Does the same without stored texts."""
        jitted = self._jit(self.step, donate_argnums=0 if self.donate else ())
        return jitted.lower(*args).compile()

    @property
    def _jit(self) -> Callable[..., Any]:
        return partial(jax.jit, compiler_options=self.options)

    def _compile_stored(self, args: tuple, folder: Path) -> "_OfLeaves":
        leaves, structure = jax.tree.flatten(args)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        results = jax.tree.structure(self.like(*args))

        def on_leaves(*leaves):
            found = self.step(*jax.tree.unflatten(structure, leaves))
            assert jax.tree.structure(found) == results
            return tuple(jax.tree.leaves(found))

        path = folder / self._key(structure, shapes)
        exported = _read(path)
        if exported is None:
            checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _CALLS]
            exported = jax.export.export(jax.jit(on_leaves), disabled_checks=checks)(*shapes)
            text = exported.serialize()
            with contextlib.suppress(OSError):  # a full disk, a folder that others wrote
                _write(path, text)
        donated = range(len(jax.tree.leaves(args[0])) if self.donate else 0)
        compiled = self._jit(exported.call, donate_argnums=tuple(donated)).lower(*shapes).compile()
        return _OfLeaves(compiled, structure, results)

    def _key(self, structure, shapes: list) -> str:
        step = self.step if isinstance(self.step, partial) else partial(self.step)
        device = jax.devices()[0]
        parts = (
            step.func.__module__, step.func.__qualname__, step.args, step.keywords, structure,
            shapes, device.device_kind, jax.default_backend(), tables.chosen(), _environment(),
            sorted(
                (name, value) for name, value in jax.config.values.items()
                if not name.startswith(_UNRELATED)
            ),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _OfLeaves:
    """A compiled program over the leaves of its arguments."""

    compiled: jax.stages.Compiled
    structure: Any
    results: Any

    def __call__(self, *args):
        leaves, structure = jax.tree.flatten(args)
        if structure != self.structure:
            raise TypeError(f"arguments of another structure: {structure}, not {self.structure}")
        return jax.tree.unflatten(self.results, self.compiled(*leaves))

    def memory_analysis(self) -> Any:
        """As of `jax.stages.Compiled`."""
        return self.compiled.memory_analysis()


@functools.cache
def _environment() -> str:
    """Versions, and a digest of every source file that a program may come from."""
    digest = hashlib.sha256()
    for package in _OURS:
        root = Path(str(package.__file__)).parent
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS_OF]
    return f"{digest.hexdigest()} {versions}"


class _Names(pickle.Pickler):
    """Collects the modules of all classes and functions in what it is given."""

    def __init__(self):
        super().__init__(io.BytesIO())
        self.found: set[str] = set()

    def reducer_override(self, obj):
        if isinstance(obj, type) or hasattr(obj, "__qualname__"):
            self.found.add((obj.__module__ or "").partition(".")[0])
        return NotImplemented


def _is_known(step: Callable[..., Any]) -> bool:
    """Whether all code that a step's static arguments name is in what `_environment` describes."""
    names = _Names()
    try:
        names.dump(step)
    except (pickle.PicklingError, AttributeError, TypeError):  # lambdas, functions in functions
        return False
    return names.found <= _KNOWN


def _read(path: Path) -> "jax.export.Exported | None":
    """The program of a file; None if there is none, or what is there is damaged."""
    try:
        stored = path.read_bytes()
        digest, text = stored[:32], bytearray(stored[32:])
        if hashlib.sha256(text).digest() == digest:
            with contextlib.suppress(OSError):  # a file of somebody else
                os.utime(path)
            return jax.export.deserialize(text)
    except OSError:
        pass
    return None


def _write(path: Path, text: bytearray) -> None:
    """Writes a file whole or not at all, and removes those that were not taken for long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.iterdir():
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - other.stat().st_mtime > _KEPT_SECONDS:
                other.unlink()
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(hashlib.sha256(text).digest() + text)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
