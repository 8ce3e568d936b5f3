"""Serves a page on which a user corrects the names of people in films (`vidjax who --review`).

The server runs on the user's machine. The address of the page contains a secret word. Requests
without this word, and changes that other pages send, are refused. Each change is saved immediately,
in the gallery or in `unknown.json`, so that the next call of `vidjax who` keeps it. The other
result files are written a second after the last change, and when the server ends.
"""

import contextlib
import functools
import hmac
import html
import re
import secrets
import threading
import time
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from vidjax.apps import web
from vidjax.apps.gallery.answers import rank_group
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import Denials, StoredClip
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.apps.video import who
from vidjax.apps.video.appearances import format_time
from vidjax.apps.video.features_folder import THUMBNAILS, FileStamp, MediaFile, hash_film
from vidjax.apps.video.names_page import CLIP, Forms, format_appearance_time
from vidjax.utils import files, messages
from vidjax.utils.errors import Expected, UserError, closest, describe_system_error
from vidjax.utils.names import IGNORED, fold, is_unknown, normal_form

HOST = "127.0.0.1"
IDLE_SECONDS = 1.0  # the results are written after this time without another change
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


class Step(NamedTuple):
    """A change of names that can be undone."""

    words: str  # a description of the change
    at: str  # the changed person, or the key of the changed appearance, see `PageEntry`
    # The entry of each changed clip in the gallery before the change; None for a new clip.
    clips: dict[str, StoredClip | None]
    denied: Denials  # the denied names of each changed clip before the change
    numbers: who.UnknownNumbers  # the contents of `unknown.json` before the change


class Review:
    """Applies a user's corrections to the names in a folder of results."""

    def __init__(
        self,
        out: Path,
        decision: who.Decision,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        padding: float = who.PADDING_SECONDS,
    ):
        """Opens the folder of results `out`. `decision` contains the names before corrections.

        For the other arguments, see `who.name_people`.
        """
        self._padding = padding
        self._out, self._gallery = out, Gallery(out / "gallery")
        self._identify = functools.partial(self._gallery.identify, fpir=fpir, threshold=threshold)
        self._films, self._decision = decision.films, decision
        self._steps: list[Step] = []
        self._saving = threading.Lock()
        self.version = self._saved = 0  # number of changes. Undoing a change counts as a change
        self._forms = Forms()
        self._numbers = who.read_numbers(out)

    def refresh(self) -> None:
        """If another program has changed the gallery, decides all names again."""
        if self._gallery.digest != self._decision.digest:
            self._apply({}, {}, who.read_numbers(self._out))

    @property
    def done(self) -> who.WhoResults:
        """The results after all changes."""
        return who.WhoResults(self._decision.count_clips(), self._decision, {})

    def film(self, number: int) -> Path | None:
        """Returns the path of film `number`, or None if the file is missing or has changed."""
        if number >= len(self._films):
            return None
        source = self._films[number].source
        path = source.path
        # A malicious folder of results may name any file of this disk as a film, but the folder
        # cannot contain the right size, time and inode of the file. So this file is not sent.
        return path if path.is_file() and FileStamp.of(path) == source else None

    def picture(self, address: str) -> Path | None:
        """Returns the path of the picture with this address, or None if there is no picture."""
        path = self._out / address
        inside = path.is_relative_to(self._out) and ".." not in path.parts
        inside = inside and path.parent.parent.name == THUMBNAILS
        return path if inside and path.suffix == ".png" and files.is_file(path) else None

    def render(self, view: Mapping[str, str], problem: Forms | None = None) -> str:
        """Returns the page of names as HTML. `view` chooses what it shows, see `_read_view`.

        `problem` is the state of the forms after a refused change. If it is None, the first page
        after a change says what was changed.
        """
        forms = (problem or self._forms)._replace(
            version=self.version, film=view.get("film", ""), person=view.get("person", ""),
            find=view.get("find", ""), first=int(view.get("first", 0)),
            last=self._steps[-1].words if self._steps else "",
        )  # fmt: skip
        self._forms = Forms()
        number_of = {film.video: number for number, film in enumerate(self._films)}

        def address(film: MediaFile, seconds: float) -> str:
            number = number_of[film.video]
            return f"film/{number}" if film.photo else f"play/{number}?t={seconds:.1f}"

        return who.render_page(self._out, self._decision, address, forms)

    def change(self, action: str, of: Sequence[str], name: str, after: str = "") -> None:
        """Changes the names of people or faces, as one step that can be undone.

        Args:
          action: "name" gives all of them the name `name`. "deny" says that their name is wrong,
            so that they become unknown. "ignore" shows them as ignored, without a name.
          of: the people, and the keys of the faces, to change.
          name: the new name. If it is an unknown person, such as `unknown 4`, this person and the
            people `of` become one unknown person. Then all of them must be unknown.
          after: the person, or the key of the face, whose name the page asks next.

        Raises:
          UserError: one of `of` is not on the page, or the name is not allowed.
        """
        found = [self._find_clips(key) for key in of]
        if not found:
            raise UserError("nobody is selected: select people or faces first")
        clips = tuple(sorted({clip for part, _, _ in found for clip in part}))
        subjects, at = [*dict.fromkeys(subject for _, _, subject in found)], of[0]
        subject = subjects[0] + f" and {len(subjects) - 1} more" * (len(subjects) > 1)
        old = {key: name for key, (_, name, _) in zip(of, found, strict=True)}
        if action in ("deny", "apart"):
            if people := [key for key, name in old.items() if key == name]:
                raise UserError(
                    f"'{people[0]}' is a person: choose an appearance that does not "
                    f"show {people[0]}"
                )
            name = old[at]
            entries = dict.fromkeys(self._find_enrolled(clips))
            self._finish(f"{subject} is not {name}", at, "", entries, self._deny(clips, name))
            named = (x.identity for x in self._decision.appearances if clips[0] in x.clips)
            message = f"Saved: {subject} is not {name}, but {next(named, None) or IGNORED}."
            self._forms = self._forms._replace(message=message)
        elif action == "ignore":
            entries = self._label_clips(of, clips, None)
            self._finish(f"{subject} is ignored", at, after, entries)
        elif action != "name" or not name:
            raise UserError("the name is empty: type a name")
        elif is_unknown(name):
            group = self._find_group(name)
            numbers = self._numbers.join([*map(self._find_group, old.values()), group])
            self._finish(f"{subject} is {group}", at, after, {}, numbers=numbers)
        else:
            name = check_person(name)
            self._finish(f"{subject} is {name}", at, after, self._label_clips(of, clips, name))

    def ignore_once(self) -> None:
        """Ignores all unknown people who are seen once, as one step that can be undone."""
        seen = Counter(x.identity for x in self._decision.appearances if x.identity)
        unknown = {*self._decision.unknown.values()}
        of = [name for name, number in seen.items() if number == 1 and name in unknown]
        self.change("ignore", of, "")

    def similar(self, name: str, of: Sequence[str]) -> str | None:
        """Returns an enrolled person not in `of` whose name is almost `name`, or None."""
        people = self._gallery.identities.keys() - {*of}
        if is_unknown(name) or normal_form(name) in people:
            return None
        letters = {_fold_letters(person): person for person in people}
        best = closest(_fold_letters(name), letters, 0.8)
        digits = [re.sub(r"\D", "", word) for word in (name, best or "")]
        return letters[best] if best and digits[0] == digits[1] else None

    def undo(self) -> None:
        """Undoes the last change. Raises UserError if there is no change to undo."""
        if not self._steps:
            raise UserError("there is no change to undo")
        step = self._steps[-1]
        self._apply(step.clips, step.denied, step.numbers)
        self._steps.pop()
        self._forms = Forms(message=f"Undone: {step.words}.", at=step.at)

    def save_later(self) -> None:
        """Waits for a second. If there was no change in this second, writes the results."""
        version = self.version
        time.sleep(IDLE_SECONDS)
        if version == self.version:
            with contextlib.suppress(Expected, OSError):  # the server saves again when it ends
                self.save()

    def save(self) -> None:
        """Writes the results if names have changed since the results were last written."""
        with self._saving:
            version, decision = self.version, self._decision
            if version > self._saved:
                who.write(self._out, decision, self._padding)
                self._saved = version

    def _find_clips(self, of: str) -> tuple[tuple[str, ...], str, str]:
        """Returns the clips, the name and a description of the person or the face `of`."""
        clip = of.removeprefix(CLIP)
        for x in self._decision.appearances if clip != of else ():
            if clip in x.clips:
                film = next(film for film in self._films if film.video == x.video)
                subject = f"{x.video}, {format_appearance_time(x, film)},"
                return (clip,), x.identity or IGNORED, subject
        unknown, enrolled = self._decision.unknown.items(), self._gallery.clips.items()
        clips = [clip for clip, name in unknown if name == of]
        clips += [clip for clip, x in enrolled if x.identity == of]
        if not clips:
            raise UserError(f"'{of}' is no longer on the page: reload the page, and choose again")
        return tuple(sorted(clips)), of, of

    def _find_group(self, name: str) -> str:
        """Returns the name in lower case. Raises UserError if no unknown person has this name."""
        group = name.casefold()
        if group not in self._decision.unknown.values():
            raise UserError(
                f"'{name}' is not an unknown person on this page: type the person's name instead"
            )
        return group

    def _find_enrolled(self, clips: Iterable[str]) -> set[str]:
        """Returns the names in `clips` that belong to enrolled clips.

        The name of an enrolled clip is left out if a clip of a replaced film has it now.
        """
        vectors = self._decision.vectors
        return {*self._gallery.find_enrolled(vectors.only({*clips}))} if vectors else set()

    def _label_clips(
        self, of: Sequence[str], clips: Collection[str], name: str | None
    ) -> dict[str, StoredClip | None]:
        """Returns clip -> new entry of the gallery, in which `of` have the name `name`.

        If `name` is None, the entry says that the person is ignored. Clips without a usable face
        are left out. Raises UserError if no clip remains.
        """
        vectors, enrolled = self._decision.vectors, self._gallery.clips
        people = {*of} & self._gallery.identities.keys()
        known = self._find_enrolled(clips)
        known |= {clip for clip in clips if clip in enrolled and enrolled[clip].identity in people}
        new = select_usable_clips(vectors.only({*clips}.difference(known))) if vectors else {}
        old = {clip: enrolled[clip] for clip in known}
        entries = {clip: entry._replace(identity=name) for clip, entry in (new | old).items()}
        if not entries:
            raise UserError("no face in this appearance is clear enough: name another appearance")
        return dict(entries)

    def _deny(self, clips: Collection[str], name: str) -> Denials:
        """Returns the denied names of `clips`, with the additional name `name`."""
        denied: dict[str, dict[str, list[str]]] = {}
        for film in self._films:
            digest = hash_film(film)
            of_film = self._gallery.denied.get(digest, {})
            for clip in {track.clip for track in film.tracks}.intersection(clips):
                denied.setdefault(digest, {})[clip] = [*of_film.get(clip, ()), name]
        return denied

    def _put(
        self, clips: Mapping[str, StoredClip | None], denied: Denials
    ) -> tuple[dict[str, StoredClip | None], Denials]:
        """Replaces entries and denied names of the gallery; returns the old values.

        The entry None means "no entry".
        """
        before = {clip: self._gallery.clips.get(clip) for clip in clips}
        with self._gallery.change() as draft:
            draft.remove(clip=[clip for clip, entry in before.items() if entry])
            draft.add({clip: entry for clip, entry in clips.items() if entry})
            return before, draft.deny(denied)

    def _apply(
        self,
        clips: Mapping[str, StoredClip | None],
        denied: Denials,
        numbers: who.UnknownNumbers,
    ) -> tuple[dict[str, StoredClip | None], Denials]:
        """Changes the gallery, and decides all names again; returns the old values, see `_put`.

        If the names cannot be decided, the gallery is not changed.
        """
        before = self._put(clips, denied)
        try:
            self._decision = who.decide(
                self._gallery, self._out, self._films, numbers, self._identify, self._decision
            )
        except BaseException:  # a full disk, or too few strangers for `fpir`
            self._put(*before)
            self._decision = self._decision._replace(digest=self._gallery.digest)
            raise
        self._numbers = who.read_numbers(self._out)
        self.version += 1
        return before

    def _finish(
        self,
        words: str,
        of: str,
        after: str,
        clips: Mapping[str, StoredClip | None],
        denied: Denials | None = None,
        *,
        numbers: who.UnknownNumbers | None = None,
    ) -> None:
        """Applies a change that can be undone, and shows its description `words` on the page.

        `clips` is clip -> new entry of the gallery, or None to remove the clip. `denied` are the
        new denied names of clips. `numbers` replace the contents of `unknown.json`. For `of` and
        `after`, see `change`.
        """
        before = self._numbers
        self._steps.append(
            Step(words, of, *self._apply(clips, denied or {}, numbers or before), before)
        )
        self._forms = Forms(message=f"Saved: {words}.", at=after)


def _fold_letters(name: str) -> str:
    """Returns the letters and digits of a name in lower case, without accents and blanks."""
    return "".join(x for x in unicodedata.normalize("NFKD", fold(name)) if x.isalnum())


class _Pages:
    """Answers the requests of a browser. All paths begin with `/TOKEN/`. TOKEN is a secret."""

    def __init__(self, review: Review, token: str):
        self._review, self._token = review, token
        self._lock = threading.Lock()

    def _check(self, request: Request) -> None:
        """Raises HTTPException if the secret word, the host, or the origin of a change is wrong."""
        given = request.path_params["token"]
        is_right = hmac.compare_digest(given.encode(), self._token.encode())
        if not (is_right and web.is_local(request.headers)):
            raise HTTPException(HTTPStatus.NOT_FOUND, "Open the address that vidjax printed.")
        if request.method == "POST" and not web.is_same_site(request.headers):
            raise HTTPException(HTTPStatus.FORBIDDEN, "Make changes only on the page of vidjax.")

    def show(self, request: Request) -> Response:
        """Answers with the page of names, for all films, or for one film or person in the query."""
        self._check(request)
        with self._lock:
            self._review.refresh()
            page = self._review.render(_read_view(request.query_params))
        return HTMLResponse(page, headers=HEADERS)

    def _find_film(self, request: Request) -> Path:
        self._check(request)
        number = request.path_params["number"]
        if re.fullmatch("[0-9]{1,9}", number) and (path := self._review.film(int(number))):
            return path
        about = "The film is missing or has changed. Put it back, or call vidjax who again."
        raise HTTPException(HTTPStatus.NOT_FOUND, about)

    def play(self, request: Request) -> Response:
        """Answers with a page that plays a film from the time `t` in the query, in seconds."""
        path, query = self._find_film(request), request.query_params
        seconds = float(query["t"]) if re.fullmatch(r"\d{1,9}(\.\d)?", query.get("t", "")) else 0.0
        address = f"../film/{request.path_params['number']}#t={seconds:.1f}"
        about = (
            f"{path.name}, from {format_time(seconds, short=True)}. If it does not play, your "
            f"browser does not support its format. Open it in a player, such as VLC: {path}"
        )
        back = '<p><a href="../">All people and films</a></p>'
        return _make_note(
            path.name, about, back + f'<video src="{address}" controls autoplay></video>'
        )

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

    async def change(self, request: Request) -> Response:
        """Applies the change in a form, or undoes the last change."""
        self._check(request)
        form = await _read_form(request)
        return await run_in_threadpool(self._apply, form, request.url.path.endswith("/undo"))

    def _apply(self, fields: Sequence[tuple[str, str]], back: bool) -> Response:
        """Applies the change in a form. If `back` is True, undoes the last change instead."""
        review, form = self._review, dict(fields)
        of = [value for name, value in fields if name == "of"]
        typed, action = form.get("person") or form.get("new", ""), form.get("do", "")
        name, after = " ".join(typed.split()), form.get("next", "")
        view = _read_view(dict(urllib.parse.parse_qsl(form.get("view", ""))))
        problem = Forms(at="".join(of[:1]), next=after, of=of, typed=typed)
        status = HTTPStatus.CONFLICT
        with self._lock:
            try:
                review.refresh()
                if form.get("version") != str(review.version):
                    raise UserError("the page was out of date: repeat the change on this new page")
                status = HTTPStatus.UNPROCESSABLE_ENTITY
                if action == "join":
                    action, name = "name", name or min(filter(is_unknown, of), key=rank_group)
                if back:
                    review.undo()
                elif action == "once":
                    review.ignore_once()
                elif action == "name" and "person" in form and (other := review.similar(name, of)):
                    problem = problem._replace(similar=other)
                    raise UserError(f"there is already {other}: is it the same person?")
                else:
                    review.change(action, of, name, after)
                    if action == "name" and [view.get("person")] == of:
                        view["person"] = name
            except (Expected, OSError) as error:
                about = f"Nothing was changed: {describe_system_error(error) or error}"
                page = review.render(view, problem._replace(message=about))
                return HTMLResponse(page, status, HEADERS)
        place = f"./?{urllib.parse.urlencode(view)}" if view else "./"
        headers, later = {"Location": place, **HEADERS}, BackgroundTask(review.save_later)
        return Response(None, HTTPStatus.SEE_OTHER, headers, background=later)


def _read_view(query: Mapping[str, str]) -> dict[str, str]:
    """Returns the parameters of a URL that choose what the page shows, see `Forms.url_query`."""
    view = {name: query[name] for name in ("film", "person", "find") if query.get(name)}
    if re.fullmatch("[1-9][0-9]{0,8}", query.get("first", "")):
        view["first"] = query["first"]
    return view


def make_app(review: Review, token: str) -> Starlette:
    """Returns the web application that serves the page of names at `/TOKEN/` of this machine."""
    pages = _Pages(review, token)

    def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _make_note("vidjax", error.detail, status=error.status_code)
        about = describe_system_error(error) or str(error)
        return _make_note("vidjax", about, status=HTTPStatus.SERVICE_UNAVAILABLE)

    return Starlette(
        routes=[
            Route("/{token}/", pages.show),
            Route("/{token}/play/{number}", pages.play),
            Route("/{token}/film/{number}", pages.send_film),
            Route("/{token}/change", pages.change, methods=["POST"]),
            Route("/{token}/undo", pages.change, methods=["POST"]),
            Route("/{token}/{picture:path}", pages.send_picture),
        ],
        # If the browser has closed the connection (ClientDisconnect), the answer reaches nobody.
        exception_handlers=dict.fromkeys(
            (HTTPException, ClientDisconnect, Expected, OSError), refuse
        ),
    )


def _make_note(title: str, about: str, more: str = "", status: int = HTTPStatus.OK) -> Response:
    """Returns a page that shows the text `about` below the HTML `more`."""
    policy = "default-src 'none'; media-src 'self'; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" '
        f'content="light dark"><title>{html.escape(title)}</title><style>body {{ font: 1rem/1.5 '
        "system-ui, sans-serif; overflow-wrap: anywhere; background: Canvas; color: CanvasText; } "
        "h1 { font-size: 1.4rem; } a { line-height: 2; } video { max-width: 100%; }</style>"
        f"<main><h1>{html.escape(title)}</h1>{more}<p>{html.escape(about)}</p></main></html>"
    )
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


def serve_review(
    out: Path,
    decision: who.Decision,
    *,
    fpir: float | None = None,
    threshold: float | None = None,
    padding: float = who.PADDING_SECONDS,
) -> who.WhoResults:
    """Serves the page on which a user corrects names, until Ctrl-C; returns the final results.

    `out` is the folder of results. `decision` contains the names before corrections. For the other
    arguments, see `who.name_people`.
    """
    token = secrets.token_urlsafe(16)
    with files.lock(out, "out"), web.listen(HOST, 0) as listener:
        files.refuse_links(out)
        review = Review(out, decision, fpir=fpir, threshold=threshold, padding=padding)
        messages.print_text(f"http://{HOST}:{listener.getsockname()[1]}/{token}/")
        messages.print_text("Open this address in a browser on this machine. Stop with Ctrl-C.")
        try:
            web.serve(make_app(review, token), listener)
        finally:
            review.refresh()
            review.save()
        return review.done
