"""Search of faces: most frames are searched only where earlier or later frames show people."""

import numpy as np
import pytest

pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import drawn_people, made_nets
from vidjax.apps.video import cards, nets
from vidjax.apps.video.search import FilmSearch

ROOM = 64  # a picture is divided into squares with this side, and a person moves in a square


class CountingDetector(nets.Detector):
    """A detector that counts the pictures that it searches as a whole."""

    whole = 0

    def search(self, image, near=None):
        self.whole += near is None
        return super().search(image, near)


def draw_shot(rng, frames, slow):
    """Returns pictures of people.

    If `slow`, people move slowly and are visible for five frames or more. If not, each person is
    in all pictures, at random places.
    """
    faces = [[] for _ in range(frames)]  # of each picture
    for room in rng.choice(12, rng.integers(1, 7), replace=False):  # 1 to 6 of 3 x 4 rooms
        begin = rng.integers(0, max(1, frames - 4)) if slow else 0
        end = rng.integers(min(begin + 5, frames), frames + 1) if slow else frames
        place, step = rng.uniform(8, 40, 2), rng.uniform(-3, 3, 2)
        for number in range(begin, end):
            place = np.clip(place + step, 4, 44) if slow else rng.uniform(4, 44, 2)
            left, top = place.astype(int)
            faces[number].append(("Ada", left + room % 4 * ROOM, top + room // 4 * ROOM))
    return [drawn_people.picture(squares, size=(3 * ROOM, 4 * ROOM)) for squares in faces]


@pytest.mark.parametrize(("slow", "step_s"), [
    pytest.param(True, 0.2, id="people move slowly"),
    pytest.param(False, 0.2, id="people jump as in a fast pan"),
    pytest.param(False, 1.0, id="slides of a second"),
])  # fmt: skip
def test_people_who_are_visible_for_a_second_are_found_in_all_frames(tmp_path, slow, step_s):
    made_nets.write(tmp_path, "find", "face_detector")
    detector = CountingDetector(cards.load(tmp_path)["face_detector"])
    search, rng = FilmSearch({"face": detector}), np.random.default_rng(0)
    wanted = []  # the boxes of the faces of each picture
    searched = []  # the pictures that `search` returns
    for length in (1, 2, 4, 6, 30, 40):
        for rgb in draw_shot(rng, length, slow):
            number = len(wanted)
            searched += search.add(number, number * step_s, rgb)
            wanted.append(sorted(detector(rgb).boxes.tolist()))  # searches the whole picture
        searched += search.end_shot()

    assert [x.number for x in searched] == [*range(len(wanted))]
    assert [sorted(x.detections["face"].boxes.tolist()) for x in searched] == wanted
    assert sum(map(len, wanted)) > len(wanted)  # more than one face per picture, on average
    if slow:  # `search` searches fewer than 60 % of the pictures as a whole
        searched_by_test = len(wanted)
        assert detector.whole - searched_by_test < 0.6 * len(wanted)
