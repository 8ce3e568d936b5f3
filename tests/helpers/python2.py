"""Pickles as Python 2.7 with numpy 1.16 writes them, and real pickles of several versions."""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

PYTHONS: Any = vars(pickle)["_Pickler"]  # its pickler in Python, whose methods can be replaced
# Function or type that makes arrays -> its module and name in numpy 1.16.
NAMES = {
    np.zeros(0).__reduce__()[0]: "numpy.core.multiarray _reconstruct",
    np.float64().__reduce__()[0]: "numpy.core.multiarray scalar", np.ndarray: "numpy ndarray",
    np.dtype: "numpy dtype",
}  # fmt: skip


def dumps(value: Any, protocol: int = 2) -> bytes:
    """Returns a pickle of Python 2: bytes are str, str is unicode, arrays are of numpy 1.16."""
    file = io.BytesIO()
    _Pickler(file, protocol).dump(value)
    return file.getvalue()


class _Pickler(PYTHONS):
    dispatch: ClassVar[dict[Any, Any]] = dict(PYTHONS.dispatch)

    def save_bytes(self, value: bytes) -> None:
        if not self.bin:
            self.write(b"S" + repr(value)[1:].encode() + b"\n")
        elif len(value) < 256:
            self.write(b"U%c" % len(value) + value)
        else:
            self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes

    def memoize(self, value: Any) -> None:
        """Memoizes only values that may be repeated, because others would fill the memo."""
        if isinstance(value, (list, dict, np.dtype)):
            super().memoize(value)

    def save_global(self, value: Any, name: str | None = None) -> None:
        del name
        self.write(b"c" + NAMES[value].replace(" ", "\n").encode() + b"\n")

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            order = value.str[:1].encode()
            state = (3, order, None, None, None, -1, -1, 0)
            return np.dtype, (value.str[1:].encode(), 0, 1), state
        if isinstance(value, (np.ndarray, np.generic)):
            return value.__reduce__()
        return NAMES[value] if callable(value) else NotImplemented


def real() -> dict[str, bytes]:
    """Returns "writer and protocol" -> a real pickle of the dict below.

    The writers are Python 2.7 (cPickle) with numpy 1.16, and Python 3 with numpy 1.16, 1.26, 2.4:

        rows = np.array([[1, 2.5, -3], [4, 5, 6], [0.5, -0.25, 100]], "f2")
        rows = [rows[0], rows[1], np.repeat(rows, 2, axis=1)[2, ::2]]
        frame = lambda i: [str(i), [1.0, 2.5, 30.5, 40.25 + i], 0.5, np.float64(80.5 - i), rows[i]]
        {"clip_1": [frame(0), frame(1)], "clip_2": [], "clip_3": [frame(2)]}
    """
    with zipfile.ZipFile(Path(__file__).with_name("real_pickles.zip")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
