"""What a run chose by itself, and keeps when it goes on later: other choices give other bits.

The memory of the device, the plan as it is now and the jobs that are left would all lead to other
choices at a resume, none of which the user has asked for.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

from lorafusion_jax.models.decoder import Remat
from lorafusion_jax.train.memory import Step, choose_remat, device_bytes, predict


class Choices(NamedTuple):
    """What decides the shapes and the order of sums of the compiled programs.

    Attributes:
        devices: of the run.
        remat: what the backward pass computes again.
        loss_chunk: rows whose logits exist at a time.
        eval_capacity: rows of a microbatch of held-out samples.
        segments: static number of segments of a microbatch.
        longest: static bound of the samples' lengths.
        policies: on a mesh, what each layer place of a stage computes again.
        residuals: on a mesh, what of a stage waits for the backward pass.
    """

    devices: int
    remat: Remat
    loss_chunk: int
    eval_capacity: int
    segments: int
    longest: int
    policies: tuple[Remat, ...] = ()
    residuals: Literal["save", "recompute"] = "save"

    @classmethod
    def from_record(cls, record: Mapping[str, Any] | None) -> Self | None:
        """Reads what a checkpoint holds; None if an older release left some of it out."""
        optional = cls._field_defaults
        if record is None or any(n not in record and n not in optional for n in cls._fields):
            return None
        values: dict[str, Any] = {name: record[name] for name in cls._fields if name in record}
        values["policies"] = tuple(values.get("policies", ()))
        return cls(**values)


def kept(before: Choices | None, fresh: Choices) -> Choices:
    """Returns the choices of the run before, as far as they fit this one; else the fresh ones.

    Args:
        before: of the run that saved; None where there is nothing to keep.
        fresh: what a new run would choose, `remat` excepted.
    """
    if before is None:
        return fresh
    return before._replace(
        remat=fresh.remat,
        eval_capacity=max(before.eval_capacity, fresh.eval_capacity),
        segments=max(before.segments, fresh.segments),
        longest=max(before.longest, fresh.longest),
    )


def plan_memory(
    step: Step, wish: Remat | Literal["auto"], before: Remat | None = None
) -> tuple[Remat, str]:
    """Returns the remat policy, and what it was planned to need.

    Args:
        step: the training step.
        wish: of the configuration.
        before: what "auto" chose when the run began; kept wherever the device has room for it.

    Raises:
        ResourceError: nothing fits that "auto" may choose.
    """
    available = device_bytes()
    if wish != "auto":
        remat = wish
    elif before is not None and (available is None or predict(step, before).total <= available):
        remat = before
    else:
        remat = "none" if available is None else choose_remat(step, available)[0]
    has = "" if available is None else f"; the device has {available / 2**30:.2f} GiB"
    return remat, f"train.remat {remat} was planned to need {predict(step, remat)}{has}"
