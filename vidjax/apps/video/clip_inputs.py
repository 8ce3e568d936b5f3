"""Reads clips from paths that a user gives, and enrols, names or groups the people in the clips.

A clip contains the features of one person, for example of a face in a shot of a film. To enrol a
clip means to store it in a gallery, with the name of its person.
"""

import contextlib
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vidjax.apps import bulk, cards
from vidjax.apps.gallery.answers import UNKNOWN, Answer, read_groups
from vidjax.apps.gallery.backend import Backend
from vidjax.apps.gallery.changes import Enrolment, check_given, check_person, find_known
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.vectors import NetVectors, Vectors
from vidjax.apps.video import log, media, naming
from vidjax.apps.video.media import MediaFile
from vidjax.apps.video.media_files import PHOTOS
from vidjax.apps.video.naming import NamedTracks, Tracks
from vidjax.apps.video.said import Said
from vidjax.data import clip_files, memory, parquet
from vidjax.data.dataset import Dataset
from vidjax.data.memory import MemoryClips
from vidjax.utils import terminal
from vidjax.utils.errors import UserError, prefix_errors
from vidjax.utils.names import show, strip_ending
from vidjax.utils.terminal import ignore_count

Given = Path | Dataset  # the path of clips, or a dataset
Person = str | Mapping[str, str] | None  # of all clips, or clip -> person


def check_input(
    gallery: Gallery, path: Path, *, has_people: bool = False, of_person: bool = False
) -> None:
    """Checks whether a gallery can use the clips in `path`. The clips are not read.

    `has_people` is True if each folder in `path` is a person. `of_person` is True if the user says
    that all clips show the same person. Raises UserError if there are no clips, or if the features
    were not computed by the nets of the gallery. If `of_person` is True, also raises UserError if
    `path` contains folders of clips, because these may show several people.
    """
    if has_people or bulk.list_tables(path):
        memory.check_path(path)
    else:
        root, found = memory.find_files(path)
        is_flat = isinstance(found, Mapping) or all(file.parent == root for file in found)
        if of_person and not is_flat:
            raise UserError(
                f"the folders in '{path}' may show different people, but --identity is one person\n"
                "if each is a person, leave out --identity; else enrol one folder: --input=FOLDER"
            )
    if gallery.origin.cards:
        media.check_models(path, gallery.origin.cards)


def refuse_photos(path: Path) -> None:
    """Raises UserError if a folder contains photos of people, but no features."""
    endings = {x.suffix.lower() for of in ("*", "*/*") for x in path.glob(of)}
    if endings & PHOTOS and not endings & {".npz", ".parquet", ".pickle"}:
        raise UserError(
            f"'{path}' contains photos, but no features\n"
            f"to enrol people from photos: --photos={shlex.quote(str(path))}"
        )


def read_films(path: Path | None) -> list[MediaFile]:
    """Reads the descriptions of the films and photos from which clips were extracted.

    `path` is a folder that `vidjax extract` has written, or a file of features in this folder. For
    any other path, and for None, the result is empty.
    """
    folder = path.parent if path and path.suffix == ".npz" else path  # .npz: of one film
    is_extracted = folder and (folder / media.NAME).exists()
    return media.read_media_files(folder) if folder and is_extracted else []


def embed(gallery: Gallery, clips: MemoryClips | Dataset, split: str | None) -> Vectors:
    """Computes embeddings of clips with the nets or the run of a gallery; displays the progress.

    `split` is the split of a dataset to embed, such as "val". It is None for clips without splits.
    """
    with terminal.show_clips("vectors", len(clips.split(split or "clips").clips)) as bar:
        return gallery.embed(clips, split, advance=bar.advance)


# ---- people of clips to enrol


def read_labels(path: Path) -> dict[str, str]:
    """Reads a table with the person of each clip; returns clip -> person.

    Raises UserError if the table contains no name of a person.
    """
    if labels := read_groups(path):
        return labels
    raise UserError(
        f"{path} contains no name of a person\nreplace '{UNKNOWN}1' and so on by names of people"
    )


def enrol(
    gallery: Gallery,
    inputs: Sequence[Given],
    identities: Person = None,
    *,
    split: str | None = None,
    clip: str | None = None,
    strangers: bool = False,
    source: str = "",
    begin: Callable[[int, Given], None] = lambda number, given: None,
) -> Enrolment:
    """Enrols the clips of several inputs, one after the other.

    Args:
      inputs: the paths of clips, or a dataset. Of a dataset, `split` is read.
      identities: the person of all clips, or clip -> person. By default, the inputs contain the
        people: a table has a column `identity`, a folder has a folder for each person.
      clip: the only clip to enrol; None for all.
      strangers: True to enrol only the clips without a person, as clips of strangers.
      source: the file of `identities`, for messages.
      begin: is called before an input is read, with its number, from 1, and the input.

    Raises:
      UserError: `check_input` refuses an input. Then nothing is enrolled.
      UserError: no clip of an input has a person, two faces of one picture would become one person,
        or `Gallery.enrol` raises a UserError. Then only earlier inputs are enrolled.
    """
    several, names, done = len(inputs) > 1, set[str](), list[Enrolment]()
    if clip and several:
        raise UserError(f"--clip={clip} needs a single input: give --input only once")
    of_person = isinstance(identities, str)
    if of_person:
        check_person(identities)
    has_people = identities is None and not strangers
    for path in (given for given in inputs if isinstance(given, Path)):
        refuse_photos(path)
        check_input(gallery, path, has_people=has_people, of_person=of_person)
    for number, given in enumerate(inputs, 1):
        begin(number, given)
        people = identities
        if not isinstance(given, Path):
            clips = given
        elif has_people:
            clips, people = load_people(gallery, given, required=not several)
        else:
            clips = gallery.load(given)
        vectors = embed(gallery, clips, split)
        del clips
        names |= {*vectors.names}
        vectors, people = _choose(vectors, people, clip, several=several)
        if isinstance(given, Path) and people and not clip:
            check_seen_together(read_films(given), people, vectors.names)
        if people == {} and several:
            continue
        waiting = [vectors]
        del vectors  # so that `Gallery.enrol` can free the memory of a large table
        with (
            terminal.show_clips("enrol", len(waiting[0].names)) as bar,
            prefix_errors(source) if source else contextlib.nullcontext(),
        ):
            done.append(gallery.enrol(
                waiting.pop(), people, strangers=strangers, source=source or "identities",
                advance=bar.advance,
            ))  # fmt: skip
    if isinstance(identities, Mapping) and several:
        check_given(identities, names, source or "identities")
    if not done:
        raise UserError(
            f"the inputs, such as {inputs[0]}, do not say which person a clip shows\n"
            "add a column identity to the tables, or --labels=FILE"
        )
    return Enrolment.join(done)


def load_people(
    gallery: Gallery, path: Path, *, required: bool = True
) -> tuple[MemoryClips, Mapping[str, str]]:
    """Loads clips and the name of each clip's person. Returns the clips, and clip -> person.

    `path` is a parquet table with a column `identity`, or a folder of files `path/PERSON/CLIP.npz`.
    Raises UserError if a clip is in no folder of a person, or if `required` is True, and the column
    contains no name.
    """
    if path.suffix == ".parquet" and parquet.has_column(path, "identity"):
        person_of = read_labels(path) if required else read_groups(path)
        return gallery.load(path), person_of
    if stray := path if path.is_file() else min(path.glob("[!.]*.npz"), default=None):
        table = ", or a column identity in the table" if stray.suffix == ".parquet" else ""
        raise UserError(
            f"'{stray}' is in no folder of a person, so the person is not known\n"
            "clips of one person: add --identity=NAME. Photos: give --photos=FOLDER instead\n"
            "clips of several people: move them to PATH/NAME/CLIP.npz, or add --labels=FILE, a "
            f"table with the columns clip and identity{table}"
        )
    widths, quality = gallery.source.reads
    return memory.load_people(path, widths, quality=quality, nets=gallery.origin.cards)


def _choose(
    vectors: Vectors, people: Person, clip: str | None, *, several: bool
) -> tuple[Vectors, Person]:
    """Selects the clips to enrol from one input. Returns their embeddings, and `people`.

    `vectors` are the embeddings of the input. `clip` is the name of the only clip to enrol, or None
    for all clips. `people` is the name of the person in all clips, or clip -> name. `several` is
    True if `people` may contain clips of other inputs, which are left out.
    """
    if clip:
        bare = strip_ending(clip)
        vectors = vectors.only({name for name in vectors.names if strip_ending(name) == bare})
        if not vectors.names:
            raise UserError(f"--clip={clip} is not a clip of the input: choose one of its clips")
    if isinstance(people, Mapping) and (clip or several):
        known = {*map(strip_ending, vectors.names)}
        people = {name: who for name, who in people.items() if strip_ending(name) in known}
    return vectors, people


def check_seen_together(
    films: Iterable[MediaFile], identity: str | Mapping[str, str], clips: Iterable[str]
) -> None:
    """Raises UserError if two clips of one person are visible in the same frame or photo.

    `films` say when clips are visible. `identity` is the person of all `clips`, or clip -> person.
    """
    person_of = dict.fromkeys(clips, identity) if isinstance(identity, str) else identity
    for pair in naming.pair_seen_together(films):
        first, second = (person_of.get(clip) for clip in pair)
        if first and first == second:
            raise UserError(
                f"clips {show(pair[0])} and {show(pair[1])} are seen together, so they "
                f"cannot both show {show(first)}\n"
                "enrol one face: --clip=CLIP --identity=NAME; or name each face: --labels=FILE"
            )


def find_models(gallery: Gallery, models: Path | None) -> Path:
    """Returns the folder with the nets that compute the embeddings of a gallery.

    This is `models`. If `models` is None, it is the folder of nets from which the gallery was made.
    Raises UserError if the folder lacks a net of the gallery, or if the gallery was made from a
    trained run instead of nets.
    """
    made, place = gallery.origin.cards, gallery.origin.workdir
    if "face" not in made:
        raise UserError(
            f"gallery '{gallery.folder}' was made from a run, so it cannot enrol photos\n"
            "make a gallery from a folder of nets: vidjax gallery create NEW --models=DIR"
        )
    folder = models or Path(place)
    found = cards.list_embedders(cards.read_all(folder))
    for part, digest in made.items():
        if part not in found or found[part].digest != digest:
            raise UserError(
                f"'{folder}' lacks the net for the modality {part} of gallery '{gallery.folder}'\n"
                f"set --models=DIR to the folder of this net; the gallery was made from '{place}'"
            )
    return folder


# ---- people of new clips


def embed_clips(backend: Backend, features: Path, clips: Collection[str]) -> Vectors:
    """Computes the embeddings of the clips with the names `clips`, which may be empty.

    `features` is a folder of files `FILM.npz`. Each file contains the clips of a film. `backend`
    has the modalities.
    """
    reads = backend.widths
    if not clips:  # for example if no photo can be used
        return Vectors((), {part: np.zeros((0, width)) for part, width in reads.items()}, ())
    paths = sorted({features / f"{clip.partition('.')[0]}.npz" for clip in clips})
    known = (
        clip._replace(modalities={part: x for part, x in clip.modalities.items() if part in reads})
        for clip in clip_files.read_clips(paths) if clip.name in clips
    )  # fmt: skip
    return NetVectors(backend).embed(MemoryClips.pack(known, reads, ()), None, ignore_count)


def name_clips(
    gallery: Gallery,
    vectors: Vectors,
    films: Sequence[MediaFile],
    identify: Callable[..., Mapping[str, Answer]],
) -> NamedTracks:
    """Names the person in each clip. `vectors` are the embeddings of the clips.

    If `films` are given, each clip is a track: the faces of a person in a shot of a film. As in
    `vidjax who`, similar tracks get one name, and tracks that overlap in time get different names.
    If `vidjax who` made the gallery, names and corrections of its users count.
    Without films, each clip is named independently of all others.
    `identify` is the method `gallery.identify`, with options such as `threshold` already set.
    """
    if not films:
        answers = identify(vectors) if gallery.identities else {}
        return NamedTracks({**answers}, {}, None, {})
    said = Said(log.read(gallery.folder.parent) if gallery.command else (), films)
    names = said.names if gallery.command else find_known(gallery.state, vectors)
    told = {clip: names[clip] for clip in vectors.names if clip in names}
    gallery.check_apart(vectors, naming.list_apart(films))
    tracks = Tracks(gallery.state, vectors, films)
    return naming.name_tracks(tracks, lambda x, of: identify(x, groups=of), told, said=said)


def group_unknown(gallery: Gallery, vectors: Vectors, films: Sequence[MediaFile]) -> dict[str, str]:
    """Groups the clips of unknown people; returns clip -> unknown person, such as `unknown 3`.

    `vectors` are the embeddings of the clips. `films` are the films of the clips, if any.
    """
    named = name_clips(gallery, vectors, films, gallery.identify)
    known = {clip for clip, answer in named.answers.items() if answer.identity is not None}
    vectors = vectors.only({*vectors.names} - known - named.told.keys())
    if films and gallery.origin.cards:
        tracks = Tracks(gallery.state, vectors, films)
        return naming.mark_unclear(naming.group_unknown(tracks), films)
    return gallery.group(vectors)
