"""Cards of nets are read strictly: what they say decides answers."""

import json
import os

import pytest

from vidjax.errors import UserError
from vidjax.extract import cards

made_nets = pytest.importorskip("tests.helpers.made_nets")

IMAGE = {"layout": "NCHW", "colour": "rgb"}
BACK_END = {"centre": [0.0] * 5, "same": [0.9, 0.1], "different": [0.1, 0.1], "pairs": [1, 1],
            "data": "none"}  # fmt: skip


def refused(folder, *words):
    """Expects that a folder is refused with at most three lines, which have these words."""
    with pytest.raises(UserError) as error:
        cards.load(folder)
    text = str(error.value)
    assert text.count("\n") < 3 and all(word in text for word in words), text


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


def test_two_nets_for_one_role_are_refused(tmp_path):
    made_nets.write(tmp_path, "one")
    made_nets.write(tmp_path, "two")
    refused(tmp_path, "face_embedder", "one.json", "two.json", "move one")


def test_a_card_without_its_net_is_refused(tmp_path):
    made_nets.write(tmp_path)
    (tmp_path / "face.onnx").unlink()
    refused(tmp_path, "face.json", "face.onnx", "vidjax convert")


def test_another_net_than_the_cards_is_refused(tmp_path):
    made_nets.write(tmp_path)
    (tmp_path / "face.onnx").write_bytes(made_nets.embedder("NHWC"))
    refused(tmp_path, "face.onnx", "sha256", "vidjax convert")


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
        ({"test": {"seed": -1, "output": [0, 0, 0, 0], "tolerance": 1.0}}, "seed"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, fields, word):
    made_nets.write(tmp_path, **fields)
    refused(tmp_path, "face.json", word, "vidjax convert")


def test_a_fixed_input_of_a_detector_fits_its_strides(tmp_path):
    made_nets.write(tmp_path, "find", "face_detector", input={"size": [320, 330]})
    refused(tmp_path, "find.json", "32")


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{", "[]", '{"format": 1}', "\xff"])
def test_what_is_no_card_is_refused(tmp_path, text):
    (tmp_path / "face.json").write_text(text, "latin-1")
    refused(tmp_path, "face.json", "vidjax convert")


def test_a_card_is_a_small_regular_file(tmp_path):
    path = made_nets.write(tmp_path)
    path.write_text(path.read_text() + " " * cards.CARD_BYTES)
    refused(tmp_path, "face.json", "too large")
    path.unlink()
    os.mkfifo(path)
    refused(tmp_path, "face.json", "a pipe")


def test_a_folder_that_is_not_there_says_how_to_make_nets(tmp_path):
    refused(tmp_path / "models", "models", "vidjax convert")


@pytest.mark.parametrize("role", ["face_detector", "face_embedder", "voice_embedder"])
def test_a_missing_role_says_how_to_get_its_net(tmp_path, role):
    with pytest.raises(UserError) as error:
        cards.require({}, role, tmp_path)
    text = str(error.value)
    assert role in text and "convert" in text and text.count("\n") < 3


def test_a_role_that_is_there_is_returned(tmp_path):
    made_nets.write(tmp_path)
    found = cards.load(tmp_path)
    assert cards.require(found, "face_embedder", tmp_path) is found["face_embedder"]


def test_keys_of_the_written_card_are_those_of_the_struct(tmp_path):
    card = cards.read(made_nets.write(tmp_path))
    written = set(json.loads(card.path.read_text()))
    assert written <= set(cards.Written.__struct_fields__)
    assert set(cards.Card.__struct_fields__) == {*cards.Written.__struct_fields__, "path", "digest"}
