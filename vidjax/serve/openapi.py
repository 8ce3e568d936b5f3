"""The description of what a server answers, as OpenAPI 3.1, and as a page without scripts."""

import html
import importlib.metadata
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}pre{overflow:auto}"
)


class Answer(NamedTuple):
    """An answer of a server: method and path of its requests, and the function that makes it.

    `body` and `query` are the types of the body of JSON and of the words of the query.
    """

    method: str
    path: str
    answer: Callable[[Request], Awaitable[Response]]
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None

    @property
    def about(self) -> str:
        """What the answer is, in words."""
        return str(self.answer.__doc__).partition("\n")[0]


def describe(answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns the description for `/openapi.json`."""
    kinds = [kind for one in answers for kind in (one.body, one.query) if kind]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, object]] = {}
    for one in answers:
        words = schemas[one.query.__name__]["properties"] if one.query else {}
        parameters = [
            {"name": name, "in": "query", "schema": schema} for name, schema in words.items()
        ]
        path = one.path.replace(":path", "")
        parameters += [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", path)
        ]
        error = {"$ref": "#/components/responses/Error"}
        about: dict[str, object] = {
            "summary": one.about,
            "parameters": parameters,
            "responses": {"200": {"description": "done"}, "default": error},
        }
        if one.body:
            schema = {"$ref": f"#/components/schemas/{one.body.__name__}"}
            content: dict[str, object] = {"application/json": {"schema": schema}}
            if not path.startswith("/v2"):
                content["application/x-npz"] = {"schema": {"type": "string", "format": "binary"}}
            about["requestBody"] = {"required": True, "content": content}
        paths.setdefault(path, {})[one.method.lower()] = about
    error = {"type": "object", "properties": {"error": {"type": "string"}}}
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


def page(answers: Sequence[Answer]) -> str:
    """Returns the description as a page, which loads nothing."""
    rows = []
    for one in answers:
        kinds = [kind.__name__ for kind in (one.body, one.query) if kind]
        path = html.escape(one.path.replace(":path", ""))
        rows.append(f"<h2><code>{one.method} {path}</code></h2><p>{html.escape(one.about)}")
        rows.append(f" It takes {kinds[0]}, see below." if kinds else "")
    for name, schema in describe(answers)["components"]["schemas"].items():
        text = html.escape(json.dumps(schema, indent=1))
        rows.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>vidjax serve</title><style>{STYLE}</style><h1>vidjax serve</h1>"
        f'<p>The same for programs: <a href="/openapi.json">openapi.json</a>.{"".join(rows)}</html>'
    )
