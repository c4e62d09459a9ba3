"""The site's made pages and pictures are complete and current; nothing comes from another host."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from lorafusion_jax import errors
from lorafusion_jax.config.schema import Section

ROOT = Path(__file__).parents[2]


def load(path: str):
    """Imports a script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return load("docs/_build/reference.py")


def undescribed(reference, section) -> list[str]:
    """Returns the keys of a section of which the reference would say nothing."""
    described = reference.attributes_of(section)
    unknown = [key for key in described if key not in section.model_fields]
    return unknown + [
        key
        for key, field in section.model_fields.items()
        if not described.get(key) and not reference._below(field)
    ]


def test_every_key_of_the_configuration_is_explained(reference):
    sections = reference.sections()
    assert {"", "base", "jobs", "jobs.lora", "jobs.data.sources"} <= set(sections)
    for place, section in sections.items():
        assert not undescribed(reference, section), f"{place}: say it in the docstring's Attributes"
    page = reference.config_page()
    for place, section in sections.items():
        part = page.partition(f"## {reference.heading(place)}\n")[2].partition("\n## ")[0]
        assert all(f"| `{key}` |" in part for key in reference.shown(section)), place


def test_missing_and_stale_explanations_are_caught(reference):
    class Odd(Section):
        """Odd.

        Attributes:
            gone: a key that is no more,
                on two lines.
            here: a key that is.
        """

        here: int = 1
        new: int = 2

    assert reference.attributes_of(Odd)["gone"] == "a key that is no more, on two lines."
    assert undescribed(reference, Odd) == ["gone", "new"]


def test_types_limits_and_defaults_are_in_words(reference):
    page = reference.config_page()
    assert "| `r` | whole number, at least 1, at most 256 | `16` |" in page
    assert "`skip` or `freeze` or `stop`" in page
    assert not re.search(r"typing\.|<class|Undefined|annotated_types", page)


def test_every_command_is_in_the_reference_and_in_the_readme(reference):
    assert {"train", "jobs add"} <= set(reference.commands())
    page, readme = reference.cli_page(), (ROOT / "README.md").read_text()
    for name in reference.commands():
        assert f"## `{name}`\n" in page
        assert f"| `{name}` |" in readme, f"README.md: the table of commands lacks {name}"
    assert "| `--max-steps` |" in page and "lorafusion train CONFIG [OPTIONS]" in page


def test_exit_codes_are_in_the_troubleshooting_page():
    page = (ROOT / "docs/howto/troubleshooting.md").read_text()
    kinds = [v for v in vars(errors).values() if isinstance(v, type)]
    codes = {k.exit_code for k in kinds if issubclass(k, errors.LoraFusionError)}
    listed = {
        int(n) for cell in re.findall(r"^\| ([\d, ]+) \|", page, re.M) for n in cell.split(",")
    }
    assert codes <= listed and {0, 130} <= listed


def test_pictures_are_those_of_the_script():
    for name, text in load("docs/pictures/make.py").pictures().items():
        committed = (ROOT / "docs/pictures" / name).read_text(encoding="utf-8")
        assert committed == text, f"{name} is stale: run python docs/pictures/make.py"


@pytest.mark.parametrize(
    "text, found",
    [
        ('<script src="https://example.org/x.js"></script>', True),
        ('<link href="//fonts.example.org/css" rel="stylesheet">', True),
        ("@font-face{src:url(https://example.org/a.woff2)}", True),
        ('<img alt="x" src=http://example.org/x.png>', True),
        ('<a href="https://example.org">a link</a><script src="../assets/x.js"></script>', False),
        ('<link rel="canonical" href="https://example.org/">', False),
    ],
)
def test_assets_of_other_hosts_are_caught(text, found):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    assert bool(load("docs/_build/hooks.py").outside_loads(text)) == found
