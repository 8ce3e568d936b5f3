"""vidjax who --review: names are corrected on the page, and the next call agrees."""

import re
import threading

import pytest

from tests.helpers.browser import CHROMIUM, open_tab
from tests.helpers.drawn_people import write_film, write_photo
from vidjax.apps.gallery.gallery import Gallery

testclient = pytest.importorskip("starlette.testclient")
TOKEN, PORT = "t" * 22, 8123


@pytest.fixture
def reviewed(drawn, monkeypatch):
    """Results of two films in which Ada is known, Bob and Eve are not."""
    from vidjax.apps.video import review

    monkeypatch.setattr(review, "IDLE_SECONDS", 0)
    film = drawn.film()
    write_film(drawn.folder / "more.mkv", (2, 20, [("Eve", 30, 30)]), (2, 60, [("Bob", 60, 30)]))
    write_photo(drawn.friends / "Ada.png", ("Ada", 40, 40))

    class Reviewed:
        """The page in a browser."""

        def __init__(self):
            self.again()
            self.review = review.Review(drawn.out, padding=0.25)
            self.client = testclient.TestClient(
                review.make_app(self.review, TOKEN, PORT), base_url=f"http://127.0.0.1:{PORT}",
                headers={"origin": f"http://127.0.0.1:{PORT}", "sec-fetch-site": "same-origin"},
            )  # fmt: skip

        def again(self):
            drawn.who(film, drawn.folder / "more.mkv", flags=["--thumbnails"])
            return self.names()

        def names(self):
            """Returns clip -> name."""
            return {clip: row["identity"] for row in drawn.rows() for clip in row["clips"]}

        def page(self):
            answer = self.client.get(f"/{TOKEN}/")
            assert answer.status_code == 200
            return answer.text

        def post(self, action="change", status=200, **fields):
            (version, *_) = re.findall('name="version" value="([0-9]+)"', self.page())
            fields = {"version": version, **fields}
            answer = self.client.post(f"/{TOKEN}/{action}", data=fields)
            assert answer.status_code == status, answer.text
            return answer.text

    return Reviewed()


@pytest.mark.slow
def test_names_are_given_denied_and_taken_back_and_the_next_call_agrees(reviewed, drawn):
    before = reviewed.names()
    unknown = {name: [c for c, x in before.items() if x == name] for name in before.values()}
    bob = before["party.s002.t01"]
    assert bob.startswith("unknown ") and before["party.s000.t00"] == "Ada"
    text = reviewed.post(do="name", of=bob, person="Zo\u0065\u0308")
    named = dict.fromkeys(unknown[bob], "Zo\u00eb")
    assert f"Saved: {bob} is Zo" in text and "Undo" in text
    edl = (drawn.out / "cuts" / "Zo\u00eb.edl").read_text()
    assert " 00:00:01:18 00:00:03:23 " in edl and " 00:00:03:18 00:00:05:23 " in edl
    assert reviewed.names() == before | named == reviewed.again()
    text = reviewed.post("undo")
    assert "Undone" in text and reviewed.names() == before == reviewed.again()
    assert {*Gallery(drawn.out / "gallery").identities} == {"Ada"}

    ada = "clip: party.s000.t00"
    text = reviewed.post(do="deny", of=ada)
    denied = reviewed.names()
    now = denied["party.s000.t00"]
    assert f"Saved: party.mkv, 0:00\u20130:02, is not Ada, but {now}." in text
    assert "or perhaps" not in text, "a name that was denied is no doubt"
    assert denied["party.s000.t00"].startswith("unknown ")
    assert reviewed.again() == denied
    reviewed.post(do="name", of=ada, person="Ada")
    assert reviewed.names()["party.s000.t00"] == "Ada" == reviewed.again()["party.s000.t00"]
    reviewed.post(do="deny", of=ada)
    assert reviewed.names() == denied == reviewed.again(), "also what somebody said before"
    reviewed.post("undo")
    reviewed.post("undo")
    assert reviewed.names() == denied
    reviewed.post("undo")
    assert reviewed.names() == before
    reviewed.post("undo", status=422)


@pytest.mark.slow
def test_the_page_asks_about_a_name_that_is_nearly_another(reviewed):
    before = reviewed.names()
    for word in ("ada", "Ad a", "ad\u0430a"):
        text = reviewed.post(status=422, do="name", of="unknown 1", person=word)
        assert "there is already Ada" in text and f">{word} is another person<" in text
    assert reviewed.names() == before
    assert "Saved: unknown 1 is Ad a." in reviewed.post(do="name", of="unknown 1", new="Ad a")
    assert {*reviewed.names().values()} == {"Ada", "Ad a", "unknown 2"}
    assert "Saved: Ad a is Guest 1." in reviewed.post(do="name", of="Ad a", person="Guest 1")
    assert "Saved: unknown 2 is Guest 2." in reviewed.post(
        do="name", of="unknown 2", person="Guest 2"
    )
    names = reviewed.names()
    assert {*names.values()} == {"Ada", "Guest 1", "Guest 2"} and names == reviewed.again()
    reviewed.post("undo")
    reviewed.post("undo")
    assert {*reviewed.names().values()} == {"Ada", "Ad a", "unknown 2"}


@pytest.mark.slow
def test_the_reader_comes_back_to_the_next_person(reviewed):
    text = reviewed.post(do="name", of="unknown 2", next="unknown 1", person="Bob")
    place = text.index("autofocus")
    assert text.index("Saved: unknown 2 is Bob.") < text.index("Undo: unknown 2 is Bob") < place
    assert "Who is unknown 1?" in text[place - 200 : place]
    assert "Saved" not in reviewed.page() and "Undo" in reviewed.page(), "it is said once"
    text = reviewed.post("undo", view="person=Ada")
    assert "<title>Ada: " in text and "Undone" in text
    text = reviewed.post(do="name", of="Ada", person="Eva", view="person=Ada")
    assert "<title>Eva: " in text and "In no film" not in text
    text = reviewed.client.get(f"/{TOKEN}/?film=more.mkv").text
    assert "<title>more.mkv: " in text and 'value="clip: more.s000.t00"' in text
    assert "<title>Who appears" in reviewed.client.get(f"/{TOKEN}/?film=less.mkv").text


def test_faces_are_shown_and_nothing_else_of_the_folder(reviewed, drawn):
    pictures = re.findall('<img[^>]* src="([^"]+)"', reviewed.page())
    assert len(pictures) > 2
    for address in pictures:
        answer = reviewed.client.get(f"/{TOKEN}/{address}")
        assert answer.status_code == 200 and answer.content.startswith(b"\x89PNG")
    assert all((drawn.out / address).exists() for address in pictures)
    other = drawn.folder / "thumbnails" / "x" / "x.png"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"")
    for address in ("names.tsv", "unknown.json", "..%2fthumbnails%2fx%2fx.png", f"%2f{other}"):
        assert reviewed.client.get(f"/{TOKEN}/{address}").status_code == 404


@pytest.mark.slow
def test_two_unknown_people_are_joined_and_one_is_ignored(reviewed, drawn):
    before = reviewed.names()
    numbers = sorted({name for name in before.values() if name.startswith("unknown ")})
    assert numbers == ["unknown 1", "unknown 2"]
    text = reviewed.post(do="name", of="unknown 2", person="Unknown  1")
    assert "Saved: unknown 2 is unknown 1." in text
    joined = {c: "unknown 1" if name == "unknown 2" else name for c, name in before.items()}
    assert reviewed.names() == joined == reviewed.again()
    reviewed.post("undo")
    assert reviewed.names() == before
    reviewed.post(do="ignore", of="unknown 2")
    ignored = {c: None if name == "unknown 2" else name for c, name in before.items()}
    assert reviewed.names() == ignored == reviewed.again()
    assert "\tignored\t" in (drawn.out / "names.tsv").read_text()


MISTAKES = [
    ({"do": "name", "of": "unknown 1", "person": " "}, 422),
    ({"do": "name", "of": "unknown 1", "person": "a\u202eb"}, 422),
    ({"do": "name", "of": "unknown 99", "person": "Bob"}, 422),
    ({"do": "name", "of": "clip: 9999", "person": "Bob"}, 422),
    ({"do": "name", "of": "", "person": "Bob"}, 422),
    ({"do": "name", "of": "Ada", "person": "unknown 1"}, 422),
    ({"do": "name", "of": "unknown 1", "person": "unknown 9"}, 422),
    ({"do": "name", "of": "unknown 1", "person": "unknown"}, 422),
    ({"do": "burn", "of": "unknown 1"}, 422),
    ({"do": "name", "of": "unknown 1", "person": "Bob", "version": "9"}, 409),
    ({"do": "name", "of": "unknown 1", "person": "x" * 20_000}, 413),
    ({}, 422),
]


def test_mistakes_change_nothing(reviewed):
    before = reviewed.names()
    for fields, status in MISTAKES:
        assert "Nothing was changed" in reviewed.post(status=status, **fields) or status == 413
    text = reviewed.post(status=422, do="name", of="unknown 1", person="unknown 9")
    assert "unknown 9 is not on the page: type a name, or unknown 1, unknown 2 ..." in text
    assert reviewed.names() == before and "Undo" not in reviewed.page()


def test_only_the_page_itself_asks_and_changes(reviewed):
    form = {"version": "0", "do": "name", "of": "unknown 1", "person": "Bob"}
    client = reviewed.client
    for path in ("/", "/x/", f"/{TOKEN}x/", f"/{TOKEN[:-1]}/", f"/{TOKEN}/film/9", "/\u00e9/"):
        assert client.get(path).status_code == 404
    assert client.get(f"/{TOKEN}/", headers={"host": "evil.example"}).status_code == 404
    for headers in (
        {"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"},
        {"origin": "http://127.0.0.1:1"},
    ):  # fmt: skip
        assert client.post(f"/{TOKEN}/change", data=form, headers=headers).status_code == 403
    answer = client.get(f"/{TOKEN}/")
    assert answer.headers["referrer-policy"] == "same-origin"
    assert "form-action 'self'" in answer.text


@pytest.mark.slow
def test_films_play_from_any_second(reviewed):
    page = reviewed.page()
    assert 'href="play/1?t=2.0"' in page
    text = reviewed.client.get(f"/{TOKEN}/play/1?t=2.0").text
    assert 'src="../film/1#t=2.0"' in text and "party.mkv, from 0:02" in text and "VLC" in text
    assert "#t=0.0" in reviewed.client.get(f"/{TOKEN}/play/1?t=%22%3E").text
    whole = reviewed.client.get(f"/{TOKEN}/film/1")
    assert whole.status_code == 200 and whole.headers["content-type"] == "video/x-matroska"
    part = reviewed.client.get(f"/{TOKEN}/film/1", headers={"range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole.content[10:20]
    path = reviewed.review.film(1)
    path.write_bytes(b"another file")
    for word in ("film", "play"):
        answer = reviewed.client.get(f"/{TOKEN}/{word}/1")
        assert answer.status_code == 404 and "vidjax who again" in answer.text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_corrects_names_by_keyboard(reviewed, tmp_path):
    import uvicorn

    from vidjax.apps.serve.app import listen
    from vidjax.apps.video import review

    listener = listen(review.HOST, 0)
    port = listener.getsockname()[1]
    app = review.make_app(reviewed.review, TOKEN, port)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    before = reviewed.names()
    focus = "document.activeElement.ariaLabel || document.activeElement.textContent"
    try:
        with open_tab(tmp_path / "profile") as tab:
            tab.send("Page.navigate", url=f"http://{review.HOST}:{port}/{TOKEN}/")
            tab.wait("document.querySelectorAll('.person').length == 2")
            tab.press("Tab")
            assert tab.ask(focus) == "To the content"
            for _ in range(20):
                if tab.ask(focus) == "Who is unknown 1?":
                    break
                tab.press("Tab")
            tab.press("ada", "Enter")
            tab.wait("document.body.innerText.includes('there is already Ada')")
            assert tab.ask(focus) == "It is Ada"
            tab.press("Enter")
            tab.wait("document.body.innerText.includes('Saved: unknown 1 is Ada.')")
            assert tab.ask(focus) == "Who is unknown 2?"
            tab.press("shift Tab", "Enter")
            tab.wait("document.body.innerText.includes('Undone: unknown 1 is Ada.')")
            assert tab.ask(focus) == "Who is unknown 1?"
            tab.press("unknown 2", "Enter")
            tab.wait("document.body.innerText.includes('Saved: unknown 1 is unknown 2.')")
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
    reviewed.review.save()
    joined = {clip: name.replace("unknown 2", "unknown 1") for clip, name in before.items()}
    assert reviewed.names() == joined == reviewed.again()
