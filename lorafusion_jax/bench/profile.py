"""Where the device's time goes, by class of kernel, from jax's own profiler."""

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

CLASSES: dict[str, re.Pattern] = {
    "attention": re.compile(r"fmha|flash|cudnn|sdpa|attention", re.I),
    "lora": re.compile(r"lora_(down|gated_down|gated_grad|grad_up|grad_down)", re.I),
    "fused_gemm": re.compile(r"lora_(base_up|dx)", re.I),
    "gemm": re.compile(r"gemm|nvjet|cutlass|cublas|xmma|dot", re.I),
    "copy": re.compile(r"memcpy|memset|copy", re.I),
}
"""The first that matches a kernel's name; anything else is `elementwise`."""


def class_of(kernel: str) -> str:
    """Returns the class of a kernel's name."""
    found = (name for name, pattern in CLASSES.items() if pattern.search(kernel))
    return next(found, "elementwise")


def kernel_classes(call: Callable[[], object], *, calls: int) -> dict[str, float]:
    """Runs a call under the profiler.

    Args:
        call: waits for the device before it returns.
        calls: microbatches in it.

    Returns:
        Milliseconds per microbatch of each class, as `ms_<class>`, and `ms_idle`, in which the
        device had nothing to do; empty where the profiler shows no device (a CPU).
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        totals: dict[str, float] = {}
        for path in Path(folder).rglob("*.xplane.pb"):
            for name, nanoseconds in _device_events(path):
                kind = class_of(name)
                totals[kind] = totals.get(kind, 0.0) + nanoseconds / 1e6 / calls
    if not totals:
        return {}
    idle = max(0.0, 1e3 * seconds / calls - sum(totals.values()))
    return {f"ms_{kind}": value for kind, value in totals.items()} | {"ms_idle": idle}


def _device_events(path: Path):
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from ((event.name, event.duration_ns) for event in line.events)
