"""The recipes of `vidjax/gallery/RECIPES.md`, each in the server it is written for."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import made_nets
from vidjax.gallery.gallery import Gallery
from vidjax.main import main

PAGE = Path(__file__).parent.parent / "vidjax" / "gallery" / "RECIPES.md"
RECIPES = dict(re.findall(r"<!-- recipe: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.S))
WIDTH = 16


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A gallery of Ada and Grace, by the card of a net of faces."""
    folder = tmp_path_factory.mktemp("recipes")
    back_end = {"centre": [0.0] * WIDTH, "data": "made", "pairs": [100, 100]}
    back_end |= {"same": [0.958, 0.0146], "different": [0.2, 0.2]}
    (folder / "models").mkdir()
    made_nets.write(folder / "models", "embed", width=WIDTH, back_end=back_end)
    people = Gallery.of_models(folder / "g", folder / "models")
    for name, face in faces().items():
        people.enrol({name: {"face": face}}, name)
    return people


def faces(noise=0.0):
    drawn = np.random.default_rng(0).normal(size=(2, WIDTH))
    drawn += noise * np.random.default_rng(1).normal(size=drawn.shape)
    return dict(zip(("Ada", "Grace"), drawn.astype(np.float32), strict=True))


@pytest.fixture(scope="module")
def shown(gallery):
    """Three clips, [3, 16] of Ada, Grace and a stranger; and the answers of the gallery."""
    stranger = np.random.default_rng(5).normal(size=WIDTH).astype(np.float32)
    x = np.stack([*faces(0.05).values(), stranger])
    found = gallery.identify({str(i): {"face": row} for i, row in enumerate(x)})
    assert [answer.identity for answer in found.values()] == ["Ada", "Grace", None]
    return x, list(found.values())


def module_of(name, gallery, monkeypatch):
    monkeypatch.setenv("GALLERY", str(gallery.folder))
    found: dict[str, Any] = {"__name__": "people"}
    exec(compile(RECIPES[name], str(PAGE), "exec"), found)  # noqa: S102
    return found


def request_of(x):
    tensor = {
        "name": "face",
        "shape": list(x.shape),
        "datatype": "FP32",
        "data": x.ravel().tolist(),
    }
    return {"id": "7", "inputs": [tensor]}


def check_outputs(outputs, answers):
    assert outputs["identity"] == [answer.identity or "" for answer in answers]
    assert outputs["probability"] == [answer.probability for answer in answers]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def post(url, content, seconds=60.0):
    """Returns the JSON answer of a server, which may still be starting."""
    body = json.dumps(content).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                return json.load(answer)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def test_recipes_are_short():
    assert set(RECIPES) == {"mlserver", "kserve", "qdrant", "ray"}
    assert all(len(text.splitlines()) <= 40 for text in RECIPES.values())


@pytest.mark.parametrize("frames", [1, 3])
def test_mlserver_answers_as_the_gallery(gallery, shown, monkeypatch, frames):
    mlserver = pytest.importorskip("mlserver")
    codecs, types = mlserver.codecs, mlserver.types

    model = module_of("mlserver", gallery, monkeypatch)["People"](
        mlserver.ModelSettings(name="people", implementation=mlserver.MLModel)
    )
    x, answers = shown
    x = x if frames == 1 else np.repeat(x[:, None], frames, axis=1)
    assert asyncio.run(model.load())
    request = types.InferenceRequest(**request_of(x))
    found = asyncio.run(model.predict(request))
    outputs = {one.name: one for one in found.outputs}
    names = codecs.StringCodec.decode_output(outputs["identity"])
    shares = codecs.NumpyCodec.decode_output(outputs["probability"]).ravel().tolist()
    assert found.id == "7" and names == [answer.identity or "" for answer in answers]
    assert shares == pytest.approx([answer.probability for answer in answers])


def test_kserve_answers_over_http_as_the_gallery(gallery, shown, tmp_path):
    pytest.importorskip("kserve")
    (tmp_path / "people.py").write_text(RECIPES["kserve"])
    port = free_port()
    words = [sys.executable, "people.py", f"--http_port={port}", "--enable_grpc=false"]
    env = {**os.environ, "GALLERY": str(gallery.folder), "PYTHONPATH": str(PAGE.parents[2])}
    with subprocess.Popen(words, cwd=tmp_path, env=env) as process:
        try:
            url = f"http://127.0.0.1:{port}/v2/models/people/infer"
            found = post(url, request_of(shown[0]))
        finally:
            process.terminate()
            process.wait(30)
    check_outputs({one["name"]: one["data"] for one in found["outputs"]}, shown[1])


def test_qdrant_finds_the_clips_of_the_gallery(gallery, shown, monkeypatch, tmp_path):
    pytest.importorskip("qdrant_client")
    table = tmp_path / "people.parquet"
    assert main(["gallery", "export", str(gallery.folder), f"--out={table}"]) == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QDRANT", ":memory:")
    client = module_of("qdrant", gallery, monkeypatch)["client"]
    assert client.count("people").count == 2
    for x, answer in zip(*shown, strict=True):
        (z,) = gallery.backend.whiten([x[None]])
        (best,) = client.query_points("people", z[0].tolist(), using="face", limit=1).points
        assert answer.identity in (None, best.payload["identity"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ray's own imports
def test_ray_serve_answers_as_the_gallery(gallery, shown, monkeypatch):
    pytest.importorskip("ray")
    people = module_of("ray", gallery, monkeypatch)["People"].func_or_class(str(gallery.folder))
    x, answers = shown
    clips = {str(i): {"face": row.tolist()} for i, row in enumerate(x)}

    class Asked:
        def __init__(self, content):
            self.content = content

        async def json(self):
            return self.content

    found = asyncio.run(people(Asked({"clips": clips})))
    told = [answer.to_dict() for answer in answers]
    assert list(json.loads(found.body).values()) == json.loads(json.dumps(told))
    for wrong in ({}, {"clips": []}, {"clips": {"a": {"face": [1, 2]}}}):
        assert asyncio.run(people(Asked(wrong))).status_code == 400
