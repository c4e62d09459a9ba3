"""Benchmarks. Each is a module with `main(arguments) -> int`, run by `lorafusion bench NAME`."""

import importlib
import importlib.util
import pkgutil

from lorafusion_jax.errors import ConfigError

_NOT_BENCHES = {"results", "report", "schedule_milp"}


def names() -> list[str]:
    """Lists the benchmarks by name, without importing them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_BENCHES)


def run(name: str, arguments: list[str]) -> int:
    """Runs one benchmark.

    Args:
        name: one of `names()`.
        arguments: what its own command line takes.

    Returns:
        Its exit code.

    Raises:
        ConfigError: there is no benchmark of that name.
    """
    if name not in names():
        raise ConfigError(f"no benchmark {name!r}; there are: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").main(arguments) or 0
