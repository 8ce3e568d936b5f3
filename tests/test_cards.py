"""Cards of nets are read strictly: what they say decides answers."""

import os
import shutil

import pytest

from tests.helpers import seen
from vidjax.apps.video import cards

made_nets = pytest.importorskip("tests.helpers.made_nets")

IMAGE = {"layout": "NCHW", "colour": "rgb"}
BACK_END = made_nets.back_end(same=(0.9, 0.1))


def refused(folder, *words):
    """Expects that a folder is refused with at most three lines, which have these words."""
    seen.refused(lambda: cards.load(folder), *words)


def test_a_folder_gives_one_card_for_each_role(tmp_path):
    made_nets.write(tmp_path, "find", "face_detector")
    path = made_nets.write(tmp_path, "embed", back_end=BACK_END)
    found = cards.load(tmp_path)
    assert set(found) == {"face_detector", "face_embedder"}
    card = found["face_embedder"]
    assert card.path == path and card.width == 5
    assert card.back_end and card.back_end.same == (0.9, 0.1)
    assert card.read_net() == (tmp_path / "embed.onnx").read_bytes()


def test_the_digest_follows_the_card_and_its_net(tmp_path):
    first = cards.read(made_nets.write(tmp_path)).digest
    assert cards.read(made_nets.write(tmp_path)).digest == first
    assert cards.read(made_nets.write(tmp_path, norm_is_quality=True)).digest != first
    other = made_nets.embedder("NHWC")
    assert cards.read(made_nets.write(tmp_path, content=other)).digest != first


DAMAGES = {  # of a folder with one net -> words of the error
    "two nets": (lambda x: made_nets.write(x, "two"), "face_embedder face.json two.json move"),
    "no net": (lambda x: (x / "face.onnx").unlink(), "face.json face.onnx convert"),
    "another net": (
        lambda x: (x / "face.onnx").write_bytes(made_nets.embedder("NHWC")),
        "face.onnx sha256 convert",
    ),
    "a fixed input that strides do not fit": (
        lambda x: made_nets.write(x, "find", "face_detector", input={"size": [320, 330]}),
        "find.json 32",
    ),
    "too large": (
        lambda x: (x / "face.json").write_text(" " * cards.CARD_BYTES + "{}"),
        "face.json large",
    ),
    "a pipe": (
        lambda x: ((x / "face.json").unlink(), os.mkfifo(x / "face.json")),
        "face.json pipe",
    ),
    "no folder": (shutil.rmtree, "models convert"),
    **{
        text[:9]: (
            lambda x, text=text: (x / "face.json").write_text(text, "latin-1"),
            "face.json convert",
        )
        for text in ("", "[" * 100_000, "{", "[]", '{"format": 1}', "\xff")
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(tmp_path, damage):
    folder = tmp_path / "models"
    folder.mkdir()
    made_nets.write(folder)
    make, words = DAMAGES[damage]
    make(folder)
    refused(folder, *words.split())


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"colour": "rgb"}, "colour"),
        ({"path": "face.onnx"}, "path"),
        ({"format": 2}, "format"),
        ({"role": "face"}, "role"),
        ({"file": "../face.onnx"}, "file"),
        ({"sha256": "0"}, "sha256"),
        ({"decoder": "yunet"}, "yunet"),
        ({"decoder": "silero"}, "silero"),
        ({"role": "voice_embedder", "input": IMAGE}, "NCHW"),
        ({"input": {"layout": "mels"}}, "colour"),
        ({"input": {"layout": "mels", "colour": None}}, "mels"),
        ({"input": {"colour": None}}, "colour"),
        ({"width": None}, "width"),
        ({"width": 0}, "width"),
        ({"template": None}, "template"),
        ({"template": [[1.0, 2.0]]}, "template"),
        ({"input": {"size": None}}, "size"),
        ({"input": {"layout": "HWC"}}, "layout"),
        ({"input": {"scale": [float("nan"), 1.0, 1.0]}}, "scale"),
        ({"input": {"crop": 1}}, "crop"),
        ({"back_end": {**BACK_END, "centre": [0.0] * 4}}, "centre"),
        ({"back_end": {**BACK_END, "same": [0.9, 0.0]}}, "same"),
        ({"back_end": {**BACK_END, "same": [0.1, 0.1], "different": [0.9, 0.1]}}, "mean of same"),
        ({"back_end": {**BACK_END, "same": [1.0, 0.1]}}, "mean of same"),
        ({"back_end": {**BACK_END, "same": [0.9, 0.5]}}, "a deviation must be at most"),
        ({"back_end": {**BACK_END, "different": [0.0, 1.1]}}, "a deviation must be at most"),
        ({"test": {"seed": -1, "output": [0, 0, 0, 0], "tolerance": 1.0}}, "seed"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, fields, word):
    made_nets.write(tmp_path, **fields)
    refused(tmp_path, "face.json", word, "vidjax convert")


@pytest.mark.parametrize("role", ["face_detector", "face_embedder", "voice_embedder"])
def test_a_missing_role_says_how_to_get_its_net(tmp_path, role):
    seen.refused(lambda: cards.require({}, role, tmp_path), role, "convert")
