"""Compiles a tick for two H100 without a GPU: XLA's compiler once died of what was in the rings.

    make check-tick

Needs the wheels of `make check-sass`; no driver. Prints where each exchange starts and ends between
the tick's conditionals (forward, backward) and loops (head, update), and the memory. Fails where
XLA lets one thread of a scatter read a whole row, as it once did for the flags of bad samples.
"""

import re
import sys
from dataclasses import replace
from functools import partial

from tests.kernels import check_sass, shipped  # first: it sets the platform

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from lorafusion_jax.bench.mesh_models import MODELS, linear_widths
from lorafusion_jax.bench.pipeline import hyper_of
from lorafusion_jax.models import attention_cudnn
from lorafusion_jax.parallel.convert import make_names
from lorafusion_jax.parallel.layout import even_layout
from lorafusion_jax.parallel.mesh import DATA, PER_STAGE, REPLICATED, STAGE
from lorafusion_jax.parallel.pipeline import WINDOW_SPECS, Pipeline, Window
from lorafusion_jax.parallel.stage import StageModel, layer_shapes
from lorafusion_jax.parallel.state import bank_shapes, state_specs
from lorafusion_jax.parallel.weights import Frozen
from lorafusion_jax.train.batch import pack
from lorafusion_sched import Microbatch

ROWS, SLOTS, RANK, STAGES = 8192, 4, 16, 2
S = jax.ShapeDtypeStruct


def two_h100() -> Mesh:
    """A mesh of devices that can only be compiled for."""
    device = check_sass._DEVICES[9, 0]
    target = check_sass._TARGET.format(
        major=9, minor=0, smem_per_sm=device["smem"] + 1024, **device
    )
    name = f"1x1x{STAGES}"
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=name, target_config=target
    )
    return Mesh(np.array(found.devices).reshape(1, STAGES), (DATA, STAGE))


def compiled_tick(mesh: Mesh) -> jax.stages.Compiled:
    """Compiles one tick of two layers of the 8B shape, cuDNN's attention included."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    attention_cudnn._on_hopper = lambda: True
    cudnn.check_cudnn_version = lambda: 91000
    config = replace(MODELS["8b"], num_hidden_layers=2 * STAGES)
    layout, inside = even_layout(2 * STAGES, STAGES), linear_widths(config)
    paths = [f"model.layers.{layer}.{path}" for layer in range(2 * STAGES) for path in inside]
    places = make_names(layout, paths).places
    dtype = jnp.dtype("bfloat16")
    model = StageModel(config, dtype, layout.places, places, "save", ("none", "full"))
    pipeline = Pipeline(mesh, model, layout.first, "fbh", ROWS)
    batch, _ = pack(Microbatch((), ROWS), {}, tile=128, num_slots=SLOTS, max_segments=16)
    bank = bank_shapes({path: inside[path.split(".", 2)[2]] for path in places}, SLOTS, RANK)

    def placed(spec, x):
        return S(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    def whole(shape):
        return placed(PER_STAGE, S((STAGES * shape.shape[0], *shape.shape[1:]), shape.dtype))

    state = jax.eval_shape(partial(pipeline.empty_state, batch, bank, ("adamw",)))
    state = jax.tree.map(placed, state_specs(state), state)
    layers = [jax.tree.map(whole, layer_shapes(config, dtype)) for _ in range(layout.places)]
    rows = whole(S((config.vocab_size // STAGES, config.hidden_size), dtype))
    frozen = Frozen(layers, placed(REPLICATED, S((config.hidden_size,), dtype)), rows, rows)
    slots = pipeline.lag + 2
    window = Window(
        jax.tree.map(lambda x: S((slots, 1, *x.shape), x.dtype), batch),
        S((slots, 1), jnp.bool_),
        *(S((slots, SLOTS), kind) for kind in (jnp.bool_, jnp.int32, jnp.float32)),
    )
    window = jax.tree.map(
        lambda spec, part: jax.tree.map(partial(placed, spec), part), WINDOW_SPECS, window
    )
    hyper = jax.tree.map(partial(placed, REPLICATED), hyper_of(SLOTS))
    number = placed(REPLICATED, S((), jnp.int32))
    return pipeline.run.lower(state, hyper, frozen, window, number, ticks=1).compile()


def main() -> None:
    with shipped.lowering_for((9, 0)):
        compiled = compiled_tick(two_h100())
    text = compiled.as_text()
    scatters = re.findall(r"^%fused_scatter.*?^}", text, re.M | re.S)
    if slow := [body for body in scatters if re.search(r" reduce\(", body)]:
        sys.exit("a scatter reads whole rows: " + slow[0].partition("\n")[0][:200])
    lines = text.splitlines()
    kinds = "|".join(("conditional", "while", "(?:all-reduce|collective-[a-z]+)(?:-start|-done|)"))
    at = [i for i, line in enumerate(lines) if re.search(r" conditional\(", line)]
    start = max(i for i in range(at[0]) if lines[i].endswith("{"))
    for line in lines[start : lines.index("}", start)]:
        if found := re.match(rf"\s+(?:ROOT )?%?([\w.\-]+) = .*? ({kinds})\(", line):
            print(found[1])
    memory = compiled.memory_analysis()
    print(f"arguments {memory.argument_size_in_bytes / 2**30:.2f} GiB, ", end="")
    print(f"beside them {memory.temp_size_in_bytes / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
