"""Finds films that show the same as a corrected film, but were cut off, shrunk or encoded again.

Such a film has other pictures, so it is another film for vidjax. A user decides whether it takes
over what was said about the corrected film.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vidjax.apps.video.decide import Decision
from vidjax.apps.video.faces import match_paths
from vidjax.apps.video.log import Line, make_step
from vidjax.apps.video.media import FaceTrack, MediaFile
from vidjax.apps.video.tracks import measure_overlaps
from vidjax.utils.groups import group_by_key

MOST_SECONDS = 0.5  # from the first picture of a face to the first picture in the other film
LEAST_OVERLAP = 0.5  # intersection over union of the boxes of a face in these pictures
LEAST_SHARE = 0.5  # of the faces of the shorter film that must be in the other film, too
LEAST_COSINE = 0.8  # of the vectors of a face in both films; people differ more


class Heir(NamedTuple):
    """A film that shows the same as a corrected film."""

    old: MediaFile
    new: MediaFile
    clips: Mapping[str, str]  # clip of `old` -> clip of `new`

    @property
    def key(self) -> str:
        """The digests of both films."""
        return f"{self.old.sha256} {self.new.sha256}"

    @property
    def about(self) -> str:
        """A sentence for the user."""
        return f"{self.new.video} shows the same faces at the same times as {self.old.video}"


def find_heirs(decision: Decision) -> list[Heir]:
    """Finds films without corrections that show the same as a film with corrections.

    The corrected film must be missing at its place, or in the folder of the other film. Faces are
    compared by time, box and vector.
    """
    spoken = decision.said.list_spoken()
    films = [film for film in decision.films if film.tracks and not film.photo]
    by_kind = group_by_key((any(x.clip in spoken for x in film.tracks), film) for film in films)
    new = [film for film in by_kind.get(False, ()) if film.source.is_valid]
    found = list[Heir]()
    for film in by_kind.get(True, ()):
        is_gone, folder = not film.source.is_valid, film.source.path.parent
        others = (x for x in new if is_gone or x.source.path.parent == folder)
        for other in (x for x in others if _has_equal_times(film, x)):
            clips = _match_faces(decision, film, other)
            least = LEAST_SHARE * min(len(film.tracks), len(other.tracks))
            if len(clips) >= least and clips.keys() & spoken:
                found.append(Heir(film, other, clips))
    return found


def _has_equal_times(film: MediaFile, other: MediaFile) -> bool:
    """Returns whether half of the faces in the shorter film begin at times of other faces."""
    starts = [np.array([x.start_s for x in of.tracks]) for of in (film, other)]
    starts.sort(key=len)
    near = np.abs(starts[0][:, None] - starts[1]).min(axis=1) <= MOST_SECONDS
    return bool(near.mean() >= LEAST_SHARE)


def _match_faces(decision: Decision, film: MediaFile, other: MediaFile) -> dict[str, str]:
    """Returns clip of `film` -> clip of `other` that shows the face at the same time and place."""
    usable, backend = decision.faces.usable, decision.state.index.backend
    tracks = {x.clip: x for of in (film, other) for x in of.tracks if x.clip in usable}
    clip_of = {face: clip for clip, face in film.faces.items()}
    found = match_paths([*clip_of], other.tracks, other.orientation)
    matches = ((clip_of[face], clips[0]) for face, clips in found.items())
    pairs = {x: y for x, y in matches if x in tracks and y in tracks}
    pairs = {x: y for x, y in pairs.items() if _is_equal(tracks[x], tracks[y])}
    if not pairs:
        return {}
    vectors = np.stack([usable[x].vector for pair in pairs.items() for x in pair])
    units = np.concatenate(backend.units(backend.split(vectors)), 1)
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    cosines = (units[::2] * units[1::2]).sum(axis=1)
    return {x: pairs[x] for x, cosine in zip(pairs, cosines, strict=True) if cosine >= LEAST_COSINE}


def _is_equal(first: FaceTrack, second: FaceTrack) -> bool:
    """Returns whether two faces begin at the same time, at the same place of the picture."""
    if not first.box or not second.box or abs(first.start_s - second.start_s) > MOST_SECONDS:
        return False
    boxes = np.array([x.places[0][1] if x.places else x.box for x in (first, second)])
    return bool(measure_overlaps(boxes[:1], boxes[1:])[0, 0] >= LEAST_OVERLAP)


def take_over(decision: Decision, heir: Heir) -> list[Line]:
    """Returns log lines, one step: what was said about the old film holds for the new film."""
    film, faces = heir.new.video, heir.new.faces
    return make_step(
        line for clip, other in heir.clips.items() if other in faces
        for line in decision.said.list_facts_of(clip, faces[other], film)
    )  # fmt: skip
