"""The page that shows who appears when: times, probabilities, order, links, and escaped names."""

import base64
import hashlib
import re
from unittest import mock

from tests.helpers.made_appearances import appearance, film
from vidjax.apps.gallery.answers import Answer
from vidjax.apps.video import names_page


def render(appearances, answers=None, people=("Ada", "Bob"), photo=False):
    """Returns the page of a film of 100 s, or of a photo, with these appearances of people."""

    def address(film, seconds):
        return "../a%20film.mp4" + ("" if film.photo else f"#t={seconds:.1f}")

    films, pictures = [film(photo=photo)], {name: [] for name in people}
    data = appearances, films, pictures, "{}.png".format, answers or {}, address
    return names_page.render(names_page.PageData(*data))


def text_of(html):
    """Returns the text that a page shows."""
    body = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split()).replace(" ,", ",")


def test_page_shows_times_probabilities_and_links_as_text():
    html = render([appearance(12.34, 75.0, probability=0.97)])
    assert "Ada in all 1:03 0:12\u20131:15 97 %" in text_of(html)
    assert html.count('href="../a%20film.mp4#t=12.3"') == 2  # below the bar, and in Ada's table
    assert "Bob This person is in no film." in text_of(html)
    html = render([appearance(12.34, 75.0, probability=0.995)])
    assert "0:12\u20131:15 over 99 %" in text_of(html)
    html = render([appearance(0, 0, probability=0.9)], photo=True)
    assert "in the photo 90 %" in text_of(html) and "#t=" not in html


def test_page_compares_each_name_with_few_others():
    compare = mock.Mock(side_effect=str.__eq__)  # counts the comparisons of `counted` names
    counted = type(
        "Name", (str,), {"__hash__": str.__hash__, "__eq__": lambda *both: compare(*both)}
    )
    people, unknown = ([counted(f"{kind}{n}") for n in range(200)] for kind in ("Ada ", "unknown "))
    rows = [appearance(n, n, name, clip=f"c{n}") for n, name in enumerate(people + unknown)]
    render(rows, people=people)
    assert 0 < compare.call_count < 20 * len(rows)  # far below 400 * 400


def test_doubtful_names_are_listed_first_with_other_candidates():
    """The doubt is 30 % for Ada and 45 % for unknown 2. It is small for Bob and unknown 1."""
    bob = appearance(2, 3, "Bob", 0.95, clip="b")
    appearances = [
        bob, appearance(0, 1, probability=0.7, clip="a"),
        appearance(4, 5, "unknown 2", None, clip="c"),
        appearance(6, 7, "unknown 1", None, clip="d"),
    ]  # fmt: skip
    best = {  # clip -> the most likely people; people below 10 % are not shown
        "a": (("Ada", 0.7), ("Bob", 0.2), ("Eve", 0.05)), "b": (("Bob", 0.95), ("Ada", 0.04)),
        "c": (("Ada", 0.45), ("Bob", 0.1)), "d": (("Ada", 0.02),),
    }  # fmt: skip
    answers = {clip: Answer(None, found[0][1], 0.0, found) for clip, found in best.items()}
    words = text_of(render(appearances, answers))
    doubtful = words[words.index("other likely people") : words.index("a.mp4 Length 1:40")]
    assert doubtful == (
        "other likely people unknown 2 a.mp4 0:04\u20130:05 Ada 45 %, Bob 10 % "
        "Ada a.mp4 0:00\u20130:01 70 % Bob 20 % "
    )
    people = words[words.rindex("People") :]
    places = [people.index(name) for name in ("Ada", "Bob", "unknown 1", "unknown 2")]
    assert places == sorted(places), "the list of people is in this order"
    assert "Doubtful" not in render([bob], answers)


def test_unclear_faces_are_listed_after_unknown_people():
    names = {"unknown face 1": "a", "unknown 3": "b", "unknown face 12": "c", "unknown 2": "d"}
    html = render([appearance(0, 1, name, None, clip=clip) for name, clip in names.items()])
    film, people = html.split('id="people"')
    assert film.count("<details>") == film.count("</details>") == 1
    assert "unknown 3" not in film[film.index("<details>") :]
    words = text_of(people)
    order = ("unknown 2", "unknown 3", "Unclear faces", "unknown face 1", "unknown face 12")
    assert [*sorted(order, key=words.index)] == [*order]


def test_page_allows_only_its_script_and_escapes_names():
    name = '"><script>alert(1)</script>'
    html = render([appearance(0, 1, name)], people=[name])
    (script,) = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html and "alert" not in script


def test_search_finds_texts_that_contain_most_of_the_words():
    films = {"1": "Zo\u00eb Joe summer.mp4", "2": "Joe winter.mp4", "3": "Ann.mp4"}
    for words, found in {
        "": "123", "zoe": "1", "JOE": "12", "zoe joe": "1", "joe zo\u00eb winter": "12",
        "ann joe": "123", "bob": "", "bob ann": "3",
    }.items():  # fmt: skip
        assert "".join(names_page.find(words, films)) == found, words


def test_faces_of_a_person_begin_with_the_clearest_face():
    clarity = {"a": 0.2, "b": 0.9, "c": 0.5}
    a_film = film(a=(0, 1), b=(2, 3), c=(4, 5))
    for track in a_film.tracks:
        track.clarity = clarity[track.clip]
    x = appearance(0, 5, "unknown 1", None)._replace(clips=("a", "b", "c"))
    address = lambda film, seconds: f"play/0?t={seconds:.1f}"  # noqa: E731
    html = names_page.render(names_page.PageData(
        [x], [a_film], {}, "{}.png".format, {}, address, names_page.Forms(person="unknown 1"),
        twins={"c": "Ada"},
    ))  # fmt: skip
    assert re.findall('href="frame/(.)"', html) == ["b", "c", "a"]
    assert re.findall(r"t=(\d)", html) == ["2", "4", "0"], "each face has its own time"
    assert text_of(html).count("unclear") == 1
    assert text_of(html).count("Another face at this time is Ada .") == 1
