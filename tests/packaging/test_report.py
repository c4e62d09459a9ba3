"""README tables come from the results files and from nowhere else."""

import json
from pathlib import Path

import pytest

from lorafusion_jax.bench import names, report, run
from lorafusion_jax.bench.results import write_results
from lorafusion_jax.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_readme_is_up_to_date(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {Path("README.md"), Path("docs/models.md")} <= set(report.pages())
    assert report.main(["--check"]) == 0
    assert "<!-- table demo -->" in Path("README.md").read_text()


def kernels_row(impl, ratio):
    shape = {"tokens": 8192, "k": 4096, "n": 4096, "r": 16, "adapters": 4, "pass": "fwd"}
    return shape | {"impl": impl, "ratio_to_frozen": ratio}


def test_table_is_rendered_from_the_file(tmp_path):
    rows = [kernels_row("frozen", 1.0), kernels_row("ours", 1.05), kernels_row("ours", 1.07)]
    write_results("kernels", rows, command="bench it", device="some-gpu", root=tmp_path)
    readme = "before\n<!-- table kernels -->\nold\n<!-- end -->\nafter\n"
    text = report.update(readme, tmp_path)
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and "some-gpu" in text and "`bench it`" in text
    assert "| 8,192 | 4096 | 4096 | 16 | 4 | fwd | 1.00 | 1.06 |" in text  # seeds are averaged
    assert report.update(text, tmp_path) == text
    # A heading without a measurement below it would promise something.
    heading = "### LoRA linears against the frozen linear"
    assert heading in text and heading not in report.update(readme, tmp_path / "empty")
    (tmp_path / "some-gpu/kernels_ratio.png").touch()
    figure = "![kernels ratio](docs/results/some-gpu/kernels_ratio.png)"
    assert figure in report.update(text, tmp_path)
    path = tmp_path / "some-gpu/kernels.json"
    record = json.loads(path.read_text())
    record["rows"][0]["ratio_to_frozen"] = 1.5
    path.write_text(json.dumps(record))
    assert report.update(text, tmp_path) != text  # a changed figure makes the README stale


def test_check_fails_on_a_stale_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("<!-- table layer -->\n<!-- end -->\n")
    assert report.main(["--check"]) == 0
    rows = [{"impl": "ours", "tokens": 8192, "ms": 1.5, "mfu": 0.5, "tokens_per_s": 1e6}]
    write_results("layer", rows, command="c", device="d")
    assert report.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    assert "| ours | 8,192 | 1.50 | 1,000,000 | 50.0% |  |" in Path("README.md").read_text()


def test_unknown_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown table 'nosuch'"):
        report.update("<!-- table nosuch -->\n<!-- end -->", tmp_path)


def test_unknown_bench_is_refused():
    assert "report" not in names()
    with pytest.raises(ConfigError, match="no benchmark 'nosuch'"):
        run("nosuch", [])
