"""The benchmarks of meshes run on virtual devices; here only that they work, not how fast."""

import json

import jax
import pytest

from lorafusion_jax.bench import pipeline, report, scaling
from lorafusion_jax.bench.mesh_models import model_shape
from lorafusion_jax.bench.schedule import jobs_of
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.parallel.state import state_specs


@pytest.mark.parametrize(
    ("stages", "data"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        (4, 1),
        (4, 2),
    ],
)
def test_all_systems_run_in_one_engine(stages, data, tmp_path):
    command = ["--quick", "--stages", str(stages), "--data", str(data), "--out", str(tmp_path)]
    assert scaling.main(command) == 0
    rows = json.loads((tmp_path / "cpu" / "scaling.json").read_text())["rows"]
    assert [row["system"] for row in rows] == ["ours", "mlora", "megatron"]
    for row in rows:
        assert row["stale"] == 0, "a forward saw the wrong adapter"
        assert row["mesh"] == f"data={data},stage={stages}"
        assert row["tokens_per_s"] > 0 and row["predicted_seconds"] > 0
    ours, _, megatron = rows
    assert ours["slots"] < megatron["slots"], "other jobs fill what a flush leaves empty"
    assert len(list((tmp_path / "cpu" / "scaling").glob("gantt_*.html"))) == 6
    page = report.section("scaling", tmp_path)
    assert page.count("| tiny |") == 3 and "scaling_speed.png" in page
    assert "scaling_gantt.png" in page


def test_appended_rows_take_the_place_of_equal_ones(tmp_path, monkeypatch):
    row = {
        "system": "ours", "mesh": "data=1,stage=2", "model": "tiny", "layers": 2, "lengths": "het",
        "adapters": 4, "gbs": 4, "capacity": 64, "tokens_per_s": 1.0,
    }  # fmt: skip
    other = row | {"lengths": "xsum"}
    for rows, more in ((row, other), ()), ((row | {"tokens_per_s": 2.0},), ("--append",)):
        monkeypatch.setattr(pipeline, "rows_of", lambda *_, rows=rows: iter(rows))
        assert pipeline.main(["--quick", "--out", str(tmp_path), *more]) == 0
    found = json.loads((tmp_path / "cpu" / "pipeline.json").read_text())
    assert [(r["lengths"], r["tokens_per_s"]) for r in found["rows"]] == [("xsum", 1), ("het", 2)]
    assert all(r["date"] == found["date"] for r in found["rows"])


def test_an_unknown_system_is_refused():
    with pytest.raises(ConfigError, match="nothing"):
        scaling.main(["--quick", "--systems", "nothing"])


def test_the_state_lies_where_the_engine_leaves_it():
    """Else the second call of a benchmark would compile the engine again, within its time."""
    engine = pipeline.make_bench(
        model_shape("tiny", 2), data=1, stages=2, order="fbh", adapters=2, capacity=64, tile=16,
        remat="none", dtype="float32",
    )  # fmt: skip
    jobs = [pipeline._shrunk(job, 0.015) for job in jobs_of("het", 2, 0, jobs=2, batches=1)]
    slots = pipeline.slots_of(pipeline.planned("ours", jobs, engine), jobs, engine, (16, 64))
    state, mesh = engine.state(slots[0]), engine.pipeline.mesh

    def stays(x, spec) -> bool:
        return x.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), x.ndim)

    assert all(jax.tree.leaves(jax.tree.map(stays, state, state_specs(state))))
