"""Enrols the people of a gallery in a gallery of other nets, by the names of their clips."""

from typing import NamedTuple

from vidjax.apps.gallery.gallery import AnyClips, Gallery
from vidjax.apps.gallery.store import StoredClip
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.utils.errors import UserError
from vidjax.utils.names import IGNORED, show, strip_ending


class Migration(NamedTuple):
    """The result of a migration."""

    moved: int  # the number of clips that are new or have another person in the new gallery
    unchanged: int  # the number of clips that an earlier call has moved
    relabelled: dict[str, str]  # clip -> its former person in the new gallery, who was replaced
    missing: list[str]  # the clips of the old gallery that the new gallery lacks
    lost: list[str]  # the people of the old gallery who have no clip in the new gallery


def migrate(old: Gallery, new: Gallery, clips: AnyClips) -> Migration:
    """Enrols the clips of the gallery `old` in the gallery `new`, as one change.

    Labels and clips of strangers are copied. Another call adds more clips. `clips` are the features
    of the clips, which the nets or the run of `new` have computed.

    Raises:
      UserError: none of the clips is in `old`, or `new` has people or clips that `old` lacks.
    """
    old.refresh()
    person_of = {strip_ending(name): clip.identity for name, clip in old.clips.items()}
    extra = [name for name, clip in new.clips.items() if clip.identity and name not in person_of]
    if extra:
        raise UserError(
            f"gallery '{new.folder}' contains clips that '{old.folder}' lacks, such as "
            f"{show(min(extra))}\ncreate it again: with --models, or with --run and --empty"
        )
    vectors = new.embed(clips)
    labels = tuple(person_of.get(strip_ending(name)) for name in vectors.names)
    known = {name for name in vectors.names if strip_ending(name) in person_of}
    chosen = select_usable_clips(vectors._replace(labels=labels).only(known))
    if not chosen:
        raise UserError(
            f"no clip of gallery '{old.folder}' has a usable frame in the features: a clip of the "
            f"gallery is {show(min(person_of, default=''))}, a clip of the features "
            f"{show(min(vectors.names, default=''))}\nuse the clip names of the old gallery"
        )
    with new.change() as draft:
        added, relabelled = dict[str, StoredClip](), dict[str, str]()
        for name, clip in chosen.items():
            before = draft.clips.get(strip_ending(name))
            if before is None:
                added[name] = clip
            elif before.identity != clip.identity:  # a label that was changed since an earlier call
                relabelled[name] = draft.relabel(name, clip.identity) or IGNORED
        moved = draft.add(added) + len(relabelled)
    missing = sorted(person_of.keys() - new.clips.keys())
    lost = sorted(old.people.keys() - new.people.keys())
    return Migration(moved, len(chosen) - moved, relabelled, missing, lost)
