"""The command, in child processes without site-packages: no jax, no numpy."""

import json
import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lorafusion_sched import from_json
from lorafusion_sched.cli import main

SCHED = Path(__file__).parents[2] / "sched"


def child(*arguments: object, hash_seed: int = 0, code: str | None = None):
    """Runs the command with the standard library alone."""
    run = ["-c", code] if code else ["-m", "lorafusion_sched.cli"]
    environment = os.environ | {"PYTHONPATH": str(SCHED), "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(
        [sys.executable, "-S", *run, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def lengths_file(tmp_path: Path) -> Path:
    rng = random.Random(4)
    jobs = [
        {
            "name": name,
            "lengths": [rng.randint(30, 1500) for _ in range(8 * batches)],
            "global_batch_size": 8,
        }
        for name, batches in (("summaries", 4), ("sql & more", 3), ("emoji", 2))
    ]
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps({"jobs": jobs}))
    return path


def test_plan_show_and_gantt_without_site_packages(lengths_file, tmp_path):
    plan_file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    options = ["--capacity", "4096", "--stages", "2", "--output", plan_file, "--html", page]
    planned = child("plan", lengths_file, *options)
    assert planned.returncode == 0, planned.stderr
    assert "samples         72" in planned.stdout
    answer = from_json(plan_file.read_text())
    assert sum(len(s.samples) for mb in answer.microbatches for s in mb.stretches) == 72
    shown = child("show", plan_file, "--microbatches")
    assert planned.stdout.startswith(shown.stdout.split("\n     0 ")[0])
    assert "summaries[0]" in shown.stdout
    text = page.read_text()
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    boxes = svg.findall("{http://www.w3.org/2000/svg}g")
    assert len(boxes) == 2 * 2 * sum(bool(mb.stretches) for mb in answer.microbatches)
    assert "sql &amp; more" in text
    assert not any(mark in text for mark in ("<script", "<link", "url(", "src="))


def test_nothing_but_the_standard_library_is_imported():
    code = (
        "import sys, lorafusion_sched.cli;"
        "new = {m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names);"
        "print(sorted(new - {'lorafusion_sched', '__main__'}))"
    )
    assert child(code=code).stdout.strip() == "[]"


def test_compare_prints_every_planner(lengths_file):
    compared = child("compare", lengths_file, "--capacity", "4096", "--stages", "2")
    lines = compared.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["megatron", "mlora", "lorafusion", "ours"]
    utilisation = {line.split()[0]: float(line.split()[3].rstrip("%")) for line in lines[1:]}
    assert utilisation["ours"] == max(utilisation.values())


@pytest.mark.scenario("B9")
def test_same_bytes_whatever_the_hash_seed(lengths_file, tmp_path):
    seen = set()
    for seed in range(5):
        output = tmp_path / f"{seed}.json"
        options = ["--capacity", "auto", "--stages", "4", "--output", output]
        assert child("plan", lengths_file, *options, hash_seed=seed).returncode == 0
        seen.add(output.read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", [], "invalid JSON"),
        ("[]", [], "expected"),
        ('{"jobs": [{"name": "a"}]}', [], "lengths must be"),
        ('{"jobs": [{"name": "a", "lengths": [3]}]}', [], "global_batch_size"),
        ('{"jobs": [{"name": "a", "lengths": [3], "gbs": 1}]}', [], "jobs\\[0\\]"),
        (
            '{"jobs": [{"name": "a", "lengths": [9000], "global_batch_size": 1}]}',
            [],
            "9000 tokens",
        ),
        ('{"jobs": []}', ["--capacity", "8k"], "8192"),
        ('{"jobs": []}', ["--capacity", "1000"], "multiples of tile"),
        ('{"jobs": []}', ["--capacity", "auto", "--max-capacity", "1"], "less than a tile"),
    ],
)
def test_bad_input_is_explained(content, options, message, tmp_path, capsys):
    path = tmp_path / "lengths.json"
    path.write_text(content)
    assert main(["plan", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)


@pytest.mark.scenario("E6")
def test_missing_and_damaged_files_are_explained(tmp_path, capsys):
    assert main(["show", str(tmp_path / "none.json")]) == 2
    damaged = tmp_path / "plan.json"
    damaged.write_text('{"format":"lorafusion-plan","version":2}')
    assert main(["show", str(damaged)]) == 2
    assert "version 2" in capsys.readouterr().err
