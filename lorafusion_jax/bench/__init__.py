"""Benchmarks. Each is a module with `main(arguments) -> int`, run by `lorafusion bench NAME`."""

import importlib
import importlib.util

from lorafusion_jax.errors import ConfigError

_KNOWN = (
    "kernels",
    "layer",
    "training",
    "schedule",
    "pipeline",
    "scaling",
    "demo",
    "sweep",
    "saving",
)


def names() -> list[str]:
    """Lists the benchmarks, without importing them."""
    return [name for name in _KNOWN if importlib.util.find_spec(f"{__name__}.{name}")]


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
