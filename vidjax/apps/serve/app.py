"""The application: what a server answers to which request; and the server, until a signal.

    app = make_app(Gallery("people"), run=None)  # any ASGI server runs it

`/v2/...` is the Open Inference Protocol. All else is JSON about people by name; `describe` tells
programs of it. An answer is made of what the folder of the gallery holds at that moment. A removal
is answered when the disk has it and no answer under way can name the person any more.
"""

import asyncio
import contextlib
import functools
import gc
import importlib.metadata
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from types import FrameType
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import uvicorn
from msgspec import Meta, Struct
from prometheus_client import Gauge, exposition
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery.gallery import Gallery, Vectors
from vidjax.apps.serve import protocol, served_models
from vidjax.apps.serve.batcher import Batcher, Changes
from vidjax.apps.serve.limits import (
    LOG,
    Bodies,
    Guard,
    Limits,
    Metrics,
    Refused,
    one_line,
    set_clock,
    unprocessable,
)
from vidjax.apps.serve.served_models import (
    Frames,
    GalleryModel,
    Model,
    Question,
    RunModel,
    check_finite,
)
from vidjax.data import clip_files
from vidjax.data.packing import Clip
from vidjax.data.untrusted.names import clean_identity, normal_form, show
from vidjax.evaluation.predict import Predictor
from vidjax.utils import files
from vidjax.utils.errors import UserError

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
UNREAD_SECONDS = 60  # in which a client takes nothing of what is sent, and is hung up on
LISTED = 10_000  # people of one answer
LARGE = 1 << 16  # bytes of a body that a thread of its own parses
NPZ = ("application/x-npz", "application/zip", "application/octet-stream")
ClipJson = Annotated[
    dict[str, str | float | list[float | list[float]]],
    Meta(
        description="clip, its name; for each modality, as face, its frames [T, D]; and "
        "optionally more of each frame, as face_quality [T]",
        extra_json_schema={
            "required": ["clip"],
            "properties": {"clip": {"type": "string", "minLength": 1}},
        },
    ),
]
Clips = Annotated[list[ClipJson], Meta(min_length=1)]
MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
EVERYWHERE = (400, 401, 403, 500, 503)  # status of errors
ERROR = "#/components/responses/Error"
READING = (413, 415, 422, 429)  # where a body is read


class Identify(protocol.Rule, kw_only=True):
    """Clips to be named."""

    clips: Clips
    k: protocol.K = protocol.DEFAULT_K


class Enrol(Struct, forbid_unknown_fields=True):
    """Clips, and whom they show: one person, a person for each clip, or strangers."""

    clips: Clips
    identity: str | None = None
    identities: dict[str, str] | None = None
    strangers: bool = False


class Page(Struct, forbid_unknown_fields=True):
    """Where a list of people begins."""

    after: Annotated[str, Meta(description="the last name of the answer before")] = ""


class Answer(NamedTuple):
    """An answer of a server: method and path of its requests, and the function that makes it.

    `errors` are the statuses besides those of EVERYWHERE. `body` and `query` are the types of the
    body of JSON and of the words of the query.
    """

    method: str
    path: str
    answer: Callable[[Request], Awaitable[Response]]
    errors: tuple[int, ...] = ()
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None

    @property
    def about(self) -> str:
        """What the answer is, in words."""
        return str(self.answer.__doc__).partition("\n")[0]


class Application:
    """The answers of one server; `answers` lists them."""

    def __init__(
        self,
        gallery: Gallery,
        run: Predictor | None,
        bodies: Bodies,
        limits: Limits,
        metrics: Metrics,
    ):
        self.bodies, self.limits, self.metrics = bodies, limits, metrics
        self.people = GalleryModel(gallery)
        nets: list[Model] = [self.people, *([RunModel(run)] if run else [])]
        self.served: dict[str, tuple[Model, Batcher[Question, Any]]] = {
            one.name: (one, Batcher(functools.partial(served_models.answer, one), limits, metrics))
            for one in nets
        }
        _, self.asked = self.served[self.people.name]
        self.changes = Changes(limits)
        # One large body is parsed at a time: what it becomes meanwhile is not counted.
        self.reader = ThreadPoolExecutor(1, "vidjax-bodies")
        self.embedding = 0  # clips of enrolments that wait for their vectors
        self.ready = self.broken = False
        for name, about, value in (
            ("ready", "1 when all is compiled.", lambda: self.ready),
            ("waiting_clips", "Clips that wait to be scored or enrolled.", lambda: self.waiting),
            ("waiting_changes", "Changes that wait.", lambda: self.changes.waiting),
            ("people", "People at the last look.", lambda: len(gallery.index.names)),
            ("clips", "Clips at the last look.", lambda: len(gallery.clips)),
        ):
            gauge = Gauge(name, about, namespace="vidjax", registry=metrics.registry)
            gauge.set_function(value)

    @property
    def waiting(self) -> int:
        """The number of clips that wait to be scored or enrolled."""
        return self.embedding + sum(batcher.size for _, batcher in self.served.values())

    def answers(self) -> list[Answer]:
        """Returns every answer; requests look at them from the first to the last."""
        asks = (404, 409, *READING)
        return [
            *(Answer("POST", f"{x}/infer", self.infer, asks, protocol.Ask) for x in MODEL_PATHS),
            Answer("GET", "/v2", self.server),
            Answer("GET", "/v2/health/live", self.live),
            Answer("GET", "/v2/health/ready", self.is_ready),
            *(Answer("GET", path, self.metadata, (404,)) for path in MODEL_PATHS),
            *(Answer("GET", f"{path}/ready", self.is_ready, (404,)) for path in MODEL_PATHS),
            Answer("POST", "/identify", self.identify, (409, *READING), Identify),
            Answer("POST", "/enrol", self.enrol, (*READING, 507), Enrol),
            Answer("GET", "/identities", self.identities, (422,), query=Page),
            Answer("DELETE", "/identities/{name:path}", self.remove_identity, (404, 429, 507)),
            Answer("DELETE", "/clips/{name:path}", self.remove_clip, (404, 429, 507)),
            Answer("GET", "/threshold", self.threshold, (409, 422), query=protocol.Rule),
            Answer("GET", "/metrics", self.counters),
            Answer("GET", "/openapi.json", self.describe),
        ]

    @contextlib.asynccontextmanager
    async def life(self, app: object) -> AsyncIterator[None]:
        """Compiles during the first requests, and ends the threads at the end."""
        del app
        warm = asyncio.create_task(self._warm())
        yield
        with contextlib.suppress(asyncio.CancelledError):
            await warm
        for thread in (*(batcher for _, batcher in self.served.values()), self.changes):
            await asyncio.to_thread(thread.stop)
        self.reader.shutdown()

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

    async def server(self, _: Request) -> Response:
        """Says what the server is."""
        version = importlib.metadata.version("vidjax")
        return _json({"name": "vidjax", "version": version, "extensions": ["binary_tensor_data"]})

    async def live(self, _: Request) -> Response:
        """Says that the server runs; 503 if it will never get ready."""
        if self.broken:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "it cannot answer: see the log")
        return _json({"live": True})

    async def is_ready(self, request: Request) -> Response:
        """Says that all programs are compiled; 503 until then."""
        if "model" in request.path_params:
            self._model(request)
        self._check_ready()
        return _json({"ready": True})

    def _check_ready(self) -> None:
        if not self.ready:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "not ready: still compiling", 1)

    def _model(self, request: Request) -> tuple[Model, Batcher[Question, Any]]:
        name, version = request.path_params["model"], request.path_params.get("version", "1")
        if name not in self.served or version != "1":
            known = ", ".join(self.served)
            raise Refused(HTTPStatus.NOT_FOUND, f"no such model: choose from {known}, version 1")
        return self.served[name]

    async def metadata(self, request: Request) -> Response:
        """Describes a model's tensors."""
        model, _ = self._model(request)
        content = {"name": model.name, "versions": ["1"], "platform": "vidjax_jax"}
        for kind, specs in (("inputs", served_models.inputs(model)), ("outputs", model.outputs)):
            content[kind] = [one._asdict() for one in specs]
        return _json(content)

    async def infer(self, request: Request) -> Response:
        """Answers tensors by tensors."""
        model, batcher = self._model(request)
        body = await self.bodies.read(request, self.limits.body_bytes)
        length = request.headers.get(protocol.HEADER)

        def read() -> tuple[protocol.Ask, Question]:
            asked, tensors = protocol.parse(body, length, served_models.inputs(model), self.limits)
            protocol.check_outputs(asked, model.outputs)
            return asked, served_models.question(model, tensors, asked.parameters, self.limits)

        asked, question = await self._parsed(read, large=len(body) > LARGE)
        self.bodies.hold(request.scope, len(body) + served_models.count_bytes(question.clips))
        self._check_ready()
        if timeout := asked.parameters.timeout:
            set_clock(request.scope, min(timeout / 1e6, self.limits.answer_seconds))
        answer = await batcher.ask(question, len(question.clips))
        content, size = protocol.answer(asked, model.name, model.tensors(question, answer))
        if size is None:
            return Response(content, media_type="application/json")
        headers = {protocol.HEADER: str(size)}
        return Response(content, headers=headers, media_type="application/octet-stream")

    # ---- people by name

    async def identify(self, request: Request) -> Response:
        """Says who clips show; null is unknown."""
        clips, asked = await self._read(request, Identify)
        question = Question(clips, asked.k, asked.fpir, asked.threshold)
        self._check_ready()
        found = await self.asked.ask(question, len(clips))
        answers = zip(clips, found.answers, strict=True)
        return _json({"clips": [answers_lib.as_json(name, one) for name, one in answers]})

    async def enrol(self, request: Request) -> Response:
        """Enrols clips; all of them or none."""
        clips, asked = await self._read(request, Enrol)
        chosen = [asked.identity is not None, asked.identities is not None, asked.strangers]
        if sum(chosen) != 1:
            raise unprocessable("name one: identity, identities {clip: name}, or strangers: true")
        # Strangers, too, are no change of whom earlier answers name, but of the threshold.
        shown = {} if asked.strangers else asked.identities or asked.identity
        for name in shown.values() if isinstance(shown, dict) else [shown]:
            clean_identity(str(name))
        if asked.identities and (stray := asked.identities.keys() - clips.keys()):
            raise unprocessable(f"identities: no clip '{show(min(stray))}' is given")
        self._check_ready()
        people = self.people.gallery

        def embed() -> Vectors:
            people.refresh()  # the vectors must be as wide as those that it has now
            return people.embed(clips)

        waiting = self.asked.size + self.embedding
        if waiting and waiting + len(clips) > self.limits.waiting_clips:
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many clips wait: try again", 1)
        self.embedding += len(clips)
        try:
            vectors = await self.asked.run(embed)
        finally:
            self.embedding -= len(clips)
        enrol = functools.partial(people.enrol, vectors, shown, strangers=asked.strangers)
        return _json((await self._change(request, enrol))._asdict())

    async def identities(self, request: Request) -> Response:
        """Lists people and their numbers of clips by name, 10,000 at a time."""
        after = normal_form(_of_words(request.query_params, Page).after)
        self._check_ready()
        people = await self.asked.run(lambda: self.people.gallery.identities)
        names = [name for name in people if name > after]
        listed = {name: people[name] for name in names[:LISTED]}
        return _json({"identities": listed, "more": len(names) > LISTED})

    async def remove_identity(self, request: Request) -> Response:
        """Removes a person with all clips."""
        name = request.path_params["name"]
        return await self._remove(request, lambda: self.people.gallery.remove(identity=name))

    async def remove_clip(self, request: Request) -> Response:
        """Removes a clip."""
        name = request.path_params["name"]
        return await self._remove(request, lambda: self.people.gallery.remove(clip=name))

    async def _remove(self, request: Request, change: Callable[[], int]) -> Response:
        self._check_ready()
        count = await self._change(request, change)
        await self.asked.settle()  # an answer that was begun before may still name the person
        return _json({"removed": count})

    async def _change(self, request: Request, change: Callable[[], T]) -> T:
        limits = self.limits
        set_clock(request.scope, limits.change_seconds + limits.answer_seconds)
        done = await self.changes.make(change)
        LOG.info("changed: version %d", self.people.gallery.version)
        return done

    async def threshold(self, request: Request) -> Response:
        """Says when a clip gets a name."""
        asked = _of_words(request.query_params, protocol.Rule)
        self._check_ready()
        rule = await self.asked.run(
            lambda: self.people.gallery.rule(fpir=asked.fpir, threshold=asked.threshold)
        )
        found = None if rule.found is None else rule.found.to_dict()
        return _json({**answers_lib.rule_as_json(rule), "strangers": found})

    # ---- about the server

    async def counters(self, _: Request) -> Response:
        """Counts what the server has done, for Prometheus."""
        content = exposition.generate_latest(self.metrics.registry)
        return Response(content, headers={"content-type": exposition.CONTENT_TYPE_LATEST})

    async def describe(self, _: Request) -> Response:
        """Describes the requests of this server as OpenAPI."""
        return _json(describe(self.answers(), [*self.served], self.people.widths))

    # ---- reading

    async def _read(self, request: Request, kind: Any) -> tuple[dict[str, Any], Any]:  # noqa: ANN401
        """Returns clip -> modality -> frames, and what else a body asks for, in JSON or `.npz`."""
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent not in (*NPZ, "application/json"):
            status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
            raise Refused(status, "wanted Content-Type: application/json, or application/x-npz")
        npz = sent in NPZ
        limit = self.limits.body_bytes if npz else self.limits.json_bytes
        body = await self.bodies.read(request, limit)
        words = dict(request.query_params)
        name = words.pop("clip", "")
        if npz:
            if not name:
                raise unprocessable("an .npz needs the name of its clip: ?clip=NAME")
            size = await self._parsed(lambda: files.npz_bytes(body, limit), large=True)
            self.bodies.hold(request.scope, len(body) + 2 * size)

        def read() -> tuple[dict[str, Any], Any]:
            if npz:
                asked = _of_words({"clips": [{"clip": name}], **words}, kind)
                clips = [clip_files.read_npz_bytes(body, name, limit)]
            else:
                asked = protocol.decode(body, kind)
                if len(asked.clips) > self.limits.clips:
                    raise unprocessable(f"a request has {self.limits.clips} clips at most")
                places = enumerate(asked.clips)
                clips = [clip_files.read_json(one, f"clips[{n}]") for n, one in places]
            asked.clips = []  # lists of numbers: the frames take less
            return _by_name(clips, self.people.widths, self.limits), asked

        clips, asked = await self._parsed(read, large=npz or len(body) > LARGE)
        self.bodies.hold(request.scope, 2 * served_models.count_bytes(clips))
        return clips, asked

    async def _parsed(self, read: Callable[[], T], *, large: bool) -> T:
        """Returns what `read` makes of a body; a thread reads a large one."""
        if large:
            return await asyncio.get_running_loop().run_in_executor(self.reader, read)
        return read()


def _of_words(words: Mapping[str, object], kind: Any) -> Any:  # noqa: ANN401 (of that kind)
    """Returns the words of a query as a value of a type; numbers may be written as text."""
    try:
        return msgspec.convert(dict(words), kind, strict=False)
    except msgspec.ValidationError as error:
        raise unprocessable(show(str(error))) from None


def _by_name(
    clips: Sequence[Clip], widths: Mapping[str, int], limits: Limits
) -> dict[str, dict[str, Frames]]:
    """Returns given name -> modality -> field -> frames, of the modalities in `widths`.

    Refused for a NaN, a name that comes twice, another width, too many frames, and a clip that has
    only other modalities.
    """
    found: dict[str, dict[str, Frames]] = {}
    for clip in clips:
        name = clip.given or clip.name
        place = f"clip '{show(name)}'"
        if name in found:
            raise unprocessable(f"{place} comes twice")
        found[name] = {}
        for modality in widths.keys() & clip.modalities.keys():
            frames = dict(clip.modalities[modality])
            check_finite(frames, f"{place}, {modality}")
            features = np.atleast_1d(frames["features"]).astype(np.float32, copy=False)
            frames["features"] = features
            problem = ""
            if features.size and features.shape[-1] != widths[modality]:
                problem = f"features are {features.shape[-1]} wide, wanted {widths[modality]}"
            elif features.ndim > 1 and len(features) > limits.frames:
                problem = f"{len(features):,} frames: {limits.frames:,} are the most"
            if problem:
                raise unprocessable(f"{place}, {modality}: {problem}")
            found[name][modality] = frames
        if clip.modalities and not found[name]:
            others = show(", ".join(map(str, clip.modalities)))
            raise unprocessable(f"{place} has {others}, wanted {', '.join(widths)}")
    return found


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
      gallery: the people.
      run: a run whose net is served, too.
      limits: None for the default ones.
      token: who asks must send it; None for programs of this machine alone.
    """
    limits, metrics = limits or Limits(), Metrics()
    bodies = Bodies(limits)
    answers = Application(gallery, run, bodies, limits, metrics)
    routes = [Route(one.path, one.answer, methods=[one.method]) for one in answers.answers()]
    router = Router(routes, redirect_slashes=False, lifespan=answers.life)
    return Guard(router, bodies, limits, metrics, token)


def describe(
    answers: Sequence[Answer], models: Sequence[str], widths: Mapping[str, int]
) -> dict[str, Any]:
    """Returns the description for `/openapi.json`; `widths` are modality -> width of clips."""
    kinds = [kind for one in answers for kind in (one.body, one.query) if kind]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for kind in (Identify, Enrol):
        clip = schemas[kind.__name__]["properties"]["clips"]["items"]["properties"]
        for name, width in widths.items():
            row = {"type": "array", "items": {"type": "number"}}
            clip[name] = {"type": "array", "items": {**row, "minItems": width, "maxItems": width}}
    text: dict[str, object] = {"type": "string"}
    within = {"model": {**text, "enum": models}, "version": {**text, "enum": ["1"]}}
    paths: dict[str, dict[str, object]] = {}
    for one in answers:
        path = one.path.replace(":path", "")
        words = schemas[one.query.__name__]["properties"] if one.query else {}
        if one.body in (Identify, Enrol):
            about = f"of an .npz; its query takes the other fields of {one.body.__name__}, too"
            words = {"clip": {**text, "description": about}}
        parameters = [{"name": name, "in": "query", "schema": kind} for name, kind in words.items()]
        parameters += [
            {"name": name, "in": "path", "required": True, "schema": within.get(name, text)}
            for name in re.findall(r"{(\w+)}", path)
        ]
        errors = {str(status): {"$ref": ERROR} for status in (*EVERYWHERE, *one.errors)}
        described: dict[str, object] = {
            "summary": one.about,
            "parameters": parameters,
            "responses": {"200": {"description": "done"}, **errors},
        }
        if one.body:
            schema = {"$ref": f"#/components/schemas/{one.body.__name__}"}
            content: dict[str, object] = {"application/json": {"schema": schema}}
            if one.body is not protocol.Ask:
                content["application/x-npz"] = {"schema": {**text, "format": "binary"}}
            described["requestBody"] = {"required": True, "content": content}
        paths.setdefault(path, {})[one.method.lower()] = described
    error = {"type": "object", "properties": {"error": text}, "required": ["error"]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "vidjax", "version": importlib.metadata.version("vidjax")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                "Error": {
                    "description": "one line that says what is wrong",
                    "content": {"application/json": {"schema": error}},
                }
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; port 0 is any free one. UserError if it cannot."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # else a client that reads nothing keeps its connection
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}:{port}: {error.strerror}\nname another --host or --port"
        ) from None
    return listener


def make_config(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    """Returns uvicorn's settings."""
    return uvicorn.Config(
        app,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        headers=[("x-content-type-options", "nosniff")],
        limit_concurrency=limits.connections,
        backlog=min(2 * limits.connections, 1024),
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=int(limits.drain_seconds),
    )


class Server(uvicorn.Server):
    """A server that ends `end_seconds` after a signal, whatever its threads do."""

    def __init__(self, app: ASGIApp, limits: Limits):
        super().__init__(make_config(app, limits))
        self._end = threading.Timer(limits.end_seconds, self._give_up)
        self._end.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end; requests under way are answered."""
        if not self.should_exit:
            self._end.start()
        super().handle_exit(sig, frame)

    def _give_up(self) -> None:
        """Ends the process without its threads; a change of a gallery is made, or is not."""
        LOG.error("ended: work under way was cut off")
        os._exit(1)


def serve(app: ASGIApp, listener: socket.socket, limits: Limits) -> bool:
    """Answers requests until SIGINT or SIGTERM; returns False if requests were cut off.

    A process that does not end in time is ended with the exit code 1.
    """
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.ERROR)  # warnings about strangers' requests
    gc.freeze()  # modules and people live on: no collection looks at them
    server = Server(app, limits)
    # uvicorn handles a signal, and raises it again when all is answered: then it does nothing.
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return server.started and not server.force_exit
