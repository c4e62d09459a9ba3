"""The `lorafusion` command. Commands import what they need when they run: `--help` is quick."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from lorafusion_jax.cli import (
    adapters,
    ask,
    export,
    jobs,
    plan,
    prepare,
    project,
    report,
    status,
    training,
    verify,
)
from lorafusion_jax.errors import CheckpointError, LoraFusionError, ResourceError

app = typer.Typer(
    name="lorafusion",
    help="Fine-tune many LoRA adapters of one frozen base model at once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _module in (
    project,
    prepare,
    plan,
    training,
    status,
    report,
    ask,
    export,
    adapters,
    verify,
    jobs,
):
    _module.register(app)

# What may hit one of several processes only: a checkpoint that cannot be written, memory or disk.
_ALONE = (CheckpointError.exit_code, ResourceError.exit_code)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: words after the program's name; those of this process by default.

    Returns:
        Exit code: 0 done, 2 usage, configuration or data, 3 checkpoint unusable or folder in use,
        4 stopped by a non-finite gradient, 5 out of memory or disk, 6 watchdog, 130 interrupted.
    """
    try:
        code = _run(arguments)
    except BaseException:
        if _among_others():  # that would wait for this one in an exchange
            traceback.print_exc()
            _leave(1)
        raise
    if code in _ALONE and _among_others():
        _leave(code)
    return code


def _among_others() -> bool:
    """Whether this is one of several processes of a run."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _leave(code: int) -> None:
    """Ends this process without waiting for the others, as a normal end does."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    # Without it, transformers prints that torch is missing, which is no news here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # By default jax takes three quarters, and a base model may need what is left over.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        given = None if arguments is None else list(arguments)
        code = app(args=given, prog_name="lorafusion", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # newer typers turn an interrupt into this code themselves
            return _explain("interrupted", code)
        return code if isinstance(code, int) else 0
    except LoraFusionError as error:
        return _explain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _explain("interrupted", 130)
    except BrokenPipeError:  # the reader left, as `head` does; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _code_of(error)


def _code_of(error: Exception) -> int:
    """Explains an error of another library, or raises it again: then it is our bug."""
    if hasattr(error, "show"):  # a usage error of the command line parser, which prints itself
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        return getattr(error, "exit_code", 2)
    if isinstance(error, OSError):
        code = ResourceError.exit_code if error.errno in _DISK_FULL else LoraFusionError.exit_code
        return _explain(f"{error.filename or 'file'}: {error.strerror or error}", code)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        first = f"out of memory: {str(error).splitlines()[0] if str(error) else 'on the host'}"
        advice = "lower batching.tokens_per_microbatch, or set train.remat: full"
        return _explain("\n".join([first, *_memory_now(), advice]), ResourceError.exit_code)
    from lorafusion_sched import PlanError

    if isinstance(error, PlanError):
        return _explain(str(error), LoraFusionError.exit_code)
    raise error


def _memory_now() -> list[str]:
    if "jax" not in sys.modules:
        return []
    from lorafusion_jax.train.memory import memory_now

    return memory_now()


def _explain(message: str, code: int) -> int:
    # From 128 up, a signal stopped a healthy run.
    print(f"error: {message}" if code < 128 else message, file=sys.stderr)
    return code
