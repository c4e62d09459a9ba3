"""Where results of a device lie."""

import json

import jax
import pytest

from lorafusion_jax.bench.results import folder_of, write_results, written_before
from lorafusion_jax.errors import ConfigError


@pytest.mark.parametrize(
    "kind, folder",
    [
        ("cpu", "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ],
)
def test_folder_of_a_device(kind, folder):
    assert folder_of(kind) == folder


def test_another_run_goes_on_with_the_rows_of_one(tmp_path):
    assert written_before(tmp_path / "cpu" / "speed.json") == ([], "")
    rows = [{"system": "ours", "tokens_per_s": 1.5}]
    path = write_results("speed", rows, command="first", device="cpu", root=tmp_path)
    assert written_before(path) == (rows, "first")
    path.write_text(path.read_text().replace(jax.__version__, "0.1.0"))
    with pytest.raises(ConfigError, match=r"--append .*0\.1\.0.*measure them again"):
        written_before(path)
    path.write_text('{"rows": []}')
    with pytest.raises(ConfigError, match=r"--append .*command"):
        written_before(path)


def test_a_folder_of_another_name_is_no_device(tmp_path):
    path = write_results("speed", [], command="c", folder=tmp_path / "run 1")
    assert path == tmp_path / "run 1" / "speed.json"
    assert json.loads(path.read_text())["device"] == "cpu"
