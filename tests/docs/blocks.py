"""Reads the code blocks of Markdown pages, and what their markers say about running them.

A marker is an HTML comment on the line before a block:

    <!-- not run: REASON -->     a reader may run it, the test cannot; REASON is one of `REASONS`
    <!-- file: NAME -->          the block is the contents of a file of the reader's folder
    <!-- exit: CODE -->          the block's last command leaves with this code

Blocks of `bash` and `python` without a marker are run, in order, in one folder per page.
"""

import re
from pathlib import Path
from typing import NamedTuple

# Why a block may stay unrun; another reason fails the test.
REASONS = frozenset(
    [
        "installs packages",
        "builds an environment and trains for minutes",
        "needs a CUDA device",
        "needs a model server",
        "needs torch and peft",
        "needs tunix",
        "needs the network",
        "a sketch, the names in it are the reader's",
    ]
)
RUN = ("bash", "python")

_BLOCK = re.compile(
    r"(?:^[ ]*<!-- (?P<marker>[^>]*?) -->\n)?^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n"
    r"(?P<body>.*?)^(?P=indent)```[ ]*$",
    re.M | re.S,
)
_INDENTED = re.compile(r"^(?: {4}|\t)(?:lorafusion|python|make|pip|vllm|\$) ?.*$", re.M)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        line: 1-based line of its first line of code.
        language: as written.
        text: its code, not indented.
        marker: what stands in the comment above it, or "".
    """

    line: int
    language: str
    text: str
    marker: str

    @property
    def runs(self) -> bool:
        """Whether the test runs it."""
        return self.language in RUN and not self.marker.startswith(("not run:", "file:"))


def blocks_of(page: str) -> list[Block]:
    """Returns the fenced blocks of a page in order."""
    found = []
    for match in _BLOCK.finditer(page):
        indent = len(match["indent"])
        text = "".join(line[indent:] or "\n" for line in match["body"].splitlines(keepends=True))
        line = page.count("\n", 0, match.start("body")) + 1
        found.append(Block(line, match["language"], text, (match["marker"] or "").strip()))
    return found


def problems_of(page: str) -> list[str]:
    """Says which blocks are marked in a way that would hide them."""
    found = []
    for block in blocks_of(page):
        kind, _, value = (part.strip() for part in block.marker.partition(":"))
        if kind == "not run" and value not in REASONS:
            found.append(f"line {block.line}: unlisted reason {value!r}")
        if kind == "exit" and not value.isdigit():
            found.append(f"line {block.line}: exit code {value!r}")
        if block.language in ("sh", "shell", "console", "py", ""):
            found.append(f"line {block.line}: language {block.language!r}; bash, python or text")
    if page.count("```") != 2 * len(blocks_of(page)):
        found.append("a fence that belongs to no block")
    for match in _INDENTED.finditer(_BLOCK.sub("", page)):
        found.append(f"a command that no test sees, as it is only indented: {match[0].strip()}")
    return found


def commands_of(text: str) -> list[str]:
    """Splits a shell block into commands: lines, with their continuations and here-documents."""
    commands, lines = [], iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        command = [line]
        end = re.search(r"<<'?(\w+)'?", line)
        while end or command[-1].rstrip().endswith("\\"):
            command.append(next(lines))
            if end and command[-1].strip() == end[1]:
                break
        commands.append("\n".join(command))
    return commands


def pages(root: Path) -> list[Path]:
    """Returns the pages whose commands are meant for readers: not the lab books."""
    found = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if "lab_book" not in path.parts and path.is_file()]
