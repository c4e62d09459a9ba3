"""Several processes that train one run: how they start, and how they agree.

Each process runs the same program on the devices it owns. What they decide must be the same in all
of them, so whatever only one can see (a signal, an error, a file) is put to a vote. All processes
must call the functions here in the same order; with one process they cost nothing.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorafusion_jax.errors import ConfigError

_LOOPBACK = ("127.0.0.1", "localhost")
_BALLOTS_OPEN = 2


def start_processes(coordinator: str | None, process: int | None, processes: int | None) -> None:
    """Joins the processes of a run; does nothing where none of the three is given.

    Must come before anything that starts jax.

    Args:
        coordinator: HOST:PORT on which process 0 is reached by the others.
        process: number of this one, from 0.
        processes: how many there are.

    Raises:
        ConfigError: a part is missing or cannot be used, or the others were not found.
    """
    given = {"coordinator": coordinator, "process": process, "processes": processes}
    if all(value is None for value in given.values()):
        return
    if coordinator is None or process is None or processes is None:
        missing = ", ".join(f"--{name}" for name, value in given.items() if value is None)
        raise ConfigError(f"{missing} missing: several processes need all of {_options(given)}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator {coordinator!r}: expected HOST:PORT of process 0")
    if not 0 <= process < processes:
        raise ConfigError(f"--process {process}: expected 0 to {processes - 1} of {processes}")
    # Our own handlers catch SIGTERM and let all processes stop at the same place.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            coordinator_bind_address=coordinator if host in _LOOPBACK else None,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"process {process} of {processes} did not find the others at {coordinator}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _options(given: dict[str, Any]) -> str:
    return ", ".join(f"--{name}" for name in given)


def is_first() -> bool:
    """Says whether this is the process that writes and prints: the only one, or process 0."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """Returns the largest of the processes' values; waits for all of them."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def from_first(value: int) -> int:
    """Returns process 0's value to all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextmanager
def all_or_none() -> Iterator[None]:
    """Runs its body in every process, and fails in all of them if it fails in one.

    Raises:
        ConfigError: it failed in another process, which says why.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = largest(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise ConfigError("another process of this run was refused: its own message says why")


def check_same(what: str, text: str) -> None:
    """Checks that a text is the same in all processes.

    Args:
        what: its name, for the message.
        text: such as a plan as JSON.

    Raises:
        ConfigError: it is not.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    every = multihost_utils.process_allgather(mine)
    if (every != every[0]).any():
        raise ConfigError(
            f"the {jax.process_count()} processes of this run differ in {what}: start all of them "
            "with the same configuration and release, where the same base model, data and output "
            "folder are"
        )


def gathered(array: jax.Array | np.ndarray) -> Any:
    """Returns a whole array in host memory, also where other processes hold parts of it.

    Returns:
        A numpy array, where the annotations of a state, which is also traced, say jax.Array.
    """
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def one_at_a_time[T](tree: T) -> T:
    """Waits for a program with exchanges where several processes run on CPUs, and nowhere else.

    There, programs that run at the same time take each other's messages.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


class Votes:
    """Lets all processes hear of a signal that one of them received, without waiting for it.

    A vote is counted beside the work that was dispatched before it and read some calls later, in
    all processes at the same call.
    """

    def __init__(self):
        self._open: deque[jax.Array] = deque()
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._each = NamedSharding(mesh, PartitionSpec("devices"))
            self._count = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, signum: int | None) -> int | None:
        """Votes with this process's signal; returns the one to obey by now, or None.

        Args:
            signum: received so far, or None.
        """
        if jax.process_count() == 1:
            return signum
        mine = np.full(1, signum or 0, np.int32)
        ballot = jax.make_array_from_callback((jax.device_count(),), self._each, lambda index: mine)
        self._open.append(one_at_a_time(self._count(ballot)))
        if len(self._open) <= _BALLOTS_OPEN:
            return None
        return int(self._open.popleft()) or None
