"""The recipe of `vidjax/apps/gallery/RECIPES.md`, in the database it is written for."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import made_galleries

PAGE = Path(__file__).parent.parent / "vidjax/apps/gallery/RECIPES.md"


@pytest.mark.slow  # it imports Qdrant
def test_qdrant_finds_the_clips_of_the_gallery(monkeypatch, tmp_path, say):
    pytest.importorskip("qdrant_client")
    gallery = made_galleries.make(tmp_path / "g")
    say("gallery", "export", gallery.folder, f"--out={tmp_path}/people.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QDRANT", ":memory:")
    program = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert program
    found: dict[str, Any] = {}
    exec(compile(program[1], str(PAGE), "exec"), found)  # noqa: S102
    client, clips = found["client"], gallery.clips
    assert client.count("people").count == len(clips) - len(gallery.strangers)
    for name in ("clip 31", "clip 71"):
        face, *_ = gallery.backend.whiten(gallery.backend.split(clips[name].vector[None]))
        near = (face[0] + 0.01 * np.ones_like(face[0])).tolist()
        (best,) = client.query_points("people", near, using="face", limit=1).points
        assert best.payload == {"clip": name, "identity": clips[name].identity}
