"""`vidjax who --review`: a small server on this machine with a page on which a user corrects names.

The address contains a secret word. Only a browser that has the address gets answers, and only pages
of this server can send changes. Each change is saved immediately, in the gallery and in the numbers
of unknown people, so that the next call of `vidjax who` keeps it. The result files are written a
moment after the last change, and when the server ends.
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

from vidjax.apps.gallery.answers import IGNORED, parse_group_number
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery, select_usable_clips
from vidjax.apps.gallery.store import StoredClip
from vidjax.apps.video import who
from vidjax.apps.video.appearances import Appearance, format_time
from vidjax.apps.video.features_folder import THUMBNAILS, FileStamp, Film
from vidjax.apps.video.names_page import CLIP, Forms, format_appearance_time
from vidjax.data.untrusted.names import fold, is_unknown, normal_form
from vidjax.utils import files, messages
from vidjax.utils.errors import Expected, UserError, closest, describe_system_error

HOST = "127.0.0.1"
IDLE_SECONDS = 1.0  # between the last change and the writing of the results
FORM_BYTES = 10_000
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",  # with `no-referrer`, browsers send forms without an origin
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Step(NamedTuple):
    """A change that can be undone.

    Attributes:
      words: the change in words.
      at: the person, or the key of the appearance, that was changed.
      clips: clip -> its entry in the gallery before the change; None if it was not enrolled.
      numbers: the numbers and corrections of unknown people before the change.
    """

    words: str
    at: str
    clips: dict[str, StoredClip | None]
    numbers: who.UnknownNumbers


class Review:
    """The names of a folder of results while a user corrects them.

    `version` grows with each change.
    """

    def __init__(
        self,
        out: Path,
        decision: who.Decision | None = None,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        padding: float = who.PADDING_SECONDS,
    ):
        self._padding = padding
        self._out, self._gallery = out, Gallery(out / "gallery")
        self._identify = functools.partial(self._gallery.identify, fpir=fpir, threshold=threshold)
        self._films = decision.films if decision else who.read_films(out)
        self._steps: list[Step] = []
        self._saving = threading.Lock()
        self.version = self._saved = 0
        self._forms = Forms(0)
        self._decision = decision or self._make_decision(who.read_numbers(out), None)
        self._numbers = who.read_numbers(out)

    @property
    def done(self) -> who.WhoResults:
        """The current results."""
        return who.WhoResults(self._gallery.identities, self._decision, {})

    def film(self, number: int) -> Path | None:
        """Returns the path of a film; None if there is no such film, or if its file has changed.

        A folder of results from a stranger may name any file as a film. It cannot match the size,
        times and inode of a file on this disk, so that no other file is sent.
        """
        if number >= len(self._films):
            return None
        source = self._films[number].source
        path = source.path
        return path if path.is_file() and FileStamp.of(path) == source else None

    def picture(self, address: str) -> Path | None:
        """Returns the path of a face's picture; None if no picture has this address."""
        path = self._out / address
        inside = path.is_relative_to(self._out) and ".." not in path.parts
        inside = inside and path.parent.parent.name == THUMBNAILS
        return path if inside and path.suffix == ".png" and path.is_file() else None

    def render(self, film: str = "", person: str = "", problem: Forms | None = None) -> str:
        """Returns the page of all names, or only of a film or a person.

        If `problem` is given, the page shows its message. If not, it shows the message of the last
        change, but only in the first call after the change.
        """
        forms = (problem or self._forms)._replace(
            version=self.version, film=film, person=person,
            last=self._steps[-1].words if self._steps else "",
        )  # fmt: skip
        self._forms = Forms(self.version)
        number_of = {film.video: number for number, film in enumerate(self._films)}

        def address(film: Film, seconds: float) -> str:
            number = number_of[film.video]
            return f"film/{number}" if film.photo else f"play/{number}?t={seconds:.1f}"

        return who.render_page(self._out, self._gallery, self._decision, address, forms)

    def change(self, action: str, of: str, name: str, after: str = "") -> None:
        """Applies a change from a form of the page.

        Args:
          action: `name` names a person, or joins two unknown people; `deny` removes a wrong name;
            `ignore` excludes the clips from all names and numbers.
          of: the key of an appearance, or a person, or an unknown person.
          name: the name of a person, or `unknown 4`.
          after: the person who comes next on the page.

        Raises:
          UserError: `of` is not on the page, or the name is not allowed.
        """
        clips, old = self._find_clips(of)
        subject = old
        if appearance := self._find_appearance(of):
            film = next(film for film in self._films if film.video == appearance.video)
            subject = f"{appearance.video}, {format_appearance_time(appearance, film)},"
        name, enrolled = " ".join(name.split()), self._gallery.clips
        if action == "deny":
            entries = {clip: None for clip in clips if clip in enrolled}
            numbers = self._numbers.deny(self._films, clips, old)
            self._finish(f"{subject} is not {old}", of, "", entries, numbers)
            new = next(x.identity for x in self._decision.appearances if clips[0] in x.clips)
            message = f"Saved: {subject} is not {old}, but {new or IGNORED}."
            self._forms = self._forms._replace(message=message)
        elif action == "ignore":
            self._finish(f"{subject} is ignored", of, after, self._label_clips(clips, None))
        elif action != "name" or not name:
            raise UserError("the name is empty: type a name")
        elif is_unknown(name):
            group = self._find_group(name)
            numbers = self._numbers.join([self._find_group(old), group])
            self._finish(f"{subject} is {group}", of, after, {}, numbers)
        else:
            entries = self._label_clips(clips, check_person(name))
            self._finish(f"{subject} is {name}", of, after, entries)

    def similar(self, name: str, of: str) -> str | None:
        """Returns the person whose name is almost equal to a typed name; None if there is none."""
        people = self._gallery.identities.keys() - {of}
        if is_unknown(name) or normal_form(" ".join(name.split())) in people:
            return None
        letters = {_fold_letters(person): person for person in people}
        best = closest(_fold_letters(name), letters, 0.8)
        digits = [re.sub(r"\D", "", word) for word in (name, best or "")]
        return letters[best] if best and digits[0] == digits[1] else None

    def undo(self) -> None:
        """Undoes the last change."""
        if not self._steps:
            raise UserError("there is no change to undo")
        step = self._steps.pop()
        self._put(step.clips)
        self._decide(step.numbers)
        self._forms = Forms(0, message=f"Undone: {step.words}.", at=step.at)

    def save_later(self) -> None:
        """Writes the results after a moment, unless another change was made by then."""
        version = self.version
        time.sleep(IDLE_SECONDS)
        if version == self.version:
            self.save()

    def save(self) -> None:
        """Writes the results if there are changes since the last time."""
        with self._saving:
            version, decision = self.version, self._decision
            if version > self._saved:
                who.write(self._out, self._gallery, decision, self._padding)
                self._saved = version

    def _find_clips(self, of: str) -> tuple[tuple[str, ...], str]:
        """Returns the clips of an appearance or a person, and the name on the page."""
        if appearance := self._find_appearance(of):
            return appearance.clips, appearance.identity or IGNORED
        enrolled = self._gallery.clips.items()
        shown = self._decision.unknown | {clip: x.identity for clip, x in enrolled if x.identity}
        clips = [clip for clip, name in shown.items() if name == of]
        if not clips:
            raise UserError(f"'{of}' is no longer on the page")
        return tuple(sorted(clips)), of

    def _find_appearance(self, of: str) -> Appearance | None:
        """Returns the appearance with a key; None if `of` is a person."""
        return next((x for x in self._decision.appearances if CLIP + x.clips[0] == of), None)

    def _find_group(self, name: str) -> str:
        """Returns the name of an unknown person as the page spells it."""
        group = " ".join(name.casefold().split())
        if group not in self._decision.unknown.values():
            groups = sorted({*self._decision.unknown.values()}, key=parse_group_number)[:5]
            alternatives = f", or {', '.join(groups)} ..." if groups else ""
            raise UserError(f"{group} is not on the page: type a name{alternatives}")
        return group

    def _label_clips(self, clips: Iterable[str], name: str | None) -> dict[str, StoredClip | None]:
        """Returns clip -> its entry with a name; if `name` is None, as an ignored person."""
        vectors, enrolled = self._decision.vectors, self._gallery.clips
        new = select_usable_clips(vectors.only({*clips} - enrolled.keys())) if vectors else {}
        known = {clip: enrolled[clip] for clip in clips if clip in enrolled}
        entries = {clip: entry._replace(identity=name) for clip, entry in (new | known).items()}
        if not entries:
            raise UserError("none of these clips has a face that is clear enough to be enrolled")
        return dict(entries)

    def _put(self, clips: Mapping[str, StoredClip | None]) -> dict[str, StoredClip | None]:
        """Replaces or removes clips in the gallery; returns the entries before."""
        before = {clip: self._gallery.clips.get(clip) for clip in clips}
        with self._gallery.change() as draft:
            draft.remove(clip=[clip for clip, entry in before.items() if entry])
            draft.add({clip: entry for clip, entry in clips.items() if entry})
        return before

    def _finish(
        self,
        words: str,
        of: str,
        after: str,
        clips: Mapping[str, StoredClip | None],
        numbers: who.UnknownNumbers | None = None,
    ) -> None:
        before = self._numbers
        self._steps.append(Step(words, of, self._put(clips), before))
        self._decide(numbers or before)
        self._forms = Forms(0, message=f"Saved: {words}.", at=after)

    def _decide(self, numbers: who.UnknownNumbers) -> None:
        self._decision = self._make_decision(numbers, self._decision)
        self._numbers = who.read_numbers(self._out)
        self.version += 1

    def _make_decision(
        self, numbers: who.UnknownNumbers, last: who.Decision | None
    ) -> who.Decision:
        gallery, out, films = self._gallery, self._out, self._films
        return who.decide(gallery, out, films, numbers, self._identify, last)


def _fold_letters(name: str) -> str:
    """Returns the letters and digits of a name, without accents, case and blanks."""
    return "".join(x for x in unicodedata.normalize("NFKD", fold(name)) if x.isalnum())


class _Pages:
    """The requests that the web application answers, below `/TOKEN/`."""

    def __init__(self, review: Review, token: str, port: int):
        """Makes pages of `review`.

        Args:
          token: the secret word in the address. Requests without it are refused.
          port: the port of the server. Requests are refused unless their `Host` header names it.
        """
        self._review, self._token = review, token
        self._hosts = [f"{name}:{port}" for name in (HOST, "localhost")]
        self._lock = threading.Lock()

    def _check(self, request: Request) -> None:
        """Refuses requests without the token, and changes from other pages."""
        headers, given = request.headers, request.path_params["token"]
        if not hmac.compare_digest(given.encode(), self._token.encode()) or (
            headers.get("host") not in self._hosts
        ):
            raise HTTPException(HTTPStatus.NOT_FOUND, "Open the address that vidjax printed.")
        same_origin = headers.get("origin") in (None, *(f"http://{host}" for host in self._hosts))
        if headers.get("sec-fetch-site") not in (None, "none", "same-origin"):
            same_origin = False
        if request.method == "POST" and not same_origin:
            raise HTTPException(HTTPStatus.FORBIDDEN, "Changes come from this page only.")

    def show(self, request: Request) -> Response:
        """Answers with the page of names."""
        self._check(request)
        query = request.query_params
        with self._lock:
            page = self._review.render(query.get("film", ""), query.get("person", ""))
        return HTMLResponse(page, headers=HEADERS)

    def _find_film(self, request: Request) -> Path:
        self._check(request)
        if path := self._review.film(request.path_params["number"]):
            return path
        about = "The film is missing, or has changed. Put it back, or call vidjax who again."
        raise HTTPException(HTTPStatus.NOT_FOUND, about)

    def play(self, request: Request) -> Response:
        """Answers with a page that plays a film from `t` seconds."""
        path, query = self._find_film(request), request.query_params
        seconds = float(query["t"]) if re.fullmatch(r"[\d.]{1,12}", query.get("t", "")) else 0.0
        address = f"../film/{request.path_params['number']}#t={seconds:.1f}"
        about = (
            f"{path.name}, from {format_time(seconds, short=True)}. If nothing plays, the browser "
            f"does not know this kind of film: open it in a player, such as VLC. It is here: {path}"
        )
        return _make_note(path.name, about, f'<video src="{address}" controls autoplay></video>')

    def send_film(self, request: Request) -> Response:
        """Answers with the file of a film."""
        path = self._find_film(request)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return FileResponse(path, media_type=kind, headers=HEADERS)

    def send_picture(self, request: Request) -> Response:
        """Answers with the picture of a face."""
        self._check(request)
        path = self._review.picture(request.path_params["picture"])
        if path is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "This page does not exist.")
        return FileResponse(path, media_type="image/png", headers=HEADERS)

    async def change(self, request: Request) -> Response:
        """Applies the form of a change, or takes the last change back."""
        self._check(request)
        form = await _read_form(request)
        return await run_in_threadpool(self._apply, form, request.url.path.endswith("/undo"))

    def _apply(self, form: Mapping[str, str], back: bool) -> Response:
        review = self._review
        of, name = form.get("of", ""), form.get("person") or form.get("new", "")
        view = dict(urllib.parse.parse_qsl(form.get("view", "")))
        view = {word: view[word] for word in ("film", "person") if word in view}
        problem, status = Forms(0, at=of, next=form.get("next", "")), HTTPStatus.CONFLICT
        with self._lock:
            try:
                if form.get("version") != str(review.version):
                    raise UserError("the page was out of date: repeat the change on this new page")
                status = HTTPStatus.UNPROCESSABLE_ENTITY
                if back:
                    review.undo()
                elif "person" in form and (other := review.similar(name, of)):
                    problem = problem._replace(similar=other)
                    raise UserError(f"there is already {other}: who is it?")
                else:
                    review.change(form.get("do", ""), of, name, form.get("next", ""))
                    if view.get("person") == of and name:
                        view["person"] = " ".join(name.split())
            except (Expected, OSError) as error:
                about = f"Nothing was changed: {describe_system_error(error) or error}"
                problem = problem._replace(message=about, typed=name)
                return HTMLResponse(review.render(**view, problem=problem), status, HEADERS)
        place = f"./?{urllib.parse.urlencode(view)}" if view else "./"
        headers, later = {"Location": place, **HEADERS}, BackgroundTask(review.save_later)
        return Response(None, HTTPStatus.SEE_OTHER, headers, background=later)


def make_app(review: Review, token: str, port: int) -> Starlette:
    """Returns the web application: the page, the films and the changes, below `/TOKEN/`."""
    pages = _Pages(review, token, port)

    def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _make_note("vidjax", error.detail, status=error.status_code)

    return Starlette(
        routes=[
            Route("/{token}/", pages.show),
            Route("/{token}/play/{number:int}", pages.play),
            Route("/{token}/film/{number:int}", pages.send_film),
            Route("/{token}/change", pages.change, methods=["POST"]),
            Route("/{token}/undo", pages.change, methods=["POST"]),
            Route("/{token}/{picture:path}", pages.send_picture),
        ],
        exception_handlers={HTTPException: refuse},
    )


def _make_note(title: str, about: str, more: str = "", status: int = HTTPStatus.OK) -> Response:
    """Returns a page with a short text, and `more` HTML above it."""
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


def serve_review(
    out: Path,
    decision: who.Decision,
    *,
    fpir: float | None = None,
    threshold: float | None = None,
    padding: float = who.PADDING_SECONDS,
) -> who.WhoResults:
    """Serves the page of a folder of results until Ctrl-C; returns the final results."""
    from vidjax.apps.serve import app as app_lib
    from vidjax.apps.serve.limits import Limits

    token = secrets.token_urlsafe(16)
    with files.lock(out, "out"), app_lib.listen(HOST, 0) as listener:
        files.refuse_links(out)
        review = Review(out, decision, fpir=fpir, threshold=threshold, padding=padding)
        port = listener.getsockname()[1]
        messages.print_text(f"http://{HOST}:{port}/{token}/")
        messages.print_text("Open this address in a browser on this machine. Stop with Ctrl-C.")
        try:
            app_lib.serve(make_app(review, token, port), listener, Limits())
        finally:
            review.save()
        return review.done
