"""Enrols people: computes from each person's clips the coefficients that score other clips.

Also fits the back end, the parameters that compare vectors, to the clips of a gallery.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

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
    stack_vectors,
)
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import cut_film_name


def enrol(
    backend: Backend,
    clips_of: Mapping[str, Sequence[str]],
    clips: Mapping[str, StoredClip],
    *,
    of_plda: bool = False,
) -> Iterator[People]:
    """Computes from each person's clips the coefficients that score other clips, see `People`.

    Yields the people in blocks, to save memory. With PLDA, all clips of a person in a film count as
    one clip, and similar clips from several films count as fewer clips.

    Args:
      backend: the parameters of the comparison.
      clips_of: identity -> names of the person's clips.
      clips: name -> clip.
      of_plda: True for the settings of a PLDA run. If PLDA was fitted to all clips of
        a person, similar clips of the person then count fully.
    """
    identities, width = [*clips_of], sum(backend.widths.values())
    for at in range(0, len(identities), MAX_BLOCK_PEOPLE):
        block = identities[at : at + MAX_BLOCK_PEOPLE]
        names = [name for identity in block for name in clips_of[identity]]
        people, film, vectors = _stack_films(names, clips, width)
        place = {identity: number for number, identity in enumerate(block)}
        owner = np.array([place[identity] for identity in people])[film]
        independent = [of_plda and all(clips[x].fitted for x in clips_of[y]) for y in block]
        has_films = len(people) < len(names)
        yield backend.enrol(
            block, vectors, owner, film if has_films else None, np.array(independent)
        )


def _stack_films(
    names: Iterable[str], clips: Mapping[str, StoredClip], width: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Groups the N clips `names` by person and film, and sorts the clips by group.

    Returns three values: the person of each group; the group of each sorted clip, [N] int; the
    vectors of the sorted clips, [N, width] float32.
    """
    films = group_by_key(
        ((clips[name].identity or STRANGER, cut_film_name(name)), name) for name in names
    )
    film = np.repeat(np.arange(len(films)), [*map(len, films.values())])
    ordered = [name for clip_names in films.values() for name in clip_names]
    return [identity for identity, _ in films], film, stack_vectors(ordered, clips, width)


def stack_people(
    clips: Mapping[str, StoredClip], widths: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Returns the arguments `vectors`, `labels` and `enrolled` of `backend.fit`.

    Each row is for one person in one film: the first clip in `vectors`, the mean of the clips in
    `enrolled`, and the person's number in `labels`. Strangers have no rows. `widths` are modality
    -> length of a vector.
    """
    # Clips of a person from the same film are alike. People are enrolled with their mean.
    names = sorted(name for name, clip in clips.items() if clip.identity is not None)
    people, film, stacked = _stack_films(names, clips, sum(widths.values()))
    labels = 1 + np.unique(np.array(people, object), return_inverse=True)[1]
    first, vectors, enrolled = np.unique(film, return_index=True)[1], {}, {}
    ends = np.cumsum(list(widths.values()))[:-1].tolist()
    for part, x in zip(widths, np.split(stacked, ends, axis=1), strict=True):
        count, total = backend_lib.sum_by_owner(x, film, len(people))
        vectors[part] = x[first]
        enrolled[part] = (total / np.maximum(count, 1)[:, None]).astype(np.float32)
    return vectors, labels, enrolled


def refit(
    clips: Mapping[str, StoredClip], backend: Backend, *, centred: bool
) -> tuple[Backend, dict[str, StoredClip]]:
    """Fits new parameters of the comparison (PLDA) to the present clips of a gallery.

    Returns the parameters, and the clips. No clip that was removed influences the new parameters.
    `backend` are the old parameters. For `centred`, see `backend.fit`.
    """
    fitted = backend_lib.fit(*stack_people(clips, backend.widths), centred=centred)
    return fitted, {name: x._replace(fitted=x.identity is not None) for name, x in clips.items()}


def make_state(
    version: int,
    origin: VectorOrigin,
    backend: Backend,
    clips: Mapping[str, StoredClip],
    command: str = "",
) -> State:
    """Makes the content of a gallery from its clips. Enrols all people, see `enrol`."""
    clips_of = list_clips_of(clips)
    people = {name: clips_of[name] for name in sorted(clips_of.keys() - {STRANGER})}
    index = Index(backend, enrol(backend, people, clips, of_plda=origin.counts_every_clip))
    return State(version, origin, index, clips, clips_of, command=command)


def check_width(backend: Backend) -> int:
    """Returns how many numbers the vector of a clip has, in all modalities together.

    Raises UserError if a gallery cannot store so many numbers.
    """
    width = sum(backend.widths.values())
    if width > MAX_VECTOR_WIDTH:
        raise UserError(
            f"the vector of a clip has {width:,} numbers, but a gallery can store at most "
            f"{MAX_VECTOR_WIDTH:,}\nuse an ensemble of fewer models, or a net with shorter vectors"
        )
    return width
