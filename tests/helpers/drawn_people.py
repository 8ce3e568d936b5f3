"""Films and photos of drawn people, and nets that identify them by the colours of their faces."""

import itertools
import json
import shutil
from collections import namedtuple
from unittest import mock

import numpy as np

from tests.helpers import clip_files, films, made_nets, xmp
from vidjax.apps.video import digests, film, media

SIDE = made_nets.FACE
# A net that distinguishes people by the colours of their faces.
EMBED = {"content": made_nets.embedder(weights=made_nets.colours()), "input": {"mean": [170.0] * 3}}
GROUP = ("Ada", 20, 20), ("Bob", 70, 40)  # names, and where the faces are: left, top
PARTIES: dict[str, bytes] = {}  # ending of a name -> the film of `write_party`
COLOURS = {"Ada": (255, 255, 90), "Bob": (255, 90, 255), "Eve": (90, 255, 255)}


def picture(faces, brightness=20, size=(96, 128)):
    """Returns a dark, striped picture with a coloured square for each face (name, left, top)."""
    drawn = np.full((*size, 3), 20, np.uint8)
    drawn[:: 5 + brightness % 7] = brightness
    for name, left, top in faces:
        drawn[top : top + SIDE, left : left + SIDE] = COLOURS[name]
    return drawn


def tags(*faces, size=(96, 128)):
    """Returns metadata (XMP) that name each drawn face (name, left, top)."""
    places = [(name, left + SIDE / 2, top + SIDE / 2, SIDE, SIDE) for name, left, top in faces]
    scale = np.array((size[1], size[0]) * 2)
    parts = [(name, *(np.array(place) / scale).tolist()) for name, *place in places]
    return xmp.packet(xmp.attributes(parts, shape=size[::-1]))


def write_photo(path, *faces, dim=False, tagged=()):
    """Writes a photo of faces; `tagged` faces are in its metadata. `dim` lowers the contrast."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = picture(faces)
    if dim:
        around = np.array(COLOURS[faces[0][0]]) // 3 * 2 * 0.9
        rgb = np.where(rgb.max(-1, keepdims=True) < 21, around, rgb // 3 * 2).astype(np.uint8)
    path.write_bytes(films.photo(rgb, "png") + (tags(*tagged) if tagged else b""))


def write_portraits(folder, photos=3):
    """Writes `photos` of each of six people, P0 to P5, whose colours differ a little."""
    rng = np.random.default_rng(0)
    for person, colour in enumerate(itertools.permutations((250, 200, 150))):
        for photo, change in enumerate(rng.normal(size=(photos, 3)) * 10):
            shade = np.array(colour) + change - change.mean()  # as bright as all other faces
            with mock.patch.dict(COLOURS, {"x": tuple(shade.clip(0, 255).astype(int))}):
                write_photo(folder / f"P{person}/{photo}.png", ("x", 40, 40))


def write_film(path, *shots, fps=10, codec=None, size=(96, 128), **options):
    """Writes a film of shots (seconds, brightness, faces). A .mkv file keeps the exact pixels.

    A face is (name, left, top). Faces move to the right by a pixel every two pictures.
    """
    pictures = (
        picture([(name, left + number // 2, top) for name, left, top in faces], brightness, size)
        for seconds, brightness, faces in shots
        for number in range(round(seconds * fps))
    )
    codec = codec or ("ffv1" if path.suffix == ".mkv" else "mpeg4")
    films.write(path, pictures, codec, fps, **options)


def tone(hertz, seconds):
    """Returns a tone, sampled at 16 kHz, which the nets of `write_voices` take for speech."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * 16_000)) / 16_000)


def write_models(folder):
    """Writes nets that find and identify drawn faces into a folder; returns the folder."""
    folder.mkdir(exist_ok=True)
    made_nets.write(folder, "find", "face_detector")
    made_nets.write(folder, "embed", back_end=made_nets.back_end(different=(-0.4, 0.2)), **EMBED)
    return folder


def write_voices(folder):
    """Writes nets that take loud sound for speech, and a tone for a voice; returns the folder."""
    made_nets.write(folder, "speech", "voice_activity", made_nets.loudness())
    tones = made_nets.back_end(same=(0.95, 0.02), different=(-0.1, 0.3))
    made_nets.write(folder, "voice", "voice_embedder", back_end=tones)
    return folder


def write_party(path):
    """Writes a film of three shots (0, 1 and 3 s) with four faces; returns its path."""
    if path.suffix in PARTIES:
        path.write_bytes(PARTIES[path.suffix])
        return path
    last = (1, 35, [("Bob", 10, 60), ("Ada", 90, 20)])
    write_film(path, (1, 20, [("Ada", 20, 30)]), (2, 60, [("Eve", 80, 50)]), last)
    PARTIES[path.suffix] = path.read_bytes()
    return path


def extract(path, out, models, **settings):
    """Extracts a film or photo into `out`; returns its description, and clip -> name -> array."""
    settings = media.ExtractionSettings(**settings)
    out.mkdir(exist_ok=True)
    task = film.Task(
        models=str(models), settings=settings, path=str(path), out=str(out), stem=path.stem,
        source=media.FileStamp.of(path), sha256=digests.digest_photo(path) or "",
    )  # fmt: skip
    nets = film.load_nets.__wrapped__(task.models, settings.size)
    return film.extract(task, *film.identify(task), nets), clip_files.read_arrays(out)


def restore(folder, make):
    """Returns a folder inside `folder` as `make(it)` has left it, for tests that change the folder.

    The first call calls `make`, and copies the folder. Later calls replace it by the copy.
    """
    now, copy = folder / "now", folder / "copy"
    shutil.rmtree(now, ignore_errors=True)
    if not copy.exists():
        now.mkdir()
        make(now)
        now.rename(copy)
    return shutil.copytree(copy, now)


# What a command with --json has printed: the JSON on stdout, and the messages on stderr.
Done = namedtuple("Done", "content output")


class Drawn:
    """Drawn films and photos in a folder, and commands that run on them in this process.

    `models` is a folder with nets, `friends` with photos, and `out` with results of `vidjax who`.
    """

    def __init__(self, folder, command):
        self.folder, self._command = folder, command
        self.models = folder / "models"
        if not self.models.exists():
            write_models(self.models)
        self.friends, self.out = folder / "friends", folder / "out"

    def film(self):
        return write_party(self.folder / "party.mkv")

    def group(self):
        """Writes a photo of Ada and Bob, which is read faster than a film; returns its path."""
        write_photo(self.folder / "group.png", *GROUP)
        return self.folder / "group.png"

    def befriend(self, *names):
        """Writes a photo of each person into a folder of the person."""
        for name in names:
            write_photo(self.friends / name / "1.png", (name, 40, 40))

    def run(self, *words, code=0):
        """Runs a command that must end with the exit code `code`."""
        done = self._command(*words, "--json")
        assert done.code == code and (code != 2 or "Traceback" not in done.err), done.err
        return Done(json.loads(done.out) if done.out else {}, done.err)

    def who(self, *films, people=True, flags=(), code=0):
        """Runs `vidjax who`; if `people` is True, with the photos in `friends`."""
        flags = [f"--models={self.models}", f"--out={self.out}", *flags]
        flags += [f"--people={self.friends}"] if people else []
        return self.run("who", *films, *flags, code=code)

    def meet(self, *names, flags=()):
        """Writes photos of people and the film, and runs `vidjax who`; returns the film's path."""
        self.befriend(*names)
        film = self.film()
        self.who(film, flags=flags)
        return film

    def extract(self, *paths, flags=(), code=0):
        flags = [f"--models={self.models}", f"--out={self.out}", *flags]
        return self.run("extract", *paths, *flags, code=code)

    def rows(self):
        """Returns the rows of names.jsonl, one for each appearance of a person."""
        return [json.loads(line) for line in (self.out / "names.jsonl").read_text().splitlines()]

    def names(self):
        """Returns clip -> name of the person, or None if the clip is ignored."""
        return {clip: row["identity"] for row in self.rows() for clip in row["clips"]}

    def gallery(self, command, *words):
        self.run("gallery", command, self.out / "gallery", *words)
