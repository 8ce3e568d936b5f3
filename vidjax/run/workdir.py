"""The folder of a run, which one process holds at a time."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vidjax import distributed, files
from vidjax.errors import UserError

# What lies in a folder of features, and in no folder of a run.
DATA = ("labels.csv", "*_gt.txt", "*_train*.pickle", "train/*.npz", "val/*.npz", "test/*.npz",
        "*.parquet")  # fmt: skip


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes and locks a run's folder; after an error, removes it if it is new and still empty."""
    refuse_data(Path(path).expanduser())
    first = distributed.is_first()
    is_new = first and not Path(path).expanduser().exists()
    workdir = files.make_folder(path)
    with files.lock(workdir) if first else contextlib.nullcontext():
        try:
            yield workdir
        except BaseException:
            if is_new and [file.name for file in workdir.glob("*")] == [".lock"]:
                shutil.rmtree(workdir)
            raise


def refuse_data(folder: Path) -> None:
    """Raises ValueError if a folder holds features: the run's files would lie among the clips."""
    if files.exists(folder / "config.json"):
        return
    found = next((path for pattern in DATA for path in folder.glob(pattern)), None)
    if found:
        raise UserError(
            f"workdir '{folder}' is a folder of data: it holds {found.relative_to(folder)}\n"
            "name another one for the run: --workdir=FOLDER"
        )


def check_there(workdir: Path) -> None:
    """Raises ValueError if the folder of a run was moved or removed while the run trained."""
    if not files.exists(workdir / "config.json"):
        raise UserError(
            f"'{workdir}' is not there any more: was it moved while it trained?\n"
            "run the same command with --workdir=FOLDER, where it is now, to go on from its last "
            "checkpoint"
        )
