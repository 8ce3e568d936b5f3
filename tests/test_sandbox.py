"""The sandbox reads official pickles: layouts, exact values, refused values, errors, memory."""

import gc
import io
import itertools
import pickle
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.campaigns import hostile
from tests.helpers import python2
from tests.helpers.seen import refused
from vidjax.data import packing
from vidjax.data.packed_clips import FRAME_FIELDS
from vidjax.data.untrusted import pieces, sandbox, unpickle

BOX = [1.0, 2.0, 30.5, 40.25]


def feature(*numbers, dtype="<f2"):
    return np.array(numbers or (1, 2, 3), dtype)


def face(number: Any = b"7", box: Any = BOX, det: Any = 0.5, quality: Any = 80.0, feat: Any = None):
    return [number, box, det, quality, feature() if feat is None else feat]


def convert(folder, value, modality="face"):
    """Unpickles a value; returns the summary, and the columns of the frames as arrays.

    `value` is bytes of a pickle, or an object that Python 2 pickles.
    """
    path = folder / "x.pickle"
    path.write_bytes(value if isinstance(value, bytes) else python2.dumps(value))
    arguments = {"path": str(path), "modality": modality, "out_dir": str(folder)}
    try:
        found = sandbox.work(arguments)
        summary = msgspec.structs.asdict(found) | found.counts._asdict()
    finally:
        gc.enable()
    dtypes = {name: field.dtype for name, field in FRAME_FIELDS.items()}
    for key, dtype in {"features": summary["dtype"], **dtypes}.items():
        summary[key] = np.fromfile(folder / f"{key}.bin", dtype)
    summary["features"] = summary["features"].reshape(-1, summary["width"] or 1)
    return summary


def test_each_pickle_layout_fills_absent_columns_with_defaults(tmp_path):
    """The layout of a modality with an unknown name is inferred from its entries."""
    entries = {
        "face": face(), "head": [b"7", BOX, 0.5, feature()], "body": [b"7", BOX, feature()],
        "scene": (7, feature()),
    }  # fmt: skip
    for modality, unknown in itertools.product(entries, (False, True)):
        entry = entries[modality]
        value = {b"none": [], b"one": [entry], b"two": (tuple(entry), list(entry))}
        read = convert(tmp_path, value, "my-own_modality2" if unknown else modality)
        assert read["names"] == ["none", "one", "two"] and read["lengths"] == [0, 1, 2]
        assert read["frames"] == 3 and read["skipped_clips"] == {"empty": 1}
        assert read["skipped"] == read["warnings"] == {}
        assert read["features"].tolist() == [[1, 2, 3]] * 3
        assert read["number"].tolist() == [7] * 3
        assert read["quality"].tolist() == [80 if modality == "face" else 0] * 3
        assert read["detection"].tolist() == [0.5 if modality in ("face", "head") else 1] * 3
        assert "box" not in read and not (tmp_path / "box.bin").exists()  # no model reads boxes


@pytest.mark.parametrize("modality", ["audio", "speech"])
def test_bare_array_is_one_frame_or_one_frame_per_row(modality, tmp_path):
    rows, none = np.arange(6, dtype="<f2").reshape(2, 3), np.zeros((0, 3), "<f2")
    value = {b"one": feature(), b"rows": rows, b"none": none, b"list": [feature(), feature()]}
    read = convert(tmp_path, value, modality)
    assert read["lengths"] == [1, 2, 0, 2] and read["number"].tolist() == [0, 0, 1, 0, 1]
    assert read["features"].tolist() == [[1, 2, 3], *rows.tolist(), [1, 2, 3], [1, 2, 3]]
    assert not read["quality"].any() and (read["detection"] == 1).all()


def test_pickles_of_every_python_and_numpy_load_to_equal_arrays(tmp_path):
    features = np.array([[1, 2.5, -3], [4, 5, 6], [0.5, -0.25, 100]], np.float16)
    for written, content in python2.real().items():
        read = convert(tmp_path, content)
        lengths = dict(zip(read["names"], read["lengths"], strict=True))
        assert lengths == {"clip_1": 2, "clip_2": 0, "clip_3": 1}, written
        rows_of = {"clip_1": [0, 1], "clip_2": [], "clip_3": [2]}
        rows = [row for name in read["names"] for row in rows_of[name]]  # clip_3 may come first
        np.testing.assert_array_equal(read["features"], features[rows])
        assert read["features"].dtype == np.float16
        assert read["number"].tolist() == rows
        assert read["quality"].tolist() == [80.5 - row for row in rows]
        assert read["detection"].tolist() == [0.5] * 3


WRITERS = [(python2.dumps, n) for n in range(3)] + [(pickle.dumps, n) for n in range(6)]


@pytest.mark.parametrize("code", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "|i1"])
def test_features_keep_their_exact_values_in_native_byte_order(code, tmp_path):
    """The arrays are contiguous, Fortran-ordered, or strided and read-only, in every protocol."""
    numbers = np.random.default_rng(0).integers(-128, 128, (4, 10)).astype(code)
    if code[1] == "f":
        numbers = (numbers / 7).astype(code)
    fortran, strided = np.asfortranarray(numbers), np.repeat(numbers, 2, axis=1)[:, ::2]
    strided.flags.writeable = False
    faces = {b"%d" % i: [face(feat=row) for row in x] for i, x in enumerate((numbers, strided))}
    voices = {b"0": numbers, b"1": fortran, b"2": strided, b"3": list(numbers)}
    for clips, modality in ((faces, "face"), (voices, "audio")):
        for dumps, protocol in WRITERS:
            read = convert(tmp_path, dumps(clips, protocol), modality)
            assert read["features"].dtype == np.dtype(code).newbyteorder("=")
            assert read["features"].tolist() == numbers.tolist() * len(clips)


def test_pieces_and_blocks_that_end_anywhere_change_no_value(tmp_path, monkeypatch):
    """If a clip refers to a clip of an earlier piece, the pickle is read as a whole."""
    # 40 clips of 0 to 8 faces. Every fifth feature has a NaN. The fields of face i contain i.
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 40).tolist()
    rows = rng.normal(size=(sum(lengths), 3)).astype("<f2")
    rows[::5, 1] = np.nan
    faces = iter([face(i, [float(i)] * 4, i, -i, row) for i, row in enumerate(rows)])
    clips = {b"%d" % clip: [next(faces) for _ in range(n)] for clip, n in enumerate(lengths)}
    voices = {b"rows": rows[np.isfinite(rows).all(axis=1)], b"one": rows[1]}
    of_clips, of_voices = convert(tmp_path, clips), convert(tmp_path, voices, "audio")
    np.testing.assert_array_equal(of_clips["features"], rows[np.isfinite(rows).all(axis=1)])
    assert of_clips["skipped"] == {"non_finite": len(rows[::5])}

    with monkeypatch.context() as patch:
        patch.setattr(packing, "BLOCK_BYTES", 4 * 3 * 2)  # four rows of three float16
        patch.setattr(packing, "NUM_PROBE_CLIPS", 2)  # clips before the first block is written
        np.testing.assert_equal(convert(tmp_path, clips), of_clips)
        np.testing.assert_equal(convert(tmp_path, voices, "audio"), of_voices)

    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)  # a piece for each clip
    monkeypatch.setattr(python2.PYTHONS, "_BATCHSIZE", 7)  # clips that an opcode adds to the dict
    with_reference = {**clips, b"39": clips[b"20"]}  # the last clip refers to an earlier clip
    assert convert(tmp_path, with_reference)["lengths"][39] == of_clips["lengths"][20]
    # Without `load`, pickles can be read only in pieces.
    monkeypatch.delattr(sandbox, "load")
    np.testing.assert_equal(convert(tmp_path, clips), of_clips)
    for protocol in range(2, 6):
        file = io.BytesIO()
        python2.PYTHONS(file, protocol).dump(clips)
        np.testing.assert_equal(convert(tmp_path, file.getvalue()), of_clips)
    with pytest.raises(NameError):  # a reference to another piece needs `load`
        convert(tmp_path, with_reference)


def test_non_finite_scores_become_zero_and_are_counted(tmp_path):
    """The scores are stored as float32, where -1e300 is infinite."""
    wrong = face(quality=float("nan"), det=float("inf"))
    frames = [wrong, face(quality=-1e300, det=np.float32(-np.inf)), face(quality=-30.0)]
    read = convert(tmp_path, {b"a": frames})
    assert read["frames"] == 3 and read["skipped"] == {}
    assert read["quality"].tolist() == [0, 0, -30]
    assert read["detection"].tolist() == [0, 0, 0.5]
    assert read["warnings"] == {"non_finite_quality": 2, "non_finite_detection": 2}


WIDE = feature(1, 2, 3, 4)


@pytest.mark.parametrize(("value", "modality", "expected"), [
    ([1, 2], "face", "contains a list, not a dict"),
    ({b"a": None}, "face", "clip a, face is of type NoneType"),
    ({b"a": feature()}, "face", "clip a, face is of type array [3] of float16: write a list"),
    ({b"a": [[face()]]}, "face", "entry 0 has 1 fields, but must be [frame, bbox,"),
    ({b"a": [[1] * 6]}, "new", "frames of new are lists of 6 fields, but must have 1 to 5 (frame"),
    ({b"a": [face(), face(feat=WIDE)]}, "face", "clip a, face entry 1: its feature is array [4]"),
    ({b"a": [face(feat=WIDE)], b"b": [face()], b"c": [face()]}, "face", "features are 4"),
    ({b"a": [face(feat=np.zeros(0, "f2"))]}, "face", "features have shape [1, 0]"),
    ({b"a": [face(), face(feat=feature(dtype="<f4"))]}, "face", "array [3] of float32, but most"),
    ({b"a": [face(feat=feature(dtype="<i8"))]}, "face", "but must be float16"),
    ({b"a": [face(b"1_0")]}, "face", "frame must be a whole number"),
    ({b"a": [face(b"9" * 11)]}, "face", "number 99999999999 is not a whole number"),
    ({b"a": [face(det=b"0.5")]}, "face", "det_score must be real number"),
    ({b"a\n": []}, "face", r"clip name 'a\n' contains the control character '\n': rename it"),
    ({b" .mp4": []}, "face", "clip name ' .mp4' is empty"),
    ({b"\xff\xfe": []}, "face", r"clip name '\xff\xfe' is not UTF-8"),
    (b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80]s.", "face", r"'\ud800' is not valid Unicode"),
    ({n + s: [] for n in "012345678" for s in ("", ".mp4")}, "face", ": 0, 1, 2, 3, 4 and 4 m"),
])  # fmt: skip
def test_layout_errors_name_the_clip_and_the_field(value, modality, expected, tmp_path):
    message = refused(lambda: convert(tmp_path, value, modality), expected)
    assert "\n" not in message and len(message) < 400


def load(data):
    return unpickle.load(io.BytesIO(data), len(data))


def refusal(data):
    """Returns the error of a pickle, which has one line."""
    message = refused(lambda: load(data))
    assert "\n" not in message
    return message


def test_scalars_of_every_pickle_protocol_load_exactly():
    scalars = [np.float16(2.5), np.float64(0.1), np.int64(-7), np.uint8(200), np.True_]
    for dumps, protocol in WRITERS:
        assert load(dumps(scalars, protocol)) == [2.5, 0.1, -7, 200, True]
    # Python 2 pickles a scalar as a function, its arguments, and an opcode that calls the function.
    # The pickle of the arguments ends with STOP.
    arguments = python2.dumps((np.dtype(">f8"), struct.pack(">d", 0.1)), 1)[:-1]
    assert load(hostile.SCALAR + arguments + b"R.") == 0.1


def test_attacks_are_refused_and_do_not_modify_the_allowed_classes():
    def attributes():
        return {name: dict(vars(allowed)) for name, allowed in unpickle._GLOBALS.items()}

    before, attacks = attributes(), hostile.attacks(Path("/nowhere/mark")).values()
    for data in (*(data for data, _ in attacks), *hostile.TRICKS.values()):
        assert refusal(data)
        assert attributes() == before
    assert "shape and bytes disagree" in refusal(hostile.GREED["shape of 1e11"])  # 3 numbers


def test_second_dtype_state_does_not_change_arrays_already_loaded():
    """After an array, its dtype comes again with the state of the other byte order."""
    array = np.array([1.5, 2.5], "<f2")
    list_of_array = python2.dumps([array], 2)[:-1]
    get_dtype, build, append = b"j\x01\x00\x00\x00", b"b", b"a"  # opcodes; memo 1 is the dtype
    other_order = python2.dumps((3, b">", *[None] * 3, -1, -1, 0), 1)[:-1]
    first, _ = load(list_of_array + get_dtype + other_order + build + append + b".")
    assert first.code == "<f2" and first.data == array.tobytes()


@pytest.mark.parametrize("protocol", [0, 2])
def test_error_of_a_truncated_pickle_gives_the_size_of_the_file(protocol):
    data = python2.dumps({b"clip": [face()]}, protocol)
    for end in range(1, len(data)):
        message = refusal(data[:end])
        assert f"at byte {end}" in message or f"({end} bytes)" in message
    assert "is empty" in refusal(b"")
    assert f"ends at byte {len(data)}, but 3 bytes follow" in refusal(data + b"abc")
