"""Takes a run to its end: signals, requests, listeners that may leave, memory that may run out."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from lorafusion_jax.config import RunConfig
from lorafusion_jax.errors import ResourceError
from lorafusion_jax.parallel.processes import Votes
from lorafusion_jax.train.events import Event, Listener
from lorafusion_jax.train.loop import Run
from lorafusion_jax.train.memory import memory_now
from lorafusion_jax.train.obey import Obedience
from lorafusion_jax.train.signals import StoppedError, StopSignals


def drive(run: Run, signals: StopSignals, obey: Obedience) -> None:
    """Trains until all is done.

    Args:
        run: just prepared.
        signals: a received one stops the run after the microbatch under way.
        obey: looks for requests between two microbatches.

    Raises:
        StoppedError: a signal came; all is saved.
        NonFiniteError: or `LossSpikeError`: a job's policy stops the run; all is saved.
    """
    votes = Votes()
    run.compile_ahead()
    run.evaluate_base(lambda: votes.cast(signals.received) is not None)
    while not run.finished:
        if (signum := votes.cast(signals.received)) is not None:
            # Before the first microbatch there is nothing to lose, and base models that were
            # evaluated already are evaluated again, with their lines of the metrics.
            if run.begun:
                run.finish_saving()
                obey.forget()
                run.raise_failure()
            raise StoppedError(_how_to_go_on(run), signum)
        obey()
        run.run_microbatch()
    run.finish_saving()
    obey.forget()


def _how_to_go_on(run: Run) -> str:
    if not run.begun:
        return (
            "stopped by a signal before the first microbatch: nothing was trained yet and nothing "
            "is lost, the same command starts the run"
        )
    total = len(run.schedule.plan.microbatches)
    return (
        f"stopped by a signal after microbatch {run.cursor} of {total}; everything is saved, the "
        "same command goes on from there"
    )


@contextmanager
def explained_memory(config: RunConfig) -> Iterator[list[str]]:
    """Turns the device's out-of-memory errors into ours; yields a list for what was planned."""
    planned: list[str] = []
    try:
        yield planned
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = "out of device memory: " + str(error).splitlines()[0][:300]
        raise ResourceError(
            "\n".join([first, *memory_now(), *planned, ""])
            + f"lower batching.tokens_per_microbatch (now {config.batching.tokens_per_microbatch}) "
            f"or raise train.remat (now {config.train.remat}; mlp, attention, then full); the last "
            "checkpoint is intact"
        ) from error


def fan_out(*listeners: Listener | None) -> Listener:
    """Returns a listener that tells all of these; one whose reader has left is told no more."""
    listening = [listener for listener in listeners if listener is not None]

    def tell(event: Event) -> None:
        for listener in tuple(listening):
            try:
                listener(event)
            except BrokenPipeError:  # as of a terminal that was closed: no reason to stop training
                listening.remove(listener)

    return tell


def peak_bytes() -> int | None:
    """Most device memory used so far; CPUs do not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
