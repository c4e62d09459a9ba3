"""The scoreboard counts what it should, and its page is what its files say."""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.reliability import scoreboard
from tests.reliability.scenarios import SCENARIOS, SECTIONS
from tests.reliability.scoreboard import (
    PAGE,
    Board,
    Recorder,
    closing_lines,
    load,
    merged,
    read_board,
    rendered,
)

ROOT = Path(__file__).parents[2]
CASES = """
import pytest

@pytest.mark.scenario("A3", "B2")
@pytest.mark.parametrize("n", [1, 2])
def test_one(n): assert n

@pytest.mark.scenario("B2")
def test_two(): assert False

@pytest.mark.scenario("C4")
def test_three(): pytest.skip("needs a CUDA device")

def test_four(): assert False
"""


def row(name: str, result: str) -> dict:
    return {"id": name, "result": result, "tests": ["tests/x.py::test"]}


def board_of(cpu: dict[str, str], gpu: dict[str, str]) -> Board:
    return Board({k: row(k, v) for k, v in cpu.items()}, {k: row(k, v) for k, v in gpu.items()})


def test_the_table_is_whole():
    assert len(SCENARIOS) == 70
    assert sum(s.weight == 3 for s in SCENARIOS.values()) == 43
    assert {s.id[0] for s in SCENARIOS.values()} == set(SECTIONS)
    assert {place for s in SCENARIOS.values() for place in s.places} == {"C", "V", "G", "G2"}


def test_a_test_decides_all_its_scenarios_and_a_skip_shows_nothing(tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = scenario: x\n")
    recorder = Recorder(frozenset({"A3", "B2", "C4"}))
    pytest.main(["-q", "-p", "no:cacheprovider", str(tmp_path)], plugins=[recorder])
    results = {row["id"]: row["result"] for row in recorder.rows()}
    assert results == {"A3": "passed", "B2": "failed", "C4": "skipped"}
    assert recorder.outcomes["A3"].keys() == {"test_cases.py::test_one"}


def test_a_run_that_is_cut_short_keeps_what_has_ended(tmp_path):
    (tmp_path / "test_short.py").write_text(
        CASES.replace("assert False", "raise KeyboardInterrupt")
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = scenario: x\n")
    recorder = Recorder(frozenset({"A3", "B2", "C4"}))
    code = pytest.main(["-q", "-p", "no:cacheprovider", str(tmp_path)], plugins=[recorder])
    assert code == pytest.ExitCode.INTERRUPTED
    assert [row["id"] for row in recorder.rows()] == ["A3"]  # B2 has its first test only
    assert recorder.unfinished == {"B2", "C4"}


def test_an_unknown_scenario_is_refused(tmp_path):
    (tmp_path / "test_others.py").write_text(CASES.replace("C4", "Z9"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = scenario: x\n")
    recorder = Recorder(frozenset({"A3"}))
    code = pytest.main(["-q", "-p", "no:cacheprovider", str(tmp_path)], plugins=[recorder])
    assert code == pytest.ExitCode.USAGE_ERROR


def by_workers(tmp_path, cases):
    """Outcomes of processes of their own, with the hook of this repository's conftest."""
    pytest.importorskip("xdist")
    (tmp_path / "test_cases.py").write_text(cases)
    hook = (ROOT / "tests" / "conftest.py").read_text().partition("def pytest_collection_modif")[2]
    (tmp_path / "conftest.py").write_text(
        "def pytest_collection_modif" + hook.partition("\n\n\n")[0] + "\n"
    )
    recorder = Recorder(frozenset({"A3", "B2"}), workers=2)
    options = ["-q", "-n", "2", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    pytest.main([*options, "-c", "/dev/null", str(tmp_path)], plugins=[recorder])
    return {row["id"]: row["result"] for row in recorder.rows()}


def test_outcomes_of_workers_come_by_the_reports(tmp_path):
    assert by_workers(tmp_path, CASES) == {"A3": "passed", "B2": "failed"}


def test_a_test_that_kills_its_worker_has_failed(tmp_path):
    """The report that xdist makes up for it says nothing of scenarios."""
    killer = """
import os, pytest
@pytest.mark.scenario("A3")
def test_passes(): pass
@pytest.mark.scenario("A3")
def test_dies(): os.abort()
"""
    assert by_workers(tmp_path, killer) == {"A3": "failed"}


def test_without_a_gpu_the_gpu_s_run_is_refused(monkeypatch, capsys):
    """It would find skipped tests only, and write them over the results of CPUs."""
    monkeypatch.setattr("sys.argv", ["scoreboard", "--gpu", "--workers", "2"])
    monkeypatch.setattr(scoreboard, "run", lambda *_, **__: pytest.fail("it ran"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit) as ended:
        scoreboard.main()
    assert ended.value.code == 2
    assert "no GPU" in capsys.readouterr().err


def test_what_has_no_test_or_needs_a_gpu_counts_as_failed():
    everything = {name: "passed" for name in SCENARIOS}
    total = sum(s.weight for s in SCENARIOS.values())
    only_gpu = sum(s.weight for s in SCENARIOS.values() if s.needs_gpu)
    assert board_of({}, {}).score() == 0
    assert board_of(everything, {}).score() == pytest.approx(1 - only_gpu / total)
    assert board_of(everything, everything).score() == 1
    assert board_of(everything, {}).score(with_gpu=True) < board_of(everything, {}).score()
    assert board_of({"A1": "skipped", "A2": "failed", "A3": "passed"}, {}).score() == 3 / total
    assert closing_lines(board_of(everything, everything))[-1] == "score 1.00"


def test_rows_that_were_not_run_stay():
    old = [row("A1", "passed"), row("A2", "passed")]
    assert merged(old, [row("A3", "passed")], ["A2", "A3"]) == [old[0], row("A3", "passed")]


def test_the_page_is_what_the_files_say():
    page = (ROOT / PAGE).read_text("utf-8")
    assert rendered(page, read_board(ROOT / "docs/results")) == page


def marks_in(path: Path) -> set[str]:
    """Scenarios that any test of a file shows, by its text."""
    return {
        str(arg.value)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.scenario"
        for arg in node.args
        if isinstance(arg, ast.Constant)
    }


def test_every_mark_is_a_scenario_and_the_evidence_is_still_there():
    marks = {path: marks_in(path) for path in (ROOT / "tests").rglob("test_*.py")}
    assert set().union(*marks.values()) - {"Z9"} <= set(SCENARIOS)
    for row in load(ROOT / "docs/results/cpu/reliability.json"):
        for test in row["tests"]:
            path, _, name = test.partition("::")
            assert row["id"] in marks[ROOT / path], f"{row['id']} has lost {test}"
            assert re.search(rf"def {name}\b", (ROOT / path).read_text("utf-8"))


def test_results_of_several_gpus_are_put_together(tmp_path):
    for device, results in {
        "cpu": {"A1": "passed", "B5": "failed"},
        "h100": {"B5": "passed", "B6": "failed", "D5": "passed"},
        "h200": {"B5": "passed", "B6": "passed", "D5": "skipped", "G1": "skipped"},
    }.items():
        (tmp_path / device).mkdir()
        rows = [row(name, result) for name, result in results.items()]
        (tmp_path / device / "reliability.json").write_text(json.dumps({"rows": rows}))
    board = read_board(tmp_path)
    verdicts = {name: board.verdict(SCENARIOS[name]) for name in ("A1", "B5", "B6", "D5", "G1")}
    assert verdicts == {
        "A1": "passed",
        "B5": "passed",
        "B6": "failed",
        "D5": "passed",
        "G1": "skipped",
    }
