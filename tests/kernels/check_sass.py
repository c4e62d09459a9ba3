"""Compiles the kernels to machine code without a GPU; fails on spilled registers.

    make check-sass                      every shipped configuration
    python -m tests.kernels.check_sass single     those whose name contains the word

Needs XLA's CUDA plugin and ptxas, from the wheels that `make check-sass` puts aside; no driver.
"""

import functools
import os
import re
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plugin would look for a driver
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
from jax.experimental import topologies

from pallas_kernels import _mgpu
from tests.kernels import shipped

# What XLA knows of an H100 SXM; `platform.target_config` of one prints it.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def _sharding():
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=_H100
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_for_h100(function, arguments) -> list[dict]:
    """Compiles and returns name, registers, spilled bytes and serialisation of each kernel."""

    def place(value):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=_sharding())

    with _mgpu.lower_for_hopper():
        lowered = jax.jit(lambda *a: function(*a)).lower(*jax.tree.map(place, arguments))
    with tempfile.TemporaryFile() as log:  # ptxas writes to the descriptors, past sys.stdout
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            lowered.compile()
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])
        log.seek(0)
        return parse(log.read().decode(errors="replace"))


def parse(log: str) -> list[dict]:
    """Returns what ptxas said of each kernel in a log."""
    kernels = []
    for part in re.split(r"(?=Compiling entry function)", log)[1:]:
        name, registers = re.search(r"function '([^']+)'", part), re.search(r"Used (\d+) reg", part)
        if name and registers:
            kernels.append({
                "kernel": name[1].removesuffix("_kernel"),
                "registers": int(registers[1]),
                "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", part))),
                "serialized": "serialized" in part,
            })  # fmt: skip
    return kernels


def main(words: list[str]) -> int:
    """Compiles the programs whose name contains one of the words; returns the exit code."""
    bad = 0
    for name, (function, arguments) in shipped.programs().items():
        if words and not any(word in name for word in words):
            continue
        for kernel in compile_for_h100(function, arguments):
            wrong = kernel["spilled"] > 0 or kernel["serialized"]
            bad += wrong
            print(f"{'BAD ' if wrong else 'ok  '}{name:<28} {kernel}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
