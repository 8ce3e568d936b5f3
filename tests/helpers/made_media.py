"""Made-up films and photos: small JSON files that say which people they show. No net reads them.

    {"title": "a", "picture": 7, "faces": [{"person": 3, "seed": 11}, ...]}

Two files with the same `picture` show the same, whatever their titles are. Face N of a film is seen
from 10 N to 10 N + 3 seconds. The faces of a photo are side by side. The vectors of a person have a
cosine of about 0.8, and the vectors of two people about 0.
"""

import json
from pathlib import Path

import numpy as np

from tests.helpers import made_nets
from tests.helpers.embeddings import unit
from vidjax.apps import cards
from vidjax.apps.video import digests, film, pipeline
from vidjax.apps.video.media import Content, FaceTrack, MediaFile, make_printable
from vidjax.data.clip_files import write_npz
from vidjax.utils import files

WIDTH = 128
PICTURES = dict[str, int]()  # digest of each file that was read -> its number `picture`
NOISE = 0.5  # the length of what a face adds to the vector of its person
SECONDS, GAP_SECONDS = 3.0, 10.0  # how long a face is seen, and from the start of one to the next


def write(path, picture, faces, title=""):
    """Writes a film or photo. `faces` are pairs (person, seed), and `picture` is a number."""
    found = [{"person": person, "seed": seed} for person, seed in faces]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"title": title, "picture": picture, "faces": found}))


def write_models(folder):
    """Writes nets, which no test runs, and their measured cards into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    cosines = made_nets.back_end(same=(0.8, 0.05), different=(0.0, 0.09), width=WIDTH)
    weights = np.ones((made_nets.SIDE**2 * 3, WIDTH), np.float32)
    made_nets.write(folder, "find", "face_detector")
    net = made_nets.embedder(weights=weights)
    made_nets.write(folder, "embed", back_end=cosines, width=WIDTH, content=net)
    return folder


def make_vector(person, seed):
    """Returns the vector of a face, [128] float32."""
    centre, own = (unit(np.random.default_rng(x).normal(size=WIDTH)) for x in (person, (1, seed)))
    return unit(centre + NOISE * own).astype(np.float32)


def make_tracks(stem, photo, faces):
    """Returns the clips of a film or photo as `FaceTrack`, in the order of `faces`."""
    tracks = []
    for number in range(len(faces)):
        clip = f"{stem}.s{number:03}.t00"
        if photo:
            clip = stem if len(faces) == 1 else f"{stem}.f{number + 1:02}"
        begin = 0.0 if photo else GAP_SECONDS * number
        left = round(number / len(faces), 3)
        box = (left, 0.2, round(left + 0.8 / len(faces), 3), 0.8)
        tracks.append(FaceTrack(
            clip=clip, shot=0 if photo else number, start_s=begin, quality=0.9, box=box,
            end_s=begin if photo else begin + SECONDS, seen=1 if photo else 10, box_at_s=begin,
            places=[(begin, box)],
        ))  # fmt: skip
    return tracks


def digest(path):
    """Returns the digest of what a made-up film or photo shows: of everything but its title."""
    content = json.loads(Path(path).read_bytes())
    sha256 = files.sha256_json([content["picture"], content["faces"]])
    PICTURES[sha256] = content["picture"]
    return sha256


def read(task, digests):
    """Reads a file as `film.work` does: writes its features, and returns its description."""
    path, photo = Path(task.path), task.path.endswith(".jpg")
    sha256, faces = digest(path), json.loads(path.read_bytes())["faces"]
    content = Content(sha256=sha256)
    if content in task.current:
        return film.Answer(content=content, film=None)
    stem = film.choose_stem(task, sha256)
    tracks = make_tracks(stem, photo, faces)
    arrays = {
        track.clip: {
            "face": make_vector(x["person"], x["seed"])[None],
            "face_quality": np.full(1, 0.9, np.float32),
        }
        for track, x in zip(tracks, faces, strict=True)
    }
    write_npz(Path(task.out) / f"{stem}.npz", arrays, digests)
    seconds = 0.0 if photo else GAP_SECONDS * len(faces)
    return film.Answer(content=content, film=MediaFile(
        video=make_printable(path.name), source=task.source, sha256=sha256, photo=photo,
        seconds=seconds, tracks=tracks, frames=1 if photo else int(25 * seconds),
        shots=[] if photo else [(x.start_s, x.start_s + GAP_SECONDS) for x in tracks],
        rate=None if photo else 25.0,
    ))  # fmt: skip


def read_here(patch):
    """Makes `vidjax who` read made-up films and photos, in this process and without nets."""

    def read_all(_, pending):
        answers = list[film.Answer]()
        for job, task in pending.items():
            embedders = cards.list_embedders(cards.read_all(job.models))
            answers.append(read(task, {part: card.digest for part, card in embedders.items()}))
        return answers

    patch.setattr(pipeline, "_read", read_all)
    patch.setattr(digests, "digest_photo", lambda path: digest(path) if is_photo(path) else None)


def is_photo(path):
    return str(path).endswith(".jpg")
