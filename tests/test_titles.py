"""The example of `vidjax/data/README.md`: a text embedding as a modality of one vector a clip."""

import runpy

import numpy as np

import vidjax
from tests.test_readme import example


def test_a_title_is_one_frame_of_a_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "titles.py").write_text(example("text: titles.py", "vidjax/data/README.md"))
    runpy.run_path("titles.py")
    clips = {}
    for i, path in enumerate(sorted((tmp_path / "titled" / "val").glob("*.npz"))[:8]):
        with np.load(path) as file:
            clips[path.stem] = {key: file[key] for key in file.files}
        if "title" in clips[path.stem]:
            assert clips[path.stem]["title"].shape == (64,)
            clips[path.stem]["title"] = clips[path.stem]["title"].reshape(((64,), (1, 64))[i % 2])
    data = vidjax.load_data({"val": clips}, cache_dir=tmp_path / "cache")
    lengths = data.split("val").lengths
    assert data.modalities["title"] == (64, "float32")
    assert set(lengths["title"].tolist()) == {0, 1}  # some clips have none
    assert lengths["face"].min() >= 1
