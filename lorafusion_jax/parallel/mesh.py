"""The mesh (data, stage), how arrays lie on it, and which meshes can work."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from lorafusion_jax.errors import ConfigError
from lorafusion_jax.models.config import ModelConfig

DATA, STAGE = "data", "stage"

# Every array of the engine lies in one of these ways. Where axis 0 is sharded it concatenates what
# the devices hold, so that a layer's weights on its stage are a shard as they are, with no copy.
REPLICATED = PartitionSpec()
PER_STAGE = PartitionSpec(STAGE)  # frozen weights, adapters, moments, rows of embedding and head
PER_DEVICE = PartitionSpec((STAGE, DATA))  # rings, exchanges, accumulators
PER_RANK = PartitionSpec(None, DATA)  # rows of the schedule: [slot, rank, ...]

type Device = Any
"""A `jax.Device`, of which type checkers do not see that it is a class."""

type AxisKind = Literal["auto", "explicit"]
_AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def make_mesh(
    data: int,
    stage: int,
    *,
    num_layers: int,
    devices: Sequence[Device] | None = None,
    axis_kind: AxisKind = "auto",
) -> Mesh:
    """Makes the mesh of `data` copies of a pipeline of `stage` devices.

    Neighbouring stages are neighbouring devices. With several processes, each must own devices of
    the mesh: call `processes.start_processes` before.

    Args:
        data: copies of the pipeline.
        stage: stages of the pipeline.
        num_layers: decoder layers to spread over the stages.
        devices: to use instead of all; the first data * stage are taken.
        axis_kind: axis type of both axes.

    Raises:
        ConfigError: the mesh cannot work; says why, and the nearest that can.
    """
    devices = jax.devices() if devices is None else devices
    check_sizes(data, stage, num_devices=len(devices), num_layers=num_layers)
    grid = np.array(devices[: data * stage]).reshape(data, stage)
    return Mesh(grid, (DATA, STAGE), axis_types=(_AXIS_TYPES[axis_kind],) * 2)


def check_sizes(data: int, stage: int, *, num_devices: int, num_layers: int) -> None:
    """Refuses a mesh that cannot work, whatever the devices are.

    Raises:
        ConfigError: says why, and the nearest that can.
    """
    problems = []
    if data * stage > num_devices:
        problems.append(f"{data * stage} devices are needed, and there are {num_devices}")
    if stage > num_layers:
        problems.append(f"{stage} stages are more than the model's {num_layers} layers")
    if data < 1 or stage < 1:
        problems.append("both must be at least 1")
    if problems:
        best_data, best_stage = nearest_mesh(data, stage, num_devices, num_layers)
        raise ConfigError(
            f"parallel: data={data}, stage={stage} cannot work: {'; '.join(problems)}. "
            f"The nearest that can is data={best_data}, stage={best_stage}"
        )


def check_mesh(data: int, stage: int, config: ModelConfig) -> None:
    """Refuses a mesh that `lorafusion train` cannot use.

    Raises:
        ConfigError: says why, and the nearest that can work.
    """
    mesh = make_mesh(data, stage, num_layers=config.num_hidden_layers)
    owners = {device.process_index for device in mesh.devices.flat}
    if len(owners) < jax.process_count():
        total = jax.device_count()
        best_data, best_stage = nearest_mesh(total, stage, total, config.num_hidden_layers)
        raise ConfigError(
            f"parallel: data={data}, stage={stage} leaves {jax.process_count() - len(owners)} of "
            f"{jax.process_count()} processes without a device of the mesh. The nearest that can "
            f"work is data={best_data}, stage={best_stage}; or start fewer processes"
        )


def nearest_mesh(data: int, stage: int, num_devices: int, num_layers: int) -> tuple[int, int]:
    """Returns the working (data, stage) nearest to a wanted one.

    The number of stages is what decides whether a model fits, so it is kept rather than `data`.
    """
    best_stage = max(1, min(stage, num_devices, num_layers))
    return max(1, min(data, num_devices // best_stage)), best_stage
