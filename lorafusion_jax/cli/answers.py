"""The same prompts through the base and through adapters, side by side in one batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorafusion_jax.config import SourceConfig
from lorafusion_jax.data import Record, prompt_text, prompt_tokens, read_source
from lorafusion_jax.errors import AdapterError
from lorafusion_jax.generate import BASE_SLOT, generate
from lorafusion_jax.lora.bank import AdapterBank, attach_adapters, put_slot
from lorafusion_jax.lora.peft_io import load_peft
from lorafusion_jax.models import Base
from lorafusion_jax.train.jobs import resolve_job
from lorafusion_jax.train.run_folder import RunFolder, write_text

_MAX_SAMPLE_TOKENS = 48


class Question(NamedTuple):
    """A held-out row of a job: what the model is given, and what the row says.

    Attributes:
        job: name.
        prompt: as text, to be shown.
        tokens: the prompt as training would have it.
        expected: the row's own answer.
    """

    job: str
    prompt: str
    tokens: tuple[int, ...]
    expected: str


class HeldOut(NamedTuple):
    """Held-out rows that ask for an answer.

    Attributes:
        questions: the first of them that can be asked.
        passed_over: rows before the last of those whose prompt has no tokens or too many.
    """

    questions: list[Question]
    passed_over: int


def load_adapters(base: Base, directories: Sequence[Path]) -> AdapterBank:
    """Loads PEFT adapters into one bank of the base model, in order of their slots.

    Args:
        base: the model; its linears are given the adapters' stacks.
        directories: PEFT folders, one per slot.

    Raises:
        AdapterError: a folder holds no usable adapter, or one of another model.
    """
    loaded = [load_peft(directory, base.model) for directory in directories]
    paths = sorted({path for one in loaded for path in one.adapter})
    largest = max(one.spec.max_rank(one.adapter) for one in loaded)
    bank = attach_adapters(base.model, paths, len(loaded), largest)
    for slot, one in enumerate(loaded):
        bank = put_slot(bank, slot, one.spec, one.adapter)
    return bank


def adapter_folder(folder: RunFolder, job: str, which: str = "best") -> Path:
    """Returns a job's PEFT folder.

    Raises:
        AdapterError: the run has no such job, or its adapter is not written yet.
    """
    if job not in folder.jobs:
        raise AdapterError(f"no job {job!r} in {folder.path}; there are: {', '.join(folder.jobs)}")
    path = folder.adapter(job, which)
    if not path.is_dir():
        raise AdapterError(f"{path}: job {job} has no {which} adapter yet")
    return path


def held_out(folder: RunFolder, base: Base, job: str, rows: int) -> HeldOut:
    """Returns the first held-out rows of a job that ask for an answer.

    Rows are passed over where the model could not be asked: an empty prompt, or one with which the
    answer would not fit the model's context or which is longer than anything it was trained on.
    """
    config, batching = folder.jobs[job], folder.config.batching
    data, apart = config.data, config.eval.path
    resolved = resolve_job(config, data, base, batching, folder.config.seed)
    records = [
        {record.line: record for record in _records(part, data.system)}
        for part in (data.parts if apart is None else (data.at(apart),))
    ]
    room = base.config.max_position_embeddings - _MAX_SAMPLE_TOKENS
    longest = min(room, batching.max_length)
    questions, samples, passed_over = [], resolved.eval_samples, 0
    for index in resolved.eval_indices:
        record = records[samples.source_of(index)][int(samples.lines[index])]
        if record.kind == "text":
            continue
        if len(questions) == rows:
            break
        tokens = prompt_tokens(record, base.tokenizer)
        if not 0 < len(tokens) <= longest:
            passed_over += 1
            continue
        answer = record.messages[-1].content if record.kind == "chat" else record.completion
        prompt = prompt_text(record, base.tokenizer)
        questions.append(Question(job, prompt, tuple(tokens), answer))
    return HeldOut(questions, passed_over)


def _records(part: SourceConfig, system: str | None) -> list[Record]:
    options = part.model_dump(exclude={"path", "weight"})
    return read_source(part.path, system=system, **options)


def side_by_side(
    base: Base, bank: AdapterBank | None, slots: dict[str, int], prompts: Sequence[str], **options
) -> list[dict[str, str]]:
    """Answers every prompt with every model in one batch.

    Args:
        base: the base model.
        bank: adapters.
        slots: slot by the name to show, `BASE_SLOT` for the base.
        prompts: texts.
        options: of `generate`.

    Returns:
        For each prompt, the answers by name.
    """
    pairs = [(prompt, slot) for prompt in prompts for slot in slots.values()]
    texts = generate(base, bank, [p for p, _ in pairs], [s for _, s in pairs], **options)
    count = len(slots)
    return [
        dict(zip(slots, texts[i * count : (i + 1) * count], strict=True))
        for i in range(len(prompts))
    ]


def write_samples(folder: RunFolder, base: Base, *, rows: int) -> None:
    """Answers held-out prompts with the base and the job's adapter; writes each job's samples.md.

    Args:
        folder: a run with adapters.
        base: its base model.
        rows: held-out rows per job; jobs without a held-out prompt are left out.
    """
    jobs = [name for name in folder.jobs if folder.adapter(name).is_dir()]
    asked = {name: held_out(folder, base, name, rows) for name in jobs}
    questions = [question for one in asked.values() for question in one.questions]
    texts = _answers(folder, base, jobs, questions) if questions else []
    for name, one in asked.items():
        parts = [f"## {name}\n"]
        if one.passed_over:
            parts.append(
                f"{one.passed_over} held-out rows were passed over: their prompt is empty, or too "
                f"long for the model's context or `batching.max_length`.\n"
            )
        for question, (by_base, by_adapter) in zip(questions, texts, strict=True):
            if question.job == name:
                parts.append(sample_text(question, by_base, by_adapter))
        if len(parts) > 1:
            write_text(folder.job(name) / "samples.md", "\n".join(parts))


def _answers(
    folder: RunFolder, base: Base, jobs: list[str], questions: list[Question]
) -> list[tuple[str, str]]:
    """The answers of the base and of the job's adapter to each question."""
    bank = load_adapters(base, [folder.adapter(name) for name in jobs])
    prompts = [q.tokens for q in questions for _ in range(2)]
    slots = [slot for q in questions for slot in (BASE_SLOT, jobs.index(q.job))]
    texts = generate(base, bank, prompts, slots, max_new_tokens=_MAX_SAMPLE_TOKENS)
    return list(zip(texts[::2], texts[1::2], strict=True))


def sample_text(question: Question, base: str, adapter: str) -> str:
    """Returns one row with its expected and both given answers, as Markdown."""
    prompt = question.prompt.strip().replace("\n", "\n    ")
    return (
        f"    {prompt}\n\n"
        f"- expected: {one_line(question.expected)}\n"
        f"- base: {one_line(base)}\n"
        f"- adapter: {one_line(adapter)}\n"
    )


def one_line(text: str, limit: int = 160) -> str:
    """Returns a text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
