"""The description of what a server answers, as OpenAPI 3.1, and as a page without scripts."""

import html
import importlib.metadata
import json
from collections.abc import Mapping

FEATURES = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
CLIPS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["clip"],
        "properties": {"clip": {"type": "string"}},
        "additionalProperties": FEATURES,
        "description": "a clip: its name, and for each modality, as face, its frames [T, D]; "
        "face_quality [T] is optional",
    },
}
RULE = {
    "fpir": {"type": "number", "description": "share of strangers who may get a name"},
    "threshold": {"type": "number", "description": "instead: the lowest probability of a name"},
}
IDENTIFY = {"clips": CLIPS, "k": {"type": "integer", "default": 5}, **RULE}
ENROL = {
    "clips": CLIPS,
    "identity": {"type": "string", "description": "the person that all clips show"},
    "identities": {
        "type": "object",
        "additionalProperties": {"type": "string"},
        "description": "instead: clip to person",
    },
    "strangers": {"type": "boolean", "description": "instead: the clips show nobody enrolled"},
}
INFER = {
    "id": {"type": "string"},
    "parameters": {"type": "object"},
    "inputs": {"type": "array", "items": {"type": "object"}},
    "outputs": {"type": "array", "items": {"type": "object"}},
}
MODELS = "/v2/models/{name}"
VERSIONS = f"{MODELS}/versions/{{version}}"
# Method and path -> what it does, the properties of its body, and the words of its query.
ANSWERS: dict[tuple[str, str], tuple[str, Mapping[str, object] | None, Mapping[str, object]]] = {
    ("POST", "/identify"): ("Says who clips show; null is unknown", IDENTIFY, {}),
    ("POST", "/enrol"): ("Enrols clips, all or none", ENROL, {}),
    ("GET", "/identities"): (
        "Lists people and the number of their clips, 10,000 at a time",
        None,
        {"after": {"type": "string", "description": "the last name of the answer before"}},
    ),
    ("DELETE", "/identities/{name}"): ("Removes a person with all clips", None, {}),
    ("DELETE", "/clips/{name}"): ("Removes a clip", None, {}),
    ("GET", "/threshold"): ("Says when a clip gets a name", None, RULE),
    ("GET", "/metrics"): ("Counts requests, for Prometheus", None, {}),
    ("GET", "/openapi.json"): ("This description", None, {}),
    ("GET", "/docs"): ("This page", None, {}),
    ("GET", "/v2"): ("Open Inference Protocol: the server", None, {}),
    ("GET", "/v2/health/live"): ("Says that the server runs", None, {}),
    ("GET", "/v2/health/ready"): ("Says that all is compiled; else 503", None, {}),
    ("GET", MODELS): ("The tensors of a model, gallery or run", None, {}),
    ("GET", VERSIONS): ("The same; the version is 1", None, {}),
    ("GET", f"{MODELS}/ready"): ("Says that the model is compiled; else 503", None, {}),
    ("GET", f"{VERSIONS}/ready"): ("The same", None, {}),
    ("POST", f"{MODELS}/infer"): ("Tensors in, tensors out", INFER, {}),
    ("POST", f"{VERSIONS}/infer"): ("The same", INFER, {}),
}
ERRORS = {
    "400": "no HTTP", "401": "no token, or a false one", "403": "a page of another site asks",
    "404": "no such path, model or name", "405": "no such method",
    "408": "the body came too slowly",
    "409": "the gallery has nobody enrolled", "413": "the body is too large",
    "415": "a body of another type", "422": "a number, array, name or field is wrong",
    "429": "too many requests wait: Retry-After",
    "503": "not ready, too slow, too many connections, or another process changes the gallery",
    "507": "the disk is full, or cannot be written",
}  # fmt: skip


def describe() -> dict[str, object]:
    """Returns the description for `/openapi.json`."""
    paths: dict[str, dict[str, object]] = {}
    for (method, path), (about, body, query) in ANSWERS.items():
        words = [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in query.items()
        ]
        parts = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
        words += [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in parts
        ]
        one: dict[str, object] = {
            "summary": about,
            "parameters": words,
            "responses": {"200": {"description": "done"}, "default": {"$ref": ERROR}},
        }
        if body is not None:
            schema = {"type": "object", "properties": body}
            content: dict[str, object] = {"application/json": {"schema": schema}}
            if not path.startswith("/v2"):
                content["application/x-npz"] = {"schema": {"type": "string", "format": "binary"}}
            one["requestBody"] = {"required": True, "content": content}
        paths.setdefault(path, {})[method.lower()] = one
    text = "; ".join(f"{status}: {about}" for status, about in ERRORS.items())
    error = {"type": "object", "properties": {"error": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "vidjax", "version": importlib.metadata.version("vidjax")},
        "paths": paths,
        "components": {
            "responses": {
                "Error": {
                    "description": text,
                    "content": {"application/json": {"schema": error}},
                }
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


ERROR = "#/components/responses/Error"
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}pre{overflow:auto}"
)


def page() -> str:
    """Returns the description as a page, which loads nothing."""
    rows = []
    for (method, path), (about, body, query) in ANSWERS.items():
        rows.append(f"<h2><code>{method} {html.escape(path)}</code></h2><p>{html.escape(about)}.")
        for name, fields in (("body", body), ("query", query)):
            if fields:
                text = html.escape(json.dumps(fields, indent=1))
                rows.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    errors = "".join(f"<li>{status}: {html.escape(about)}" for status, about in ERRORS.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>vidjax serve</title><style>{STYLE}</style><h1>vidjax serve</h1>"
        f'<p>The same for programs: <a href="/openapi.json">openapi.json</a>.{"".join(rows)}'
        f'<h2>Errors</h2><p>Each is <code>{{"error": "one line"}}</code>.<ul>{errors}</ul></html>'
    )
