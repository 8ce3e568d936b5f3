"""unpickle: real feature pickles load, and nothing else is reachable through one."""

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.campaigns import hostile
from tests.helpers import python2
from vidjax.data.untrusted import unpickle
from vidjax.utils.errors import UserError


def load(data):
    return unpickle.load(io.BytesIO(data), len(data))


def refusal(data):
    with pytest.raises(UserError) as caught:
        load(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arrays_and_scalars_of_every_pickle_protocol_load_exactly():
    rng = np.random.default_rng(0)
    writers = [(python2.dumps, p) for p in range(3)] + [(pickle.dumps, p) for p in range(6)]
    for code in ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "|i1"):
        numbers = rng.integers(-100, 100, (6, 8)).astype(code)
        kept = np.array(numbers[0])
        kept.flags.writeable = False
        arrays = (kept, numbers[1, ::2], numbers[2, ::-1], np.asfortranarray(numbers), numbers[:0])
        for dumps, protocol in writers:
            for array in arrays:
                loaded = load(dumps({b"clip": [array, 1, 2.5, b"3"]}, protocol))[b"clip"]
                assert loaded[1:] == [1, 2.5, b"3"]
                values = np.frombuffer(loaded[0].data, loaded[0].code).reshape(loaded[0].shape)
                assert values.dtype == array.dtype
                np.testing.assert_array_equal(values, array)
            scalar = numbers[3, 4]
            assert load(dumps([scalar, scalar], protocol)) == [scalar, scalar]
    big = python2.dumps((np.dtype(">f8"), struct.pack(">d", 0.1)), 1)[:-1]
    assert load(hostile.SCALAR + big + b"R.") == 0.1
    assert load(pickle.dumps([np.int64(-7), np.uint8(200), np.True_])) == [-7, 200, True]


def test_attacks_are_refused_and_do_not_modify_the_allowed_classes():
    before = {name: dict(vars(allowed)) for name, allowed in unpickle._GLOBALS.items()}
    attacks = hostile.attacks(Path("/nowhere/mark")).values()
    for data in (*(attack.data for attack in attacks), *hostile.TRICKS.values()):
        assert refusal(data)
        assert {name: dict(vars(allowed)) for name, allowed in unpickle._GLOBALS.items()} == before
    assert "shape and bytes disagree" in refusal(hostile.GREED["shape of 1e11"])


def test_second_dtype_state_does_not_change_arrays_already_loaded():
    array = np.array([1.5, 2.5], "<f2")
    data = python2.dumps([array], 2)[:-1]
    rebuild = b"j\x01\x00\x00\x00" + python2.dumps((3, b">", *[None] * 3, -1, -1, 0), 1)[:-1] + b"b"
    first, _ = load(data + rebuild + b"a.")
    assert first.code == "<f2" and first.data == array.tobytes()


@pytest.mark.parametrize("protocol", [0, 2])
def test_error_of_a_truncated_pickle_gives_the_size_of_the_file(protocol):
    frame = [b"1", [1.0] * 4, 0.5, 80.0, np.arange(4, dtype="f2")]
    data = python2.dumps({b"clip": [frame]}, protocol)
    for end in range(1, len(data)):
        message = refusal(data[:end])
        assert f"at byte {end}" in message or f" {end} bytes: " in message
    assert "is empty" in refusal(b"")
    assert f"ends at byte {len(data)}, but 3 bytes follow" in refusal(data + b"abc")
