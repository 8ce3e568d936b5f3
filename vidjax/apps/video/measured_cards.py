"""Measures how similar embeddings of your own photos are, and writes the results into a card.

A card is a JSON file that describes a net. A card contains the distributions of the cosine of two
embeddings, for one person and for two people, and no names of people. The embeddings of the photos
are deleted at the end.
"""

import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from vidjax.apps import cards
from vidjax.apps.cards import BackEnd, Card
from vidjax.apps.gallery import card_notes
from vidjax.apps.gallery.backend import unit
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import align, clip_inputs, media, photos
from vidjax.apps.video.media import PEOPLE
from vidjax.data.memory import load_people
from vidjax.models import card_measure
from vidjax.models.card_backend import LEAST_CLARITY
from vidjax.models.card_measure import FEWEST_PEOPLE, Measured, Spread
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Tell
from vidjax.utils.names import show

PEOPLE_FOR_MEAN = 20  # with fewer people, the mean vector in the card stays
DIGITS = 5  # of the numbers in a card


class Samples(NamedTuple):
    """The embeddings of N clips of a modality, such as face or audio."""

    units: np.ndarray  # [N, D] float32, of length 1, or 0
    people: np.ndarray  # [N], the names of the people
    quality: np.ndarray  # [N], see `align.measure_quality`; 1 if it is unknown

    def take(self, rows: np.ndarray) -> "Samples":
        """Selects clips by their indices, or by a mask."""
        return Samples(*(x[rows] for x in self))


class MeasuredCard(NamedTuple):
    """The card (the JSON file of a net), and the measured cosines of the net's embeddings."""

    card: Card  # before
    measured: Measured
    back_end: BackEnd  # the new numbers
    unclear: int  # number of faces that were not measured, see `FaceTrack.unclear`


def measure_photos(models: Path, people: Path, workers: int, tell: Tell) -> list[MeasuredCard]:
    """Measures how well a face net separates people, and writes the results into its JSON file.

    `people` is a folder of photos NAME/PHOTO.jpg. `models` is the folder of the net. `workers` is
    the number of processes. `tell` is called with each problem of a photo. The result has one item.
    Raises UserError if fewer than 5 people have two usable photos, or if the net does not separate
    the people.
    """
    with files.scratch_folder() as out:
        # In a folder `gallery`, `Photos` would see people of earlier calls.
        gallery = Gallery.of_models(out / "vectors", models)
        if "face" not in gallery.backend.widths:
            raise UserError(
                f"'{models}' contains no face net whose JSON file has the key back_end\n"
                f"{cards.describe_remedy('face_embedder', models)}"
            )
        faces, owners = list[tuple[np.ndarray, str, float]](), dict[tuple[str, bytes], str]()
        found = photos.read_folder(people, out, models, workers, tell)
        clips = {x.track.clip for x in found.faces}
        vectors = clip_inputs.embed_clips(gallery.backend, out / PEOPLE, clips)
        vector_of = dict(zip(vectors.names, vectors.parts["face"], strict=True))
        usable = (x for x in found.faces if vector_of[x.track.clip].any())
        for x in sorted(usable, key=lambda x: (x.person, x.path)):
            vector, person = vector_of[x.track.clip], x.person
            # A copy would be measured as the most similar face of another person.
            owner = owners.setdefault((x.photo.sha256, vector.tobytes()), person)
            if owner != person:
                raise UserError(
                    f"'{x.path}' is for {show(person)}, but is a copy of a photo of {show(owner)}\n"
                    "delete the wrong copy, and repeat the command"
                )
            faces.append((vector, person, x.track.quality))
        given = {"face": Samples(*map(np.array, zip(*faces, strict=True)))} if faces else {}
        return _measure_all(gallery, models, given, "photo")


def measure_features(models: Path, path: Path) -> list[MeasuredCard]:
    """Measures how well nets separate people, and writes the results into the nets' JSON files.

    A file `path/NAME/CLIP.npz` contains embeddings of the person NAME. `models` is the folder of
    nets. Raises UserError if too few people have two clips, if a net does not separate the people,
    or if the embeddings are from nets that are not in `models`.
    """
    with files.scratch_folder() as scratch:
        gallery = Gallery.of_models(scratch / "gallery", models)
        widths, quality = gallery.source.reads
        clips, person_of = load_people(path, widths, quality=quality, nets=gallery.origin.cards)
        for folder in filter(Path.is_dir, path.iterdir()):
            media.check_models(folder, gallery.origin.cards)
        vectors = gallery.embed(clips)
        names = np.array([person_of[clip] for clip in vectors.names])
        given = {part: Samples(x, names, np.ones(len(x))) for part, x in vectors.parts.items()}
        return _measure_all(gallery, models, given, "clip")


def _measure_all(
    gallery: Gallery, models: Path, given: dict[str, Samples], kind: str
) -> list[MeasuredCard]:
    """Measures how well each net separates people, and writes the results into the net's card.

    `gallery` is made from the nets in the folder `models`. `given` is modality -> embeddings, of
    any norm. Modalities with too few people are left out. `kind` is the word for a clip in
    messages, "photo" or "clip". Raises UserError if no modality has enough people.
    """
    embedders, done = cards.list_embedders(cards.read_all(models)), list[MeasuredCard]()
    most = unclear = 0
    for part in gallery.backend.parts:
        if samples := given.get(part.name):
            units = unit(part, samples.units).astype(np.float32)
            samples = _drop_copies(samples._replace(units=units))
            card = embedders[part.name]
            least = card.back_end.clear_quality if card.back_end else None
            clarity = [align.measure_clarity(q, least) for q in samples.quality]
            clear = samples.take(np.array(clarity) >= LEAST_CLARITY)
            rows = card_measure.choose_clips(np.unique(clear.people, return_inverse=True)[1])
            most = max(most, count := len({*clear.people[rows]}))
            unclear = len(samples.people) - len(clear.people)
            if count >= FEWEST_PEOPLE:
                done.append(_measure(card, clear.take(rows), unclear, kind))
    if not done:
        note = f", without {messages.count(unclear, 'unclear face')}" if unclear else ""
        few = f"there are two usable {kind}s of only {messages.count(most, 'person')}"
        raise UserError(
            f"{few if most else f'no person has two usable {kind}s'}{note}: at least "
            f"{FEWEST_PEOPLE} people with two {kind}s each are needed\n"
            f"add people or {kind}s: a folder for each person, with two or more {kind}s"
        )
    for each in done:
        cards.replace_back_end(each.card, each.back_end)
    return done


def _drop_copies(samples: Samples) -> Samples:
    """Leaves out clips without a usable frame, and copies of other clips of the same person."""
    owner = np.unique(samples.people, return_inverse=True)[1]
    keys = np.column_stack([owner, samples.units])
    rows = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    return samples.take(rows[samples.units[rows].any(axis=1)])


def _measure(card: Card, chosen: Samples, unclear: int, kind: str) -> MeasuredCard:
    """Measures the cosines of pairs of clips in `chosen`; returns the results for the net.

    `unclear` is the number of clips that were left out, for the report. `kind` is the word for a
    clip in texts, "photo" or "clip". Raises UserError if the net does not separate the people.
    """
    owner = np.unique(chosen.people, return_inverse=True)[1]
    found = card_measure.measure(chosen.units, owner)
    same, different = (
        (round(x.mean, DIGITS), max(round(x.deviation, DIGITS), 10**-DIGITS))
        for x in (found.same, found.different)
    )
    if different[0] >= same[0] or same[0] >= 1:
        raise UserError(
            f"'{card.path}' is not changed: its net does not separate these people. The mean "
            f"cosine of two {kind}s of the same person is {same[0]:.3f}, and of different people "
            f"{different[0]:.3f}\n{card_notes.CONVERT}"
        )
    earlier, date = card.back_end, datetime.datetime.now(datetime.UTC).date()
    has_mean = found.people >= PEOPLE_FOR_MEAN
    assert earlier
    within, between = (" +- ".join(format_intervals(x)) for x in (found.same, found.different))
    back_end = msgspec.structs.replace(
        earlier,
        same=same,
        different=different,
        mean=found.mean.round(4).tolist() if has_mean else earlier.mean,
        pairs=found.pairs,
        data=(
            f"vidjax measure-card on {date}: {messages.count(found.clips, kind)} of "
            f"{found.people:,} people, each person with the same weight; 95 % intervals: same "
            f"{within}, different {between}; equal error rate {100 * found.equal_error_rate:.1f} %"
            + ("" if has_mean or not earlier.mean else "; the mean is from the card before")
        ),
    )
    return MeasuredCard(card, found, back_end, unclear)


def format_intervals(spread: Spread) -> tuple[str, str]:
    """Returns the 95 % intervals of a mean and a standard deviation, such as `0.61 to 0.64`."""
    (low, high), (least, most) = spread.mean_interval, spread.deviation_interval
    return f"{low:.3f} to {high:.3f}", f"{max(least, 0):.3f} to {most:.3f}"
