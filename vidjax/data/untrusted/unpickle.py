"""Unpickles files from strangers without running code from the file.

A pickle can name any function or class of any module. This module accepts only the names that numpy
writes into pickles of arrays. Each name is replaced by a class of this module, which checks its
arguments. Arrays stay plain bytes, so numpy never unpickles them. A few bytes can still allocate
gigabytes. So `load` must be called only in the child process of `sandbox`, which has limits.
"""

import pickle
from typing import Any, BinaryIO

import numpy as np

from vidjax.data.checks import refuse_other_files
from vidjax.utils.errors import UserError
from vidjax.utils.names import show

_DTYPES = ("b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")

REMEDY = "write it again with pickle.dump, as a dict {clip name: numpy array [T, D]}"


# The globals of a pickle resolve to the classes below, never to functions. A pickle may try to set
# an attribute of a class, which the metaclass refuses.


class _Sealed(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise UserError("the pickle is refused, because it tries to change a class")


class _NdArray(metaclass=_Sealed):
    """Replaces numpy.ndarray. A pickle may pass this class to _Reconstruct, but not call it."""

    def __new__(cls, *args: object) -> "_NdArray":
        raise UserError("the pickle is refused, because it calls numpy.ndarray")


class _DType(metaclass=_Sealed):
    """Replaces numpy.dtype. Only dtypes of real numbers and bool are allowed."""

    __slots__ = ("code", "itemsize")
    code: str
    itemsize: int

    def __new__(cls, code: object, align: object = False, copy: object = False) -> "_DType":
        name = str(code, "latin-1") if isinstance(code, bytes) else code
        if not isinstance(name, str) or name not in _DTYPES:
            raise UserError("the pickle contains an array whose values are not real numbers")
        self = object.__new__(cls)
        self.itemsize = int(name[1])
        self.code = ("<" if self.itemsize > 1 else "|") + name
        return self

    def __setstate__(self, state: object) -> None:
        if type(state) is not tuple or len(state) not in (8, 9):
            raise UserError("the pickle contains a damaged dtype")
        version, order, subarray, names, fields, *layout = state
        if type(order) is bytes:
            order = order.decode("latin-1")
        orders = ("<", ">") if self.itemsize > 1 else ("|",)
        known = type(order) is str and order in orders
        plain = all(part is None for part in (subarray, names, fields, *layout[3:]))
        whole = all(type(number) is int for number in (version, *layout[:3]))
        # In pickles of real numbers, item size, alignment and flags are -1, -1 and 0.
        if not (known and plain and whole) or version not in (3, 4) or layout[:3] != [-1, -1, 0]:
            raise UserError("the pickle contains a damaged dtype")
        self.code = order + self.code[1:]


class Array(metaclass=_Sealed):
    """A numpy array of a pickle, as dtype code, shape, and bytes in C order."""

    __slots__ = ("code", "data", "shape")
    code: str
    data: bytes
    shape: tuple[int, ...]

    def __setstate__(self, state: object) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise UserError("the pickle contains a damaged array")
        _, shape, dtype, fortran, data = state
        self.fill(dtype, shape, bool(fortran), data)

    def fill(self, dtype: object, shape: object, fortran: bool, data: object) -> None:
        """Sets dtype, shape and bytes. Raises UserError if they contradict each other."""
        if type(dtype) is not _DType or type(shape) is not tuple or type(data) is not bytes:
            raise UserError("the pickle contains a damaged array")
        if len(shape) > 2:
            raise UserError(
                f"the pickle contains an array of {len(shape)} axes: at most 2 are allowed"
            )
        wanted = dtype.itemsize
        for length in shape:
            if type(length) is not int or length < 0:
                raise UserError("the pickle contains an array of impossible shape")
            wanted *= length
        if wanted != len(data):
            raise UserError("the pickle contains an array whose shape and bytes disagree")
        if fortran and len(shape) == 2:
            data = np.frombuffer(data, dtype.code).reshape(shape, order="F").tobytes()
        self.code, self.shape, self.data = dtype.code, shape, data


class _Reconstruct(metaclass=_Sealed):
    """Replaces numpy.core.multiarray._reconstruct. Makes an empty array, which is filled later."""

    def __new__(cls, kind: object, shape: object, code: object) -> Array:
        if kind is not _NdArray:
            raise UserError("the pickle builds an object that is not an array, so it is refused")
        array = object.__new__(Array)
        array.code, array.shape, array.data = "|i1", (0,), b""
        return array


class _FromBuffer(metaclass=_Sealed):
    """Replaces numpy.core.numeric._frombuffer. Pickles of protocol 5 call it to make arrays."""

    def __new__(
        cls, data: object, dtype: object, shape: object, order: object, axes: object = None
    ) -> Array:
        if type(order) is not str or order not in ("C", "F") or axes is not None:
            raise UserError("the pickle contains an array of unknown memory layout")
        array = object.__new__(Array)
        array.fill(dtype, shape, order == "F", bytes(data) if type(data) is bytearray else data)
        return array


class _Scalar(metaclass=_Sealed):
    """Replaces numpy.core.multiarray.scalar, but makes a Python number."""

    def __new__(cls, dtype: object, data: object) -> float:
        if type(dtype) is not _DType or type(data) is not bytes or len(data) != dtype.itemsize:
            raise UserError("the pickle contains a damaged numpy scalar")
        return np.frombuffer(data, dtype.code).item()


class _Encode(metaclass=_Sealed):
    """Replaces _codecs.encode. Pickles of protocol 0 to 2 call this function to make bytes."""

    def __new__(cls, text: object, encoding: object) -> bytes:
        known = type(encoding) in (str, bytes) and encoding in ("latin1", b"latin1")
        if type(text) is not str or not known:
            raise UserError("the pickle encodes text with an encoding other than latin1")
        return text.encode("latin-1")


class _Bytes(metaclass=_Sealed):
    """Replaces __builtin__.bytes. Pickles of protocol 0 to 2 call it to make empty bytes."""

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


class Unpickler(pickle.Unpickler):
    """Python's unpickler, which accepts only the functions and classes in _GLOBALS."""

    def find_class(self, module_name: str, global_name: str) -> type:
        """Returns the replacement in _GLOBALS for a function or class that a pickle names.

        Raises UserError for all names that are not in _GLOBALS.
        """
        sealed = _GLOBALS.get((module_name, global_name))
        if sealed is None:
            name = show(f"{module_name}.{global_name}")
            raise UserError(f"the pickle is refused, because it refers to {name}")
        return sealed

    def persistent_load(self, pid: object) -> object:
        """Raises UserError. Python calls this method if a pickle refers to an object elsewhere."""
        raise UserError("the pickle is refused, because it refers to an object outside the file")


def load(file: BinaryIO, size: int) -> Any:
    """Unpickles a file of `size` bytes. Arrays become objects of the class `Array`.

    Raises MemoryError if the content exceeds the memory limit of the process, and UserError if the
    pickle is damaged or not allowed.
    """
    if size == 0:
        raise UserError("the file is empty: copy the pickle again")
    try:
        content = Unpickler(file, encoding="bytes").load()
    except MemoryError:
        raise
    except UserError as error:
        raise UserError(f"{error}; {REMEDY}") from None
    except Exception as error:
        file.seek(0)
        refuse_other_files(file)
        if isinstance(error, EOFError) or "truncated" in str(error):
            raise UserError(
                f"the pickle is truncated: the file ends at byte {size}: copy the file again"
            ) from None
        reason = f"{type(error).__name__}: {show(str(error))}"
        raise UserError(
            f"the pickle ({size:,} bytes) is not readable: {reason}; {REMEDY}"
        ) from None
    end = file.tell()
    if end != size:
        raise UserError(f"the pickle ends at byte {end}, but {size - end} bytes follow; {REMEDY}")
    return content
