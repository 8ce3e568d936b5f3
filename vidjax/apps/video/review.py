"""Serves a page on which a user corrects the names of people in films (`vidjax review`).

The server runs on the user's machine. The address of the page contains a secret word. Requests
without this word, and changes that other pages send, are refused. Each change is saved immediately,
in the log `said.jsonl`, so that the next call of `vidjax who` keeps it. The other
result files are written a second after the last change, and when the server ends.
"""

import asyncio
import hmac
import re
import secrets
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from vidjax.apps import web
from vidjax.apps.video import names_page, who
from vidjax.apps.video.actions import Review
from vidjax.apps.video.names_page import Forms
from vidjax.utils import messages
from vidjax.utils.errors import Expected, InUseError, UserError, describe_system_error
from vidjax.utils.messages import format_time

HOST = "127.0.0.1"
MOST_DECODED = 2  # pictures that are decoded at the same time
FORM_BYTES = 200_000
SNIFF_BYTES = 64
# The first bytes of films and photos -> the type as which a file is sent. A browser does not run
# scripts in a file of these types. Other files are sent as bytes without a type.
TYPES = {
    rb"\x89PNG\r\n": "image/png", rb"\xff\xd8\xff": "image/jpeg", rb"GIF8": "image/gif",
    rb"RIFF.{4}WEBP": "image/webp", rb"BM": "image/bmp", rb"II\*\0|MM\0\*": "image/tiff",
    rb".{4}ftypavi[fs]": "image/avif", rb".{4}ftyp(hei|hev|mif)": "image/heic",
    rb".{4}(ftyp|moov|mdat|wide|free|skip)": "video/mp4", rb"OggS": "video/ogg",
    rb"\x1a\x45\xdf\xa3.{,59}webm": "video/webm", rb"\x1a\x45\xdf\xa3": "video/x-matroska",
    rb"RIFF.{4}AVI ": "video/x-msvideo", rb"\0\0\x01[\xb3\xba]": "video/mpeg",
}  # fmt: skip
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",  # with `no-referrer`, browsers send forms without an origin
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
SANDBOX = {"Content-Security-Policy": "sandbox", **HEADERS}  # of films and pictures


class _Pages:
    """Answers the requests of a browser. All paths begin with `/TOKEN/`. TOKEN is a secret."""

    def __init__(self, review: Review, token: str):
        self._review, self._token = review, token
        self._lock = threading.Lock()
        self._decoding = asyncio.Semaphore(MOST_DECODED)

    def _check(self, request: Request) -> None:
        """Raises HTTPException if a request does not come from the page of this program.

        The secret word and the host of the request must be right. If the request changes something,
        the origin must be right, too.
        """
        given = request.path_params["token"]
        is_right = hmac.compare_digest(given.encode(), self._token.encode())
        if not (is_right and web.is_local(request.headers)):
            raise HTTPException(HTTPStatus.NOT_FOUND, "Wrong address: open the one vidjax printed.")
        if request.method == "POST" and not web.is_same_site(request.headers):
            raise HTTPException(HTTPStatus.FORBIDDEN, "Another website sent this change; refused.")

    def show(self, request: Request) -> Response:
        """Answers with the page of names: of all films, or of the film or person in the URL."""
        self._check(request)
        with self._lock:
            self._review.refresh()
            page = self._review.render(_read_view(request.query_params))
        return HTMLResponse(page, headers=HEADERS)

    def _find_film(self, request: Request) -> Path:
        self._check(request)
        if path := self._review.film(request.query_params.get("film", "")):
            return path
        about = "The film is missing or has changed. Put it back, or repeat the command vidjax who."
        raise HTTPException(HTTPStatus.NOT_FOUND, about)

    def play(self, request: Request) -> Response:
        """Answers with a page that plays the film `film` from the time `t`, in seconds.

        Both are in the query.
        """
        path, query = self._find_film(request), request.query_params
        seconds = float(query["t"]) if re.fullmatch(r"\d{1,9}(\.\d)?", query.get("t", "")) else 0.0
        about = (
            f"{path.name}, from {format_time(seconds, short=True)}. If it does not play, your "
            f"browser does not support its format. Open it in a player, such as VLC: {path}"
        )
        with self._lock:
            people = self._review.list_seen(query["film"], seconds)
        names = ", ".join(str(x.identity) for x, *_ in people)
        title = f"{names} in {path.name}" if names else path.name
        film = f"film?{urllib.parse.urlencode({'film': query['film']})}#t={seconds:.1f}"
        return _make_note(title, about, film=film, people=people)

    def send_film(self, request: Request) -> Response:
        path = self._find_film(request)
        with path.open("rb") as file:
            start = file.read(SNIFF_BYTES)
        kinds = (kind for first, kind in TYPES.items() if re.match(first, start, re.DOTALL))
        return FileResponse(
            path, media_type=next(kinds, "application/octet-stream"), headers=SANDBOX
        )

    def send_picture(self, request: Request) -> Response:
        self._check(request)
        path = self._review.picture(request.path_params["picture"])
        if path is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "This page does not exist.")
        return FileResponse(path, media_type="image/png", headers=SANDBOX)

    async def send_frame(self, request: Request) -> Response:
        self._check(request)
        # Pictures that wait take no thread. Otherwise, the page would wait for them, too.
        async with self._decoding:
            await request.body()  # raises ClientDisconnect if the user has gone on to another face
            try:
                picture = await run_in_threadpool(self._review.frame, request.path_params["clip"])
            except UserError:
                picture = None
        if picture is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "The picture cannot be read from the film.")
        return Response(picture, media_type="image/jpeg", headers=SANDBOX)

    async def change(self, request: Request) -> Response:
        """Answers a submitted form: makes the change in the form."""
        self._check(request)
        form = await _read_form(request)
        self._review.waiting += 1  # the results are written when no change waits
        try:
            return await run_in_threadpool(self._apply, form)
        finally:
            self._review.waiting -= 1

    def _apply(self, fields: Sequence[tuple[str, str]]) -> Response:
        """Applies the change in a form with the fields (name, value), or undoes the last change.

        Answers with a redirection to the page. If the change is refused, or the user must confirm
        it, answers with the page and a message.
        """
        review, form = self._review, dict(fields)
        of = [value for name, value in fields if name == "of"]
        typed, action = form.get("person") or form.get("new", ""), form.get("do", "")
        if "not" in form:  # the button of a suggested name
            typed, action = form["not"], "deny"
        name, after = " ".join(typed.split()), form.get("next", "")
        view = _read_view(dict(urllib.parse.parse_qsl(form.get("view", ""))))
        problem = view._replace(at="".join(of[:1]), next=after, of=of, typed=typed)
        question = ""
        later = BackgroundTask(review.save_later)  # an earlier change may have left it to this one
        with self._lock:
            try:
                version = form.get("version", "")
                version = int(version) if re.fullmatch("[0-9]{1,9}", version) else -1
                if action == "undo":
                    changed = review.undo(version)
                    if view.person and not review.has_person(view.person):
                        view = view._replace(person=changed)  # the person was renamed
                elif action == "forget":
                    review.forget("".join(of[:1]), version)
                    view = Forms()
                else:
                    if action == "name" and "person" in form:
                        question, similar = review.find_question(name, of)
                        problem = problem._replace(asked=bool(question), similar=similar)
                    if question:
                        raise UserError(question)
                    review.change(action, of, name, after, version)
                    if action == "name" and [view.person] == of:
                        view = view._replace(person=name)
            except (Expected, OSError) as error:
                about = f"Nothing was changed: {describe_system_error(error) or error}"
                page = review.render(problem._replace(message=about))
                refused = HTTPStatus.UNPROCESSABLE_ENTITY
                return HTMLResponse(page, refused, HEADERS, background=later)
        headers = {"Location": f"./?{view.url_query}", **HEADERS}
        return Response(None, HTTPStatus.SEE_OTHER, headers, background=later)


def _read_view(query: Mapping[str, str]) -> Forms:
    """Returns what the page shows. The parameters of a URL choose it, see `Forms.url_query`."""
    film, person, find, first = (query.get(x, "") for x in ("film", "person", "find", "first"))
    number = int(first) if re.fullmatch("[0-9]{1,9}", first) else 0
    return Forms(film=film, person=person, find=find, first=number)


def make_app(review: Review, token: str) -> Starlette:
    """Returns the web application with the page, at `/TOKEN/`, on which a user corrects names."""
    pages = _Pages(review, token)

    def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _make_note("vidjax", error.detail, status=error.status_code)
        about = describe_system_error(error) or str(error)
        return _make_note("vidjax", about, status=HTTPStatus.SERVICE_UNAVAILABLE)

    return Starlette(
        routes=[
            Route("/favicon.ico", lambda _: Response(status_code=HTTPStatus.NO_CONTENT)),
            Route("/{token}/", pages.show),
            Route("/{token}/play", pages.play),
            Route("/{token}/film", pages.send_film),
            Route("/{token}/frame/{clip}", pages.send_frame),
            Route("/{token}/change", pages.change, methods=["POST"]),
            Route("/{token}/{picture:path}", pages.send_picture),
        ],
        # If the browser has closed the connection (ClientDisconnect), the answer reaches nobody.
        exception_handlers=dict.fromkeys(
            (HTTPException, ClientDisconnect, Expected, OSError), refuse
        ),
    )


def _make_note(title: str, about: str, status: int = HTTPStatus.OK, **more: object) -> Response:
    """Returns a page that shows the text `about`. For `more`, see `names_page.render_note`."""
    policy = "default-src 'none'; media-src 'self'; style-src 'unsafe-inline'"
    page = names_page.render_note(title=title, about=about, **more)
    return HTMLResponse(page, status, {"Content-Security-Policy": policy, **HEADERS})


async def _read_form(request: Request) -> list[tuple[str, str]]:
    """Reads the fields of a form from a request; refuses forms of more than 200 kB."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > FORM_BYTES:
            raise HTTPException(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The name is too long: type a shorter name."
            )
    return urllib.parse.parse_qsl(body.decode(errors="replace"))


def serve_review(review: Review) -> who.WhoResults:
    """Serves the page on which a user corrects names, until Ctrl-C; returns the final results."""
    token = secrets.token_urlsafe(16)
    with web.listen(HOST, 0) as listener:
        messages.print_text(f"http://{HOST}:{listener.getsockname()[1]}/{token}/")
        messages.print_text("Open this address in a browser on this machine. Stop with Ctrl-C.")
        try:
            web.serve(make_app(review, token), listener)
        finally:
            try:
                review.save()
            except InUseError:  # all changes are in the log
                messages.print_text("Another vidjax who is running: it will write the tables.")
        return review.done
