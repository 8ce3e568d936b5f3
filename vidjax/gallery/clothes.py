"""Labels of the clips of films: by faces, and by clothes where a face does not tell.

A person wears the same clothes in one film, as a rule. So the clips of a film are grouped by their
bodies, the faces of a group vote for a name, and clips without a name inherit it.

Source: iQIYI-VID, section 3.3. There a face and clothes are a pair in each frame; here a clip is a
track, whose faces and bodies were paired when they were extracted.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidjax.data.memory import load_clips
from vidjax.errors import UserError
from vidjax.extract import cards, folder
from vidjax.extract.folder import Film, Track
from vidjax.gallery import answers, backend

BODY = "body"


class Labels(NamedTuple):
    """The labels of clips, those that clothes gave among them, and clip -> why one may be wrong."""

    identities: dict[str, str]
    inherited: set[str]
    doubts: dict[str, str]


def group(features: Path, models: Path, films: Iterable[Film]) -> dict[str, str]:
    """Returns clip -> its group by clothes; none without bodies among the features.

    Two clips of a film are alike as the card of the net of bodies says, and are joined by average
    linkage, as in `Gallery.group`.

    Raises:
      UserError: the models have no such card, another one, or one without a back end.
    """
    made = folder.read_extraction(features)
    if not made or f"{BODY}_embedder" not in made.models:
        return {}
    card = cards.require(cards.load(models), "body_embedder", models)
    folder.check_models(features, {BODY: card.digest})
    if card.back_end is None:
        raise UserError(
            f"'{card.path}' has no back end, which says how alike clothes of one person are\n"
            "add it to the card, or extract without bodies"
        )
    bodies = load_clips(features, {BODY: len(card.back_end.centre)}, ())
    vectors = dict(zip(bodies.names, bodies.mean_vectors(BODY), strict=True))
    found: dict[str, str] = {}
    alike = backend.of_cards({BODY: card.back_end})
    for number, film in enumerate(films):
        clips = [track.clip for track in film.tracks if np.any(vectors.get(track.clip, 0))]
        if clips:
            odds = alike.odds([np.stack([vectors[clip] for clip in clips])])
            named = answers.name_groups(clips, odds)
            found |= {clip: f"{number} {name}" for clip, name in named.items()}
    return found


def label(
    named: Mapping[str, str | None],
    groups: Mapping[str, str],
    films: Iterable[Film],
    faceless: Iterable[str] = (),
) -> Labels:
    """Returns the labels of the clips of films.

    A clip inherits the name that more than half of the named clips of its group have, unless it is
    seen at one time with somebody of that name, or with another clip that would inherit it.

    Args:
      named: clip -> the person whom its face shows, None for nobody.
      groups: clip -> its group by clothes; a group is of one film.
      films: the times of the clips.
      faceless: clips without a face. All other clips that inherit are in doubt.
    """
    faceless = set(faceless)
    found = Labels({clip: name for clip, name in named.items() if name is not None}, set(), {})
    for film in films:
        members: dict[str, list[Track]] = {}
        for track in film.tracks:
            if track.clip in groups:
                members.setdefault(groups[track.clip], []).append(track)
        for tracks in members.values():
            votes = Counter(name for track in tracks if (name := named.get(track.clip)))
            if votes and 2 * max(votes.values()) > votes.total():
                _vote(tracks, named, votes, faceless, film, found)
            else:
                for track in tracks:
                    if named.get(track.clip):
                        found.doubts[track.clip] = f"alike are dressed {_told(votes)}"
    return found


def _vote(
    tracks: Iterable[Track], named: Mapping[str, str | None], votes: Counter[str],
    faceless: set[str], film: Film, found: Labels,
) -> None:  # fmt: skip
    """Gives clips of one group the name with the most votes, and doubts what contradicts it."""
    ((winner, count),) = votes.most_common(1)
    shown = [track for track in film.tracks if found.identities.get(track.clip) == winner]
    for track in tracks:
        own = named.get(track.clip)
        if own is not None and own != winner:
            found.doubts[track.clip] = f"its clothes are {winner}'s, by {count} of {votes.total()}"
    free = [track for track in tracks if named.get(track.clip) is None and _alone(track, shown)]
    for track in free:
        if _alone(track, free):
            found.identities[track.clip] = winner
            found.inherited.add(track.clip)
            if track.clip not in faceless:
                found.doubts[track.clip] = f"its face is nobody's, its clothes are {winner}'s"
            elif count == 1:
                found.doubts[track.clip] = "one clip alone is dressed so"


def _told(votes: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in votes.most_common(3))


def _alone(one: Track, others: Iterable[Track]) -> bool:
    """Returns whether none of the other tracks is seen at one time with this one."""
    return not any(
        one.shot == other.shot and one.start_s <= other.end_s and other.start_s <= one.end_s
        for other in others
        if other is not one
    )
