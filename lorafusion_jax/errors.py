"""Everything that can go wrong by a user's hand, one type each.

The command line prints `str(error)` without a traceback and leaves with `error.exit_code`.
Messages say where (file, line or key), what was got, what was expected, and how to fix it.
"""


class LoraFusionError(Exception):
    """Base of all errors that are explained to the user instead of shown as a traceback."""

    exit_code = 2


class ConfigError(LoraFusionError):
    """The configuration cannot be used; the message lists every problem found."""


class DataError(LoraFusionError):
    """A data file cannot be used.

    Args:
        message: what was got, what was expected, how to fix it.
        path: file the problem is in.
        line: 1-based line number, where one line is to blame.
        column: 1-based column, where it is known.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        line: int | None = None,
        column: int | None = None,
    ):
        where = "" if path is None else str(path)
        where += "" if line is None else f":{line}"
        where += "" if column is None else f":{column}"
        super().__init__(f"{where}: {message}" if where else message)
        self.path, self.line, self.column = path, line, column


class ModelError(LoraFusionError):
    """A base model directory or file cannot be loaded."""


class AdapterError(LoraFusionError):
    """An adapter (PEFT directory, name, target) cannot be used."""


class CheckpointError(LoraFusionError):
    """A checkpoint is missing, damaged or belongs to another run."""

    exit_code = 3


class RunLockedError(LoraFusionError):
    """Another process is training in the same output folder."""

    exit_code = 3


class NonFiniteError(LoraFusionError):
    """Training stopped because a job's gradients stayed non-finite (policy `stop`)."""

    exit_code = 4


class LossSpikeError(LoraFusionError):
    """Training stopped because too many steps of a job in a row were loss spikes."""

    exit_code = 4


class ResourceError(LoraFusionError):
    """Memory or disk is exhausted; the message says planned, available and the knob to turn."""

    exit_code = 5


class WatchdogError(LoraFusionError):
    """A step took longer than the watchdog allows; stacks were dumped to the log."""

    exit_code = 6
