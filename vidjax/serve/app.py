"""The application: what a server answers to which request.

    app = make_app(Gallery("people", sync=True), run=None)  # any ASGI server runs it

`/v2/...` is the Open Inference Protocol. All else is JSON about people by name; `openapi` describes
it. An answer is made of what the folder of the gallery holds at that moment. A removal is answered
when the disk has it and no answer under way can name the person any more.
"""

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from vidjax.data import clip_files
from vidjax.data.packing import Clip
from vidjax.data.untrusted.names import check_identity, show
from vidjax.errors import UserError, of_the_system
from vidjax.gallery import answers as answers_lib
from vidjax.gallery.gallery import Enrolment, Gallery
from vidjax.gallery.store import Clip as Enrolled
from vidjax.predict import Predictor
from vidjax.serve import openapi, protocol
from vidjax.serve.batcher import Batcher, Changes
from vidjax.serve.limits import LOG, Guard, Limits, Refused, one_line, read_body, unprocessable
from vidjax.serve.metrics import Metrics
from vidjax.serve.models import GalleryModel, Model, Question, RunModel, ask, inputs_of, question_of

LISTED = 10_000  # people of one answer
LARGE = 1 << 16  # bytes of a body that a thread of its own parses
NPZ = ("application/x-npz", "application/zip", "application/octet-stream")
Value = str | float | list[float | list[float]]  # a clip's name, or frames
ClipJson = dict[str, Value]


class _Identify(Struct, forbid_unknown_fields=True):
    clips: Annotated[list[ClipJson], Meta(min_length=1)]
    k: int = 5
    fpir: float | None = None
    threshold: float | None = None


class _Enrol(Struct, forbid_unknown_fields=True):
    clips: Annotated[list[ClipJson], Meta(min_length=1)]
    identity: str | None = None
    identities: dict[str, str] | None = None
    strangers: bool = False


class _Served(NamedTuple):
    """A model, and the queue of its questions."""

    model: Model
    batcher: Batcher[Question, Any]


class _Answer:
    """The answer of one path, to be run by a Route as it is.

    It tells the Guard the pattern of the path, and turns errors of vidjax into Refused.
    """

    def __init__(
        self, app: "Application", path: str, answer: Callable[[Request], Awaitable[Response]]
    ):
        self._app, self._path, self._answer = app, path.replace(":path", ""), answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        scope["vidjax.route"] = self._path
        try:
            response = await self._answer(Request(scope))
        except UserError as error:
            raise self._app.refused(error) from None
        except OSError as error:
            if not (text := of_the_system(error)):
                raise
            LOG.error("%s", one_line(text))
            status = HTTPStatus.INSUFFICIENT_STORAGE
            raise Refused(status, "the gallery cannot be written: see the log", 10) from None
        await response(scope, receive, send)


class Application:
    """The answers of one server; `routes` lists them."""

    def __init__(self, gallery: Gallery, run: Predictor | None, limits: Limits, metrics: Metrics):
        self.limits, self.metrics = limits, metrics
        self.people = GalleryModel(gallery)
        models: list[Model] = [self.people, *([RunModel(run)] if run else [])]
        self.served = {
            one.name: _Served(one, Batcher(one.answer, limits, metrics)) for one in models
        }
        self.asked = self.served[self.people.name].batcher
        self.changes = Changes(limits)
        self.embedding = 0  # clips of enrolments that wait for their vectors
        self.ready = self.broken = False

    def routes(self) -> list[Route]:
        """Returns method and path of every answer."""
        version, infer = "/v2/models/{name}/versions/{version}", self.infer
        table: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("POST", "/v2/models/{name}/infer", infer),  # the first that is looked at
            ("POST", f"{version}/infer", infer),
            ("GET", "/v2", self.server),
            ("GET", "/v2/health/live", self.live),
            ("GET", "/v2/health/ready", self.is_ready),
            ("GET", "/v2/models/{name}", self.metadata),
            ("GET", version, self.metadata),
            ("GET", "/v2/models/{name}/ready", self.is_ready),
            ("GET", f"{version}/ready", self.is_ready),
            ("POST", "/identify", self.identify),
            ("POST", "/enrol", self.enrol),
            ("GET", "/identities", self.identities),
            ("DELETE", "/identities/{name:path}", self.remove_identity),
            ("DELETE", "/clips/{name:path}", self.remove_clip),
            ("GET", "/threshold", self.threshold),
            ("GET", "/metrics", self.counters),
            ("GET", "/openapi.json", self.describe),
            ("GET", "/docs", self.page),
        ]
        return [
            Route(path, _Answer(self, path, answer), methods=[method])
            for method, path, answer in table
        ]

    def refused(self, error: UserError) -> Refused:
        """Returns the error of a request that vidjax refuses; paths stay in the log."""
        text = str(error)
        if " is in use by " in text:
            status = HTTPStatus.SERVICE_UNAVAILABLE
            return Refused(status, "another process changes the gallery", 1)
        if "has nobody enrolled" in text:
            return Refused(HTTPStatus.CONFLICT, "the gallery has nobody enrolled")
        if str(self.people.gallery.folder) in text:
            LOG.error("%s", one_line(text))
            return Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the gallery is damaged: see the log")
        return unprocessable(text)

    @contextlib.asynccontextmanager
    async def life(self, app: object) -> AsyncIterator[None]:
        """Compiles and warms up beside the first requests, and ends the threads at the end."""
        del app
        warm = asyncio.create_task(self._warm())
        yield
        with contextlib.suppress(asyncio.CancelledError):
            await warm
        for thread in (*(one.batcher for one in self.served.values()), self.changes):
            await asyncio.to_thread(thread.stop)

    async def _warm(self) -> None:
        try:
            for model, batcher in self.served.values():
                await batcher.run(model.warm)
        except Exception as error:  # it never gets ready, and a platform starts it anew
            self.broken = True
            LOG.error("cannot answer: %s", one_line(str(error)))
            return
        self.ready = True
        LOG.info("ready")

    # ---- the Open Inference Protocol

    async def server(self, request: Request) -> Response:
        """Says what the server is."""
        del request
        version = importlib.metadata.version("vidjax")
        return _json({"name": "vidjax", "version": version, "extensions": ["binary_tensor_data"]})

    async def live(self, request: Request) -> Response:
        """Says that the server runs; 503 if it will never get ready."""
        del request
        if self.broken:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "it cannot answer: see the log")
        return _json({"live": True})

    async def is_ready(self, request: Request) -> Response:
        """Says if all is compiled; else 503."""
        if "name" in request.path_params:
            self._model(request)
        if not self.ready:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "not ready: still compiling", 1)
        return _json({"ready": True})

    def _model(self, request: Request) -> _Served:
        name, version = request.path_params["name"], request.path_params.get("version", "1")
        if name not in self.served or version != "1":
            known = ", ".join(self.served)
            raise Refused(HTTPStatus.NOT_FOUND, f"no such model: choose from {known}, version 1")
        return self.served[name]

    async def metadata(self, request: Request) -> Response:
        """Describes a model's tensors."""
        model, _ = self._model(request)
        await self._is_wider()
        content = {"name": model.name, "versions": ["1"], "platform": "vidjax_jax"}
        for kind, specs in (("inputs", inputs_of(model.widths)), ("outputs", model.outputs)):
            content[kind] = [
                {"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in specs
            ]
        return _json(content)

    async def infer(self, request: Request) -> Response:
        """Answers tensors by tensors."""
        model, batcher = self._model(request)
        body = await read_body(request.scope, self.limits.body_bytes)
        length = request.headers.get(protocol.HEADER)

        def read() -> tuple[protocol.Ask, Question]:
            widths = model.widths
            asked = protocol.parse(body, length, inputs_of(widths), self.limits)
            return asked, question_of(asked.tensors, widths, asked.parameters, self.limits)

        try:
            asked, question = await _parsed(read, len(body))
        except protocol.UnknownInput:
            if not await self._is_wider():
                raise
            asked, question = await _parsed(read, len(body))
        known = [one.name for one in model.outputs]
        if unknown := [name for name in asked.outputs if name not in known]:
            raise unprocessable(f"no output '{show(unknown[0])}': choose from {', '.join(known)}")
        self._check_ready()
        answer = await batcher.ask(question, len(question.clips))
        tensors = model.tensors(question, answer)
        content, size = protocol.answer(asked, model.name, tensors)
        if size is None:
            return Response(content, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(size)}
        return Response(content, headers=headers, media_type="application/octet-stream")

    async def _is_wider(self) -> bool:
        """Looks at the folder anew; returns True if the gallery has other modalities than before.

        Answers look, too, but only after what a request has besides the known ones is left out.
        """
        before = self.people.widths
        if self.ready:  # until then, the thread compiles
            await self.asked.run(self.people.gallery.refresh)
        return self.people.widths != before

    def _check_ready(self) -> None:
        if not self.ready:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "not ready: still compiling", 1)

    # ---- people by name

    async def identify(self, request: Request) -> Response:
        """Says who clips show."""
        given, asked = await self._read(request, _Identify)
        clips = list(given.values())
        question = ask(clips, asked.k, asked.fpir, asked.threshold)
        self._check_ready()
        found = await self.asked.ask(question, len(clips))
        answers = zip(given, found.answers, strict=True)
        return _json({"clips": [answers_lib.as_json(name, one) for name, one in answers]})

    async def enrol(self, request: Request) -> Response:
        """Enrols clips; all of them or none."""
        clips, asked = await self._read(request, _Enrol)
        chosen = [asked.identity is not None, asked.identities is not None, asked.strangers]
        if sum(chosen) != 1:
            raise unprocessable("name one: identity, identities {clip: name}, or strangers: true")
        shown = asked.identities if asked.identities is not None else asked.identity
        for name in asked.identities.values() if asked.identities else [shown] if shown else []:
            check_identity(str(name))
        if asked.identities and (stray := asked.identities.keys() - clips.keys()):
            raise unprocessable(f"identities: no clip '{show(min(stray))}' is given")
        self._check_ready()
        people = self.people.gallery

        def embed() -> tuple[dict[str, Enrolled], tuple[str, ...]]:
            people.refresh()  # the vectors must be as wide as those that it has now
            # Strangers, too, are no change of whom earlier answers name, but of the threshold.
            named = {} if asked.strangers else shown
            return people.to_enrol(clips, named, strangers=asked.strangers)

        waiting = self.asked.size + self.embedding
        if waiting and waiting + len(clips) > self.limits.waiting_clips:
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many clips wait: try again", 1)
        self.embedding += len(clips)
        try:
            embedded = await self.asked.run(embed)
        finally:
            self.embedding -= len(clips)
        new = await self._change(lambda: people.add(embedded[0]))
        done = Enrolment(new, len(embedded[0]) - new, embedded[1])
        return _json(done._asdict())

    async def identities(self, request: Request) -> Response:
        """Lists people in the order of their names, with the number of their clips."""
        after = request.query_params.get("after", "")
        people = await self.asked.run(lambda: self.people.gallery.identities)
        names = [name for name in people if name > after]
        listed = {name: people[name] for name in names[:LISTED]}
        return _json({"identities": listed, "more": len(names) > LISTED})

    async def remove_identity(self, request: Request) -> Response:
        """Removes a person."""
        name = request.path_params["name"]
        return await self._remove(lambda: self.people.gallery.remove(identity=name))

    async def remove_clip(self, request: Request) -> Response:
        """Removes a clip."""
        name = request.path_params["name"]
        return await self._remove(lambda: self.people.gallery.remove(clip=name))

    async def _remove(self, change: Callable[[], int]) -> Response:
        try:
            count = await self._change(change)
        except UserError as error:
            if not str(error).startswith("no "):
                raise
            raise Refused(HTTPStatus.NOT_FOUND, "no such name is enrolled") from None
        await self.asked.settle()  # an answer that was begun before may still name the person
        return _json({"removed": count})

    async def _change(self, change: Callable[[], int]) -> int:
        count = await self.changes.make(change)
        LOG.info("changed: version %d, %d clips", self.people.gallery.version, count)
        return count

    async def threshold(self, request: Request) -> Response:
        """Says when a clip gets a name."""
        try:
            given = {name: float(request.query_params[name])
                     for name in ("fpir", "threshold") if name in request.query_params}  # fmt: skip
        except ValueError:
            raise unprocessable("fpir, threshold: wanted a number") from None
        rule = await self.asked.run(
            lambda: self.people.rule(given.get("fpir"), given.get("threshold"))
        )
        found = None if rule.found is None else rule.found.to_dict()
        return _json({**answers_lib.rule_as_json(rule), "strangers": found})

    # ---- about the server

    async def counters(self, request: Request) -> Response:
        """Counts what the server has done."""
        del request
        gallery = self.people.gallery
        waiting = self.embedding + sum(one.batcher.size for one in self.served.values())
        text = self.metrics.text({
            "ready": ("1 when all is compiled.", float(self.ready)),
            "waiting_clips": ("Clips that wait to be scored or enrolled.", waiting),
            "waiting_changes": ("Changes that wait.", self.changes.waiting),
            "people": ("People of the gallery, at the last look.", len(gallery.index.names)),
            "clips": ("Clips of the gallery, at the last look.", len(gallery.clips)),
        })  # fmt: skip
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def describe(self, request: Request) -> Response:
        """Describes the requests of this server as OpenAPI."""
        del request
        return _json(openapi.describe())

    async def page(self, request: Request) -> Response:
        """Shows the description."""
        del request
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(openapi.page(), headers=policy)

    # ---- reading

    async def _read(self, request: Request, kind: Any) -> tuple[dict[str, Any], Any]:  # noqa: ANN401
        """Returns clip -> modality -> frames, and what else a body asks for, in JSON or `.npz`."""
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent in NPZ:
            body = await read_body(request.scope, self.limits.body_bytes)
            words = dict(request.query_params)
            name = words.pop("clip", None)
            if not name:
                raise unprocessable("an .npz needs the name of its clip: ?clip=NAME")
            asked = _of_words({"clips": [{"clip": name}], **words}, kind)
            read = lambda: [clip_files.read_npz_bytes(body, name, self.limits.body_bytes)]  # noqa: E731
            return await self._clips_by_name(await _parsed(read, LARGE + 1)), asked
        if sent != "application/json":
            status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
            raise Refused(status, "wanted Content-Type: application/json, or application/x-npz")
        body = await read_body(request.scope, self.limits.json_bytes)
        asked = await _parsed(lambda: protocol.decode(body, kind), len(body))
        if len(asked.clips) > self.limits.clips:
            raise unprocessable(f"a request has {self.limits.clips} clips at most")
        read = lambda: [  # noqa: E731
            clip_files.read_json(one, f"clips[{place}]") for place, one in enumerate(asked.clips)
        ]
        return await self._clips_by_name(await _parsed(read, len(body))), asked

    async def _clips_by_name(self, clips: Sequence[Clip]) -> dict[str, Any]:
        """Returns clips as `_by_name`, by the modalities that the gallery has now."""
        known = self.people.widths
        if any(key not in known for clip in clips for key in clip.modalities):
            await self._is_wider()
        return _by_name(clips, self.people.widths)


def _of_words(words: Mapping[str, object], kind: Any) -> Any:  # noqa: ANN401 (of that kind)
    """Returns the words of a query as a value of a type; numbers may be written as text."""
    try:
        return msgspec.convert(words, kind, strict=False)
    except msgspec.ValidationError as error:
        raise unprocessable(show(str(error))) from None


def _by_name(clips: Sequence[Clip], known: Collection[str]) -> dict[str, Any]:
    """Returns given name -> modality -> field -> frames, without modalities that are not `known`.

    Refused for a NaN, a name that comes twice, and a clip that has only others.
    """
    found: dict[str, Any] = {}
    for clip in clips:
        name = clip.given or clip.name
        if name in found:
            raise unprocessable(f"clip '{show(name)}' comes twice")
        own = {key: dict(fields) for key, fields in clip.modalities.items() if key in known}
        if clip.modalities and not own:
            others = show(", ".join(map(str, clip.modalities)))
            raise unprocessable(f"clip '{show(name)}' has {others}, wanted {', '.join(known)}")
        for modality, fields in own.items():
            for field, array in fields.items():
                place = f"clip '{show(name)}', {show(modality)}"
                if array.dtype.kind not in "fiu":
                    raise unprocessable(f"{place}: {field} are no numbers")
                with np.errstate(over="ignore"):
                    single = array.astype(np.float32)
                if not np.isfinite(single).all():
                    raise unprocessable(f"{place}: {field} hold a number that is not finite")
                fields[field] = single if field == "features" else array
        found[name] = own
    return found


async def _parsed(read: Callable[[], Any], size: int) -> Any:  # noqa: ANN401 (what `read` returns)
    """Returns what `read` makes of a body of `size` bytes; a thread reads a large one."""
    return await asyncio.to_thread(read) if size > LARGE else read()


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def make_app(
    gallery: Gallery,
    run: Predictor | None = None,
    limits: Limits | None = None,
    token: bytes | None = None,
) -> Guard:
    """Returns the ASGI application of a gallery.

    Args:
      gallery: opened with `sync=True`, unless a power cut may undo a change that was answered.
      run: a run whose net is served, too.
      limits: None for the default ones.
      token: who asks must send it; None for programs of this machine alone.
    """
    limits, metrics = limits or Limits(), Metrics()
    answers = Application(gallery, run, limits, metrics)
    router = Router(answers.routes(), redirect_slashes=False, lifespan=answers.life)
    return Guard(router, limits, metrics, token)
