"""Every example runs with its tiny model, and does what it says."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example the way Python runs it: its own folder comes first."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return importlib.import_module


@pytest.mark.scenario("G9")
def test_train_two_adapters(example, tmp_path, capsys):
    losses = example("train_two_adapters").main(["--steps", "12", "--output", str(tmp_path / "r")])
    assert set(losses) == {"upper", "length"}
    assert all(after < before - 0.3 for before, after in losses.values())
    assert (tmp_path / "r" / "jobs" / "upper" / "adapter" / "adapter_config.json").is_file()
    assert "held-out loss" in capsys.readouterr().out


@pytest.mark.scenario("G9")
def test_together_vs_alone(example):
    differences = example("together_vs_alone").main(["--steps", "3"])
    assert set(differences) == {"squares", "colours"}
    assert all(0 <= difference < 1e-4 for difference in differences.values())


@pytest.mark.scenario("G9")
def test_your_own_model(example, tmp_path):
    before, after = example("your_own_model").main(
        ["--steps", "40", "--output", str(tmp_path / "a")]
    )
    assert after < 0.6 * before


@pytest.mark.scenario("G9")
def test_export_to_peft(example, tmp_path, capsys):
    folder = example("export_to_peft").main([str(tmp_path / "peft"), "--steps", "2"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "byte for byte the same" in capsys.readouterr().out


@pytest.mark.scenario("G9")
def test_every_example_is_tested():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny_base"}
    assert {f"test_{script}" for script in scripts} <= set(globals())
