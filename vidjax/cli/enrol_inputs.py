"""Finds the people of the clips that `vidjax gallery enrol` reads."""

import contextlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidjax.apps import bulk
from vidjax.apps.gallery import answers as answers_lib
from vidjax.data import parquet
from vidjax.utils import files
from vidjax.utils.errors import UserError, prefix_errors, warn
from vidjax.utils.names import show

if TYPE_CHECKING:
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.apps.gallery.vectors import Vectors
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

    The input is a parquet table with a column `identity`, a folder of `vidjax extract`, which
    stores the folder of each film and photo, or a folder of files `path/PERSON/CLIP.npz`. If
    `required` is True, raises UserError if no clip of a table has a person.
    """
    from vidjax.apps.gallery.changes import check_person
    from vidjax.apps.video import features_folder
    from vidjax.data import memory

    if path.suffix == ".parquet" and parquet.has_column(path, "identity"):
        person_of = read_labels(path) if required else answers_lib.read_groups(path)
        return gallery.load(path), person_of
    is_extracted = path.is_dir() and files.exists(path / features_folder.NAME)
    person_of = dict[str, str]()
    for film in features_folder.read_media_files(path) if is_extracted else ():
        for track in film.tracks:
            if not film.folder:
                raise refuse_stray(features_folder.locate_features(path, track.clip))
            with prefix_errors(f"{show(str(film.source.path))}: its folder"):
                person_of[track.clip] = check_person(film.folder)
    if person_of:
        return gallery.load(path), person_of
    if stray := path if path.is_file() else min(path.glob("[!.]*.npz"), default=None):
        raise refuse_stray(stray)
    widths, quality = gallery.reads
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
        f"identity{table}"
    )


def drop_group_photos(
    path: Path, clips: Sequence[str], identity: str | Mapping[str, str]
) -> dict[str, str]:
    """Returns clip -> person, without the clips of photos that show several people.

    If a person has several photos, photos with sunglasses are also left out.

    If `identity` is a name, all `clips` show this person. `path` is the folder of the clips, or
    contains a folder of clips for each person. Only folders that `vidjax extract` wrote are
    checked. A warning names each photo with a problem.
    """
    from vidjax.apps.video import features_folder

    people = dict.fromkeys(clips, identity) if isinstance(identity, str) else dict(identity)
    is_flat = isinstance(identity, str) or files.exists(path / features_folder.NAME)
    folders = [path] if is_flat or not path.is_dir() else sorted(path.iterdir())
    poor, hidden = set[str](), dict[str, str]()
    for folder in (folder for folder in folders if (folder / features_folder.NAME).exists()):
        prefix = "" if folder == path else f"{folder.name}/"
        for film in features_folder.read_media_files(folder):
            film.tracks = [track for track in film.tracks if f"{prefix}{track.clip}" in people]
            single, problem = features_folder.check_photo(film) if film.photo else ("", "")
            for track in film.tracks if single is None else ():
                people.pop(f"{prefix}{track.clip}", None)
            if problem and single and film.tracks[0].dark_eyes:
                hidden[f"{prefix}{single}"] = f"{show(str(film.source.path))}: {problem}"
            elif problem:
                poor.add(f"{prefix}{single}")
                warn(f"{show(str(film.source.path))}: {problem}")
    for problem in features_folder.leave_out_hidden(people, poor, hidden):
        warn(problem)
    return people


def add_folders(
    path: Path, vectors: "Vectors", identity: Mapping[str, str]
) -> "tuple[Vectors, dict[str, str]]":
    """Adds the folder of each photo to the names of its clips, as in `Ada/1`.

    So clips from `vidjax extract` get the same names as with `--photos`. `path` is the input, and
    `identity` is clip -> person. Clips without a person are left out. If `path` is not a folder of
    `vidjax extract`, the names stay.
    """
    from vidjax.apps.video import features_folder

    vectors, name_of, taken = vectors.only(identity), dict[str, str](), set[str]()
    is_extracted = path.is_dir() and files.exists(path / features_folder.NAME)
    for film in features_folder.read_media_files(path) if is_extracted else ():
        # Photos of several people may be called 1.jpg: `1~0a1b2c3d` becomes `1` again.
        stem = f"{film.folder}/{features_folder.make_stem(Path(film.video))}"
        for track in film.tracks:
            first, dot, rest = track.clip.partition(".")
            base = f"{film.folder}/{first}" if stem in taken else stem
            name_of[track.clip] = f"{base}{dot}{rest}"
        taken.add(stem)
    names = tuple(name_of.get(clip, clip) for clip in vectors.names)
    people = {name_of.get(clip, clip): who for clip, who in identity.items()}
    return vectors._replace(names=names), people


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
