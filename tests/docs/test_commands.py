"""Every command and code block of README and docs is run, or says why it is not."""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorafusion_jax.cli import main
from tests.docs.blocks import Block, blocks_of, commands_of, pages, problems_of

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in pages(ROOT)}
# Pages that are quick enough for the default suite; the others are slow.
QUICK = ("README.md", "docs/index.md", "docs/scheduler.md")


def page_parameters():
    for name, path in PAGES.items():
        if any(block.runs for block in blocks_of(path.read_text(encoding="utf-8"))):
            yield pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.fixture
def reader(tmp_path, tiny_model, monkeypatch):
    """Runs blocks as a reader of one page would: in one folder, one Python, a tiny base model."""
    shutil.copytree(tiny_model, tmp_path / "my-model")
    for name in ("examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shim = tmp_path / "bin" / "lorafusion"  # for commands within pipes and redirections
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lorafusion_jax.cli "$@"\n')
    shim.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(shim.parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "sched")]))
    return Reader(tmp_path)


class Reader:
    """One reader's folder and Python names."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names: dict = {"__name__": "__main__"}

    def follow(self, block: Block) -> None:
        """Does what a block says."""
        kind, _, value = (part.strip() for part in block.marker.partition(":"))
        if kind == "file":
            path = self.folder / value
            assert path.resolve().is_relative_to(self.folder.resolve())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.runs and block.language == "python":
            exec(compile(block.text, f"block of line {block.line}", "exec"), self.names)
        elif block.runs:
            codes = [self.run(command) for command in commands_of(block.text)]
            expected = int(value) if kind == "exit" else 0
            assert all(code == 0 for code in codes[:-1]), (block, codes)
            assert codes[-1] == expected, (block, codes)

    def run(self, command: str) -> int:
        """Runs one shell command; our own programs in this process, which is quicker."""
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        simple = not any(sign in words for sign in ("|", "&&", ">", "<", ";", "&"))
        if words[0] == "lorafusion" and simple:
            return main(words[1:])
        if words[0] == "lorafusion-sched" and simple:
            from lorafusion_sched.cli import main as sched

            return sched(words[1:]) or 0
        if words[0] == "python" and simple and words[1].endswith(".py"):
            return self.script(words[1:])
        assert words[0] not in ("sudo", "pip", "make"), f"not for a test: {command}"
        done = subprocess.run(["bash", "-ec", command], cwd=self.folder, timeout=120)
        return done.returncode

    def script(self, words: list[str]) -> int:
        """Runs a Python file as `python FILE ...` does."""
        path = (self.folder / words[0]).resolve()
        saved = sys.argv, sys.path[:]
        sys.argv, sys.path[:0] = words, [str(path.parent)]
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            sys.argv, sys.path[:] = saved
        return 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Qwix calls deprecated methods of flax
@pytest.mark.parametrize("name", list(page_parameters()))
def test_page_does_what_it_says(name, reader, capfd):
    for block in blocks_of(PAGES[name].read_text(encoding="utf-8")):
        try:
            reader.follow(block)
        except Exception as error:
            error.add_note(f"{name}, block of line {block.line}:\n{block.text}")
            raise


@pytest.mark.parametrize("name", PAGES)
def test_no_block_is_hidden(name):
    assert not problems_of(PAGES[name].read_text(encoding="utf-8"))


PAGE = """
<!-- file: a.txt -->
```text
word
```
Words.

1. In a list:
   ```bash
   cat a.txt \\
     | grep word
   cat <<'END' > b.txt
   two
   END
   ```

```python
from pathlib import Path

names = Path("b.txt").read_text().split()
```
<!-- exit: 2 -->
```bash
lorafusion train nosuch.yaml
```
<!-- not run: needs a CUDA device -->
```bash
exit 7
```
"""


def test_blocks_are_read_and_run(reader, capfd):
    blocks = blocks_of(PAGE)
    assert [block.language for block in blocks] == ["text", "bash", "python", "bash", "bash"]
    assert [block.runs for block in blocks] == [False, True, True, True, False]
    assert len(commands_of(blocks[1].text)) == 2
    for block in blocks:
        reader.follow(block)
    assert reader.names["names"] == ["two"]


@pytest.mark.parametrize(
    "block",
    [
        Block(1, "bash", "false\ntrue\n", ""),
        Block(1, "bash", "lorafusion train nosuch.yaml\n", ""),
        Block(1, "bash", "true\n", "exit: 2"),
        Block(1, "bash", "pip install something\n", ""),
        Block(1, "python", "assert False\n", ""),
    ],
)
def test_failing_block_is_caught(block, reader, capfd):
    with pytest.raises(AssertionError):
        reader.follow(block)


@pytest.mark.parametrize(
    "page",
    [
        "<!-- not run: no time -->\n```bash\nx\n```\n",
        "```console\n$ x\n```\n",
        "```bash\nx\n",
        "Run\n\n    lorafusion train x\n",
        "<!-- exit: two -->\n```bash\nx\n```\n",
    ],
)
def test_hidden_block_is_caught(page):
    assert problems_of(page)
