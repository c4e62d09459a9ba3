"""The memory planner of a mesh against XLA's own count, and what it decides."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from lorafusion_jax.errors import ResourceError
from lorafusion_jax.lora.bank import multi_linears
from lorafusion_jax.models import Decoder, ModelConfig
from lorafusion_jax.parallel.layout import even_layout
from lorafusion_jax.parallel.mesh import make_mesh
from lorafusion_jax.parallel.pipeline import Pipeline
from lorafusion_jax.parallel.stage import StageModel, layer_shapes
from lorafusion_jax.parallel.state import bank_shapes, state_specs
from lorafusion_jax.parallel.stream import Slot, window_of
from lorafusion_jax.parallel.weights import Frozen, frozen_specs
from lorafusion_jax.train import memory_mesh
from lorafusion_jax.train.batch import pack
from lorafusion_jax.train.choices import Choices
from lorafusion_jax.train.memory import Step
from lorafusion_jax.train.memory_mesh import Share, choose_stage, fits, plan_stage, predict_stage
from lorafusion_sched import Microbatch
from tests.train.test_memory import TINY
from tests.train.tiny import hyper

CONFIG = replace(TINY, num_hidden_layers=4)
STAGES, PLACES = 2, 2
SHARE = Share(STAGES, PLACES, 2 * STAGES)
STEP = Step(CONFIG, 2560, 2, 8, 4, 256, kernels=False, tile=16)
LLAMA_70B = ModelConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, head_dim=128,
)  # fmt: skip
LARGE = Step(LLAMA_70B, 8192, slots=4, r_max=16, loss_chunk=2048)
OF_FOUR = Share(4, 20, 8)
H100 = 78 * 2**30


def engine(step: Step, remat, residuals):
    """The engine of a mesh, a microbatch and the shapes of a stage's adapters."""
    config, dtype = step.config, jnp.dtype("float32")
    mesh = make_mesh(1, STAGES, num_layers=config.num_hidden_layers)
    layout = even_layout(config.num_hidden_layers, STAGES)
    linears = multi_linears(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    widths = {
        place: (linears[path].in_features, linears[path].out_features)
        for path in linears
        for place in layout.place_paths([path])
    }
    model = StageModel(config, dtype, PLACES, layout.place_paths(linears), residuals, remat)
    pipeline = Pipeline(mesh, model, layout.first, "fbh", step.loss_chunk)
    bank = bank_shapes(widths, step.slots, step.r_max)
    sizes = {"tile": step.tile, "num_slots": step.slots, "max_segments": step.segments}
    batch, _ = pack(Microbatch((), step.capacity), {}, **sizes)
    return pipeline, batch, bank


def compiled_bytes(step: Step, remat, residuals="save") -> int:
    """What XLA says that each device needs for a tick; nothing is allocated."""
    pipeline, batch, bank = engine(step, remat, residuals)
    config, mesh, dtype = step.config, pipeline.mesh, pipeline.model.dtype
    slot = Slot((batch,), np.zeros(1, bool), np.zeros(step.slots, bool), np.full(step.slots, -1))
    state = jax.eval_shape(lambda: pipeline.empty_state(batch, bank, ("adamw",)))
    window = window_of([slot] * (pipeline.lag + 2), mesh)
    rows = -(-config.vocab_size // STAGES)
    stacked = {
        name: jax.ShapeDtypeStruct((STAGES * s.shape[0], *s.shape[1:]), dtype)
        for name, s in layer_shapes(config, dtype).items()
    }
    frozen = Frozen(
        [stacked] * PLACES,
        jax.ShapeDtypeStruct((config.hidden_size,), dtype),
        jax.ShapeDtypeStruct((STAGES * rows, config.hidden_size), dtype),
        None,
    )

    def lying(tree, specs):
        def one(leaf, spec):
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(one, tree, specs)

    arguments = (
        lying(state, state_specs(state)),
        hyper({}, step.slots),
        lying(frozen, frozen_specs(frozen)),
        window,
        np.int32(0),
    )
    found = pipeline.run.lower(*arguments, ticks=1).compile().memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "residuals"),
    [
        (("none", "none"), "save"),
        (("none", "full"), "save"),
        (("full", "full"), "save"),
        (("mlp", "attention"), "save"),
        (("full", "full"), "recompute"),
    ],
)
def test_predicts_what_xla_counts(remat, residuals):
    """The stated accuracy: within 15%."""
    found = compiled_bytes(STEP, remat, residuals)
    planned = predict_stage(STEP, SHARE, remat, residuals).memory
    print(f"{remat} {residuals}: XLA {found >> 20} MiB, planned {planned.total >> 20} MiB")
    assert 0.85 < planned.total / found < 1.15, f"planned {planned}, XLA says {found}"


def saved_bytes(step: Step, policy) -> list[int]:
    """What a stage's layers keep of one microbatch, as the engine says."""
    pipeline, batch, bank = engine(step, (policy,) * PLACES, "save")
    saved = pipeline.model.saved_shapes(batch, bank)[1]
    return [sum(s.size * s.dtype.itemsize for s in place) for place in saved]


@pytest.mark.parametrize("policy", ["none", "mlp", "attention", "full"])
def test_predicts_what_the_rings_hold(policy):
    """Within 5%; the input of the first layer is in a ring of its own."""
    first, second = saved_bytes(STEP, policy)
    hidden = 4 * STEP.capacity * CONFIG.hidden_size
    planned = predict_stage(STEP, SHARE, (policy,) * PLACES).memory.kept
    assert 0.95 < planned / (SHARE.ring * (first + second + hidden)) < 1.05


def test_a_stage_of_70b_keeps_what_fits_layer_by_layer():
    plan = choose_stage(LARGE, OF_FOUR, H100)
    assert plan.residuals == "save" and fits(plan, H100)
    assert len(plan.remat) == 20 and len(set(plan.remat)) == 2, str(plan)
    rich, poor = plan.remat[0], plan.remat[-1]
    one_more = (rich,) * (plan.remat.count(rich) + 1)
    one_more += (poor,) * (20 - len(one_more))
    assert not fits(predict_stage(LARGE, OF_FOUR, one_more), H100)
    # Not a quarter of the whole model, nor all that would wait on one device.
    assert 0.24 < plan.memory.weights / (2 * 70.6e9) < 0.26


def test_more_memory_never_computes_more_again():
    found = []
    for gib in (30, 50, 52, 54, 58, 62, 66, 70, 80, 100, 200, 400, 900):
        try:
            plan = choose_stage(LARGE, OF_FOUR, gib * 2**30)
        except ResourceError:
            assert not found
            continue
        assert fits(plan, gib * 2**30)
        found.append(round(memory_mesh._cost(LARGE, plan), 3))
    assert found[0] > 20 * 1.5 and found[-1] == 0
    assert found == sorted(found, reverse=True)


def test_refuses_with_planned_available_and_what_would_fit():
    with pytest.raises(ResourceError, match="tokens_per_microbatch from 32768 to ") as refused:
        choose_stage(LARGE._replace(capacity=32768), OF_FOUR, 56 * 2**30)
    assert refused.value.exit_code == 5
    assert "the device has" not in str(refused.value) and "56.00 GiB" in str(refused.value)
    size = int(str(refused.value).rsplit(" ", 1)[1])
    assert choose_stage(LARGE._replace(capacity=size), OF_FOUR, 56 * 2**30)
    with pytest.raises(ResourceError, match=r"raise parallel\.stage"):
        choose_stage(LARGE, OF_FOUR, 24 * 2**30)


def test_auto_takes_what_the_devices_have(monkeypatch):
    """On CPUs, which do not tell, nothing is computed again; a wish is obeyed."""
    none = plan_stage(LARGE, OF_FOUR, "auto")
    assert set(none.plan.remat) == {"none"}
    monkeypatch.setattr(memory_mesh, "device_bytes", lambda *, every: H100)
    some = plan_stage(LARGE, OF_FOUR, "auto")
    assert some.plan == choose_stage(LARGE, OF_FOUR, H100) and "78.00 GiB" in some.words
    assert set(plan_stage(LARGE, OF_FOUR, "full").plan.remat) == {"full"}


def test_a_stage_keeps_what_it_chose_when_the_run_began(monkeypatch):
    """Other policies give other bits; the user's word and the room there is come first."""
    poor = ("attention", *("full",) * 19)
    before = Choices(4, "full", 2048, 8192, 64, 2048, poor)
    assert plan_stage(LARGE, OF_FOUR, "auto", before).plan.remat == poor
    monkeypatch.setattr(memory_mesh, "device_bytes", lambda *, every: 2 * H100)
    assert plan_stage(LARGE, OF_FOUR, "auto").plan.remat != poor
    assert plan_stage(LARGE, OF_FOUR, "auto", before).plan.remat == poor
    twice = plan_stage(LARGE, OF_FOUR, "auto", before._replace(residuals="recompute"))
    assert (twice.plan.remat, twice.plan.residuals) == (poor, "recompute")
    assert set(plan_stage(LARGE, OF_FOUR, "none", before).plan.remat) == {"none"}
    other_mesh = plan_stage(LARGE, Share(8, 10, 16), "auto", before).plan
    assert other_mesh == choose_stage(LARGE, Share(8, 10, 16), 2 * H100)
    rich = before._replace(policies=("none",) * 20)
    monkeypatch.setattr(memory_mesh, "device_bytes", lambda *, every: H100)
    assert plan_stage(LARGE, OF_FOUR, "auto", rich).plan == choose_stage(LARGE, OF_FOUR, H100)
