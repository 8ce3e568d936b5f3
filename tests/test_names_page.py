"""The page that shows who appears when: times, probabilities, order, links, and escaped names."""

import base64
import hashlib
import re
from unittest import mock

import pytest

from tests.helpers.made_appearances import appearance, film
from vidjax.apps.gallery.answers import Answer
from vidjax.apps.video import names_page


def render(appearances, answers=None, people=("Ada", "Bob"), films=None, **more):
    """Returns the page of a film of 100 s, or of `films`, with these appearances of people."""

    def address(film, seconds):
        return "../a%20film.mp4" + ("" if film.photo else f"#t={seconds:.1f}")

    pictures = dict[str, list[names_page.Picture]]()
    for name in people:
        pictures[name] = [(f"{name[0].lower()}.png", name, "", "")] if answers else []
    data = appearances, films or [film()], pictures, "{}.png".format, answers or {}, address
    return names_page.render(names_page.PageData(*data, **more))


def text_of(html):
    """Returns the text that a page shows."""
    body = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.DOTALL)
    return re.sub("[ \n]+", " ", re.sub(r"<[^>]+>", " ", body)).replace(" ,", ",")


def test_page_shows_times_probabilities_and_links_as_text():
    html = render([appearance(12.34, 75.0, probability=0.97)], embed="data:{}".format)
    assert "Ada in all 1:03 0:12\u20131:15 97\u00a0%" in text_of(html)
    # The bar of the timeline, the times of the film, and Ada's table.
    assert html.count('href="../a%20film.mp4#t=12.3"') == 3 and 'src="data:' in html
    assert html.count('<bdi dir="ltr">a.mp4</bdi>') >= 2 and "<bdi>a.mp4" not in html
    assert "Bob This person is in no film." in text_of(html)
    html = render([appearance(12.34, 75.0, probability=0.995)])
    assert "0:12\u20131:15 over 99\u00a0%" in text_of(html)
    html = render([appearance(12.34, 75.0, probability=0.3)])
    assert "0:12\u20131:15? 30\u00a0%" in text_of(html) and "<bdi>Ada?</bdi>" in html
    html = render([appearance(0, 0, probability=0.9)], films=[film(photo=True)])
    assert "in the photo 90\u00a0%" in text_of(html) and "#t=" not in html


def test_page_compares_each_name_with_few_others():
    compare = mock.Mock(side_effect=str.__eq__)  # counts the comparisons of `counted` names
    counted = type(
        "Name", (str,), {"__hash__": str.__hash__, "__eq__": lambda *both: compare(*both)}
    )
    people, unknown = ([counted(f"{kind}{n}") for n in range(200)] for kind in ("Ada ", "unknown "))
    rows = [appearance(n, n, name, clip=f"c{n}") for n, name in enumerate(people + unknown)]
    render(rows, people=people)
    assert 0 < compare.call_count < 20 * len(rows)  # far below 400 * 400


def test_doubtful_names_are_listed_next_to_the_people_whom_the_faces_may_show():
    """The doubt is 30 % for Ada and 45 % for unknown 2. It is small for Bob and unknown 1."""
    best = {  # clip -> the most likely people; people below 10 % are not shown
        "a": (("Ada", 0.7), ("Bob", 0.2), ("Eve", 0.05)), "b": (("Bob", 0.95), ("Ada", 0.04)),
        "c": (("Ada", 0.45), ("Bob", 0.1)), "d": (("Ada", 0.02),),
    }  # fmt: skip
    names = {"a": ("Ada", 0.7), "b": ("Bob", 0.95), "c": ("unknown 2", None)}
    names["d"] = ("unknown 1", None)
    rows = [appearance(2 * n, 2 * n + 1, *names[x], clip=x) for n, x in enumerate("bacd")]
    answers = {clip: Answer(None, found[0][1], 0.0, found) for clip, found in best.items()}
    html = render(rows, answers)
    doubtful = html[html.index("<h2>Doubtful") : html.index("<h2>Films")]
    shown = re.findall('src="([a-z])|<bdi class="name"[^>]*>(.+?)<|([0-9]+)\u00a0%', doubtful)
    assert [*map("".join, shown)] == [
        "c", "a", "Ada", "45", "b", "Bob", "10", "unknown 2",
        "a", "a", "Ada", "70", "b", "Bob", "20", "Ada",
    ], "a face, then the likely people, each with a picture"  # fmt: skip
    people = text_of(html)
    people = people[people.rindex("Times of each person") :]
    places = [people.index(name) for name in ("Ada", "Bob", "unknown 1", "unknown 2")]
    assert places == sorted(places), "the list of people is in this order"
    assert "Doubtful" not in render(rows[:1], answers)


def test_unclear_faces_are_listed_after_unknown_people():
    names = {"unknown face 1": "a", "unknown 3": "b", "unknown face 12": "c", "unknown 2": "d"}
    html = render([appearance(0, 1, name, None, clip=clip) for name, clip in names.items()])
    people, film = html[html.index('id="people"') : html.index('id="times"')].split('id="films"')
    assert film.count("<details>") == film.count("</details>") == 2
    assert "unknown 3" not in film[film.rindex("<details>") :]
    words = text_of(people)
    order = ("unknown 2", "unknown 3", "Unclear faces", "unknown face 1", "unknown face 12")
    assert [*sorted(order, key=words.index)] == [*order]


def test_page_allows_only_its_script_and_escapes_names():
    name = '"><script>alert(1)</script>'
    html = render([appearance(0, 1, name)], people=[name])
    (script,) = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:; script-src"
    assert f"{policy} 'sha256-{digest}'" in html and "alert" not in script


def test_search_finds_texts_that_contain_most_of_the_words():
    films = {"1": "Zo\u00eb Joe summer.mp4", "2": "Joe winter.mp4", "3": "Ann.mp4"}
    for words, found in {
        "": "123", "zoe": "1", "JOE": "12", "zoe joe": "1", "joe zo\u00eb winter": "12",
        "ann joe": "123", "bob": "", "bob ann": "3",
    }.items():  # fmt: skip
        assert "".join(names_page.find(words, films)) == found, words


def test_faces_of_a_person_begin_with_the_clearest_face():
    films = [film(a=(0, 1), b=(2, 3), c=(4, 5))]
    for track, clarity in zip(films[0].tracks, (0.2, 0.9, 0.5), strict=True):
        track.clarity = clarity
    x = appearance(0, 5, "unknown 1", None)._replace(clips=("a", "b", "c"))
    forms, twins = names_page.Forms(person="unknown 1"), {"c": "Ada"}
    html = render([x], people=(), films=films, forms=forms, twins=twins)
    assert re.findall('href="frame/(.)"', html) == ["b", "c", "a"]
    assert re.findall(r"#t=(\d)", html) == ["2", "4", "0"], "each face has its own time"
    assert text_of(html).count("unclear") == 1
    assert text_of(html).count("Is this Ada in a mirror") == 1


@pytest.mark.parametrize("at", ["unknown 1", names_page.CLIP + "c", names_page.CLIP + "gone"])
def test_a_field_has_the_focus_after_the_last_doubtful_name_was_confirmed(at):
    """The doubtful face c is the only one that is left."""
    x = [appearance(0, 1, "unknown 1", None, clip="c")]
    answers = {"c": Answer(None, 0.45, 0.0, (("Ada", 0.45),))}
    page = render(x, answers, forms=names_page.Forms(message="Saved.", at=at))
    before = page[: page.index("autofocus")]
    focus = at.replace("gone", "c")
    assert f'name="of" value="{focus}"' in before[before.rindex("<form") :]


def test_unknown_people_come_after_known_people_and_the_most_frequent_comes_first():
    rows = [appearance(n, n, f"unknown {n % 3}", None, clip=f"c{n}") for n in (0, 1, 2, 5, 8, 4)]
    html = render([*rows, appearance(9, 9)])
    order = re.findall('class="cover".*?class="name" title="([^"]+)', html)
    assert order == ["Ada", "Bob", "unknown 2", "unknown 1", "unknown 0"]


def test_no_two_bars_of_a_timeline_overlap():
    rows = [appearance(a, b, "Ada", 0.97, clip=f"c{a}") for a, b in ((0, 50), (20, 30), (30.5, 80))]
    html = render([*rows, appearance(90, 90.1), appearance(91, 91)])
    assert re.findall("--row:([0-9])", html) == ["0", "1", "1", "0", "1"]
    assert "--rows:2" in html
    for row in rows:  # a focused bar shows the face, the name and the time
        assert re.search(rf'class="bar.*?src="{row.clips[0]}.png".*?<b><bdi>Ada', html)
