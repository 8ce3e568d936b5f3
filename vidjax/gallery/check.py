"""`--mode=check --workdir=GALLERY`: the file of a gallery, and the run that makes its vectors."""

import os
from pathlib import Path

from vidjax import messages
from vidjax.commands.check import FAULT, OK, WARNING, Findings, Item, one_line
from vidjax.gallery import store
from vidjax.gallery.gallery import Gallery


def is_gallery(folder: Path) -> bool:
    """Returns True for the folder of a gallery, which may be damaged."""
    return any((folder / name).exists() for name in (store.NAME, store.OLD_NAME))


def check_gallery(folder: Path) -> list[Item]:
    """Returns the findings on a gallery; a part that raises does not end the check."""
    items = []
    for part in (_people, _run):
        try:
            items += [Item(state, "gallery", one_line(text)) for state, text in part(folder)]
        except Exception as error:  # a damaged file raises whatever its reader raises
            kind = "" if messages.exit_code(error) else f"{type(error).__name__}: "
            items.append(Item(FAULT, "gallery", one_line(f"{kind}{messages.text_of(error)}")))
    return items


def _people(folder: Path) -> Findings:
    people = Gallery(folder).people  # every row matches its sha256
    clips = sum(people.identities.values())
    yield (
        OK if people.identities else WARNING,
        f"gallery: {len(people.identities):,} people by {clips:,} clips, "
        f"{len(people.strangers):,} strangers, every sha256 agrees",
    )
    if not os.access(folder, os.W_OK | os.X_OK):
        yield WARNING, f"gallery: nobody can be enrolled or removed: cannot write in '{folder}'"


def _run(folder: Path) -> Findings:
    run = Gallery(folder).run
    yield OK, f"gallery: '{run.workdir}', step {run.step}, is the run that it was made with"
