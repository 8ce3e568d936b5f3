"""`vidjax who --review`: a page on which people correct names, from a small server on this machine.

The address holds a secret word. Only a browser that was given the address can ask, and only pages
of this server can send changes. Each change is written at once, to the gallery and to the results,
so that the next call of `vidjax who` agrees.
"""

import functools
import hmac
import mimetypes
import secrets
import threading
import urllib.parse
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from vidjax import files, messages, who
from vidjax.errors import UserError
from vidjax.extract import folder
from vidjax.gallery.gallery import Gallery
from vidjax.gallery.page import Forms

HOST = "127.0.0.1"
FORM_BYTES = 10_000
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Step(NamedTuple):
    """A change: what it did, in words, and a function that takes it back."""

    words: str
    undo: Callable[[], None]


class Review:
    """The names of a folder of results, while somebody corrects them.

    `version` grows with each change.
    """

    def __init__(
        self,
        out: Path,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        padding: float = who.PADDING,
    ):
        self._padding = padding
        self._out, self._gallery = out, Gallery(out / "gallery")
        self._identify = functools.partial(self._gallery.identify, fpir=fpir, threshold=threshold)
        self._films = who.read_films(out)
        self._numbers = who.read_numbers(out)
        self._vectors = None
        self._steps: list[Step] = []
        self._done = ""
        self.version = 0
        self._decide()

    def film(self, number: int) -> Path | None:
        """Returns the path of a film; None without one, or if its file is not the one of the page.

        A folder of a stranger may name any file as a film, but does not know what the disk says.
        """
        if number >= len(self._films):
            return None
        source = self._films[number].source
        path = source.path
        return path if path.is_file() and folder.Source.of(path) == source else None

    def render(self) -> str:
        """Returns the page."""
        addresses = {film.video: f"film/{number}" for number, film in enumerate(self._films)}
        forms = Forms(self.version, self._done, bool(self._steps))
        return who.render_page(self._out, self._gallery, self._decision, addresses, forms)

    def change(self, action: str, of: str, person: str) -> None:
        """Does what a form of the page asks for.

        Args:
          action: `name` gives clips to a person, `deny` takes the person's name off them, `ignore`
            keeps them out of all names and numbers, `join` joins two unknown people.
          of: the number of an appearance, or the name of an unknown person.
          person: the name of a person; for `join`, of another unknown person.

        Raises:
          UserError: there is no such appearance or unknown person, or the name is no name.
        """
        clips, shown = self._clips_of(of)
        if action == "join":
            self._clips_of(person)
            self._note(f"{of} and {person} are one person", self._numbers.join([of, person]))
        elif action == "deny":
            numbers = self._numbers.deny(self._films, clips, shown)
            self._note(f"this is not {shown}", numbers)
        elif action == "ignore":
            self._label(f"{shown} is ignored", clips, None)
        elif action == "name" and person.strip():
            self._label(f"{shown} is {person.strip()}", clips, person.strip())
        else:
            raise UserError("there is no name: type one")

    def undo(self) -> None:
        """Takes the last change back."""
        if not self._steps:
            raise UserError("there is no change to take back")
        step = self._steps.pop()
        step.undo()
        self._decide()
        self._done = f"Taken back: {step.words}."

    def _clips_of(self, of: str) -> tuple[tuple[str, ...], str]:
        """Returns the clips of an appearance or an unknown person, and the name on the page."""
        found = self._decision.found
        if of.isascii() and of.isdigit() and len(of) < 10 and int(of) < len(found):
            one = found[int(of)]
            return one.clips, one.identity or "unknown"
        clips = tuple(sorted(c for c, group in self._decision.groups.items() if group == of))
        if not clips:
            raise UserError("nobody of this name is on the page: load it again")
        return clips, of

    def _note(self, words: str, numbers: who.Numbers) -> None:
        before = self._numbers
        self._numbers = numbers
        self._finish(words, lambda: setattr(self, "_numbers", before))

    def _label(self, words: str, clips: Collection[str], name: str | None) -> None:
        """Enrols clips as a person, or as strangers if `name` is None."""
        gallery, vectors = self._gallery, self._vectors
        assert vectors is not None  # there are clips
        before = {clip: gallery.clips[clip].identity for clip in clips if clip in gallery.clips}
        new = sorted({*clips} - before.keys())
        if new:
            labels = (name,) * len(new)
            gallery.enrol(vectors.only(new)._replace(labels=labels), strangers=name is None)
        with gallery.change() as draft:
            for clip in before:
                draft.relabel(clip, name)

        def undo() -> None:
            gallery.remove(clip=[clip for clip in new if clip in gallery.clips])
            with gallery.change() as draft:
                for clip, old in before.items():
                    draft.relabel(clip, old)

        self._finish(words, undo)

    def _finish(self, words: str, undo: Callable[[], None]) -> None:
        self._steps.append(Step(words, undo))
        self._decide()
        self._done = f"Saved: {words}."

    def _decide(self) -> None:
        self._decision = who.decide(
            self._gallery, self._out, self._films, self._numbers, self._identify, self._vectors,
            padding=self._padding,
        )  # fmt: skip
        self._vectors = self._decision.vectors
        self._numbers = who.read_numbers(self._out)
        self.version += 1


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
        with lock:
            return HTMLResponse(review.render(), headers=HEADERS)

    def play(request: Request) -> Response:
        check(request)
        path = review.film(request.path_params["number"])
        if path is None:
            raise HTTPException(
                HTTPStatus.NOT_FOUND, "The film is not at its place, or has changed."
            )
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return FileResponse(path, media_type=kind, headers=HEADERS)

    async def change(request: Request) -> Response:
        check(request)
        form = await _read_form(request)
        return await run_in_threadpool(apply, form, request.url.path.endswith("/undo"))

    def apply(form: Mapping[str, str], back: bool) -> Response:
        with lock:
            if form.get("version") != str(review.version):
                raise HTTPException(
                    HTTPStatus.CONFLICT, "This page is old. Go back, load it again, and repeat."
                )
            try:
                if back:
                    review.undo()
                else:
                    review.change(*(form.get(word, "") for word in ("do", "of", "person")))
            except UserError as error:
                problem = f"Nothing was changed: {error}"
                raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, problem) from error
        return Response(status_code=HTTPStatus.SEE_OTHER, headers={"Location": "./", **HEADERS})

    return Starlette(
        routes=[
            Route("/{token}/", show),
            Route("/{token}/film/{number:int}", play),
            Route("/{token}/change", change, methods=["POST"]),
            Route("/{token}/undo", change, methods=["POST"]),
        ]
    )


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
    *,
    fpir: float | None = None,
    threshold: float | None = None,
    padding: float = who.PADDING,
) -> None:
    """Serves the page of a folder of results until Ctrl-C."""
    from vidjax.serve import app as app_lib
    from vidjax.serve.limits import Limits

    token = secrets.token_urlsafe(16)
    with files.lock(out, "out"), app_lib.listen(HOST, 0) as listener:
        files.refuse_links(out)
        review = Review(out, fpir=fpir, threshold=threshold, padding=padding)
        port = listener.getsockname()[1]
        messages.say(f"http://{HOST}:{port}/{token}/")
        messages.say("Open this address in a browser on this machine. End with Ctrl-C.")
        app_lib.serve(make_app(review, token, port), listener, Limits())
