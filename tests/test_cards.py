"""Cards of nets are read strictly: what they say decides answers."""

import os
import shutil

import pytest

from tests.helpers import seen
from vidjax.apps.video import cards

made_nets = pytest.importorskip("tests.helpers.made_nets")

BACK_END = made_nets.back_end(same=(0.9, 0.1))


def test_folder_of_nets_loads_one_card_per_role(tmp_path):
    made_nets.write(tmp_path, "find", "face_detector")
    path = made_nets.write(tmp_path, "embed", back_end=BACK_END)
    loaded = cards.load(tmp_path)
    assert set(loaded) == {"face_detector", "face_embedder"}
    card = loaded["face_embedder"]
    assert card.path == path and card.width == 5
    assert card.back_end and card.back_end.same == (0.9, 0.1)
    assert card.read_net() == (tmp_path / "embed.onnx").read_bytes()
    changes = {}, {"norm_is_quality": True}, {"content": made_nets.embedder("NHWC")}
    digests = [cards.read(made_nets.write(tmp_path, "face", **change)).digest for change in changes]
    assert len({*digests}) == 3  # which follow the card and its net
    (tmp_path / "face.json").unlink()
    seen.refused(lambda: cards.require({}, "voice_embedder", tmp_path), "voice_embedder", "convert")


def card_of(text):
    return lambda folder: (folder / "face.json").write_text(text, "latin-1")


DAMAGES = {  # words of the error -> the damage to a folder with one net
    "face_embedder face.json two.json move": lambda x: made_nets.write(x, "two"),
    "face.json face.onnx convert": lambda x: (x / "face.onnx").unlink(),
    "face.onnx sha256 convert": lambda x: (x / "face.onnx").write_bytes(made_nets.embedder("NHWC")),
    "find.json 32": lambda x: made_nets.write(
        x, "find", "face_detector", input={"size": [320, 330]}
    ),
    "face.json large": card_of(" " * cards.CARD_BYTES + "{}"),
    "face.json pipe": lambda x: ((x / "face.json").unlink(), os.mkfifo(x / "face.json")),
    "models convert": shutil.rmtree,
    "face.json convert": card_of("[" * 100_000),
    "face.json  convert": card_of("{"),
    "face.json   convert": card_of('{"format": 1}'),
    "face.json    convert": card_of("\xff"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_damaged_folder_of_nets_is_refused(tmp_path, words):
    folder = tmp_path / "models"
    folder.mkdir()
    made_nets.write(folder)
    DAMAGES[words](folder)
    seen.refused(lambda: cards.load(folder), *words.split())


def test_error_names_the_wrong_field_of_a_card(tmp_path):
    for fields, word in (
        ({"colour": "rgb"}, "colour"),
        ({"format": 2}, "format"),
        ({"role": "face"}, "role"),
        ({"file": "../face.onnx"}, "file"),
        ({"sha256": "0"}, "sha256"),
        ({"decoder": "yunet"}, "yunet"),
        ({"role": "voice_embedder", "input": {"layout": "NCHW", "colour": "rgb"}}, "NCHW"),
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
        ({"back_end": {**BACK_END, "same": [1.0, 0.1]}}, "mean of same"),
        ({"back_end": {**BACK_END, "same": [0.9, 0.5]}}, "a deviation must be at most"),
        ({"test": {"seed": -1, "output": [0, 0, 0, 0], "tolerance": 1.0}}, "seed"),
    ):
        made_nets.write(tmp_path, **fields)
        seen.refused(lambda: cards.load(tmp_path), "face.json", word, "vidjax convert")
