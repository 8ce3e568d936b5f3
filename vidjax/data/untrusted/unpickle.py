"""Unpickling with no code of the file's choosing.

Only the globals that numpy writes into feature pickles resolve, by exact look-up, to sealed classes
that check their arguments. Arrays stay plain bytes: numpy's own unpickling never sees the file.
This prevents foreign code, not excessive memory: a few bytes can still ask for gigabytes. Call
`load` only in the child process of `sandbox`, which has limits.
"""

import pickle
import struct
from typing import Any, BinaryIO

import numpy as np

from vidjax.data.untrusted.names import show
from vidjax.utils.errors import UserError

_STRUCT_CODES = {
    "f2": "e", "f4": "f", "f8": "d", "b1": "?",
    "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
}  # fmt: skip

# First bytes of files that are mistaken for pickles; no pickle begins like one of them.
_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive, as .npz and PyTorch files are",
    b"\x93NUMPY": "a .npy file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"version https://git-lfs": "a Git LFS pointer: its content was not downloaded (git lfs pull)",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
}


# The globals of a pickle resolve to the classes below. BUILD sets attributes on any object, classes
# included: their metaclass forbids it, and no global resolves to a function.


class _Sealed(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise UserError("the pickle tries to change a class: refused")


class _NdArray(metaclass=_Sealed):
    """numpy.ndarray: valid only as the first argument of _reconstruct."""

    def __new__(cls, *args: object) -> "_NdArray":
        raise UserError("the pickle builds a numpy.ndarray outside _reconstruct: refused")


class _DType(metaclass=_Sealed):
    """numpy.dtype, for plain numbers only."""

    __slots__ = ("code", "itemsize")
    code: str
    itemsize: int

    def __new__(cls, code: object, align: object = False, copy: object = False) -> "_DType":
        name = str(code, "latin-1") if isinstance(code, bytes) else code
        if not isinstance(name, str) or name not in _STRUCT_CODES:
            raise UserError("the pickle holds a dtype that is not a plain number: refused")
        self = object.__new__(cls)
        self.itemsize = int(name[1])
        self.code = ("<" if self.itemsize > 1 else "|") + name
        return self

    def __setstate__(self, state: object) -> None:
        if type(state) is not tuple or len(state) not in (8, 9):
            raise UserError("the pickle holds a damaged dtype")
        version, order, subarray, names, fields, *layout = state
        if any(part is not None for part in (subarray, names, fields, *layout[3:])):
            raise UserError("the pickle holds a structured dtype or one with metadata: refused")
        if type(order) is bytes:
            order = order.decode("latin-1")
        orders = ("<", ">") if self.itemsize > 1 else ("|",)
        # Item size, alignment and flags of a plain number are -1, -1 and 0.
        if type(order) is not str or order not in orders:
            raise UserError("the pickle holds a dtype with an impossible byte order")
        whole = all(type(number) is int for number in (version, *layout[:3]))
        if not whole or version not in (3, 4) or layout[:3] != [-1, -1, 0]:
            raise UserError("the pickle holds a damaged dtype")
        self.code = order + self.code[1:]


class Array(metaclass=_Sealed):
    """A numpy array of the pickle: dtype code, shape, and bytes in C order."""

    __slots__ = ("code", "data", "shape")
    code: str
    data: bytes
    shape: tuple[int, ...]

    def __setstate__(self, state: object) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise UserError("the pickle holds a damaged array")
        _, shape, dtype, fortran, data = state
        self.fill(dtype, shape, bool(fortran), data)

    def fill(self, dtype: object, shape: object, fortran: bool, data: object) -> None:
        """Takes dtype, shape and bytes; UserError unless they fit each other."""
        if type(dtype) is not _DType or type(shape) is not tuple or type(data) is not bytes:
            raise UserError("the pickle holds a damaged array")
        if len(shape) > 2:
            raise UserError(f"the pickle holds an array of {len(shape)} axes")
        wanted = dtype.itemsize
        for length in shape:
            if type(length) is not int or length < 0:
                raise UserError("the pickle holds an array of impossible shape")
            wanted *= length
        if wanted != len(data):
            raise UserError("the pickle holds an array whose shape and bytes disagree")
        if fortran and len(shape) == 2:
            data = np.frombuffer(data, dtype.code).reshape(shape, order="F").tobytes()
        self.code, self.shape, self.data = dtype.code, shape, data


class _Reconstruct(metaclass=_Sealed):
    """numpy.core.multiarray._reconstruct: an empty array, which BUILD fills."""

    def __new__(cls, kind: object, shape: object, code: object) -> Array:
        if kind is not _NdArray:
            raise UserError("the pickle builds something other than a numpy.ndarray: refused")
        made = object.__new__(Array)
        made.code, made.shape, made.data = "|i1", (0,), b""
        return made


class _FromBuffer(metaclass=_Sealed):
    """numpy.core.numeric._frombuffer: an array of protocol 5, its bytes in the file."""

    def __new__(
        cls, data: object, dtype: object, shape: object, order: object, axes: object = None
    ) -> Array:
        if type(order) is not str or order not in ("C", "F") or axes is not None:
            raise UserError("the pickle holds an array of unknown order")
        made = object.__new__(Array)
        made.fill(dtype, shape, order == "F", bytes(data) if type(data) is bytearray else data)
        return made


class _Scalar(metaclass=_Sealed):
    """numpy.core.multiarray.scalar: a Python number of the same value."""

    def __new__(cls, dtype: object, data: object) -> float:
        if type(dtype) is not _DType or type(data) is not bytes or len(data) != dtype.itemsize:
            raise UserError("the pickle holds a damaged numpy scalar")
        order = ">" if dtype.code[0] == ">" else "<"
        return struct.unpack(order + _STRUCT_CODES[dtype.code[1:]], data)[0]


class _Encode(metaclass=_Sealed):
    """_codecs.encode: how Python 3 writes bytes below protocol 3."""

    def __new__(cls, text: object, encoding: object) -> bytes:
        known = type(encoding) in (str, bytes) and encoding in ("latin1", b"latin1")
        if type(text) is not str or not known:
            raise UserError("the pickle encodes text other than as latin1: refused")
        return text.encode("latin-1")


class _Bytes(metaclass=_Sealed):
    """__builtin__.bytes: how Python 3 writes b"" below protocol 3."""

    def __new__(cls) -> bytes:
        return b""


_GLOBALS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _NdArray,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
    ("_codecs", "encode"): _Encode,
    ("__builtin__", "bytes"): _Bytes,
    ("builtins", "bytes"): _Bytes,
}


class _Unpickler(pickle.Unpickler):
    """The C Unpickler, with all of Python's own globals refused."""

    def find_class(self, module_name: str, global_name: str) -> type:
        sealed = _GLOBALS.get((module_name, global_name))
        if sealed is None:
            name = show(f"{module_name}.{global_name}")
            raise UserError(f"the pickle names {name}, which no feature pickle needs: refused")
        return sealed

    def persistent_load(self, pid: object) -> object:
        raise UserError("the pickle asks for a persistent object (PERSID): refused")


def load(file: BinaryIO, size: int) -> Any:
    """Returns the content of a pickle of `size` bytes, made of Python's own types and Array.

    UserError if the pickle is refused, damaged, truncated or followed by more. MemoryError if
    it asks for more than the limit of the process.
    """
    if size == 0:
        raise UserError("the file is empty: no pickle")
    try:
        content = _Unpickler(file, encoding="bytes").load()
    except (MemoryError, UserError):
        raise
    except Exception as error:
        file.seek(0)
        refuse_others(file)
        if isinstance(error, EOFError) or "truncated" in str(error):
            raise UserError(f"the pickle is truncated: the file ends at byte {size}") from None
        reason = f"{type(error).__name__}: {show(str(error))}"
        raise UserError(f"no readable pickle of {size:,} bytes: {reason}") from None
    end = file.tell()
    if end != size:
        raise UserError(f"the pickle ends at byte {end}, but {size - end} bytes follow it")
    return content


def refuse_others(file: BinaryIO, place: str = "") -> None:
    """Raises UserError, after `place`, if a file begins as one of _OTHER_FILES does."""
    start = file.read(64).lstrip()
    for magic, kind in _OTHER_FILES.items():
        if start[: len(magic)].lower() == magic.lower():
            raise UserError(f"{place}not a pickle: the file is {kind}")
