"""Computes the people of a gallery from their clips, and fits the back end of the gallery."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from vidjax.apps.gallery import backend as backend_lib
from vidjax.apps.gallery.backend import Backend, People
from vidjax.apps.gallery.index import MAX_BLOCK_PEOPLE, Index
from vidjax.apps.gallery.store import (
    MAX_VECTOR_WIDTH,
    STRANGER,
    State,
    StoredClip,
    VectorOrigin,
    list_clips_of,
)
from vidjax.models.two_covariance import Settings
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import cut_film_name


def enrol(
    backend: Backend,
    clips_of: Mapping[str, Sequence[str]],
    clips: Mapping[str, StoredClip],
    *,
    of_plda: bool = False,
) -> People:
    """Computes the coefficients of people from their clips.

    With PLDA, all clips of a person in a film count as one clip. Similar clips count less, see
    `two_covariance.count_independent` and `card_backend.effective_count`.

    Args:
      backend: the parameters that compare vectors.
      clips_of: identity -> names of the person's clips.
      clips: name -> clip.
      of_plda: True for the gallery of a PLDA run. If PLDA was fitted to all clips of a person, each
        clip of the person then counts fully, as in the run.
    """
    names = (name for clip_names in clips_of.values() for name in clip_names)
    films = group_by_film(names, clips)
    place = {identity: number for number, identity in enumerate(clips_of)}
    owner = np.array([place[identity] for identity, _ in films], int)
    film = np.repeat(np.arange(len(films)), [*map(len, films.values())])
    ordered = [name for clip_names in films.values() for name in clip_names]
    vectors = stack_vectors(ordered, clips, sum(backend.widths.values()))
    return backend.enrol(
        tuple(clips_of),
        vectors,
        owner[film],
        film if len(films) < len(ordered) else None,
        np.array([of_plda and all(clips[x].fitted for x in names) for names in clips_of.values()]),
    )


def enrol_in_blocks(
    backend: Backend,
    clips_of: Mapping[str, Sequence[str]],
    clips: Mapping[str, StoredClip],
    *,
    of_plda: bool = False,
) -> Iterator[People]:
    """Yields blocks of people, which need little memory. The arguments are as in `enrol`."""
    names = [*clips_of]
    for at in range(0, len(names), MAX_BLOCK_PEOPLE):
        some = {name: clips_of[name] for name in names[at : at + MAX_BLOCK_PEOPLE]}
        yield enrol(backend, some, clips, of_plda=of_plda)


def group_by_film(
    names: Iterable[str], clips: Mapping[str, StoredClip]
) -> dict[tuple[str, str], list[str]]:
    """Groups the clips `names` by person and film; returns (identity, film) -> names of clips."""
    return group_by_key(
        ((clips[name].identity or STRANGER, cut_film_name(name)), name) for name in names
    )


def stack_films(
    films: Collection[Sequence[str]], clips: Mapping[str, StoredClip], widths: Mapping[str, int]
) -> np.ndarray:
    """Returns the mean vector of each of N films, [N, sum of D] float32.

    `films` lists the names of each film's clips. `widths` are modality -> D. The mean of a modality
    is the mean over the clips that have the modality.
    """
    width, ends = sum(widths.values()), np.cumsum([*widths.values()])[:-1].tolist()
    vectors = stack_vectors([names[0] for names in films], clips, width)
    for row, names in enumerate(films):
        if len(names) > 1:
            parts = np.split(stack_vectors(names, clips, width), ends, axis=1)
            counts = [max(np.any(x != 0, axis=1).sum(), 1) for x in parts]
            means = [x.sum(axis=0, dtype=float) / n for x, n in zip(parts, counts, strict=True)]
            vectors[row] = np.concatenate(means)
    return vectors


def stack_vectors(names: Sequence[str], clips: Mapping[str, StoredClip], width: int) -> np.ndarray:
    """Returns the vectors of clips, [N, width] float32."""
    vectors = [clips[name].vector for name in names]
    return np.array(vectors, np.float32).reshape(len(names), width)


def stack_parts(state: State, names: Sequence[str]) -> list[np.ndarray]:
    """Returns the vectors of N enrolled clips, M arrays [N, D]."""
    backend = state.index.backend
    return backend.split(stack_vectors(names, state.clips, sum(backend.widths.values())))


def list_usable_strangers(state: State) -> Iterator[str]:
    """Yields the names of the clips of strangers, except clips without a vector."""
    # A clip without a vector waits until `vidjax who` reads its film with the present models.
    return (name for name in state.clips_of.get(STRANGER, ()) if state.clips[name].vector.any())


def fit_backend(
    clips: Mapping[str, StoredClip],
    widths: Mapping[str, int],
    *,
    centred: bool,
    settings: Settings | None = None,
) -> Backend:
    """Fits PLDA to one clip of each person in each film. Clips of strangers are ignored.

    `clips` are name -> clip, in any order. `widths` are modality -> length of its vectors. For
    `centred` and `settings`, see `backend.fit`.
    """
    labels, vectors, enrolled = _stack_people(clips, widths)
    return backend_lib.fit(vectors, labels, enrolled, centred=centred, settings=settings)


def measure_shared(clips: Mapping[str, StoredClip], widths: Mapping[str, int]) -> float:
    """Returns how alike the clips of a person are, 0 to 1, see `backend.measure_shared`."""
    labels, vectors, _ = _stack_people(clips, widths)
    return backend_lib.measure_shared(vectors, labels)


def _stack_people(
    clips: Mapping[str, StoredClip], widths: Mapping[str, int]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the arguments `labels`, `vectors` and `enrolled` of `backend.fit`."""
    # Clips of a person from the same film are alike. People are enrolled with their mean.
    names = sorted(name for name, clip in clips.items() if clip.identity is not None)
    films = group_by_film(names, clips)
    people = np.array([identity for identity, _ in films], object)
    labels = 1 + np.unique(people, return_inverse=True)[1]
    ends = np.cumsum(list(widths.values()))[:-1].tolist()
    vectors, enrolled = (
        dict(zip(widths, np.split(stack_films(some, clips, widths), ends, axis=1), strict=True))
        for some in ([names[:1] for names in films.values()], films.values())
    )
    return labels, vectors, enrolled


def refit(state: State) -> State:
    """Returns a state whose back end is fitted to its present clips."""
    backend = fit_backend(state.clips, state.index.backend.widths, centred=state.origin.centred)
    clips = {
        name: clip._replace(fitted=clip.identity is not None) for name, clip in state.clips.items()
    }
    return make_state(state.version, state.origin, backend, clips)


def make_state(
    version: int,
    origin: VectorOrigin,
    backend: Backend,
    clips: Mapping[str, StoredClip],
) -> State:
    """Returns a state, with the coefficients of all people in `clips`."""
    clips_of = list_clips_of(clips)
    people = {name: clips_of[name] for name in sorted(clips_of.keys() - {STRANGER})}
    blocks = enrol_in_blocks(backend, people, clips, of_plda=origin.counts_every_clip)
    return State(version, origin, Index(backend, blocks), clips, clips_of)


def check_width(backend: Backend) -> int:
    """Returns the length of a clip's vector. Raises UserError if a gallery cannot store it."""
    width = sum(backend.widths.values())
    if width > MAX_VECTOR_WIDTH:
        raise UserError(
            f"the vector of a clip has {width:,} numbers, but a gallery can store at most "
            f"{MAX_VECTOR_WIDTH:,}\nuse an ensemble with fewer members, or a narrower net"
        )
    return width
