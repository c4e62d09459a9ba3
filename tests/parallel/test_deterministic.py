"""`train.deterministic` reaches a stage's attention and the compiler, also of evaluations."""

from types import SimpleNamespace

import jax
import pytest

from lorafusion_jax.models import attention_cudnn
from lorafusion_jax.parallel import evaluate, pipeline
from lorafusion_jax.parallel.engine import make_engine
from lorafusion_jax.parallel.evaluate import ForwardPipeline
from lorafusion_jax.parallel.state import bank_shapes
from lorafusion_jax.train.batch import pack
from lorafusion_sched import Microbatch
from tests.parallel.mix import Mix, first_state, tiny_base


@pytest.mark.parametrize("deterministic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_reaches_attention_and_compiler(monkeypatch, deterministic):
    asked = []

    def refusal(q, k, segments, scoring):
        asked.append(segments.demands.deterministic)
        return "no GPU here"

    monkeypatch.setattr(attention_cudnn, "refusal", refusal)
    jax.clear_caches()
    base = tiny_base()
    engine = make_engine(
        base,
        first_state(base, Mix(1))[2].bank,
        data=1,
        stage=2,
        order="fbh",
        remat="none",
        capacity=64,
        deterministic=deterministic,
    )
    batch, _ = pack(Microbatch((), 64), {}, tile=16, num_slots=4, max_segments=16)
    model = engine.pipeline.model
    model.saved_shapes(batch, bank_shapes(dict(engine.widths), 4, 4))
    assert set(asked) == {deterministic}
    given = []
    fake = SimpleNamespace(
        jit=lambda run, **settings: given.append(settings["compiler_options"]) or run
    )
    for room in (pipeline, evaluate):
        monkeypatch.setattr(room, "jax", fake)
    pipeline._program.__wrapped__(engine.pipeline)
    evaluate._program.__wrapped__(ForwardPipeline(engine.pipeline, 4))
    expected = {"xla_gpu_exclude_nondeterministic_ops": True} if deterministic else None
    assert given == [expected] * 2
