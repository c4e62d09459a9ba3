"""README tables come from the results files and from nowhere else."""

import json
from pathlib import Path

import pytest

from lorafusion_jax.bench import names, profile, report, run, training_report
from lorafusion_jax.bench.results import write_results
from lorafusion_jax.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_readme_is_up_to_date(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {Path("README.md"), Path("docs/models.md")} <= set(report.pages())
    assert report.main(["--check"]) == 0
    assert "<!-- table demo -->" in Path("README.md").read_text()


def kernels_row(impl, ratio):
    shape = {"tokens": 8192, "k": 4096, "n": 4096, "r": 16, "p": 0.1, "adapters": 4}
    return shape | {"pass": "fwdbwd"} | {"impl": impl, "ratio_to_frozen": ratio}


def test_table_is_rendered_from_the_file(tmp_path):
    rows = [kernels_row("frozen", 1.0), kernels_row("ours", 1.05), kernels_row("ours", 1.07)]
    write_results("kernels", rows, command="bench it", device="some-gpu", root=tmp_path)
    readme = "before\n<!-- table kernels -->\nold\n<!-- end -->\nafter\n"
    text = report.update(readme, tmp_path)
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and "some-gpu" in text and "`bench it`" in text
    assert "| 8,192 | 4096 | 4096 | 16 | 0.1 | 4 | 1.000 | 1.060 |" in text  # seeds are averaged
    assert report.update(text, tmp_path) == text
    # A heading without a measurement below it would promise something.
    heading = "### LoRA linears against the frozen linear"
    assert heading in text and heading not in report.update(readme, tmp_path / "empty")
    (tmp_path / "some-gpu/kernels_ratio.png").touch()
    figure = "![kernels ratio](docs/results/some-gpu/kernels_ratio.png)"
    assert figure in report.update(text, tmp_path)
    from_docs = report.update(text, tmp_path, Path("docs/kernels.md"))
    assert figure.replace("(docs/", "(") in from_docs
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


def training_row(system, speed, lengths="xsum", **more):
    case = {"lengths": lengths, "model": "m", "layers": 8, "deterministic": False}
    return {"system": system, "tokens_per_s": speed, "mfu": 0.5} | case | more


def test_training_rows_are_compared_within_their_own_case(tmp_path):
    rows = [
        training_row("a_sequential_padded", 100.0),
        training_row("d_lorafusion", 200.0),
        training_row("e_ours", 250.0, overhead=0.03, loop_ms=50.0, compile_cold_seconds=80.0),
        training_row("peft_compile", 150.0) | {"deterministic": None},  # has no such mode
        training_row("e_ours", 90.0, layers=32),
        training_row("e_ours", 70.0, "mix"),
    ]
    found = [(row["over_a"], row["over_d"]) for row in training_report.with_ratios(rows)]
    assert found == [(None, 0.5), (2.0, None), (2.5, 1.25), (1.5, 0.75), *[(None, None)] * 2]
    write_results("training", rows, command="c", device="d", root=tmp_path)
    text = report.update("<!-- table training -->\n<!-- end -->\n", tmp_path)
    assert "| xsum | 8 | e_ours | 250 | 2.50 | 1.25 | 50.0% |" in text
    assert "| xsum | 8 | 50.0 |" in text and "| 3.0% | 80.0 |" in text
    assert "from the cache" not in text  # was not measured
    assert "no work, in milliseconds" in text
    write_results("training", rows[2:3], command="c", device="d", root=tmp_path)
    text = report.update(text, tmp_path)
    assert "over (a)" not in text and "| xsum | 8 | e_ours | 250 | 50.0% |" in text


def test_training_figures_are_drawn_with_the_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("<!-- table training -->\n<!-- end -->\n")
    rows = [training_row("e_ours", 9.0), training_row("d_lorafusion", 8.0, ms_gemm=3, ms_idle=1)]
    path = write_results("training", rows, command="c", device="d")
    assert report.main(["--check"]) == 1 and not list(path.parent.glob("*.png"))  # writes nothing
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    figures = sorted(path.parent.glob("training_*.png"))
    assert [f.stem for f in figures] == ["training_breakdown", "training_tokens"]
    assert all(f"(docs/results/d/{f.name})" in Path("README.md").read_text() for f in figures)
    before = [f.read_bytes() for f in figures]
    assert report.main([]) == 0 and [f.read_bytes() for f in figures] == before
    rows[0]["tokens_per_s"] = 4.0
    training_report.draw(rows, path.parent)
    assert all(f.read_bytes() != old for f, old in zip(figures[1:], before[1:], strict=True))
    for figure in figures:
        figure.unlink()
    assert training_report.draw([], path.parent) == []
    drawn = training_report.draw(rows[:1], path.parent)
    assert [f.stem for f in drawn] == ["training_tokens"]  # nothing was profiled


def test_a_share_of_the_breakdown_is_of_the_profiled_time():
    row = training_row("e_ours", 1.0, ms_gemm=3.0, ms_idle=1.0)
    shares = {name: training_report._share(row, name) for name in training_report.CLASSES}
    assert (shares["gemm"], shares["idle"]) == (0.75, 0.25) and sum(shares.values()) == 1
    assert set(profile.CLASSES) | {"elementwise", "idle"} == set(training_report.CLASSES)


def test_unknown_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown table 'nosuch'"):
        report.update("<!-- table nosuch -->\n<!-- end -->", tmp_path)


def test_unknown_bench_is_refused():
    assert "report" not in names()
    with pytest.raises(ConfigError, match="no benchmark 'nosuch'"):
        run("nosuch", [])
