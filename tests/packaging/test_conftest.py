"""The shared settings do what they say."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_jax_sees_eight_virtual_devices():
    import jax

    assert "--xla_force_host_platform_device_count" in os.environ["XLA_FLAGS"]
    assert len(jax.devices("cpu")) == 8


@pytest.mark.scenario("F8")
def test_no_test_reaches_the_network():
    with pytest.raises(RuntimeError, match="look-up"):
        socket.getaddrinfo("example.com", 443)
    with socket.socket() as s, pytest.raises(RuntimeError, match="connection"):
        s.connect(("192.0.2.1", 443))
    with socket.socket() as server:  # the machine itself stays reachable
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.socket() as s:
            s.connect(server.getsockname())


@pytest.mark.parametrize("name", ["a", "b"])
def test_rng_belongs_to_the_test(rng, name):
    expected = {"a": 5011, "b": 3359}
    assert int(rng.integers(10_000)) == expected[name]


@pytest.mark.parametrize(
    "reason, code", [("needs a CUDA device", 0), ("did not feel like it", 1)], ids=["known", "not"]
)
def test_skip_ledger(tmp_path, reason, code):
    """A skip for a reason outside the ledger fails the run."""
    (tmp_path / "conftest.py").write_bytes((ROOT / "tests/conftest.py").read_bytes())
    (tmp_path / "test_it.py").write_text(
        f"import pytest\ndef test_it():\n    pytest.skip({reason!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout
    assert ("not in the ledger" in done.stdout) == bool(code)
