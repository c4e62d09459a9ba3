"""The steps as compiled programs: ahead of time, side by side, never silently another one."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from lorafusion_jax.lora.bank import AdapterBank
from lorafusion_jax.train.batch import PackedBatch
from lorafusion_jax.train.events import Compiling
from lorafusion_jax.train.loss import TokenLosses
from lorafusion_jax.train.optimizer import Hyper
from lorafusion_jax.train.step import (
    Model,
    StepReport,
    TrainState,
    eval_step,
    train_step,
    update_step,
)
from lorafusion_jax.train.stored import Compiled, Program

# XLA then picks, or asks its libraries for, algorithms that repeat their bits. Other platforms
# ignore the option.
REPEATABLE = {"xla_gpu_exclude_nondeterministic_ops": True}


class _Key(NamedTuple):
    """What tells programs apart: a name, capacity (0 for the update), M, its bound, loss limits."""

    name: str
    capacity: int = 0
    segments: int = 0
    longest: int | None = None
    limits: bool = False


class Programs:
    """One training and one evaluation program per bucket, and one update.

    A program is compiled when it is first called, or before, in the background, if it was
    announced: XLA compiles mostly on one core, so two programs take as long as one.

    Args:
        model: static half of the base model.
        frozen: its weights.
        listener: told about compilations.
        waiting: entered while training waits for the compiler.
    """

    def __init__(
        self,
        model: Model,
        frozen: PyTree,
        listener: Callable[[Compiling], None] = lambda _: None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._frozen, self._listener, self._waiting = frozen, listener, waiting
        self._steps = programs_of(model)
        self._compiling: dict[_Key, Future[tuple[Compiled, float]]] = {}
        self._compiled: dict[_Key, Compiled] = {}

    def train(self, state: TrainState, batch: PackedBatch) -> tuple[TrainState, Float[Array, ""]]:
        """Runs `train_step`; `state` is donated."""
        return self._program(_batch_key("train", batch), state, self._frozen, batch)

    def update(
        self, state: TrainState, hyper: Hyper, ended: Bool[Array | np.ndarray, " slots"]
    ) -> tuple[TrainState, StepReport]:
        """Runs `update_step`; `state` is donated."""
        return self._program(_update_key(hyper), state, hyper, ended)

    def evaluate(self, bank: AdapterBank, batch: PackedBatch) -> TokenLosses:
        """Runs `eval_step`."""
        return self._program(_batch_key("eval", batch), bank, self._frozen, batch)

    def evaluate_all(
        self, bank: AdapterBank, batches: Sequence[PackedBatch]
    ) -> Iterator[TokenLosses]:
        """Runs `eval_step` on one microbatch after the other."""
        return (self.evaluate(bank, batch) for batch in batches)

    def announce(
        self, state: TrainState, hyper: Hyper, train: PackedBatch, evaluate: PackedBatch | None
    ) -> None:
        """Starts to compile what batches of these shapes will need."""
        pool = ThreadPoolExecutor(2, "compile")
        self._start(pool, _batch_key("train", train), (state, self._frozen, train))
        if evaluate is not None:
            args = (state.bank, self._frozen, evaluate)
            self._start(pool, _batch_key("eval", evaluate), args)
        self._start(pool, _update_key(hyper), (state, hyper, train.batch_end))
        pool.shutdown(wait=False)  # its threads end with the last compilation

    @property
    def num_compiled(self) -> int:
        """How many programs were compiled so far."""
        return len(self._compiled)

    def _start(self, pool: ThreadPoolExecutor, key: _Key, args: tuple) -> None:
        self._listener(Compiling(key.name, key.capacity))
        # The arrays may be donated before the compiler has looked at them: it gets their shapes.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        self._compiling[key] = pool.submit(_compile, self._steps[key.name], shapes)

    def _program(self, key: _Key, *args):
        if key not in self._compiled:
            if key in self._compiling:
                with self._waiting():
                    program, seconds = self._compiling.pop(key).result()
            else:
                self._listener(Compiling(key.name, key.capacity))
                with self._waiting():
                    program, seconds = _compile(self._steps[key.name], args)
            memory = program.memory_analysis()
            temp_bytes = None if memory is None else memory.temp_size_in_bytes
            self._listener(Compiling(key.name, key.capacity, seconds, temp_bytes))
            self._compiled[key] = program
        return self._compiled[key](*args)


def _batch_key(name: str, batch: PackedBatch) -> _Key:
    sizes = batch.tokens.shape[0], batch.segment_offsets.shape[0]
    return _Key(name, *sizes, batch.longest.rows)


def _update_key(hyper: Hyper) -> _Key:
    return _Key("update", limits=hyper.loss_limit is not None)


def programs_of(model: Model) -> dict[str, Program]:
    """Returns the programs of a model, by name: train, update and eval."""
    options = REPEATABLE if model.deterministic else None
    leaf: Any = 0
    report = StepReport(*[leaf] * len(StepReport._fields))
    losses = TokenLosses(*[leaf] * len(TokenLosses._fields))
    return {
        "train": Program(partial(train_step, model), lambda state, *_: (state, 0), True, options),
        "update": Program(update_step, lambda state, *_: (state, report), True, options),
        "eval": Program(partial(eval_step, model), lambda *_: losses, False, options),
    }


def _compile(program: Program, args: tuple) -> tuple[Compiled, float]:
    start = time.perf_counter()
    compiled = program.compile(args)
    return compiled, time.perf_counter() - start
