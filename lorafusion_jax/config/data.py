"""Where a job's training data come from, and what of them is learnt."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lorafusion_jax.config.section import Section

type Format = Literal["auto", "text", "prompt_completion", "alpaca", "chat"]
type Column = Literal[
    "text", "prompt", "completion", "instruction", "input", "output", "messages", "conversations"
]

HUB = "hf://"
HUB_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?", re.ASCII)


class SourceConfig(Section):
    """One of several sources of a job's training data.

    Attributes:
        path: JSONL, CSV, TSV or Parquet file, a data set folder saved by `datasets`, or
            hf://OWNER/NAME for one of the Hugging Face Hub.
        weight: share of the job's samples that come from here, relative to the other weights; all
            sources or none have one. Without, each row is seen once an epoch.
        format: structure of the rows; auto looks at the keys of the first row.
        columns: names of the columns or keys in the file, where they are not the format's, as in
            {prompt: question, completion: answer}.
        split: which split of a data set of the Hub or a folder; files have none.
        subset: which configuration of a data set of the Hub.
    """

    path: str = Field(min_length=1)
    weight: float | None = Field(default=None, gt=0)
    format: Format = "auto"
    columns: dict[Column, Annotated[str, Field(min_length=1)]] = Field(default={})
    split: str = Field(default="train", min_length=1)
    subset: str | None = Field(default=None, min_length=1)

    @field_validator("path")
    @classmethod
    def _readable(cls, path: str) -> str:
        return data_path(path)


class DataConfig(Section):
    """A job's training data: one path, or several sources that are mixed.

    Attributes:
        path: JSONL, CSV, TSV or Parquet file, a data set folder saved by `datasets`, or
            hf://OWNER/NAME for one of the Hugging Face Hub.
        sources: several paths in its place, each with its own keys, mixed by weight.
        format: structure of the rows; auto looks at the keys of the first row.
        columns: names of the columns or keys in the file, where they are not the format's, as in
            {prompt: question, completion: answer}.
        split: which split of a data set of the Hub or a folder; files have none.
        subset: which configuration of a data set of the Hub.
        system: system prompt: the first turn of every chat that has none, or a paragraph in front
            of every prompt.
        train_on_prompt: learn the prompts and all turns too, not only the answers.
        last_turn_only: of a chat, learn only the last answer.
    """

    path: str | None = Field(default=None, min_length=1)
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    format: Format = "auto"
    columns: dict[Column, Annotated[str, Field(min_length=1)]] = Field(default={})
    split: str = Field(default="train", min_length=1)
    subset: str | None = Field(default=None, min_length=1)
    system: str | None = Field(default=None, min_length=1)
    train_on_prompt: bool = False
    last_turn_only: bool = False

    @field_validator("path")
    @classmethod
    def _readable(cls, path: str | None) -> str | None:
        return None if path is None else data_path(path)

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> Self:
        if (self.path is None) == (not self.sources):
            raise ValueError(
                "path and sources are both given, expected one of them"
                if self.sources
                else "path: missing (or sources, for several files)"
            )
        own = {"format", "columns", "split", "subset"} & self.model_fields_set
        if self.sources and any(getattr(self, key) for key in own & {"columns", "subset"}):
            raise ValueError("with sources, columns and subset belong to each source")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("some sources have a weight and some do not, expected all or none")
        if self.train_on_prompt and self.last_turn_only:
            raise ValueError("train_on_prompt and last_turn_only exclude each other")
        return self

    @property
    def parts(self) -> tuple[SourceConfig, ...]:
        """Its sources; the path alone as one."""
        return self.sources or (self.at(self.path or ""),)

    def at(self, path: str) -> SourceConfig:
        """Returns a path with this section's own keys, as for held-out rows.

        Split and subset go along with data sets of the same kind only: held-out rows may be a file
        beside training data of the Hub, or of a folder with splits.
        """
        same = self.path is None or _kind(path) == _kind(self.path)
        return SourceConfig(
            path=path,
            format=self.format,
            columns=self.columns,
            split=self.split if same else "train",
            subset=self.subset if same else None,
        )


def _kind(path: str) -> Literal["hub", "folder", "file"]:
    if path.startswith(HUB):
        return "hub"
    return "folder" if Path(path).is_dir() else "file"


def data_path(path: str) -> str:
    """Checks what is written as a path of data.

    Raises:
        ValueError: it is neither a local path nor one of the hub.
    """
    if "://" in path.removeprefix(HUB):
        raise ValueError(f"got {path!r}, expected a local file or folder, or {HUB}OWNER/NAME")
    if path.startswith(HUB) and not HUB_NAME.fullmatch(path.removeprefix(HUB)):
        raise ValueError(f"got {path!r}, expected {HUB}OWNER/NAME")
    if "\0" in path:
        raise ValueError(f"got {path!r}, expected a path without NUL")
    return path
