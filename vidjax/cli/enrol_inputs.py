"""Finds the people of the clips that `vidjax gallery enrol` reads."""

import contextlib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vidjax.apps import bulk
from vidjax.apps.gallery import answers as answers_lib
from vidjax.data import parquet
from vidjax.utils.errors import UserError
from vidjax.utils.names import show

if TYPE_CHECKING:
    from vidjax.apps.features_folder import MediaFile
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.data.memory import MemoryClips


def list_inputs(inputs: Iterable[str]) -> list[Path]:
    """Returns the paths of the flags `--input`. A folder of tables is replaced by its tables."""
    paths = [Path(path).expanduser() for path in inputs]
    return [path for named in paths for path in (bulk.list_tables(named) or [named])]


def read_labels(path: Path) -> dict[str, str]:
    """Reads clip -> person from a table of labels. Raises UserError if it contains no name."""
    if labels := answers_lib.read_groups(path):
        return labels
    raise UserError(
        f"{path} contains no name\n"
        f"replace '{answers_lib.UNKNOWN}1' and so on by the names of people"
    )


def load_people(
    path: Path, gallery: "Gallery", *, required: bool
) -> "tuple[MemoryClips, Mapping[str, str]]":
    """Loads an input that contains the people of its clips. Returns the clips, and clip -> person.

    The input is a parquet table with a column `identity`, or a folder of files
    `path/PERSON/CLIP.npz`. If `required` is True, raises UserError if no clip of a table has a
    person.
    """
    from vidjax.data import memory

    if path.suffix == ".parquet" and parquet.has_column(path, "identity"):
        person_of = read_labels(path) if required else answers_lib.read_groups(path)
        return gallery.load(path), person_of
    if stray := path if path.is_file() else min(path.glob("[!.]*.npz"), default=None):
        raise refuse_stray(stray)
    widths, quality = gallery.source.reads
    return memory.load_people(path, widths, quality=quality, nets=gallery.origin.cards)


@contextlib.contextmanager
def hint_at_photos(paths: Iterable[Path]) -> Iterator[None]:
    """Replaces the error for a folder of photos by a hint at `--photos`, in a `with` block."""
    from vidjax.apps.video.media_files import PHOTOS

    try:
        yield
    except UserError:
        for path in paths:
            endings = {x.suffix.lower() for of in ("*", "*/*") for x in path.glob(of)}
            if endings & PHOTOS and ".npz" not in endings:
                raise UserError(
                    f"'{path}' contains photos, but no features\n"
                    f"to enrol people from photos: --photos={shlex.quote(str(path))}"
                ) from None
        raise


def refuse_stray(path: Path) -> UserError:
    """Returns the error for an input that does not contain the names of its people."""
    table = ", or a column identity in the table" if path.suffix == ".parquet" else ""
    return UserError(
        f"'{path}' is in no folder of a person: --input=PATH with PATH/NAME/CLIP.npz\n"
        "if all clips show the same person, add --identity=NAME\n"
        "if they show several people, add --labels=FILE, a table with the columns clip and "
        f"identity{table}; for photos: --photos=FOLDER"
    )


def check_seen_together(
    films: Iterable["MediaFile"], identity: str | Mapping[str, str], clips: Iterable[str]
) -> None:
    """Raises UserError if two faces of one picture, which differ, would be enrolled as one person.

    `films` describe the clips. `identity` is the person of all `clips`, or clip -> person.
    """
    from vidjax.apps.video.naming import pair_seen_together

    person_of = dict.fromkeys(clips, identity) if isinstance(identity, str) else identity
    for pair in pair_seen_together(films):
        first, second = (person_of.get(clip) for clip in pair)
        if first and first == second:
            raise UserError(
                f"{show(pair[0])} and {show(pair[1])} are seen together, so they are two people, "
                f"not both {show(first)}\n"
                "enrol a single face, --clip=CLIP --identity=NAME, or add --labels=FILE"
            )


def check_models(gallery: "Gallery", models: str | None) -> Path:
    """Returns the folder of the nets of a gallery, by default where the gallery was made.

    Raises UserError if a run made the gallery, or if `models` has other nets.
    """
    from vidjax.apps.cards import EMBEDDER_ROLES
    from vidjax.apps.video import pipeline

    made, place = gallery.origin.cards, gallery.origin.workdir
    if not made or "face" not in made:
        raise UserError(
            f"gallery '{gallery.folder}' was made from a run, so it cannot enrol photos\n"
            "make a gallery of the nets: vidjax gallery create NEW --models=DIR"
        )
    folder = Path(models or place).expanduser()
    digests = pipeline.read_digests(folder)
    for part, digest in made.items():
        if digests.get(EMBEDDER_ROLES.get(part, part)) != digest:
            raise UserError(
                f"'{folder}' lacks the net for {part} that made gallery '{gallery.folder}'\n"
                f"name the folder of the gallery's nets, --models=DIR (at first '{place}')"
            )
    return folder
