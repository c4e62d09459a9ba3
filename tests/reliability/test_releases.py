"""What earlier releases left behind is still read, or refused with its version."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lorafusion_jax.errors import CheckpointError, ConfigError
from lorafusion_jax.lora.peft_io import load_peft
from lorafusion_jax.models.decoder import Decoder
from lorafusion_jax.models.hf_weights import Base, random_base
from lorafusion_jax.train import manifest
from lorafusion_jax.train.checkpoint import Checkpoints
from lorafusion_jax.train.run_folder import open_run
from lorafusion_sched import PlanError, from_json, to_json
from tests.golden.make_release import losses, make, processor
from tests.train.tiny import CONFIG, tiny_base

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASES = sorted(GOLDEN.glob("release-*"))
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.scenario("A13")
@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_what_a_release_left_is_read(release, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(release, run)
    assert [job for job in open_run(run).jobs] == ["sql", "emoji"]
    text = (run / "plan.json").read_text()
    assert to_json(from_json(text)) == text
    restored = Checkpoints(run / "checkpoints").restore()
    assert restored is not None and len(restored.leaves) > 20
    assert load_peft(run / "jobs" / "sql" / "adapter", tiny_base().model).spec.r == 2
    results = make(run).fit()  # a finished run goes on from its end
    assert results["sql"].steps == 20
    assert sum(p.stat().st_size for p in release.rglob("*") if p.is_file()) < 400_000


@pytest.mark.scenario("A13")
def test_another_version_is_refused_by_name(tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(RELEASES[-1], run)
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 7)
    with pytest.raises(CheckpointError, match="format version 1, this program reads 7"):
        Checkpoints(run / "checkpoints").restore()
    plan = json.loads((run / "plan.json").read_text())
    plan["version"] = 99
    with pytest.raises(PlanError, match="99"):
        from_json(json.dumps(plan))


@pytest.mark.scenario("B8")
def test_losses_are_those_of_the_release(tmp_path):
    """Exact on processors whose losses were kept; elsewhere as close as float32 allows."""
    golden = json.loads((RELEASES[-1] / "losses.json").read_text())
    make(tmp_path / "run").fit()
    found = losses(tmp_path / "run")
    assert {name: len(x) for name, x in found.items()} == {"sql": 20, "emoji": 20}
    assert found == golden["exact"].get(processor(), found)
    for name, values in golden["losses"].items():
        assert found[name] == pytest.approx(values, rel=2e-5)
    other = [x * (1 + 1e-4) for x in golden["losses"]["sql"]]  # the twin
    assert found["sql"] != pytest.approx(other, rel=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device")
@pytest.mark.scenario("B8")
def test_losses_on_a_gpu_are_those_of_the_release(tmp_path):
    """In float32 by exact products; sums in another order grow over twenty steps."""
    golden = json.loads((RELEASES[-1] / "losses.json").read_text())["losses"]
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        make(tmp_path / "run").fit()
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    found = losses(tmp_path / "run")
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=2e-4)
    other = [x * (1 + 1e-3) for x in golden["sql"]]  # the twin
    assert found["sql"] != pytest.approx(other, rel=2e-4)


@pytest.mark.scenario("A9")
@pytest.mark.parametrize("change", ["weights", "dimensions", "dtype"])
def test_another_model_is_refused_and_nothing_changes(tmp_path, change):
    run = tmp_path / "run"
    shutil.copytree(RELEASES[-1], run)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    made = make(run)
    if change == "weights":
        made._base = random_base(CONFIG, 1)
    elif change == "dimensions":
        made._base = random_base(replace(CONFIG, intermediate_size=64), 0)
    else:
        model = Decoder(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        made._base = Base(model, CONFIG, "", "random", None)
    with pytest.raises(ConfigError, match=r"not the run that.*(?s:.*)base\."):
        made.fit()
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"} == before
