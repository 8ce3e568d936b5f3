"""Measures `vidjax who --review` with made-up results of many films.

    python -m tests.benchmarks.corrections FOLDER MODELS [--films=300] [--people=2000]

The first call writes the results into FOLDER, with random vectors that are as alike as the card of
the net of faces declares. A tenth of the people are enrolled. Half of the other people are in one
shot each. The script then decides all names, and measures the times of corrections and pages.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.benchmarks import common
from tests.helpers.embeddings import unit
from vidjax.apps import cards
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip
from vidjax.apps.video import features_folder, pipeline, review, who
from vidjax.apps.video.features_folder import THUMBNAILS, FaceTrack, FileStamp, MediaFile
from vidjax.apps.video.names_page import CLIP
from vidjax.apps.video.people_photos import PhotoFace
from vidjax.data.clip_files import write_npz

SECONDS, SIDE = 5400.0, 0.1  # the length of a film, and the side of a face
SHOTS = 9  # the mean number of shots in which a person is seen, beyond the first
PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)


def make_vectors(centres: np.ndarray, card: cards.Card, rng: np.random.Generator) -> np.ndarray:
    """Returns a unit vector near each of the centres [N, D], which are independent unit vectors."""
    assert card.back_end
    different = card.back_end.different[0]
    same = 1 - (1 - card.back_end.same[0]) / 4  # good pictures, so that most groups are right
    shared = unit(np.ones(centres.shape[1], np.float32))
    noise = unit(rng.standard_normal(centres.shape, np.float32))
    return unit(
        different**0.5 * shared + (same - different) ** 0.5 * centres + (1 - same) ** 0.5 * noise
    )


def make_results(out: Path, models: Path, num_films: int, num_people: int) -> None:
    """Writes the features of films, and a gallery with a photo of a tenth of the people."""
    rng, features = np.random.default_rng(0), out / who.FEATURES
    known = cards.load(models)
    card = known["face_embedder"]
    digests = {part: x.digest for part, x in cards.list_embedders(known).items()}
    for folder in (features / features_folder.VIDEOS, features / THUMBNAILS, out / "films"):
        folder.mkdir(parents=True)
    settings = features_folder.ExtractionSettings()
    made = features_folder.Extraction(models=pipeline.read_digests(models), settings=settings)
    features_folder.write(features / features_folder.NAME, made)
    centres = unit(rng.standard_normal((num_people, len(card.back_end.centre)), np.float32))
    enrolled, crowd = num_people // 10, num_people // 2
    shots = 1 + rng.geometric(1 / SHOTS, num_people)
    shots[-crowd:] = 1
    owner = rng.permutation(np.repeat(np.arange(num_people), shots))
    vectors = make_vectors(centres[owner], card, rng)
    (out / "picture.png").write_bytes(PICTURE)
    for number, rows in enumerate(np.array_split(np.arange(len(owner)), num_films)):
        stem, step = f"film{number:03}", SECONDS / max(len(rows), 1)
        (path := out / "films" / f"{stem}.mp4").write_bytes(os.urandom(8))
        clips = [f"{stem}.s{shot:03}.t00" for shot in range(len(rows))]
        quality = np.ones(1, np.float32)
        arrays = {
            clip: {"face": vectors[[row]], "face_quality": quality}
            for clip, row in zip(clips, rows, strict=True)
        }
        write_npz(features / f"{stem}.npz", arrays, digests)
        tracks = [
            FaceTrack(
                clip=clip, shot=shot, start_s=shot * step, end_s=(shot + 0.8) * step, seen=20,
                quality=1.0, box=(0.4, 0.4, 0.4 + SIDE, 0.4 + SIDE), box_at_s=shot * step,
            )
            for shot, clip in enumerate(clips)
        ]  # fmt: skip
        film = MediaFile(
            video=path.name, source=FileStamp.of(path), sha256=f"{number:064x}", photo=False,
            seconds=SECONDS, tracks=tracks, frames=int(SECONDS * 25), rate=25.0,
            shots=[(x.start_s, x.end_s) for x in tracks],
        )  # fmt: skip
        features_folder.write(features / features_folder.VIDEOS / f"{stem}.json", film)
        (pictures := features / THUMBNAILS / stem).mkdir()
        for clip in clips:
            os.link(out / "picture.png", pictures / f"{clip}.png")
    gallery = Gallery.of_models(out / "gallery", models)
    photos = make_vectors(centres[:enrolled], card, rng)
    names = [f"Person {number}" for number in range(enrolled)]
    gallery.add(
        {
            str(PhotoFace(name, name, "1")): StoredClip(name, vector)
            for name, vector in zip(names, photos, strict=True)
        }
    )


def measure(text: str, action: Callable[[], object]) -> None:
    """Calls a function, and prints its time."""
    start = time.perf_counter()
    action()
    sys.stdout.write(f"| {text} | {time.perf_counter() - start:.3f} |\n")


def list_actions(page: review.Review) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields corrections with their descriptions."""
    sizes = sorted({*page._decision.unknown.values()}, key=[*page._decision.unknown.values()].count)
    clip = page._decision.appearances[0].clips[0]
    yield "a page of all people", page.render
    yield "the page of a person", lambda: page.render(person=sizes[-1])
    yield "name the most frequent person", lambda: page.change("name", sizes[-1], "New")
    yield "the first page after a change", page.render
    yield "deny a name", lambda: page.change("deny", CLIP + clip, "")
    yield "join two people", lambda: page.change("name", sizes[-2], sizes[-3])
    yield "ignore a person", lambda: page.change("ignore", sizes[-4], "")
    yield "undo", page.undo
    yield "write all results", page.save


def main() -> None:
    """Makes the results if they do not exist, and prints a table of times."""
    args = common.parse(__doc__, folder=Path, models=Path, films=300, people=2000)
    out: Path = args.folder
    if not out.exists():
        make_results(out, args.models, args.films, args.people)
    gallery, films = Gallery(out / "gallery"), features_folder.read_media_files(out / who.FEATURES)
    num_clips = sum(len(film.tracks) for film in films)
    sys.stdout.write(f"{num_clips:,} clips\n| action | seconds |\n| --- | --- |\n")
    decisions: list[who.Decision] = []

    def decide() -> None:
        numbers = who.read_numbers(out)
        decisions.append(who.decide(gallery, out, films, numbers, gallery.identify))

    measure("decide all names", decide)
    page = review.Review(out, decisions[0])
    for text, action in list_actions(page):
        measure(text, action)


if __name__ == "__main__":
    main()
