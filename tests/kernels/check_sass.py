"""Compiles the kernels to machine code without a GPU; fails on spilled registers.

    make check-sass                      every shipped configuration
    python -m tests.kernels.check_sass single     those whose name contains the word

Needs XLA's CUDA plugin and ptxas, from the wheels that `make check-sass` puts aside; no driver.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plugin would look for a driver
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
from jax.experimental import topologies

from tests.kernels import shipped

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {smem_per_sm}
  threads_per_core_limit: {threads} core_count: {sms} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: {smem}
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_OWN = "feature_extension: ACCELERATED_FEATURES"
# What XLA knows of a device; `target_config` of a real one's topology prints it.
_DEVICES = {
    (8, 0): {"name": "NVIDIA A100", "sms": 108, "smem": 166_912, "threads": 2048, "features": ""},
    (8, 6): {"name": "NVIDIA A10", "sms": 72, "smem": 101_376, "threads": 1536, "features": ""},
    (8, 9): {"name": "NVIDIA L40S", "sms": 142, "smem": 101_376, "threads": 1536, "features": ""},
    (9, 0): {"name": "NVIDIA H100", "sms": 132, "smem": 232_448, "threads": 2048, "features": _OWN},
    (10, 0): {
        "name": "NVIDIA B200",
        "sms": 148,
        "smem": 232_448,
        "threads": 2048,
        "features": _OWN,
    },
}


@functools.cache
def _sharding(capability):
    device = _DEVICES[capability]
    target = _TARGET.format(
        major=capability[0], minor=capability[1], smem_per_sm=device["smem"] + 1024, **device
    )
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=target
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_for(capability, function, arguments) -> tuple[list[dict], int]:
    """Compiles; returns name, registers, spilled bytes and serialisation of each kernel.

    Also returns the bytes of temporary memory that the whole program takes.
    """

    def place(value):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=_sharding(capability))

    with shipped.lowering_for(capability):
        lowered = jax.jit(lambda *a: function(*a)).lower(*jax.tree.map(place, arguments))
    with tempfile.TemporaryFile() as log:  # ptxas writes to the descriptors, past sys.stdout
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with shipped.lowering_for(capability):
                compiled = lowered.compile()
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])
            log.seek(0)
            text = log.read().decode(errors="replace")
            if sys.exc_info()[0]:
                print(text[-4000:])
    return parse(text), compiled.memory_analysis().temp_size_in_bytes


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


def check(capability, words: list[str]) -> int:
    """Compiles the programs for a capability whose name contains one of the words; counts faults.

    One capability per process: the compiler remembers the first one.
    """
    bad = 0
    for name, (own, function, arguments) in shipped.programs().items():
        if own != capability or (words and not any(word in name for word in words)):
            continue
        kernels, temporary = compile_for(capability, function, arguments)
        bad += not kernels
        rows, columns = arguments[0].shape
        share = temporary / (rows * columns * arguments[0].dtype.itemsize)
        large = name in shipped.MODEL_SIZED and share > 0.5
        bad += large
        print(f"{'BAD ' if large else 'ok  '}{name:<28} temporary memory {share:.3f} of X's size")
        for kernel in kernels:
            wrong = kernel["spilled"] > 0 or kernel["serialized"]
            bad += wrong
            print(f"{'BAD ' if wrong else 'ok  '}{name:<28} {kernel}", flush=True)
    return bad


def main(words: list[str]) -> int:
    """Checks all capabilities, each in a process of its own; returns the exit code."""
    processes = (
        subprocess.run([sys.executable, "-m", __spec__.name, f"--{major}.{minor}", *words])
        for major, minor in _DEVICES
    )
    return int(any([process.returncode for process in processes]))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--"):
        major, minor = map(int, sys.argv[1][2:].split("."))
        sys.exit(int(check((major, minor), sys.argv[2:]) > 0))
    sys.exit(main(sys.argv[1:]))
