"""The recipe of `vidjax/apps/gallery/RECIPES.md`, in the database it is written for."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import made_nets
from vidjax.apps.gallery.gallery import Gallery
from vidjax.cli.program import main

PAGE = Path(__file__).parent.parent / "vidjax/apps/gallery/RECIPES.md"
WIDTH = 16


@pytest.mark.slow
def test_nearest_qdrant_vectors_agree_with_the_gallery(monkeypatch, tmp_path):
    pytest.importorskip("qdrant_client")
    back_end = made_nets.back_end((0.958, 0.0146), (0.2, 0.2), WIDTH)
    (tmp_path / "models").mkdir()
    made_nets.write(tmp_path / "models", "embed", width=WIDTH, back_end=back_end)
    gallery = Gallery.of_models(tmp_path / "g", tmp_path / "models")
    faces = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    for name, face in zip(("Ada", "Grace"), faces, strict=True):
        gallery.enrol({name: {"face": face}}, name)
    assert main(["gallery", "export", str(gallery.folder), f"--out={tmp_path}/people.parquet"]) == 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QDRANT", ":memory:")
    program = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert program
    names: dict[str, Any] = {}
    exec(compile(program[1], str(PAGE), "exec"), names)  # noqa: S102
    client = names["client"]
    assert client.count("people").count == 2
    near = faces + 0.05 * np.random.default_rng(1).normal(size=faces.shape).astype(np.float32)
    for name, x in zip(("Ada", "Grace"), near, strict=True):
        assert gallery.identify({"x": {"face": x}})["x"].identity == name
        (z,) = gallery.backend.whiten([x[None]])
        (best,) = client.query_points("people", z[0].tolist(), using="face", limit=1).points
        assert best.payload["identity"] == name
