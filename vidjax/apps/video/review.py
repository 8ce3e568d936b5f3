"""`vidjax who --review`: a page on which people correct names, from a small server on this machine.

The address holds a secret word. Only a browser that was given the address can ask, and only pages
of this server can send changes. Each change is written at once to the gallery and to the numbers of
unknown people, so that the next call of `vidjax who` agrees. The results follow when nobody has
changed anything for a moment, and at the end.
"""

import functools
import hmac
import html
import mimetypes
import re
import secrets
import threading
import time
import unicodedata
import urllib.parse
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from vidjax.apps.gallery.answers import IGNORED, number_of
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery, clips_of
from vidjax.apps.gallery.store import Clip
from vidjax.apps.video import features_folder, who
from vidjax.apps.video.appearances import Appearance, clock
from vidjax.apps.video.names_page import CLIP, Forms, time_of
from vidjax.data.untrusted.names import fold, is_unknown, normal_form
from vidjax.utils import files, messages
from vidjax.utils.errors import Expected, UserError, closest, of_the_system

HOST = "127.0.0.1"
IDLE_SECONDS = 1.0  # after the last change, until the results are written
FORM_BYTES = 10_000
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",  # with `no-referrer` a form of the page has no origin
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Step(NamedTuple):
    """A change: what it did, in words, where, and what was there before.

    Attributes:
      at: the person, or the key of the appearance.
      clips: clip -> as it was enrolled before; None if it was not.
      numbers: what was known of unknown people.
    """

    words: str
    at: str
    clips: dict[str, Clip | None]
    numbers: who.Numbers


class Review:
    """The names of a folder of results, while somebody corrects them.

    `version` grows with each change.
    """

    def __init__(
        self,
        out: Path,
        decision: who.Decision | None = None,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        padding: float = who.PADDING,
    ):
        self._padding = padding
        self._out, self._gallery = out, Gallery(out / "gallery")
        self._identify = functools.partial(self._gallery.identify, fpir=fpir, threshold=threshold)
        self._films = decision.films if decision else who.read_films(out)
        self._steps: list[Step] = []
        self._saving = threading.Lock()
        self.version = self._saved = 0
        self._forms = Forms(0)
        self._decision = decision or self._decided(who.read_numbers(out), None)
        self._numbers = who.read_numbers(out)

    @property
    def done(self) -> who.Done:
        """What the results say."""
        return who.Done.of(self._gallery, self._decision, {})

    def film(self, number: int) -> Path | None:
        """Returns the path of a film; None without one, or if its file is not the one of the page.

        A folder of a stranger may name any file as a film, but does not know what the disk says.
        """
        if number >= len(self._films):
            return None
        source = self._films[number].source
        path = source.path
        return path if path.is_file() and features_folder.Source.of(path) == source else None

    def picture(self, address: str) -> Path | None:
        """Returns the path of the picture of a face; None for an address that no page has."""
        path = self._out / address
        inside = path.is_relative_to(self._out) and ".." not in path.parts
        inside = inside and path.parent.parent.name == features_folder.THUMBNAILS
        return path if inside and path.suffix == ".png" and path.is_file() else None

    def render(self, film: str = "", person: str = "", problem: Forms | None = None) -> str:
        """Returns the page of a film, of a person, or of all; what was done is said once."""
        forms = (problem or self._forms)._replace(
            version=self.version, film=film, person=person,
            last=self._steps[-1].words if self._steps else "",
        )  # fmt: skip
        self._forms = Forms(self.version)
        numbers = {one.video: number for number, one in enumerate(self._films)}

        def address(one: features_folder.Film, seconds: float) -> str:
            number = numbers[one.video]
            return f"film/{number}" if one.photo else f"play/{number}?t={seconds:.1f}"

        return who.render_page(self._out, self._gallery, self._decision, address, forms)

    def change(self, action: str, of: str, name: str, after: str = "") -> None:
        """Does what a form of the page asks for.

        Args:
          action: `name` says who it is: a person, or another unknown person; `deny` takes a wrong
            name away; `ignore` keeps the clips out of all names and numbers.
          of: the key of an appearance, or a person, or an unknown person.
          name: the name of a person, or `unknown 4`.
          after: who is next on the page.

        Raises:
          UserError: there is nobody `of` this key or name, or the name is no name.
        """
        clips, shown = self._clips_of(of)
        what = shown
        if one := self._appearance(of):
            film = next(film for film in self._films if film.video == one.video)
            what = f"{one.video}, {time_of(one, film)},"
        name, enrolled = " ".join(name.split()), self._gallery.clips
        if action == "deny":
            own = {clip: None for clip in clips if clip in enrolled}
            numbers = self._numbers.deny(self._films, clips, shown)
            self._finish(f"{what} is not {shown}", of, "", own, numbers)
            now = next(one.identity for one in self._decision.found if clips[0] in one.clips)
            said = f"Saved: {what} is not {shown}, but {now or IGNORED}."
            self._forms = self._forms._replace(message=said)
        elif action == "ignore":
            self._finish(f"{what} is ignored", of, after, self._labelled(clips, None))
        elif action != "name" or not name:
            raise UserError("there is no name: type one")
        elif is_unknown(name):
            group = self._group(name)
            numbers = self._numbers.join([self._group(shown), group])
            self._finish(f"{what} is {group}", of, after, {}, numbers)
        else:
            self._finish(f"{what} is {name}", of, after, self._labelled(clips, check_person(name)))

    def similar(self, name: str, of: str) -> str | None:
        """Returns the person whose name is nearly, but not quite, a name that somebody typed."""
        people = self._gallery.identities.keys() - {of}
        if is_unknown(name) or normal_form(" ".join(name.split())) in people:
            return None
        letters = {_letters(one): one for one in people}
        found = closest(_letters(name), letters, 0.85)
        digits = [re.sub(r"\D", "", word) for word in (name, found or "")]
        return letters[found] if found and digits[0] == digits[1] else None

    def undo(self) -> None:
        """Takes the last change back."""
        if not self._steps:
            raise UserError("there is no change to take back")
        step = self._steps.pop()
        self._put(step.clips)
        self._decide(step.numbers)
        self._forms = Forms(0, message=f"Taken back: {step.words}.", at=step.at)

    def save_later(self) -> None:
        """Writes the results in a moment, unless there is another change until then."""
        version = self.version
        time.sleep(IDLE_SECONDS)
        if version == self.version:
            self.save()

    def save(self) -> None:
        """Writes the results, if they are older than the last change."""
        with self._saving:
            version, decision = self.version, self._decision
            if version > self._saved:
                who.write(self._out, self._gallery, decision, self._padding)
                self._saved = version

    def _clips_of(self, of: str) -> tuple[tuple[str, ...], str]:
        """Returns the clips of an appearance or a person, and the name on the page."""
        if one := self._appearance(of):
            return one.clips, one.identity or IGNORED
        clips = [clip for clip, group in self._decision.groups.items() if group == of]
        clips += [clip for clip, one in self._gallery.clips.items() if of and one.identity == of]
        if not clips:
            raise UserError(f"'{of}' is not on the page any more")
        return tuple(sorted(clips)), of

    def _appearance(self, of: str) -> Appearance | None:
        """Returns the appearance that a key says; None for a person."""
        return next((one for one in self._decision.found if CLIP + one.clips[0] == of), None)

    def _group(self, name: str) -> str:
        """Returns an unknown person as the page names it."""
        group = " ".join(name.casefold().split())
        if group not in self._decision.groups.values():
            there = sorted({*self._decision.groups.values()}, key=number_of)[:5]
            some = f", or {', '.join(there)} ..." if there else ""
            raise UserError(f"there is no {group} on the page (any more): type a name{some}")
        return group

    def _labelled(self, clips: Iterable[str], name: str | None) -> dict[str, Clip | None]:
        """Returns clips as a person's, or as strangers' if `name` is None."""
        vectors, enrolled = self._decision.vectors, self._gallery.clips
        new = clips_of(vectors.only({*clips} - enrolled.keys())) if vectors else {}
        known = {clip: enrolled[clip] for clip in clips if clip in enrolled}
        found = {clip: one._replace(identity=name) for clip, one in (new | known).items()}
        if not found:
            raise UserError("no face is clear enough there to learn from")
        return dict(found)

    def _put(self, clips: Mapping[str, Clip | None]) -> dict[str, Clip | None]:
        """Enrols clips anew, or removes them; returns what was there."""
        before = {clip: self._gallery.clips.get(clip) for clip in clips}
        with self._gallery.change() as draft:
            draft.remove(clip=[clip for clip, one in before.items() if one])
            draft.add({clip: one for clip, one in clips.items() if one})
        return before

    def _finish(
        self,
        words: str,
        of: str,
        after: str,
        clips: Mapping[str, Clip | None],
        numbers: who.Numbers | None = None,
    ) -> None:
        before = self._numbers
        self._steps.append(Step(words, of, self._put(clips), before))
        self._decide(numbers or before)
        self._forms = Forms(0, message=f"Saved: {words}.", at=after)

    def _decide(self, numbers: who.Numbers) -> None:
        self._decision = self._decided(numbers, self._decision)
        self._numbers = who.read_numbers(self._out)
        self.version += 1

    def _decided(self, numbers: who.Numbers, last: who.Decision | None) -> who.Decision:
        gallery, out, films = self._gallery, self._out, self._films
        return who.decide(gallery, out, films, numbers, self._identify, last)


def _letters(name: str) -> str:
    """Returns the letters of a name, without accents, case and blanks."""
    return "".join(x for x in unicodedata.normalize("NFKD", fold(name)) if x.isalnum())


def make_app(review: Review, token: str, port: int) -> Starlette:
    """Returns the answers: the page, the films, and the changes, below `/TOKEN/`."""
    hosts = [f"{name}:{port}" for name in (HOST, "localhost")]
    lock = threading.Lock()

    def check(request: Request) -> None:
        """Refuses who does not know the token, and changes that another page sends."""
        headers, word = request.headers, request.path_params["token"]
        if not hmac.compare_digest(word.encode(), token.encode()) or (
            headers.get("host") not in hosts
        ):
            raise HTTPException(HTTPStatus.NOT_FOUND, "Open the address that vidjax printed.")
        ours = headers.get("origin") in (None, *(f"http://{host}" for host in hosts))
        if headers.get("sec-fetch-site") not in (None, "none", "same-origin"):
            ours = False
        if request.method == "POST" and not ours:
            raise HTTPException(HTTPStatus.FORBIDDEN, "Changes come from this page only.")

    def show(request: Request) -> Response:
        check(request)
        query = request.query_params
        with lock:
            page = review.render(query.get("film", ""), query.get("person", ""))
        return HTMLResponse(page, headers=HEADERS)

    def film(request: Request) -> Path:
        check(request)
        if path := review.film(request.path_params["number"]):
            return path
        raise HTTPException(
            HTTPStatus.NOT_FOUND,
            "The film is not at its place, or has changed. Put it back, or call vidjax who again.",
        )

    def play(request: Request) -> Response:
        path, query = film(request), request.query_params
        seconds = float(query["t"]) if re.fullmatch(r"[\d.]{1,12}", query.get("t", "")) else 0.0
        address = f"../film/{request.path_params['number']}#t={seconds:.1f}"
        about = (
            f"{path.name}, from {clock(seconds, short=True)}. If nothing plays, the browser does "
            f"not know this kind of film: open it in a player, such as VLC. It is here: {path}"
        )
        return _note(path.name, about, f'<video src="{address}" controls autoplay></video>')

    def send(request: Request) -> Response:
        path = film(request)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return FileResponse(path, media_type=kind, headers=HEADERS)

    def picture(request: Request) -> Response:
        check(request)
        path = review.picture(request.path_params["picture"])
        if path is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such page.")
        return FileResponse(path, media_type="image/png", headers=HEADERS)

    async def change(request: Request) -> Response:
        check(request)
        form = await _read_form(request)
        return await run_in_threadpool(apply, form, request.url.path.endswith("/undo"))

    def apply(form: Mapping[str, str], back: bool) -> Response:
        of, name = form.get("of", ""), form.get("person") or form.get("new", "")
        view = dict(urllib.parse.parse_qsl(form.get("view", "")))
        view = {word: view[word] for word in ("film", "person") if word in view}
        problem, status = Forms(0, at=of, next=form.get("next", "")), HTTPStatus.CONFLICT
        with lock:
            try:
                if form.get("version") != str(review.version):
                    raise UserError("the page was old, this is the new one: repeat the change")
                status = HTTPStatus.UNPROCESSABLE_ENTITY
                if back:
                    review.undo()
                elif "person" in form and (other := review.similar(name, of)):
                    problem = problem._replace(similar=other)
                    raise UserError(f"there is {other} already: who is it?")
                else:
                    review.change(form.get("do", ""), of, name, form.get("next", ""))
                    if view.get("person") == of and name:
                        view["person"] = " ".join(name.split())
            except (Expected, OSError) as error:
                about = f"Nothing was changed: {of_the_system(error) or error}"
                problem = problem._replace(message=about, typed=name)
                return HTMLResponse(review.render(**view, problem=problem), status, HEADERS)
        place = f"./?{urllib.parse.urlencode(view)}" if view else "./"
        headers, later = {"Location": place, **HEADERS}, BackgroundTask(review.save_later)
        return Response(None, HTTPStatus.SEE_OTHER, headers, background=later)

    def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _note("vidjax", error.detail, status=error.status_code)

    return Starlette(
        routes=[
            Route("/{token}/", show),
            Route("/{token}/play/{number:int}", play),
            Route("/{token}/film/{number:int}", send),
            Route("/{token}/change", change, methods=["POST"]),
            Route("/{token}/undo", change, methods=["POST"]),
            Route("/{token}/{picture:path}", picture),
        ],
        exception_handlers={HTTPException: refuse},
    )


def _note(title: str, about: str, more: str = "", status: int = HTTPStatus.OK) -> Response:
    """Returns a page with a few words, and `more` HTML above them."""
    policy = "default-src 'none'; media-src 'self'; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" '
        f'content="light dark"><title>{html.escape(title)}</title><style>body {{ font: 1rem/1.5 '
        "system-ui, sans-serif; overflow-wrap: anywhere; } video { max-width: 100%; }</style>"
        f"{more}<p>{html.escape(about)}</p></html>"
    )
    return HTMLResponse(page, status, {"Content-Security-Policy": policy, **HEADERS})


async def _read_form(request: Request) -> dict[str, str]:
    """Returns the fields of a form."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > FORM_BYTES:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The form is too large.")
    return dict(urllib.parse.parse_qsl(body.decode(errors="replace")))


def run(
    out: Path,
    decision: who.Decision,
    *,
    fpir: float | None = None,
    threshold: float | None = None,
    padding: float = who.PADDING,
) -> who.Done:
    """Serves the page of a folder of results until Ctrl-C; returns what the results say then."""
    from vidjax.apps.serve import app as app_lib
    from vidjax.apps.serve.limits import Limits

    token = secrets.token_urlsafe(16)
    with files.lock(out, "out"), app_lib.listen(HOST, 0) as listener:
        files.refuse_links(out)
        review = Review(out, decision, fpir=fpir, threshold=threshold, padding=padding)
        port = listener.getsockname()[1]
        messages.say(f"http://{HOST}:{port}/{token}/")
        messages.say("Open this address in a browser on this machine. End with Ctrl-C.")
        try:
            app_lib.serve(make_app(review, token, port), listener, Limits())
        finally:
            review.save()
        return review.done
