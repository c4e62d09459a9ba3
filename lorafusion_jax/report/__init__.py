"""A run as one HTML page that opens from disk: no network, no script, light and dark."""

from pathlib import Path

from lorafusion_jax.report.contents import page
from lorafusion_jax.report.markup import document
from lorafusion_jax.train.run_folder import RunFolder, write_text

NAME = "report.html"


def write_report(folder: RunFolder) -> Path:
    """Writes report.html of a running or finished run; returns its path.

    It only reads the run's files, so it may be called at any time.
    """
    path = folder.path / NAME
    write_text(path, document(page(folder), title=folder.path.resolve().name))
    return path
