"""The folder of results of made-up films and photos, as a user changes it: `vidjax who`, the page.

This is all that the model test of `tests.test_pairs` knows of vidjax.
"""

import json
import re
import shutil
from typing import Any

from tests.helpers import made_media
from vidjax.apps import forget
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import actions, who
from vidjax.apps.video.names_page import CLIP

LOG = "said.jsonl"
USERS = ("features", "people", "gallery")  # they contain paths of the user's own photos


class Home:
    """`films` and `people` are the user's folders, `away` is a drive, and `out` has the results.

    A face is a pair (picture, number of the face).
    """

    def __init__(self, folder, models):
        self.films, self.people, self.away, self.out = (
            folder / name for name in ("films", "friends", "drive", "out")
        )
        self._models, self._start = models, folder / "start"
        self.away.mkdir()
        self.page: Any = None
        self.notes = list[str]()

    def who(self, people=True, forget_missing=False):
        """Calls `vidjax who`, and shows its results on the page. `notes` are its messages."""
        self.notes.clear()
        who.name_people(
            self.films, self.people if people else None, self.out, self._models,
            forget_missing=forget_missing, tell=lambda note: self.notes.append(note.text),
        )  # fmt: skip
        if self.page:
            self.page.refresh()

    def open(self):
        """Opens the page of corrections, or opens it again."""
        self.page = actions.Review(self.out)

    def key(self, face):
        """Returns the key of a face on the page."""
        return CLIP + self._clips()[face][0]

    def change(self, action, of, name=""):
        self.page.change(action, of, name)

    def undo(self):
        self.page.undo()

    def forget(self, name):
        """Forgets a person with the button of the page."""
        self.page.forget(name)

    def forget_elsewhere(self, name):
        """Forgets a person with the command `vidjax forget --delete`."""
        forget.forget([name], (), [self.out], delete=True)
        self.page.refresh()

    def save(self):
        self.page.save()

    def _clips(self):
        clips = dict[tuple[int, int], list[str]]()
        for film in self.page._decision.films:
            for number, track in enumerate(film.tracks):
                face = made_media.PICTURES[film.sha256], number
                clips.setdefault(face, []).append(track.clip)
        return clips

    def shown(self):
        """Returns face -> the labels of its clips on the page: names, `unknown 3` or None."""
        label = {clip: x.identity for x in self.page._decision.appearances for clip in x.clips}
        found = ((face, {label[x] for x in of if x in label}) for face, of in self._clips().items())
        return {face: labels for face, labels in found if labels}

    def known(self):
        """Returns the names that a user can choose on the page."""
        return {*self.page._decision.people}

    def rows(self):
        """Returns the rows of `names.jsonl`."""
        return [json.loads(x) for x in (self.out / "names.jsonl").read_text().splitlines()]

    def written(self):
        """Returns the names of people in the table, in the subtitles, and in the gallery."""
        table = [x.split("\t") for x in (self.out / "names.tsv").read_text().splitlines()]
        column = table[0].index("identity")
        lines = (
            line for path in self.out.glob("subtitles/**/*.srt")
            for line in path.read_text().splitlines()
            if line and not line.isdigit() and " --> " not in line
        )  # fmt: skip
        names = {x[column] for x in table[1:]} - {"ignored"}, {*lines}
        return *names, {*Gallery(self.out / "gallery").identities}

    def labels(self):
        """Returns clip -> label, in `names.jsonl` and on the page."""
        shown = self.page._decision.appearances
        return (
            {clip: x["identity"] for x in self.rows() for clip in x["clips"]},
            {clip: x.identity for x in shown for clip in x.clips},
        )

    def search(self, names, log_names, own):
        """Yields (file, name) if a file of the results contains one of the names.

        The log may contain `names`, but not `log_names`. Names of the user's folders in `own` may
        be in files with paths of photos.
        """
        for path in sorted(x for x in self.out.rglob("*") if x.is_file()):
            place = path.relative_to(self.out)
            asked = log_names if place.name == LOG else names
            if place.name == LOG or place.parts[0] in USERS:
                asked = asked - own
            content = path.read_bytes() + str(place).encode()
            for name in asked:
                word = max(re.findall("[A-Za-z]+", name), key=len)
                if word.encode() in content:
                    yield str(place), name

    def keep(self):
        """Keeps a copy of everything for `restore`."""
        for place in self._places():
            shutil.copytree(place, self._start / place.name)

    def restore(self):
        """Makes everything as it was when `keep` was called."""
        for place in self._places():
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self._start / place.name, place)

    def _places(self):
        return self.films, self.people, self.away, self.out
