"""Hooks of the site: pages made from the code, and a check that nothing is loaded from elsewhere."""

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import reference  # noqa: E402  (beside this file)

# Whatever a browser fetches by itself; links that a reader may click are no concern here.
_LOADS = re.compile(
    r"<(?:script|img|iframe|source|audio|video|embed)\b[^>]*?\bsrc=[\"']?(?:https?:)?//[^\"'\s>]+"
    r"|<link\b(?=[^>]*rel=[\"']?(?:stylesheet|preload|preconnect|icon))[^>]*"
    r"href=[\"']?(?:https?:)?//[^\"'\s>]+"
    r"|url\([\"']?(?:https?:)?//[^)]+"
)


def outside_loads(text: str) -> list[str]:
    """Returns what a page or style sheet would load from another host."""
    return [match[0] for match in _LOADS.finditer(text)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made from the code."""
    for name, text in reference.pages().items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Refuses a site that is not complete in itself."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            found = outside_loads(path.read_text(encoding="utf-8"))
            if found:
                raise PluginError(f"{path} loads {found[0]}")
