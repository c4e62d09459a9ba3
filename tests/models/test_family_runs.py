"""Every family from training to PEFT and transformers, and the committed record of it."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from lorafusion_jax.bench import report
from tests.models.family_run import COMMAND, FAMILIES, run_family, torch_python

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs/results/cpu/families.json"
FLOAT32 = 2.0**-23


def problems(row: dict) -> list[str]:
    """Says what is wrong with a row; errors are allowed twice PEFT's own, and 8 ulp in any case."""
    floor = 8 * FLOAT32 * row["largest_logit"]
    limits = {"our_float32_error": max(2 * row["peft_float32_error"], floor), "merged_error": floor}
    steep = 8 * FLOAT32 * row["largest_gradient"]
    limits["our_gradient_error"] = max(2 * row["peft_gradient_error"], steep)
    if row["job"] == "patterned":
        limits["uniform_error"] = floor
    found = [f"{key} {row[key]:.1e}" for key, limit in limits.items() if not row[key] <= limit]
    if not row["adapter_effect"] > 1e3 * floor:
        found.append("the adapter does nothing: equality would mean nothing")
    if not row["last_loss"] < row["first_loss"]:
        found.append("the loss did not fall")
    return found


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_train_export_and_load(name, tmp_path):
    if "LORAFUSION_TORCH_PYTHON" not in os.environ:
        for module in ("torch", "peft"):
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
    for row in run_family(name, tmp_path / "project", torch_python()):
        print(row)
        assert not problems(row)


def test_the_committed_record_is_whole():
    record = json.loads(RECORD.read_text())
    assert record["command"] == COMMAND
    assert [(row["family"], row["job"]) for row in record["rows"]] == [
        (name, job) for name in FAMILIES for job in ("plain", "patterned")
    ]
    for row in record["rows"]:
        assert not problems(row), row


def test_the_page_shows_the_record():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert report.update(page, ROOT / "docs/results") == page
    assert "gemma3_text" in page


@pytest.mark.parametrize(
    "key", ["our_float32_error", "our_gradient_error", "merged_error", "adapter_effect"]
)
def test_a_bad_row_is_seen(key):
    row = json.loads(RECORD.read_text())["rows"][0]
    bad = row | {key: 0.0 if key == "adapter_effect" else 1e-3}
    assert problems(bad) and not problems(row)
