"""Where the device's time goes, by class of kernel, from jax's own profiler."""

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

CLASSES: dict[str, re.Pattern] = {
    "exchange": re.compile(r"nccl", re.I),
    "attention": re.compile(r"fmha|flash|cudnn|sdpa|attention", re.I),
    "lora": re.compile(r"lora_(down|gated_down|gated_grad|grad_up|grad_down)", re.I),
    "fused_gemm": re.compile(r"lora_(base_up|dx)", re.I),
    "gemm": re.compile(r"gemm|nvjet|cutlass|cublas|xmma|dot", re.I),
    "slices": re.compile(r"dynamic_(update_)?slice", re.I),
    "copy": re.compile(r"memcpy|memset|copy", re.I),
}
"""The first that matches a kernel's name; anything else is `elementwise`."""
_NUMBER = re.compile(r"_\d+$")


def class_of(kernel: str) -> str:
    """Returns the class of a kernel's name."""
    found = (name for name, pattern in CLASSES.items() if pattern.search(kernel))
    return next(found, "elementwise")


class Event(NamedTuple):
    """A kernel that ran.

    Attributes:
        device: name of its plane in the profile.
        kernel: name.
        start: nanoseconds.
        duration: nanoseconds.
    """

    device: str
    kernel: str
    start: float
    duration: float


class Profile(NamedTuple):
    """What devices did during a call.

    Attributes:
        events: kernels of all devices; none where the profiler shows no device (a CPU).
        seconds: that the call took.
    """

    events: list[Event]
    seconds: float

    def by_class(self, parts: int) -> dict[str, float]:
        """Returns milliseconds of each class, as `ms_<class>`, and `ms_idle`.

        Exchanges run beside other kernels, so the sum can be more than the time that passed; idle
        is the time in which a device ran nothing.

        Args:
            parts: microbatches or ticks that the call is made of; each has its share.
        """
        devices = {event.device for event in self.events}
        if not devices:
            return {}
        shares = 1e6 * parts * len(devices)
        totals: dict[str, float] = {}
        for event in self.events:
            kind = class_of(event.kernel)
            totals[kind] = totals.get(kind, 0.0) + event.duration / shares
        busy = sum(_busy([e for e in self.events if e.device == device]) for device in devices)
        idle = max(0.0, 1e3 * self.seconds / parts - busy / shares)
        return {f"ms_{kind}": value for kind, value in totals.items()} | {"ms_idle": idle}

    def heaviest(self, parts: int, count: int = 25) -> str:
        """Returns the kernels that take most, a line each, with milliseconds of a part."""
        totals: dict[str, float] = {}
        for event in self.events:
            name = _NUMBER.sub("", event.kernel)
            totals[name] = totals.get(name, 0.0) + event.duration
        shares = 1e6 * parts * len({event.device for event in self.events})
        ranked = sorted(totals.items(), key=lambda item: -item[1])[:count]
        return "\n".join(f"{total / shares:9.3f} ms  {name[:80]}" for name, total in ranked)

    def waits(self, parts: int, count: int = 10) -> str:
        """Returns the kernels that devices idled before, a line each, with the idle time of a part.

        The first kernel of a device has no time before it. The profiler itself lengthens gaps.
        """
        totals: dict[str, tuple[float, int]] = {}
        devices = {event.device for event in self.events}
        for device in devices:
            until = None
            for event in sorted((e for e in self.events if e.device == device), key=_start):
                name = _NUMBER.sub("", event.kernel)
                if until is not None and event.start > until:
                    idle, times = totals.get(name, (0.0, 0))
                    totals[name] = (idle + event.start - until, times + 1)
                until = max(until or 0.0, event.start + event.duration)
        shares = parts * len(devices)
        ranked = sorted(totals.items(), key=lambda item: -item[1][0])[:count]
        return "\n".join(
            f"{idle / shares / 1e6:9.3f} ms idle before {times / shares:6.1f}  {name[:80]}"
            for name, (idle, times) in ranked
        )


def profiled(call: Callable[[], object]) -> Profile:
    """Runs a call, which waits for the devices before it returns, under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        events = [e for path in Path(folder).rglob("*.xplane.pb") for e in _device_events(path)]
    return Profile(events, seconds)


def _device_events(path: Path) -> Iterator[Event]:
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield Event(plane.name, event.name, event.start_ns, event.duration_ns)


def _start(event: Event) -> float:
    return event.start


def _busy(events: list[Event]) -> float:
    """Nanoseconds in which at least one of the kernels ran."""
    total, until = 0.0, 0.0
    for event in sorted(events, key=_start):
        end = event.start + event.duration
        total += max(0.0, end - max(until, event.start))
        until = max(until, end)
    return total
