"""Runs notebooks from a clean kernel.

`python -m tests.helpers.notebooks colab/*.ipynb` writes their outputs again.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[2]
# In a separate process, with its own event loop and sockets.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
given, done, where = sys.argv[1:]
notebook = nbformat.read(given, as_version=4)
client = NotebookClient(notebook, kernel_name="python3", timeout=600, allow_errors=True)
client.record_timing = False
try:
    client.execute(cwd=where)
finally:
    nbformat.write(notebook, done)
"""


def run(path: Path, folder: Path, cache_dir: Path) -> Any:
    """Returns a notebook with the outputs of a run from top to bottom, in an empty folder.

    An error in a cell is in its outputs. If no kernel ran, raises RuntimeError.
    """
    notebook: Any = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where, given, done = folder / "at", folder / "given.ipynb", folder / "done.ipynb"
    where.mkdir()
    shutil.copytree(ROOT / "configs", where / "configs")
    nbformat.write(notebook, given)
    env = os.environ | {"XLA_FLAGS": "", "VIDJAX_CACHE": str(cache_dir), "PYTHONPATH": str(ROOT)}
    # No kernel of the user's own.
    env |= {"IPYTHONDIR": f"{folder}/ipython", "JUPYTER_DATA_DIR": f"{folder}/jupyter"}
    command = [sys.executable, "-c", EXECUTE, str(given), str(done), str(where)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    if ran.returncode:
        raise RuntimeError(f"{path}: {ran.stderr}")
    return nbformat.read(done, as_version=4)


def main(*paths: str) -> None:
    """Runs notebooks and writes them with their outputs."""
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            done = run(Path(path), Path(folder), Path(folder) / "cache")
        for cell in done.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(done, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
