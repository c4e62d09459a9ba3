"""Runs every scenario that this machine can run and says what a release may promise.

    python -m tests.reliability.scoreboard [--quick] [--only A3,B2] [--gpu [--workers N]] [--show]

A scenario passes when all tests that carry its mark pass, one at least; a skipped test shows
nothing. Results are kept in docs/results/<device>/reliability.json, and the table of
docs/reliability.md is made from these files. With `--only`, the other rows stay as they were.
`--quick` leaves out slow tests; with `--write` its results are kept, with a star where a slow test
of the scenario was left out. `--gpu` runs the GPU tests instead and writes
the file of that device: the only way in which a scenario that needs a GPU passes. With `--workers`
all GPU tests run, those of no scenario too, so many at a time (with `--only` those in the files of
these scenarios); interrupted, that writes nothing.
`--show` runs nothing.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from lorafusion_jax.bench.results import folder_of, write_results
from tests.reliability.scenarios import SCENARIOS, SECTIONS, Scenario

RESULTS, PAGE = Path("docs/results"), Path("docs/reliability.md")
_MARKED = re.compile(r"(<!-- scoreboard -->\n).*?(<!-- end -->)", re.S)

_MARKS = re.compile(r"pytest\.mark\.scenario\((.*?)\)", re.S)

type Row = dict[str, str | bool | list[str]]


def scenarios_of(item: pytest.Item) -> list[str]:
    """Returns the scenarios that a test shows.

    Raises:
        UsageError: there is no such scenario.
    """
    names = [str(name) for mark in item.iter_markers("scenario") for name in mark.args]
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise pytest.UsageError(f"{item.nodeid} shows {unknown[0]}, which is no scenario")
    return names


@dataclass(eq=False)  # pytest wants its plugins hashable
class Recorder:
    """A pytest plugin that notes how the tests of each scenario ended.

    Attributes:
        wanted: scenarios to run; others are left out.
        quick: slow tests are left out.
        workers: processes that run the tests; 0 for this one, which alone can leave tests out.
        outcomes: worst outcome of each test (without its parameters) of each scenario.
    """

    wanted: frozenset[str]
    quick: bool = False
    workers: int = 0
    outcomes: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    _left: set[str] = field(default_factory=set)
    _cut: set[str] = field(default_factory=set)

    def pytest_configure(self, config: pytest.Config) -> None:
        """Notes what the paths of reports start from."""
        self._root = config.rootpath

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leaves out tests that show no wanted scenario."""
        self._shows = {item.nodeid: self.wanted & {*scenarios_of(item)} for item in items}
        slow = [item for item in items if item.get_closest_marker("slow")]
        self._cut = {name for item in slow for name in self._shows[item.nodeid]}
        config.hook.pytest_deselected(items=[i for i in items if not self._shows[i.nodeid]])
        items[:] = [item for item in items if self._shows[item.nodeid]]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Notes what will run."""
        if not self.workers:
            self._left = {item.nodeid for item in session.items}

    @property
    def unfinished(self) -> set[str]:
        """Scenarios of which a test has not ended."""
        return {name for test in self._left for name in self._shows[test]}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes an outcome; set-up and tear-down count only where they fail or skip."""
        if report.when == "teardown":
            self._left.discard(report.nodeid)
        if report.when != "call" and report.outcome == "passed":
            return
        test = re.split(r"[\[@]", report.nodeid)[0]  # xdist ends names of a group with @GROUP
        shown = self._shown(report)
        if report.when not in ("setup", "call", "teardown"):
            # What xdist says of a worker that died: none of the test's own marks came with it.
            shown = self.wanted & marked_in((self._root / str(report.fspath)).read_text("utf-8"))
        for scenario in shown:
            known = self.outcomes[scenario].get(test, report.outcome)
            worst = max(known, report.outcome, key=["passed", "skipped", "failed"].index)
            self.outcomes[scenario][test] = worst

    def _shown(self, report: pytest.TestReport) -> set[str]:
        if not self.workers:
            return self._shows.get(report.nodeid, set())
        # By what tests/conftest.py puts on the tests of the workers, which this plugin never sees.
        return self.wanted & {
            str(name) for key, name in report.user_properties if key == "scenario"
        }

    def rows(self) -> list[Row]:
        """Returns one row per scenario that had a test, all of which have ended."""
        today, commit = datetime.date.today().isoformat(), _commit()
        return [
            {
                "id": name,
                "result": _result(tests.values()),
                "date": today,
                "commit": commit,
                "tests": sorted(tests),
                "without_slow": self.quick and name in self._cut,
            }
            for name, tests in self.outcomes.items()
            if name not in self.unfinished
        ]


def _result(outcomes: Iterable[str]) -> str:
    found = set(outcomes)
    if "failed" in found:
        return "failed"
    return "passed" if "passed" in found else "skipped"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


class Ran(NamedTuple):
    """What running the tests of scenarios gave.

    Attributes:
        rows: of the scenarios.
        unfinished: scenarios that an interruption (Ctrl-C) left without one.
        failed: some test failed.
    """

    rows: list[Row]
    unfinished: set[str]
    failed: bool


def run(wanted: Iterable[str], *, quick: bool, gpu: bool, workers: int = 0) -> Ran:
    """Runs the tests of these scenarios; with workers, all GPU tests.

    Raises:
        SystemExit: pytest could not run them.
    """
    recorder = Recorder(frozenset(wanted), quick, workers)
    ended = [pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED]
    files = [str(path) for path in files_showing(recorder.wanted)]
    if not files:
        return Ran([], set(), False)
    if workers:
        # Tests of a group share what they trained: one worker runs them.
        spread = ["-v", "-n", str(workers), "--dist", "loadgroup", "-p", "no:benchmark"]
        files = [] if recorder.wanted == {*SCENARIOS} else files
        code = pytest.main(["-m", "gpu", *spread, "--durations=8", *files], plugins=[recorder])
    else:
        choice = "scenario and gpu" if gpu else "scenario and not gpu and not torch"
        expression = choice + (" and not slow" if quick else "")
        code = pytest.main(["-q", "-m", expression, "--no-header", *files], plugins=[recorder])
        ended.append(pytest.ExitCode.INTERRUPTED)
    if code not in ended:
        raise SystemExit(f"pytest stopped with {code!r}: nothing was written")
    failed = code == pytest.ExitCode.TESTS_FAILED
    return Ran(recorder.rows(), recorder.unfinished, failed)


def files_showing(wanted: frozenset[str], root: Path = Path("tests")) -> list[Path]:
    """Returns the test files whose text has the mark of a wanted scenario."""
    texts = {path: path.read_text("utf-8") for path in sorted(root.rglob("test_*.py"))}
    return [path for path, text in texts.items() if wanted & marked_in(text)]


def marked_in(text: str) -> set[str]:
    """Returns the scenarios that any test of a file shows."""
    return {name for mark in _MARKS.findall(text) for name in re.findall(r'"(\w+)"', mark)}


def load(path: Path) -> list[Row]:
    """Returns the rows of a results file; none if it is not there."""
    return json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []


def merged(old: list[Row], new: list[Row], wanted: Iterable[str]) -> list[Row]:
    """Returns old rows, those of the wanted scenarios replaced, in the order of the scenarios."""
    rows = {row["id"]: row for row in old if row["id"] not in {*wanted}}
    rows |= {row["id"]: row for row in new}
    return [rows[name] for name in SCENARIOS if name in rows]


@dataclass(frozen=True)
class Board:
    """What is known of every scenario.

    Attributes:
        cpu: rows of this repository's CPU file, by scenario.
        gpu: rows of any other device's file.
    """

    cpu: dict[str, Row]
    gpu: dict[str, Row]

    def verdict(self, scenario: Scenario) -> str:
        """Says in a word or two how a scenario stands."""
        row = (self.gpu if scenario.needs_gpu else self.cpu).get(scenario.id)
        if row is None:
            return "not run here" if scenario.needs_gpu else "no test"
        return str(row["result"]) + ("*" if row.get("without_slow") else "")

    def passed(self, scenario: Scenario) -> bool:
        """Says whether a scenario counts."""
        return self.verdict(scenario).rstrip("*") == "passed"

    def gpu_verdict(self, scenario: Scenario) -> str:
        """The same for the part that a GPU shows; empty where there is none."""
        if not scenario.wants_gpu:
            return ""
        row = self.gpu.get(scenario.id)
        return "not run" if row is None else str(row["result"])

    def score(self, *, with_gpu: bool = False) -> float:
        """Returns the weight of what passed over all weight.

        Args:
            with_gpu: count a scenario only if its GPU part passed too.
        """
        passed = sum(
            s.weight
            for s in SCENARIOS.values()
            if self.passed(s) and not (with_gpu and self.gpu_verdict(s) not in ("", "passed"))
        )
        return passed / sum(s.weight for s in SCENARIOS.values())

    def evidence(self, scenario: Scenario) -> str:
        """Returns the test files that show a scenario, with their numbers of tests."""
        counts: dict[str, int] = defaultdict(int)
        for rows in (self.cpu, self.gpu):
            for test in rows.get(scenario.id, {}).get("tests", ()):
                counts[test.partition("::")[0].removeprefix("tests/")] += 1
        return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def read_board(root: Path = RESULTS) -> Board:
    """Reads the results of all devices.

    Of several GPUs, a failure on one counts; what one could not run, another may have shown.
    """
    cpu = {str(row["id"]): row for row in load(root / "cpu" / "reliability.json")}
    gpu: dict[str, Row] = {}
    order = ("skipped", "passed", "failed")
    for path in sorted(root.glob("*/reliability.json")):
        for row in load(path) if path.parent.name != "cpu" else ():
            known = gpu.setdefault(str(row["id"]), row)
            gpu[str(row["id"])] = max(known, row, key=lambda r: order.index(str(r["result"])))
    return Board(cpu, gpu)


def closing_lines(board: Board) -> list[str]:
    """Returns what is printed below the table; the score is the last line."""
    blockers = [s for s in SCENARIOS.values() if s.weight == 3]
    passed = sum(board.passed(s) for s in blockers)
    wants = [s for s in SCENARIOS.values() if s.wants_gpu]
    shown = sum(board.gpu_verdict(s) == "passed" for s in wants)
    return [
        f"release blockers passed: {passed} of {len(blockers)}",
        f"shown on a GPU: {shown} of the {len(wants)} that want one",
        f"score if the GPU part of every scenario is required {board.score(with_gpu=True):.2f}",
        f"score {board.score():.2f}",
    ]


def markdown(board: Board) -> str:
    """Returns the table of docs/reliability.md."""
    lines = []
    for letter, title in SECTIONS.items():
        lines += [
            f"\n### {letter}. {title}\n",
            "| ID | scenario | weight | where | result | on a GPU | tests |",
            "|---|---|--:|---|---|---|---|",
        ]
        lines += [
            f"| {s.id} | {s.text} | {s.weight} | {' '.join(s.places)} | {board.verdict(s)} "
            f"| {board.gpu_verdict(s)} | {board.evidence(s)} |"
            for s in SCENARIOS.values()
            if s.id.startswith(letter)
        ]
    note = "`*`: without the slow tests of the scenario.\n\n"
    return "\n".join(lines) + "\n\n" + note + "  \n".join(closing_lines(board)) + "\n"


def rendered(page: str, board: Board) -> str:
    """Returns the page with its table made anew."""
    return _MARKED.sub(lambda m: m[1] + markdown(board) + m[2], page)


def _show(board: Board) -> None:
    for scenario in SCENARIOS.values():
        verdict = board.verdict(scenario)
        print(f"{scenario.id:<4} {verdict:<13} {scenario.weight}  {board.evidence(scenario)}")
    print("\n".join(closing_lines(board)))


def main() -> int:
    """Runs, writes and prints; 1 if a scenario that was run failed."""
    parser = argparse.ArgumentParser(prog="scoreboard", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    if options.workers and not options.gpu:
        parser.error("--workers is for --gpu")
    if options.workers and options.quick:
        parser.error("--workers runs all GPU tests: --quick cannot leave any out")
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in SCENARIOS]:
        parser.error(f"no scenario {unknown[0]}")
    if options.show:
        _show(read_board())
        return 0
    device = _device() if options.gpu else "cpu"
    ran = run(wanted, quick=options.quick, gpu=options.gpu, workers=options.workers)
    wanted = [name for name in wanted if name not in ran.unfinished]
    board = read_board()
    path = RESULTS / device / "reliability.json"
    rows = merged(load(path), ran.rows, wanted)
    if options.quick and not options.write:
        board = Board({str(row["id"]): row for row in rows}, board.gpu)
    else:
        _write(path, device, rows)
        board = read_board()
        PAGE.write_text(rendered(PAGE.read_text("utf-8"), board), "utf-8")
    _show(board)
    return int(ran.failed or any(row["result"] == "failed" for row in rows))


def _write(path: Path, device: str, rows: list[Row]) -> None:
    command = "make scoreboard" if device == "cpu" else "make scoreboard-gpu"
    write_results("reliability", rows, command=command, device=device, root=path.parents[1])


def _device() -> str:
    """The folder of this GPU's results.

    Asked of another process: here, jax would take the memory that the tests' own need.

    Raises:
        SystemExit: jax has no GPU here: skipped tests would be written over the CPUs' results.
    """
    asked = "import jax; d = jax.devices()[0]; print(f'{d.platform} {d.device_kind}')"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=False
    )
    platform, _, kind = done.stdout.strip().lower().partition(" ")
    if platform != "gpu":
        last = done.stderr.strip().rpartition("\n")[2]
        print(f"--gpu: jax found no GPU but {platform or last!r}: nothing was run", file=sys.stderr)
        raise SystemExit(2)
    return folder_of(kind)


if __name__ == "__main__":
    sys.exit(main())
