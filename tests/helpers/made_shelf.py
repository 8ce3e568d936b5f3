"""A folder of results of `vidjax who` with films of made-up people, without any net or film."""

import itertools
from types import SimpleNamespace

import numpy as np

from tests.helpers import films as films_lib, made_nets
from tests.helpers.embeddings import unit
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import actions, log, media, pipeline, results, review
from vidjax.apps.video.log import Line
from vidjax.apps.video.media import FEATURES, PEOPLE, FaceTrack, FileStamp, MediaFile
from vidjax.data.clip_files import write_npz

WIDTH = 128
TOKEN, SITE = "t" * 22, "http://127.0.0.1:8123"  # of the page of corrections
NAMES = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lou")
SHOT_SECONDS = 4.0
BOX = (0.25, 0.15, 0.75, 0.9)  # of each face
PICTURE = films_lib.photo(films_lib.scene(0, 56, 56), "png")  # of each face
MIXTURE = (0.8, 0.6)  # of the person whom a face in a wrong group looks like, and of its own person


def name_person(person: int) -> str:
    """Returns the name of a person, such as `Ada` or `Ada 2`, without names that look alike."""
    return NAMES[person % len(NAMES)] + f" {person // len(NAMES) + 1}" * (person >= len(NAMES))


def make(folder, *, people: int, films: int, known: int, faces: int, wrong=0.0, seed=0):
    """Writes the results of `films` films; returns where they are, and clip -> true person.

    `known` of the `people` are enrolled by a photo. A film has `faces` faces. A share `wrong` of
    them look like another person. The films are empty files.
    """
    rng, out = np.random.default_rng(seed), folder / "out"
    (models := folder / "models").mkdir(parents=True)
    cosines = made_nets.back_end(same=(0.94, 0.02), different=(0.0, 0.09), width=WIDTH)
    weights = rng.normal(size=(made_nets.SIDE**2 * 3, WIDTH)).astype(np.float32)
    made_nets.write(models, "find", "face_detector")
    net = made_nets.embedder(weights=weights)
    made_nets.write(models, "embed", back_end=cosines, width=WIDTH, content=net)
    out.mkdir()
    Gallery.of_models(out / "gallery", models, results.COMMAND)
    digests, features, photos = pipeline.read_digests(models), out / FEATURES, out / PEOPLE
    settings = media.ExtractionSettings()
    extraction = media.Extraction(models=digests, settings=settings)
    for place in (features, photos):
        (place / media.VIDEOS).mkdir(parents=True)
        media.write(place / media.NAME, extraction)
    centres = unit(rng.normal(size=(people, WIDTH)))

    def look(person, like=None):
        """Returns a vector of a face, which is more similar to the person `like` if it is given."""
        centre = centres[person] if like is None else centres[[like, person]].T @ MIXTURE
        return unit(centre + 0.25 / WIDTH**0.5 * rng.normal(size=WIDTH)).astype(np.float32)

    lines = list[Line]()
    for person in range(known):
        name, sha256, key = name_person(person), f"{person:064x}"[::-1], log.make_key()
        (path := folder / "friends" / name / "1.jpg").parent.mkdir(parents=True)
        path.write_bytes(sha256.encode())
        track = FaceTrack(
            clip=sha256[:16], shot=0, start_s=0, end_s=0, seen=1, quality=0.9, box=BOX, box_at_s=0
        )
        photo = MediaFile(
            video=path.name, source=FileStamp.of(path), sha256=sha256, photo=True, seconds=0,
            tracks=[track], frames=1, shots=[(0, 0)],
        )  # fmt: skip
        arrays = {track.clip: {"face": look(person)[None], "face_quality": np.ones(1, np.float32)}}
        write_npz(photos / f"{track.clip}.npz", arrays, {"face": digests["face_embedder"]})
        media.write(photos / media.VIDEOS / f"{track.clip}.json", photo)
        lines.append(Line(says="person", person=key, name=name))
        lines.append(log.about(photo.faces[track.clip], "photo", person=key, name=name))
    log.append(out, lines)
    truth = dict[str, str]()
    turn = itertools.cycle(rng.permutation(people).tolist())
    for number in range(films):
        stem, tracks, arrays = f"film_{number:03}", [], {}
        for face in range(faces):
            person, clip = next(turn), f"{stem}.s{face:03}.t00"
            truth[clip] = name_person(person)
            like = int(rng.integers(people)) if rng.random() < wrong else None
            quality = float(rng.uniform(0.3, 0.9))
            vectors = np.stack([look(person, like) for _ in range(3)])
            arrays[clip] = {"face": vectors, "face_quality": np.full(3, quality, np.float32)}
            begin, box = face * SHOT_SECONDS, BOX
            tracks.append(FaceTrack(
                clip=clip, shot=face, start_s=begin, end_s=begin + 3.8, seen=10, quality=quality,
                box=box, box_at_s=begin + 2, places=[(begin + 2, box)],
            ))  # fmt: skip
            thumbnail = media.locate_thumbnail(features, clip)
            thumbnail.parent.mkdir(parents=True, exist_ok=True)
            thumbnail.write_bytes(PICTURE)
        path = folder / "films" / f"{stem}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        write_npz(features / f"{stem}.npz", arrays, {"face": digests["face_embedder"]})
        film = MediaFile(
            video=path.name, source=FileStamp.of(path), sha256=f"{number:064x}", photo=False,
            seconds=faces * SHOT_SECONDS, tracks=tracks, frames=faces * 20, rate=25.0,
            shots=[(x.start_s, x.start_s + SHOT_SECONDS) for x in tracks],
        )  # fmt: skip
        media.write(features / media.VIDEOS / f"{stem}.json", film)
    return SimpleNamespace(out=out, truth=truth, models=models)


def open_client(page):
    """Returns a client of the page of corrections."""
    from starlette import testclient  # needs httpx

    headers = {"origin": SITE, "sec-fetch-site": "same-origin"}
    app = review.make_app(page, TOKEN)
    return testclient.TestClient(app, base_url=f"{SITE}/{TOKEN}/", headers=headers)


def decide(out):
    """Returns the decision on a folder of results."""
    return actions.Review(out)._decision


def list_names(out, decision=None):
    """Returns clip -> name, or None for an ignored clip, of results, or of a decision on them."""
    appearances = (decision or decide(out)).appearances
    return {clip: x.identity for x in appearances for clip in x.clips}
