"""`vidjax review`: names are corrected on a page, and the next call keeps the corrections."""

import asyncio
import html
import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("starlette.testclient")
pytest.importorskip("tests.helpers.drawn_people", reason="needs the extra [video]")

from tests.helpers import browser, limits, made_shelf
from tests.helpers.drawn_people import Drawn, restore, write_film, write_photo
from tests.helpers.made_shelf import SITE, TOKEN
from tests.helpers.seen import contents, refused
from vidjax.apps import forget
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import actions, log, names_page, results, review

pytestmark = pytest.mark.usefixtures("read_here")
MORE = (2, 20, [("Eve", 30, 30)]), (2, 60, [("Bob", 60, 30)])  # the shots of more.mkv


class Reviewed:
    """Results of two films of Ada (enrolled), Bob and Eve (unknown), and a client of the page."""

    def __init__(self, drawn):
        self.drawn, self.names = drawn, drawn.names
        self.films = drawn.folder / "party.mkv", drawn.folder / "more.mkv"

    def make(self):
        write_film(self.drawn.film().with_name("more.mkv"), *MORE)
        write_photo(self.drawn.friends / "Ada.png", ("Ada", 40, 40))
        self.names_after_restart()

    def open(self, page=None):
        """Opens the page of the results."""
        out, self.before = self.drawn.out, self.names()
        options = {"padding": 0.25, "search": forget.list_left}
        self.review = page or actions.Review(out, **options)
        self.client = made_shelf.open_client(self.review)
        return self

    def names_after_restart(self):
        """Returns clip -> name after another call of `vidjax who`."""
        self.drawn.who(*self.films, flags=["--thumbnails"])
        return self.names()

    def post(self, action="change", status=200, **fields):
        """Sends a form of the page; returns the text of the answer."""
        fields |= {"do": "undo"} if action == "undo" else {}
        answer = self.client.post("change", data={"version": self.review.version, **fields})
        assert answer.status_code == status, answer.text
        return answer.text


@pytest.fixture
def drawn(place, command):
    return Drawn(restore(place, lambda now: Reviewed(Drawn(now, command)).make()), command)


@pytest.fixture(autouse=True)
def never_idle(monkeypatch):
    monkeypatch.setattr(actions, "IDLE_SECONDS", 0)  # results are written after this time


@pytest.fixture
def reviewed(drawn):
    return Reviewed(drawn).open()


def test_review_needs_neither_prometheus_nor_httptools(python):
    python(
        "import sys\n"
        "sys.modules |= dict.fromkeys(('prometheus_client', 'httptools'))\n"  # an import then fails
        "from vidjax.apps import web\n"
        "from vidjax.apps.video import review\n"
        "app = review.make_app(None, 'token')\n"
        "web.Server(app, web.DEFAULTS, None).config.load()\n"
    )


def test_review_joins_ignores_and_names_people_and_asks_about_similar_names(reviewed, drawn):
    before = reviewed.before
    for words, name in (
        ({"do": "name", "person": "Unknown  1"}, "unknown 1"),  # the same name as unknown 1
        ({"do": "ignore", "person": "ada"}, None),  # a person without a name and a number
    ):
        reviewed.post(of="unknown 2", **words)
        changed = {clip: name if x == "unknown 2" else x for clip, x in before.items()}
        assert reviewed.names() == changed == reviewed.names_after_restart() != before
        assert ("\tignored\t" in (drawn.out / "names.tsv").read_text()) == (name is None)
        assert "Undo: unknown 2 is" in reviewed.client.get("").text
        reviewed.post("undo")
    for similar in ("ada", "Ad a", "ad\u0430a"):  # \u0430 is a Cyrillic letter that looks like a
        text = reviewed.post(status=422, do="name", of="unknown 1", person=similar)
        assert "the similar name Ada is taken" in text and f">{similar} is another person<" in text
    assert reviewed.names() == before
    # `new` confirms that Ad a is another person.
    assert "Saved: unknown 1 is Ad a." in reviewed.post(do="name", of="unknown 1", new="Ad a")
    # Guest 1 and Guest 2 are similar, too, but no question is asked.
    for of, person in {"Ad a": "Guest 1", "unknown 2": "Guest 2"}.items():
        assert f"Saved: {of} is {person}." in reviewed.post(do="name", of=of, person=person)
    # Bob appears at 2 s of more.mkv. The cut begins 0.25 s earlier.
    guest = drawn.out / "cuts" / f"{reviewed.names()['more.s001.t00']}.m3u"
    assert "start-time=1.75" in guest.read_text() or "start-time=1.8" in guest.read_text()
    assert {*reviewed.names().values()} == {"Ada", "Guest 1", "Guest 2"}
    assert reviewed.names() == reviewed.names_after_restart()


def test_next_person_or_the_same_person_or_film_is_shown_after_a_change(reviewed):
    text = reviewed.post(do="name", of="unknown 2", next="unknown 1", person="Bob")
    field = text.index("autofocus")  # the field in which the next name is typed
    assert text.index("Saved: unknown 2 is Bob.") < text.index("Undo: unknown 2 is Bob") < field
    assert "Who is unknown 1?" in text[:field][-200:]
    assert "Saved" not in reviewed.client.get("").text, "the message is shown once"
    text = reviewed.post(do="apart", of="clip:\tparty.s000.t00", next="unknown 1")
    assert "Who is unknown 1?" in text[: text.index("autofocus")][-200:]
    # The page of a person is shown again.
    reviewed.post("undo")
    text = reviewed.post("undo", view="person=Ada")
    assert "<title>Ada: " in text and "Undone" in text
    reviewed.post("undo", status=422)  # nothing is left to undo
    assert "<title>Eva: " in reviewed.post(do="name", of="Ada", person="Eva", view="person=Ada")
    assert "<title>Ada: " in reviewed.post("undo", view="person=Eva")
    text = reviewed.client.get("?film=more.mkv").text
    assert "<title>more.mkv: " in text and 'value="clip:\tmore.s000.t00"' in text
    # For a film that does not exist, the page of all films is shown.
    assert "<title>Who appears" in reviewed.client.get("?film=less.mkv").text


def test_buttons_join_people_and_ignore_everybody_seen_once(reviewed):
    """test_corrections.py tests changes of several people and faces."""
    before, unknown = reviewed.names(), ["unknown 1", "unknown 2"]
    text = reviewed.post(do="join", of=unknown)
    joined = {clip: "unknown 1" if x in unknown else x for clip, x in before.items()}
    assert reviewed.names() == joined and "Saved: unknown 2 is unknown 1." in text
    assert "Undone" in reviewed.post("undo") and reviewed.names() == before
    # A button with a likely name is sent after the empty or half-typed field.
    reviewed.post(do="name", of="unknown 1", person=["Ex", "Ada"])
    assert "unknown 1" not in reviewed.names().values()
    reviewed.post("undo")
    faces = [f"clip:\t{clip}" for clip, name in before.items() if name == "unknown 1"]
    reviewed.post(do="apart", of=faces[0])  # each of the two faces is now another person
    text = reviewed.client.get("").text
    ((do, count),) = re.findall('value="([a-z]+)">Ignore everybody seen once .([0-9]+)', text)
    reviewed.post(do=do)
    assert [*reviewed.names().values()].count(None) == int(count) == len(faces) == 2
    for fields in ({"of": "Ada"}, {}):
        assert "Nothing was changed" in reviewed.post(status=422, do="join", **fields)


def test_giving_a_person_the_name_of_another_person_asks_first_and_shows_both_faces(reviewed):
    reviewed.post(do="name", of="unknown 1", person="Bob")
    before, renaming = reviewed.names(), {"do": "name", "of": "Bob"}
    text = reviewed.post(status=422, **renaming, person="Ada", view="person=Bob")
    assert "the name Ada is taken. Is Bob the same person?" in text
    assert "I am sure: it is Ada" in text and "<title>Bob: " in text and reviewed.names() == before
    for of, person, other in (
        ("unknown 2", "ada", "Ada"), ("Ada", "Bob", "Bob"), ("clip:\tparty.s001.t00", "ada", "Ada")
    ):  # fmt: skip
        text = reviewed.post(status=422, do="name", of=of, person=person)
        asked = text[text.index('class="pair"') : text.index("</form>", text.index('class="pair"'))]
        face, guess = asked.split('class="guess"')
        assert face.count("<img") == 1 == guess.count("<img") and f">{other}<" in guess
        assert ('href="frame/party.s001.t00"' in face) == of.startswith("clip:")
    reviewed.post(**renaming, new="Ada")
    assert "Bob" not in reviewed.names().values()
    reviewed.post("undo")
    reviewed.post(do="name", of="unknown 2", person="Ada")  # an unknown person is often Ada
    reviewed.post(do="name", of="Bob", person="Zo\u00eb")
    text = reviewed.post(status=422, do="name", of="Ada", person="Zoe\u0308")  # two letters for one
    assert "Is Ada the same person?" in text


def test_message_about_a_face_has_its_time_and_not_the_time_of_the_appearance(tmp_path, command):
    """Ada is visible for 4 s, in two shots. Each shot is a clip."""
    (drawn := Drawn(tmp_path, command)).befriend("Ada")
    write_film(film := drawn.folder / "long.mkv", *[(2, x, [("Ada", 20, 30)]) for x in (20, 60)])
    write_photo(photo := drawn.folder / "photo.png", ("Ada", 40, 40))
    drawn.who(film, photo)
    reviewed = Reviewed(drawn).open()
    assert drawn.rows()[0]["clips"] == ["long.s000.t00", "long.s001.t00"]
    faces = [f"clip:\t{clip}" for clip in ("long.s000.t00", "long.s001.t00", "photo")]
    for of, words in (
        (faces[1], "long.mkv, 0:02\u20130:04, is"), (faces[:2], "long.mkv, 0:00\u20130:04, is"),
        (faces[2], "a face in photo.png is"), (faces, "long.mkv, 0:00\u20130:04, and 1 more are"),
    ):  # fmt: skip
        assert f"Saved: {words} Eve." in reviewed.post(do="name", of=of, person="Eve")
        reviewed.post("undo")


def test_naming_unclear_faces_asks_first(reviewed):
    naming = {"do": "name", "of": ["unknown 1", "unknown 2"]}
    with mock.patch.object(actions, "FACE", "unknown"):
        text = reviewed.post(status=422, **naming, person="Bob")
        assert "the face is unclear" in text and "I am sure: it is Bob" in text
        assert text.count('type="hidden" name="of" value="unknown') > 2, "both are asked about"
        assert "Saved" in reviewed.post(**naming, new="Bob")
    assert {*reviewed.names().values()} == {"Ada", "Bob"}


def test_page_shows_some_people_at_a_time_and_searches_all(reviewed, monkeypatch):
    monkeypatch.setattr(names_page, "MOST_SHOWN", 1)
    get = reviewed.client.get
    first, second = get("").text, get("?first=1").text
    assert 'id="people"' in first and 'value="unknown 1" form=' in first
    assert 'href="./?first=1">More people<' in first and ">Earlier people<" not in first
    assert 'value="unknown 1" form=' not in second and 'value="unknown 2" form=' in second
    assert ">More people<" not in second and 'href="./?">Earlier people<' in second
    found = get("?find=ADA+2").text  # only a film has both words
    assert 'value="unknown 2" form=' in found and ">Ada<" in found
    assert "?film=party.mkv" in found and "?film=more.mkv" not in found
    assert "Nothing matches" in get("?find=zzz").text
    assert get("?first=-1&find=%22%3E").status_code == 200
    text = reviewed.post(do="ignore", of="unknown 2", view="first=1")
    # The page with unknown 2 no longer exists.
    assert "Saved: unknown 2 is ignored." in text and 'value="unknown 1" form=' in text


@pytest.mark.slow
@pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium")
def test_every_change_can_be_made_with_keys_only(tmp_path):
    out = made_shelf.make(tmp_path / "keys", people=9, films=4, known=2, faces=9).out
    words = (sys.executable, "-um", "vidjax", "review", out)
    with limits.running(words, cwd=limits.ROOT) as server, browser.Browser(tmp_path / "b") as page:
        assert server.stdout
        address = server.stdout.readline().strip()
        person, box, large = ".person [name=person]", "[type=checkbox]", "querySelector('#large')"

        def act(selector, *keys, says=""):
            """Presses Tab until the focus is at `selector`, then keys, and waits for a message."""
            for _ in range(400):
                if page.run(f"document.activeElement.matches({selector!r})"):
                    break
                page.press("Tab")
            else:
                raise AssertionError(f"Tab does not reach {selector}")
            for key in keys:
                page.press(key)
            page.wait(f"(document.querySelector('#said')?.innerText ?? '').includes({says!r})", 5)

        page.open(address)
        act(person)
        page.type("Gus")
        act(person, "Enter", says="is Gus")
        act(".said button", "Enter", says="Undone")
        act(box, " ", "ArrowRight", "ArrowRight")
        page.press(" ", shift=True)
        assert page.run("document.querySelector('#count').innerText") == "3 people selected"
        act("*", "Escape")
        assert not page.run("document.querySelectorAll(':checked').length")
        act(box, " ", "ArrowLeft", " ")
        act("#selection [value=join]", "Enter", says="unknown")
        act(box, "Enter")
        act("#selection [value=ignore]", "Enter", says="ignored")
        # After the last box of the page, the focus goes back to another person.
        page.run(f"[...document.querySelectorAll('.person {box}')].at(-1).focus()")
        act(box, "Enter")
        act("#selection [value=ignore]", "Enter", says="ignored")
        page.wait(f"document.activeElement.matches('{person}')", 5)
        act(".person h3 a", "Enter")
        page.wait("!!document.querySelector('.grid')")
        act(".grid a.face", "Enter")
        assert page.run(f"document.{large}.open")
        before = page.run(f"document.{large}.innerHTML")
        page.press("ArrowRight")
        assert page.run(f"document.{large}.innerHTML") != before
        page.press("Escape")
        assert not page.run(f"document.{large}.open")
        act(f".grid {box}", " ")
        act("#selection [value=apart]", "Enter", says="not unknown")
        page.open(f"{address}?person=Ada")  # Enter confirms a question
        act(person)
        page.type("Bob")
        page.press("Enter")
        page.wait("document.activeElement.innerText === 'I am sure: it is Bob'", 5)
        act("*", "Enter", says="Ada is Bob")


def test_review_plays_films_and_serves_only_films_and_pictures_of_faces(reviewed, drawn):
    reviewed.names_after_restart()  # records that the films are copies
    client = reviewed.open().client
    page = client.get("").text
    pictures = re.findall('<img[^>]* src="([^"]+)"', page)
    assert len(pictures) > 2 and all((drawn.out / address).exists() for address in pictures)
    assert all(client.get(address).content.startswith(b"\x89PNG") for address in pictures)
    write_photo(outside := drawn.folder / "thumbnails" / "x" / "x.png")  # outside of the results
    for address in ("names.tsv", "unknown.json", "..%2fthumbnails%2fx%2fx.png", f"%2f{outside}"):
        assert client.get(address).status_code == 404
    # A link opens a page that plays the film from a time.
    play, film = "play?film=party.mkv", "film?film=party.mkv"
    assert f'href="{play}&amp;t=1.0"' in page
    text = client.get(f"{play}&t=1.0").text
    assert f'src="{film}#t=1.0"' in text and "party.mkv, from 0:01" in text
    for time in ("%22%3E", "1.2.3"):  # a time that is no number is ignored
        assert "#t=0.0" in client.get(f"{play}&t={time}").text
    text = client.get(f"{play}&t=0.0").text
    assert "<title>Ada in party.mkv<" in text and "prefers-color-scheme: dark" in text
    following = re.findall('<a href="([^"]+)">next: <bdi dir="ltr">([^<]+)', text)
    assert following == [(f"{play}&amp;t=3.0", "0:03\u20130:04")]
    whole = client.get(film)
    assert whole.status_code == 200 and whole.headers["content-type"] == "video/x-matroska"
    part = client.get(film, headers={"range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole.content[10:20]
    reviewed.review.film("party.mkv").write_bytes(b"another file")
    for answer in map(client.get, (film, play)):
        assert answer.status_code == 404 and "the command vidjax who." in answer.text


def test_films_and_photos_are_sent_as_what_they_contain_and_never_as_pages(reviewed, drawn):
    """The type of a file is recognised by its first bytes, and not by the name of the file."""
    script = b"<!DOCTYPE html><script>alert(1)</script>"
    write_photo(photo := drawn.folder / "photo.html", ("Bob", 40, 40))
    starts = {
        photo.read_bytes() + script: "image/png", b"\0\0\0\x20ftypavif": "image/avif",
        b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm": "video/webm",
        b"\0\0\0\x20ftypisom": "video/mp4", b"RIFF\n\0\0\0WEBP": "image/webp",
    }  # fmt: skip
    for other in (script, b"<svg xmlns='http://www.w3.org/2000/svg'>", b""):
        starts[other] = "application/octet-stream"
    for content, kind in starts.items():
        photo.write_bytes(content)
        with mock.patch.object(reviewed.review, "film", return_value=photo):
            answer = reviewed.client.get("film")
        assert answer.headers["content-type"] == kind and answer.content == content
        assert answer.headers["content-security-policy"] == "sandbox"


def test_names_are_written_from_one_state_although_another_program_renames(reviewed, drawn):
    page, write = drawn.out / "names.html", results.write

    def rename_first(out, gallery, decision, padding, **options):
        (ada,) = decision.said.find_people("Ada")
        log.append(out, [log.Line(says="person", person=ada, name="Eva")])
        assert page.exists(), "the old page stays until the new page is written"
        return write(out, gallery, decision, padding, **options)

    before = reviewed.names()
    with mock.patch.object(results, "write", rename_first):
        assert reviewed.names_after_restart() == before
    assert ">Ada<" in page.read_text() and ">Eva<" not in page.read_text()
    assert 'value="clip:\tparty.s000.t00"' in reviewed.client.get("?person=Eva").text
    reviewed.review.save()
    assert reviewed.names() == {c: "Eva" if x == "Ada" else x for c, x in before.items()}
    with pytest.raises(OSError), mock.patch.object(names_page, "render", side_effect=OSError):
        results.write(drawn.out, reviewed.review._gallery, reviewed.review._decision)
    assert ">Eva<" in page.read_text() and reviewed.names()


def test_wrong_requests_tokens_hosts_and_origins_change_nothing(reviewed):
    naming = {"do": "name", "of": "unknown 1", "person": "Bob"}
    # 422: a wrong field, or a form of another version. 413: a form of more than 200,000 bytes.
    for status, *forms in [
        (422, *(naming | {"person": new} for new in (" ", "a\u202eb", "unknown 9", "unknown"))),
        (422, *(naming | {"of": old} for old in ("unknown 99", "clip:\t9999", ""))),
        (422, {"do": "name", "of": "Ada", "person": "unknown 1"}, naming | {"do": "burn"}, {}),
        (422, *(naming | {"version": x} for x in ("9", "9" * 5000, "\u0661"))),
        (413, naming | {"person": "x" * 300_000}),
    ]:
        for form in forms:
            text = reviewed.post(status=status, **form)
            assert status == 413 or "Nothing was changed" in text  # 413: the form was not read
    # Addresses without the token or without a page, another host, and forms of other websites.
    client = reviewed.client
    for path in ("/", "/x/", f"/{TOKEN}x/", f"/{TOKEN[:-1]}/", f"/{TOKEN}/film?film=9", "/\u00e9/"):
        assert client.get(f"{SITE}{path}").status_code == 404
    assert client.get("", headers={"host": "evil.example"}).status_code == 404
    for headers in (
        {"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"},
        {"origin": "http://127.0.0.1:1"},
    ):  # fmt: skip
        answer = client.post("change", data={"version": "0"} | naming, headers=headers)
        assert answer.status_code == 403
    answer = client.get("")
    assert answer.headers["referrer-policy"] == "same-origin"
    assert "form-action 'self'" in answer.text and "Undo" not in answer.text
    assert reviewed.names() == reviewed.before


def test_errors_of_the_disk_and_closed_connections_get_answers(reviewed, drawn, monkeypatch):
    said, bob = drawn.out / log.NAME, {"do": "name", "of": "unknown 1", "person": "Bob"}
    content = said.read_bytes()
    said.unlink()
    said.mkdir()  # nothing can be read or written at this path
    for action in ("change", "undo"):
        assert "Nothing was changed" in reviewed.post(action, status=422, **bob)
    assert {*Gallery(drawn.out / "gallery").identities} == {"Ada"}
    said.rmdir()
    said.write_bytes(content)
    assert "Saved: unknown 1 is Bob" in reviewed.post(**bob)
    client = reviewed.client  # raises every exception that the application does not handle
    faces = reviewed.review._decision.faces._replace(films=[])  # another program has changed films
    shown = reviewed.review._decision._replace(faces=faces)
    with mock.patch.object(reviewed.review, "_decision", shown):
        assert client.get("frame/party.s000.t00").status_code == 404
    assert client.get(f"play?film=x&t={'9' * 5000}").status_code == 404
    assert "choose a shorter name" in client.get(f"thumbnails/x/{'x' * 5000}.png").text

    async def call(_=None):  # receives and sends: the browser has closed the connection
        return {"type": "http.disconnect"}

    # Neither raises an error, and no picture is decoded.
    with mock.patch.object(actions.Review, "frame", side_effect=AssertionError):
        for method, path in (("POST", "change"), ("GET", "frame/party.s000.t00")):
            scope = {"type": "http", "method": method, "path": f"/{TOKEN}/{path}"}
            asyncio.run(client.app(scope | {"headers": [(b"host", b"127.0.0.1:8123")]}, call, call))
    with monkeypatch.context() as patch:
        patch.setattr(results, "write", lambda *_: os.mkdir("/dev/null"))  # raises OSError
        reviewed.post(do="name", of="unknown 2", person="Eve")  # is saved in the log
    assert "Eve" not in reviewed.names().values()
    said.write_bytes(said.read_bytes() + b"damaged\n")
    answer = client.get("")
    assert answer.status_code == 503
    assert f"of '{said}' is damaged" in html.unescape(answer.text)
    said.write_bytes(said.read_bytes().removesuffix(b"damaged\n"))
    reviewed.review.save()
    assert {"Bob", "Eve"} <= {*reviewed.names().values()}


def test_review_opens_the_page_without_films_photos_and_nets(reviewed, drawn, monkeypatch):
    reviewed.post(do="name", of="unknown 1", person="Bob")
    reviewed.review.save()
    before, paths = drawn.names(), (*reviewed.films, drawn.friends, drawn.models)
    for path in paths:
        path.rename(drawn.folder / f"away {path.name}")

    def serve(page, *_):
        client = reviewed.open(page).client
        pictures = re.findall('<img[^>]* src="([^"]+)"', client.get("").text)
        assert pictures and all(client.get(x).status_code == 200 for x in pictures)
        reviewed.post(do="name", of="unknown 2", person="Eve")
        page.save()
        return page.done

    monkeypatch.setattr(review, "serve_review", serve)
    assert drawn.run("review", drawn.out).content["people"] == {"Ada": 1, "Bob": 2, "Eve": 2}
    renamed = {clip: "Eve" if name == "unknown 2" else name for clip, name in before.items()}
    assert drawn.names() == renamed
    for path in paths:
        (drawn.folder / f"away {path.name}").rename(path)
    assert reviewed.names_after_restart() == renamed, "the next call agrees"


def test_ignored_faces_are_no_person_and_are_shown_again(reviewed):
    before = reviewed.names()
    faces = [f"clip:\t{clip}" for clip, name in before.items() if name == "unknown 1"]
    reviewed.post(do="ignore", of=faces)
    text = reviewed.client.get("").text
    assert "People (2)" in text and "Ignored: 2 times" in text
    text = reviewed.client.get("?person=ignored").text
    assert text.count(">Show again<") == 1 and ">Somebody else<" not in text
    assert "is shown again." in reviewed.post(do="show", of=faces[0], view="person=ignored")
    assert [*reviewed.names().values()].count(None) == 1
    assert "shown again." in reviewed.post(do="show", of="ignored")
    assert reviewed.names() == before == reviewed.names_after_restart()
    reviewed.post("undo")
    assert [*reviewed.names().values()].count(None) == 1


def test_forgotten_person_leaves_no_trace_in_the_folder_but_photos_are_named(reviewed, drawn, say):
    reviewed.post(do="name", of="unknown 1", person="Bob")
    reviewed.post(do="name", of="Ada", person="Eva")  # a chain of names
    reviewed.post(do="name", of="unknown 2", person="Eva", new="Eva")
    assert "Forget Eva" in reviewed.client.get("?person=Eva").text
    photo, note = drawn.friends / "Ada.png", drawn.out / "note.txt"
    note.write_text("Eva")
    text = reviewed.post(do="forget", of="Eva", view="person=Eva")
    note.unlink()
    assert "Saved: Eva is forgotten in this folder." in text and f"\n{photo}\n{note}\n" in text
    # The undo steps contain what was said about her.
    assert "<title>Who appears" in text and "Undo:" not in text
    assert "there is no change to undo" in reviewed.post("undo", status=422)
    names = reviewed.names()
    assert "Eva" not in names.values() and "Bob" in names.values()
    done = say("forget", "--identity=Eva", drawn.out, "--json", code=0)
    assert done["places"] == [] and "Eva" not in (drawn.out / "said.jsonl").read_text()
    assert {path.name for path in (drawn.out / "people").rglob("*") if path.is_file()} == {
        ".lock", "extract.json"
    }  # fmt: skip
    for path in filter(Path.is_file, drawn.out.rglob("*")):
        assert not re.search(rb"\b(Ada|Eva)\b", path.read_bytes()), path
    photo.unlink()
    write_photo(drawn.friends / "Eve.png", ("Eve", 40, 40))
    assert not {"Ada", "Eva"} & {*reviewed.names_after_restart().values()}


def test_names_are_given_without_a_browser(reviewed, drawn):
    before = reviewed.before

    def give(*names, code=0):
        return drawn.run("review", drawn.out, *(f"--name={name}" for name in names), code=code)

    give("unknown 1=Ann", "unknown 2 = A=B")
    new = {"unknown 1": "Ann", "unknown 2": "A=B"}
    assert drawn.names() == {clip: new.get(name, name) for clip, name in before.items()}
    content = give("A=B=Bob", "Bob=Ann", "Ada=Eva").content  # one after the other; Ann and Bob join
    assert content["people"].keys() == {"Ann", "Eva"} and content["groups"] == 0
    names = drawn.names()
    assert {*names.values()} == {"Ann", "Eva"} and names == reviewed.names_after_restart()
    # If one of the names is refused, none of them is given.
    lines = log.read(drawn.out)
    for words, name in {
        "nobody with the name before the =": "Zoe=Ada", "--name=Ann": "Ann", "is empty": "Ann=",
        "no unknown person": "Ann=unknown 77", "invisible": "Ann=Bo\u200b",
    }.items():  # fmt: skip
        _, output = give("Eva=Ida", name, code=2)
        assert words in output and drawn.names() == names == made_shelf.list_names(drawn.out)
        assert {"Ida"}.isdisjoint(made_shelf.decide(drawn.out).people)
    assert log.read(drawn.out)[: len(lines)] == lines
    _, output = drawn.run("review", drawn.folder / "films", "--name=a=b", code=2)
    assert "has no results" in output


def test_warning_about_similar_names_in_results_has_a_command_that_changes_them(reviewed, drawn):
    drawn.befriend("Bob")
    (drawn.friends / "Bob").rename(drawn.friends / "ada")
    with pytest.warns(UserWarning, match=f"if they are the same: vidjax review {drawn.out}$"):
        drawn.who(drawn.folder / "party.mkv")


def test_gallery_of_results_is_read_and_never_changed_by_other_commands(reviewed, drawn):
    gallery, before = drawn.out / "gallery", contents(drawn.out)
    features = f"--input={drawn.out / 'features'}"
    for words in (
        ("rename", "--identity=Ada", "--to=Eva"), ("remove", "--identity=Ada"),
        ("enrol", features, "--identity=Bob", "--clip=party.s001.t00"),
        ("relabel", "--clip=party.s001.t00", "--strangers"),
    ):  # fmt: skip
        _, output = drawn.run("gallery", words[0], gallery, *words[1:], code=2)
        assert f"vidjax review {drawn.out}" in output and len(output.splitlines()) <= 3, output
    opened = Gallery(gallery)
    for change in (lambda: opened.rename("Ada", "Eva"), lambda: opened.remove(identity="Ada")):
        refused(change, f"vidjax review {drawn.out}")
    assert contents(drawn.out) == before
    answers = drawn.run("gallery", "identify", gallery, features).content["answers"]
    assert "Ada" in {answer["identity"] for answer in answers}
    assert drawn.run("gallery", "list", gallery).content["identities"] == {"Ada": 1}
    shutil.copytree(gallery, copy := drawn.folder / "copy")  # a copy is a result, too
    refused(lambda: Gallery(copy).remove(identity="Ada"), "vidjax review")
    moved = drawn.out.rename(drawn.folder / "moved")
    refused(lambda: Gallery(moved / "gallery").remove(identity="Ada"), f"vidjax review {moved}")
