"""The benchmarks of meshes run on virtual devices; here only that they work, not how fast."""

import json

import pytest

from lorafusion_jax.bench import report, scaling
from lorafusion_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("stages", "data"),
    [
        (2, 1),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
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


def test_an_unknown_system_is_refused():
    with pytest.raises(ConfigError, match="nothing"):
        scaling.main(["--quick", "--systems", "nothing"])
