"""The example of `vidjax/data/README.md`: a text embedding as a modality of one vector a clip."""

import runpy

import numpy as np
import pytest

import vidjax
from tests.test_readme import example


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder that the program of the page writes."""
    place = tmp_path_factory.mktemp("titles")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "titles.py").write_text(example("text: titles.py", "vidjax/data/README.md"))
        runpy.run_path("titles.py")
    return place / "titled"


def test_a_title_is_one_frame_of_a_clip(folder, tmp_path):
    clips = {}
    for i, path in enumerate(sorted((folder / "val").glob("*.npz"))[:8]):
        with np.load(path) as file:
            clips[path.stem] = {key: file[key] for key in file.files}
        if "title" in clips[path.stem]:
            assert clips[path.stem]["title"].shape == (64,)
            clips[path.stem]["title"] = clips[path.stem]["title"].reshape(((64,), (1, 64))[i % 2])
    data = vidjax.load_data({"val": clips}, cache_dir=tmp_path)
    lengths = data.split("val").lengths
    assert data.modalities["title"] == (64, "float32")
    assert set(lengths["title"].tolist()) == {0, 1}  # some clips have none
    assert lengths["face"].min() >= 1
