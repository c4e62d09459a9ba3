"""Results files: docs/results/<device>/<bench>.json, the source of every published figure."""

import datetime
import importlib.metadata
import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from lorafusion_jax.errors import ConfigError

RESULTS = Path("docs/results")
_VERSIONS_OF = ("lorafusion-jax", "jax", "jaxlib", "flax", "optax", "numpy")

type Row = dict[str, str | int | float | bool | None]


def device_name() -> str:
    """Returns the first device's kind as a folder name: `cpu`, `h100`, `geforce-rtx-4090`."""
    import jax

    return folder_of(jax.devices()[0].device_kind)


def folder_of(kind: str) -> str:
    """Returns a device's kind as a folder name, without maker, memory and form."""
    words = re.findall(r"[a-z0-9]+", kind.lower())
    words = words[words[:1] == ["nvidia"] :]
    kept = itertools.takewhile(
        lambda word: not re.fullmatch(r"\d+gb|hbm\d*|pcie|sxm\d*", word), words
    )
    return "-".join(kept)


def versions() -> dict[str, str]:
    """Returns the installed versions that a measurement depends on."""
    found = {}
    for package in _VERSIONS_OF:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout, not installed
            continue
    return found


def write_results(
    bench: str,
    rows: list[Row],
    *,
    command: str | None = None,
    device: str | None = None,
    root: Path = RESULTS,
    folder: Path | None = None,
) -> Path:
    """Writes one results file.

    Args:
        bench: name of the benchmark; also the file's name.
        rows: one flat record per measurement; the columns of each bench are fixed by convention.
        command: what reproduces it; this process's command line by default.
        device: its name; the first device's kind by default.
        root: folder of all results, in which each device has one.
        folder: the file's own folder, where it is not that device's in `root`.

    Returns:
        The file's path.
    """
    device = device or device_name()
    path = (folder or root / device) / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "bench": bench,
        "command": command or this_command(),
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "rows": rows,
    }
    path.write_text(_one_row_a_line(record))
    return path


def this_command() -> str:
    """Returns what repeats this process."""
    return shlex.join(["python", "-m", *_module_and_arguments()])


def written_before(path: Path) -> tuple[list[Row], str]:
    """Returns rows and command of a results file; none and "" if it is not there.

    Raises:
        ConfigError: the file holds something else, or figures of other versions: a file states one
            set of versions for all of its rows.
    """
    if not path.is_file():
        return [], ""
    try:
        found = json.loads(path.read_text("utf-8"))
        rows, command, measured_with = list(found["rows"]), str(found["command"]), found["versions"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--append {path}: expected a results file: {error!r}") from error
    if measured_with != versions():
        raise ConfigError(
            f"--append {path}: its rows were measured with {measured_with}, and this would be with "
            f"{versions()}: measure them again, or write to another --out"
        )
    return rows, command


def _one_row_a_line(record: dict[str, Any]) -> str:
    head = json.dumps({**record, "rows": []}, indent=1, ensure_ascii=False)
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in record["rows"])
    return head.removesuffix("[]\n}") + f"[\n{rows}\n ]\n}}\n"


def read_baselines(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """Reads rows that another program measured on the same device, such as PEFT's.

    Args:
        path: a JSON list of rows, or an object with `rows`.
        columns: what every row must have.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--baselines {path}: {error}") from error
    rows = found.get("rows") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"--baselines {path}: expected a list of rows, or an object with `rows`")
    for number, row in enumerate(rows):
        missing = [column for column in columns if column not in row]
        if missing:
            raise ConfigError(f"--baselines {path}: row {number} lacks {', '.join(missing)}")
    return rows


def _module_and_arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return [name, *sys.argv[1:]]
