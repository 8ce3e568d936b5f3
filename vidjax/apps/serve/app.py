"""Makes the web application with its endpoints.

    app = make_app(Gallery("people"))  # for any ASGI server

The endpoints take and return JSON with names of people. `/openapi.json` describes them. Every
answer uses the current content of the gallery's folder. The server confirms a removal when the
removal is on the disk, and when all answers that could still contain the person are finished.
"""

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct
from prometheus_client import Gauge, exposition
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from vidjax.apps.gallery import answers as answers_lib, changes, verification
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.serve import batcher
from vidjax.apps.serve.batcher import DEFAULT_K, Batcher, Changes, Frames, Question
from vidjax.apps.serve.limits import CHANGED, LOG, Guard, Refused, one_line, set_clock
from vidjax.apps.server_limits import Limits
from vidjax.data import clip_files
from vidjax.data.packed_clips import is_finite
from vidjax.data.packing import Clip
from vidjax.utils import files
from vidjax.utils.errors import UserError, check_argument
from vidjax.utils.names import normal_form, show
from vidjax.utils.version import VERSION

T = TypeVar("T")
MAX_LISTED_PEOPLE = 10_000  # per answer
LARGE_BYTES = 1 << 16  # larger bodies are parsed in a thread
NPZ_TYPES = ("application/x-npz", "application/zip", "application/octet-stream")
ClipJson = Annotated[
    dict[str, str | float | list[float | list[float]]],
    Meta(
        description="The field clip is the name of the clip. Every other field is a modality, such "
        "as face: a list of T frames with D features each. A number for each frame, such as "
        "face_quality, is optional.",
        extra_json_schema={
            "required": ["clip"],
            "properties": {"clip": {"type": "string", "minLength": 1}},
        },
    ),
]
ClipList = Annotated[list[ClipJson], Meta(min_length=1)]
K = Annotated[int, Meta(ge=1, le=1000, description="largest number of identities per clip")]
Fpir = Annotated[
    float, Meta(gt=0, lt=1, description="the largest share of strangers who may wrongly get a name")
]
Fmr = Annotated[
    float, Meta(gt=0, lt=1, description="the largest share of other people's clips to accept")
]
Probability = Annotated[
    float, Meta(gt=0, le=1, description="the lowest probability of a name, instead of fpir")
]
COMMON_ERRORS = (400, 401, 403, 500, 503)  # HTTP statuses of errors of every endpoint
REMOVAL_ERRORS = (404, 409, 429, 507)
BODY_ERRORS = (413, 415, 422, 429)  # HTTP statuses of errors of endpoints that read a body


class RuleParameters(Struct, forbid_unknown_fields=True, kw_only=True):
    """The rule by which a clip gets a name. By default, the gallery chooses the rule."""

    fpir: Fpir | None = None
    threshold: Probability | None = None


class IdentifyRequest(RuleParameters, kw_only=True):
    """A request to identify clips."""

    clips: ClipList
    k: K = DEFAULT_K


class VerifyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """A request to decide if clips show the person `identity`."""

    clips: ClipList
    identity: str
    fmr: Fmr | None = None


class EnrolRequest(Struct, forbid_unknown_fields=True):
    """A request to enrol clips. One of `identity`, `identities` and `strangers` must be given.

    Attributes:
      clips: the clips; a clip is a dict of its name and its frames.
      identity: the person that all clips show.
      identities: clip -> person, if the clips show several people.
      strangers: True if the clips show people who must not get a name.
    """

    clips: ClipList
    identity: str | None = None
    identities: dict[str, str] | None = None
    strangers: bool = False


class PageQuery(Struct, forbid_unknown_fields=True):
    """The query of a request for the list of people, which the server sends page by page."""

    after: Annotated[str, Meta(description="the last name of the previous page")] = ""


class Endpoint(NamedTuple):
    """An endpoint of the server: a method and a path, and the function that answers requests."""

    method: str
    path: str  # the path, with parameters such as `{name}`
    # Answers a request. The first line of its docstring appears in the OpenAPI description.
    answer: Callable[[Request], Awaitable[Response]]
    # The HTTP statuses of errors, in addition to COMMON_ERRORS, and with a body to BODY_ERRORS.
    errors: tuple[int, ...] = ()
    # The type of the fields: of a POST in the body, of another method in the query.
    takes: type[Struct] | None = None
    result: type[Struct] | None = None  # the type of the JSON in the answer


class Application(Guard):
    """A server: its state, and the functions that answer its requests.

    The first line of each function's docstring appears in `/openapi.json`.
    """

    def __init__(self, gallery: Gallery, limits: Limits, token: bytes | None):
        routes = [Route(x.path, x.answer, methods=[x.method]) for x in self.list_endpoints()]
        router = Router(routes, redirect_slashes=False, lifespan=self.run_lifespan)
        super().__init__(router, gallery, limits, token)
        self._check_gallery()  # loads the run of the gallery, so that errors appear at the start
        self.batcher = Batcher(partial(batcher.answer, gallery), limits, self.metrics)
        self.changes = Changes(limits)
        # Large bodies are parsed one at a time, because the memory of a parsed body is counted only
        # after parsing.
        self.reader = ThreadPoolExecutor(1, "vidjax-bodies")
        self.ready = self.broken = False
        for name, about, value in (
            ("ready", "1 if all programs are compiled.", lambda: self.ready),
            ("waiting_clips", "Clips to score or to enrol that wait.", lambda: self.batcher.size),
            ("waiting_changes", "Changes that wait.", lambda: self.changes.waiting),
            ("people", "People when the gallery was last read.", lambda: len(gallery.index.names)),
            ("clips", "Clips when the gallery was last read.", lambda: len(gallery.clips)),
        ):
            gauge = Gauge(name, about, namespace="vidjax", registry=self.metrics.registry)
            gauge.set_function(value)

    def list_endpoints(self) -> list[Endpoint]:
        """Returns all endpoints. The first endpoint that matches a request answers it."""
        return [
            Endpoint("GET", "/v2/health/live", self.live),
            Endpoint("GET", "/v2/health/ready", self.is_ready),
            Endpoint("POST", "/identify", self.identify, (409,), IdentifyRequest),
            Endpoint("POST", "/verify", self.verify, (404, 409), VerifyRequest),
            Endpoint("POST", "/enrol", self.enrol, (409, 507), EnrolRequest, changes.Enrolment),
            Endpoint("GET", "/identities", self.identities, (422,), PageQuery),
            Endpoint("DELETE", "/identities/{name:path}", self.remove_identity, REMOVAL_ERRORS),
            Endpoint("DELETE", "/clips/{name:path}", self.remove_clip, REMOVAL_ERRORS),
            Endpoint("GET", "/threshold", self.threshold, (409, 422), RuleParameters),
            Endpoint("GET", "/metrics", self.counters),
            Endpoint("GET", "/openapi.json", self.describe),
        ]

    @contextlib.asynccontextmanager
    async def run_lifespan(self, _: object) -> AsyncIterator[None]:
        """Compiles all programs when the server starts, and ends all threads when it stops."""
        warm = asyncio.create_task(self._warm())
        yield
        with contextlib.suppress(asyncio.CancelledError):
            await warm
        for thread in (self.batcher.thread, self.changes.thread):
            await asyncio.to_thread(thread.shutdown)
        self.reader.shutdown()

    async def _warm(self) -> None:
        try:
            await self.batcher.run(lambda: batcher.warm(self.gallery))
        except Exception as error:  # then `live` fails, so Kubernetes can restart the server
            self.broken = True
            LOG.error("cannot answer: %s", one_line(str(error)))
            return
        self.ready = True
        LOG.info("ready")

    # ---- probes

    async def live(self, _: Request) -> Response:
        """Returns status 200 while the server runs, and 503 if its start has failed."""
        if self.broken:
            raise Refused(503, "the start of the server has failed: see the log")
        return _encode_json({"live": True})

    async def is_ready(self, _: Request) -> Response:
        """Returns status 200 if the server can answer requests, and 503 otherwise."""
        self._check_ready()
        if self.leaving.is_set():
            raise Refused(503, "the server is shutting down: ask another server")
        try:
            await asyncio.to_thread(self._check_gallery)
        except (UserError, OSError):  # is not logged, because any client may send this request
            raise Refused(503, "the gallery cannot be read", 1) from None
        return _encode_json({"ready": True})

    def _check_gallery(self) -> None:
        """Raises an error if the gallery or the model that makes its embeddings cannot be read."""
        self.gallery.refresh()
        _ = self.widths

    @property
    def widths(self) -> dict[str, int]:
        """The modalities that the gallery reads: modality -> width of the features of a frame."""
        return self.gallery.source.reads[0]

    def _check_ready(self) -> None:
        if not self.ready:
            raise Refused(503, "the server still compiles its programs: try again", 1)

    # ---- people by name

    async def identify(self, request: Request) -> Response:
        """Identifies the person in each clip. An unknown person is null."""
        clips, body = await self._read(request, IdentifyRequest)
        answers = await self.batcher.ask(Question(clips, body.k, body.fpir, body.threshold))
        return _encode_json({"clips": [*map(answers_lib.as_json, clips, answers)]})

    async def verify(self, request: Request) -> Response:
        """Decides if each clip shows the given person."""
        clips, body = await self._read(request, VerifyRequest)
        vectors = await self.batcher.run(lambda: self.gallery.embed(clips), len(clips))

        def answer() -> dict[str, object]:
            identity = normal_form(body.identity)
            done = self.gallery.verify_person(vectors, identity, fmr=body.fmr)
            clips = [verification.as_json(*pair, identity) for pair in done.matches.items()]
            return {"clips": clips, "rule": done.rule.to_dict(), "misfits": done.misfits}

        return _encode_json(await self.batcher.run(answer))

    async def enrol(self, request: Request) -> Response:
        """Enrols clips of people or strangers. If one clip is wrong, no clip is enrolled."""
        clips, body = await self._read(request, EnrolRequest)
        if (body.identity is not None) + bool(body.identities) + body.strangers != 1:
            text = "send either identity, identities ({clip: name}) or strangers (true)"
            raise Refused(422, text)
        identities = body.identities or {}
        people_of_clips = {} if body.strangers else identities or body.identity
        changes.check_identities(people_of_clips)  # before vectors are computed
        if stray := identities.keys() - clips.keys():
            place = f"clip '{show(min(stray))}' is missing: "
            raise Refused(422, "each key of 'identities' must be a key of 'clips'", place=place)
        vectors = await self.batcher.run(lambda: self.gallery.embed(clips), len(clips))
        done = await self._change(
            request, lambda: self.gallery.enrol(vectors, people_of_clips, strangers=body.strangers)
        )
        return _encode_json(done)

    async def identities(self, request: Request) -> Response:
        """Lists up to 10,000 people and their clip counts. `?after=NAME` starts after NAME."""
        after = normal_form(_convert(request.query_params, PageQuery).after)
        self._check_ready()
        people = await self.batcher.run(lambda: self.gallery.identities)
        names = [name for name in people if name > after]
        listed = {name: people[name] for name in names[:MAX_LISTED_PEOPLE]}
        return _encode_json({"identities": listed, "more": len(names) > MAX_LISTED_PEOPLE})

    async def remove_identity(self, request: Request) -> Response:
        """Removes a person and all their clips."""
        return await self._remove(request, "identity")

    async def remove_clip(self, request: Request) -> Response:
        """Removes a clip."""
        return await self._remove(request, "clip")

    async def _remove(self, request: Request, kind: str) -> Response:
        self._check_ready()
        removed = {kind: request.path_params["name"]}
        count = await self._change(request, lambda: self.gallery.remove(**removed))
        request.scope["vidjax.clips"] = count
        await self.batcher.run(lambda: None)  # waits for answers that may contain the name
        await asyncio.sleep(0)  # the event loop delivers these answers
        return _encode_json({"removed": count})

    async def _change(self, request: Request, change: Callable[[], T]) -> T:
        set_clock(request.scope, self.limits.change_seconds + self.limits.answer_seconds)
        result = await self.changes.make(change)
        request.scope[CHANGED] = True  # 429 would say that the request can be sent again
        LOG.info("changed: version %d", self.gallery.version)
        return result

    async def threshold(self, request: Request) -> Response:
        """Returns the rule and the threshold by which a clip gets a name."""
        query = _convert(request.query_params, RuleParameters)
        self._check_ready()
        rule = await self.batcher.run(lambda: self.gallery.rule(**msgspec.structs.asdict(query)))
        strangers = None if rule.threshold is None else rule.threshold.to_dict()
        return _encode_json({**rule.to_dict(), "strangers": strangers})

    # ---- about the server

    async def counters(self, _: Request) -> Response:
        """Returns the counters of the server in the format of Prometheus."""
        content = exposition.generate_latest(self.metrics.registry)
        return Response(content, headers={"content-type": exposition.CONTENT_TYPE_LATEST})

    async def describe(self, _: Request) -> Response:
        """Returns the OpenAPI description of the server."""
        return _encode_json(describe(self.list_endpoints(), self.widths, self.limits))

    # ---- reading

    async def _read(self, request: Request, kind: Any) -> tuple[dict[str, Any], Any]:  # noqa: ANN401
        """Reads a request with clips; returns the clips, and the other fields.

        The clips are the result of `_check_clips`. The fields are an object of the class `kind`.
        The body is JSON with all fields, or an `.npz` file of one clip or more. With an `.npz`
        file, the query of the URL has the other fields, and `clip=NAME`, the name of a lone clip.
        """
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in (*NPZ_TYPES, "application/json"):
            raise Refused(415, "send Content-Type: application/json or application/x-npz")
        npz = content_type in NPZ_TYPES
        limit = self.limits.body_bytes if npz else self.limits.json_bytes
        body = await self.bodies.read(request, limit)
        words = dict(request.query_params)
        name = words.pop("clip", "")
        if request.query_params and not npz:
            raise Refused(422, "the URL has a query: with JSON, send all fields in the body")
        loop = asyncio.get_running_loop()
        if npz:
            try:
                size = await loop.run_in_executor(self.reader, files.npz_bytes, body, limit)
            except UserError as error:
                # curl -d leaves out bytes such as NUL, which every .npz contains.
                hint = "" if b"\0" in body else ". With curl, use --data-binary instead of -d"
                raise UserError(f"{error}{hint}") from None
            self.bodies.hold(request.scope, len(body) + 2 * size)

        def read() -> tuple[dict[str, Any], Any]:
            if npz:
                fields = _convert({"clips": [{"clip": name}], **words}, kind)
                found = clip_files.read_npz_bytes(body, name, limit, self.gallery.origin.cards)
            else:
                fields = _convert(body, kind)
                rows = enumerate(fields.clips)
                found = (clip_files.read_json(clip, f"clips[{n}]") for n, clip in rows)
            most = self.limits.clips
            clips = [*itertools.islice(found, most + 1)]
            if not 0 < len(clips) <= most:
                count = "too many" if clips else "no"
                raise Refused(422, f"the request has {count} clips: send 1 to {most}")
            fields.clips = []  # frees lists of numbers, which take more memory than arrays
            return _check_clips(clips, self.widths, self.limits), fields

        is_large = npz or len(body) > LARGE_BYTES
        clips, fields = await loop.run_in_executor(self.reader, read) if is_large else read()
        self.bodies.hold(request.scope, 2 * batcher.count_bytes(clips))
        request.scope["vidjax.clips"] = len(clips)
        self._check_ready()
        return clips, fields


def _convert(given: bytes | Mapping[str, object], kind: Any) -> Any:  # noqa: ANN401 (of this kind)
    """Converts a JSON body, or the query of a request, to an object of the class `kind`.

    A query is name -> value. Text such as "5" in a query becomes a number. Raises Refused if
    `given` does not fit the class.
    """
    try:
        if isinstance(given, bytes):
            return msgspec.json.decode(given, type=kind)
        return msgspec.convert(dict(given), kind, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        text = show(str(error)).replace("Input data was truncated", "the JSON ends too early")
    except RecursionError:
        raise Refused(422, "the JSON is nested too deeply: see /openapi.json") from None
    if "unknown field" in text and " - at `$" not in text:  # not of a nested object
        text += f": choose from {', '.join(kind.__struct_fields__)}"
    if not isinstance(given, bytes):
        raise Refused(422, "see /openapi.json", place=f"the query of the URL is wrong: {text}: ")
    nan = re.search(rb"\b(NaN|Infinity)\b", given) and "invalid character" in text
    hint = "NaN and Infinity are not allowed" if nan else "see /openapi.json"
    raise Refused(422, hint, place=f"{text}: ")


def _check_clips(
    clips: Sequence[Clip], widths: Mapping[str, int], limits: Limits
) -> dict[str, dict[str, Frames]]:
    """Checks the clips of a request; returns clip -> modality -> field -> array [T, ...].

    T is the number of frames. Modalities, such as face, that the gallery does not use are left out.
    `widths` are modality -> width of its features. Raises Refused if two clips have the same name,
    or if a clip has no modality of the gallery, too many frames, a wrong width, or values that are
    not finite.
    """
    checked: dict[str, dict[str, Frames]] = {}
    for clip in clips:
        name = clip.given or clip.name
        place = f"clip '{show(name)}'"
        if name in checked:
            raise Refused(422, "occurs twice: rename one of the two clips", place=f"{place} ")
        checked[name] = {}
        for modality in widths.keys() & clip.modalities.keys():
            frames = dict(clip.modalities[modality])
            frames["features"] = np.atleast_1d(frames["features"])
            if problem := _find_problem(frames, widths[modality], limits.frames):
                raise Refused(422, f"{modality}: {problem}", place=f"{place}, ")
            frames["features"] = frames["features"].astype(np.float32, copy=False)
            checked[name][modality] = frames
        if clip.modalities and not checked[name]:
            place += f" has only {show(', '.join(map(str, clip.modalities)))}, but "
            text = f"the gallery uses {', '.join(widths)}: send one of these modalities"
            raise Refused(422, text, place=place)
    return checked


def _find_problem(frames: Frames, width: int, most: int) -> str:
    """Returns what is wrong with the frames of a clip in one modality, or "".

    `width` is the right width of the features. `most` is the largest number of frames.
    """
    for field, array in frames.items():
        if array.dtype.kind not in "fiu":
            return f"the values of {field} must be numbers"
        if not is_finite(array).all():
            return f"a value of {field} is not finite: remove the frame"
    features = frames["features"]
    if features.size and features.shape[-1] != width:
        return f"features are {features.shape[-1]} wide, but must be {width}"
    if features.ndim > 1 and len(features) > most:
        return f"there are {len(features):,} frames: send at most {most:,}"
    return ""


def _encode_json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def make_app(
    gallery: Gallery, limits: Limits | None = None, token: bytes | None = None
) -> Application:
    """Makes an ASGI application that serves a gallery.

    `token` is the secret that clients must send. If it is None, the server answers only programs
    on this machine.
    """
    check_argument("make_app: gallery", gallery, Gallery, "a gallery: vidjax.Gallery(FOLDER)")
    limits = limits or Limits()
    gallery.lock_seconds = limits.lock_seconds
    return Application(gallery, limits, token)


def describe(
    endpoints: Sequence[Endpoint], widths: Mapping[str, int], limits: Limits
) -> dict[str, Any]:
    """Returns the OpenAPI description of a server as values for JSON.

    `widths` are modality -> width of its features. `info["x-limits"]` of the result contains the
    limits of the server.
    """
    kinds = [kind for point in endpoints for kind in (point.takes, point.result) if kind]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    text: dict[str, object] = {"type": "string"}
    paths: dict[str, dict[str, object]] = {}
    for point in endpoints:
        path = point.path.replace(":path", "")
        words = schemas[point.takes.__name__]["properties"] if point.takes else {}
        done: dict[str, object] = {"description": "done"}
        if point.result:
            done["content"] = _refer_to(point.result)
        described: dict[str, object] = {"summary": str(point.answer.__doc__).partition("\n")[0]}
        statuses = [*COMMON_ERRORS, *point.errors]
        if point.takes and point.method == "POST":  # a request with clips
            statuses += BODY_ERRORS
            clip = words["clips"]["items"]["properties"]
            for name, width in widths.items():
                row = {"type": "array", "items": {"type": "number"}}
                row |= {"minItems": width, "maxItems": width}
                clip[name] = {"type": "array", "items": row}
            rest = ", ".join(sorted(words.keys() - {"clips", "identities"}))
            about = f"the name of a single clip in an .npz; with an .npz, the query may have {rest}"
            words = {"clip": {**text, "description": about}}
            npz = {"schema": {**text, "format": "binary"}}
            content = {**_refer_to(point.takes), "application/x-npz": npz}
            described["requestBody"] = {"required": True, "content": content}
        parameters = [{"name": name, "in": "query", "schema": kind} for name, kind in words.items()]
        parameters += [
            {"name": name, "in": "path", "required": True, "schema": text}
            for name in re.findall(r"{(\w+)}", path)
        ]
        errors = {str(status): {"$ref": "#/components/responses/Error"} for status in statuses}
        described |= {"parameters": parameters, "responses": {"200": done, **errors}}
        paths.setdefault(path, {})[point.method.lower()] = described
    error = {"type": "object", "properties": {"error": text}, "required": ["error"]}
    content_of_errors = {"application/json": {"schema": error}}
    about = "a description of the error in a single line"
    return {
        "openapi": "3.1.0",
        "info": {"title": "vidjax", "version": VERSION, "x-limits": limits},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {"Error": {"description": about, "content": content_of_errors}},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _refer_to(kind: type[Struct]) -> dict[str, object]:
    """Returns the description of a body: JSON of the class `kind`."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
