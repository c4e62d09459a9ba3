"""Two clocks: wall time of many calls in flight, and the GPU's own time per kernel."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax


def _drain(results) -> None:
    jax.block_until_ready(results)


def seconds_per_call(call: Callable, arguments: Sequence[tuple], calls: int) -> float:
    """Times `calls` calls in flight, rotating over several sets of arguments."""
    results = []
    start = time.perf_counter()
    for index in range(calls):
        results = call(*arguments[index % len(arguments)])
    _drain(results)
    return (time.perf_counter() - start) / calls


def sustained(
    calls: Mapping[str, tuple[Callable, Sequence[tuple]]], *, rounds: int = 5, seconds: float = 0.12
) -> dict[str, float]:
    """Returns the median time per call of each, in ms, all taking turns.

    Turns matter: under sustained load a GPU lowers its clock, and what ran last ran slower.

    Args:
        calls: function and sets of arguments to rotate over, by name.
        rounds: turns that each takes.
        seconds: length of a turn.
    """
    counts = {}
    for name, (call, arguments) in calls.items():
        _drain([call(*each) for each in arguments])
        counts[name] = max(4, int(seconds / seconds_per_call(call, arguments, 6)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, arguments) in calls.items():
            samples[name].append(seconds_per_call(call, arguments, counts[name]))
    return {name: statistics.median(values) * 1e3 for name, values in samples.items()}


def forbid_graphs() -> None:
    """Keeps XLA from making CUDA graphs, in which CUPTI sees no kernels; before jax starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()


def kernel_times(call: Callable, arguments: tuple, repeat: int = 5) -> list[tuple[str, float]]:
    """Returns name and median time in us of each kernel of a call, from CUPTI.

    XLA must not have turned the call into a CUDA graph: see `forbid_graphs`.
    """
    from jax.experimental.mosaic.gpu import profiler

    _drain(call(*arguments))
    runs = []
    for _ in range(repeat):
        times = profiler.measure(call, aggregate=False)(*arguments)[1]
        if not isinstance(times, list) or (runs and len(times) != len(runs[0])):
            raise RuntimeError("CUPTI saw other kernels in an equal call: disable command buffers")
        runs.append(times)
    return [
        (kernels[0][0], statistics.median(time for _, time in kernels) * 1e3)
        for kernels in zip(*runs, strict=True)
    ]
