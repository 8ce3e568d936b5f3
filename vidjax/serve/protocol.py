"""The Open Inference Protocol, version 2: requests and answers as tensors, in JSON and in binary.

A body is JSON; after it may come the bytes of tensors. Then the header
`Inference-Header-Content-Length` says where the JSON ends, and the parameter `binary_data_size` of
a tensor how many bytes are its own. Tensors are arrays: `FP32` float32, `BOOL` bool, `BYTES` text.

Source: the specification of KServe's data plane, and the binary extension of Triton. `FP32` that
JSON lacks (-inf) is the lowest finite float32 there.
"""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vidjax.data.untrusted.names import show
from vidjax.serve.limits import Limits, Refused, unprocessable

HEADER = "inference-header-content-length"
DTYPES = {"FP32": np.dtype("<f4"), "BOOL": np.dtype("?")}
LOWEST = float(np.finfo(np.float32).min)
Name = Annotated[str, Meta(max_length=200)]
Sizes = Annotated[list[Annotated[int, Meta(ge=0, le=1 << 30)]], Meta(min_length=1, max_length=4)]


class _Tensor(Struct):
    name: Name
    shape: Sizes
    datatype: Name
    parameters: dict[str, bool | float | str] = {}
    data: msgspec.Raw = msgspec.Raw()


class _Output(Struct):
    name: Name
    parameters: dict[str, bool | float | str] = {}


class _Request(Struct):
    inputs: Annotated[list[_Tensor], Meta(min_length=1, max_length=64)]
    id: Name = ""
    parameters: dict[str, bool | float | str] = {}
    outputs: Annotated[list[_Output], Meta(max_length=64)] = []


class Spec(NamedTuple):
    """A tensor of a model: its name, datatype, and shape with -1 for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class UnknownInput(Refused):
    """The model has no such input, or had none at the last look."""


class Ask(NamedTuple):
    """A request: arrays by name, parameters, and the outputs wanted, name -> True for binary.

    Without outputs, all are wanted, in binary if `binary` says so.
    """

    id: str
    tensors: dict[str, np.ndarray]
    parameters: Mapping[str, bool | float | str]
    outputs: dict[str, bool]
    binary: bool


def parse(body: bytes, header_length: str | None, inputs: Sequence[Spec], limits: Limits) -> Ask:
    """Returns a request; Refused names the tensor that is wrong."""
    size = _header_size(body, header_length)
    if size > limits.json_bytes:
        raise unprocessable(
            f"the JSON has {limits.json_bytes:,} bytes at most: send binary tensors"
        )
    request = decode(memoryview(body)[:size], _Request)
    known = {spec.name: spec for spec in inputs}
    tensors: dict[str, np.ndarray] = {}
    at = size
    for tensor in request.inputs:
        name = tensor.name
        if name not in known:
            text = f"no input '{show(name)}': choose from {', '.join(known)}"
            raise UnknownInput(HTTPStatus.UNPROCESSABLE_ENTITY, text)
        if name in tensors:
            raise unprocessable(f"input '{name}' comes twice")
        spec = known[name]
        if tensor.datatype != spec.datatype:
            raise unprocessable(f"input '{name}' is {spec.datatype}, not {show(tensor.datatype)}")
        if not _fits(tensor.shape, spec.shape):
            raise unprocessable(f"input '{name}': shape {tensor.shape}, wanted {list(spec.shape)}")
        dtype = DTYPES[spec.datatype]
        length = tensor.parameters.get("binary_data_size")
        if length is not None:
            wanted = math.prod(tensor.shape) * dtype.itemsize
            if length != wanted or len(bytes(tensor.data)) or at + wanted > len(body):
                raise unprocessable(f"input '{name}': its shape takes {wanted:,} bytes of the body")
            array = np.frombuffer(body, dtype, math.prod(tensor.shape), at)
            at += wanted
        else:
            array = _of_json(tensor, name, dtype)
        tensors[name] = array.reshape(tensor.shape)
    if at != len(body):
        raise unprocessable(f"{len(body) - at:,} bytes of the body belong to no tensor")
    outputs = {one.name: bool(one.parameters.get("binary_data", False)) for one in request.outputs}
    binary = bool(request.parameters.get("binary_data_output", False))
    return Ask(request.id, tensors, request.parameters, outputs, binary)


def decode(content: bytes | memoryview, kind: Any) -> Any:  # noqa: ANN401 (of that kind)
    """Returns JSON as a value of a type of msgspec; Refused for all else, and for NaN."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unprocessable(show(str(error))) from None
    except RecursionError:
        raise unprocessable("the JSON is nested too deep") from None


def _header_size(body: bytes, header_length: str | None) -> int:
    if header_length is None:
        return len(body)
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
        raise unprocessable("Inference-Header-Content-Length: no number")
    if int(header_length) > len(body):
        raise unprocessable("Inference-Header-Content-Length: longer than the body")
    return int(header_length)


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Returns True for the rank and sizes that are wanted."""
    sizes = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in sizes)


def _of_json(tensor: _Tensor, name: str, dtype: np.dtype) -> np.ndarray:
    """Returns the values of a tensor in JSON, a flat list or lists of lists, as [N]."""
    kind: Any = bool if dtype.kind == "b" else float
    flat = list[kind]
    nested: Any = kind
    for _ in tensor.shape:
        nested = list[nested]
    if not bytes(tensor.data):
        raise unprocessable(f"input '{name}' has neither data nor binary_data_size")
    try:
        values = msgspec.json.decode(tensor.data, type=flat)
    except msgspec.DecodeError:
        try:
            values = msgspec.json.decode(tensor.data, type=nested)
        except (msgspec.DecodeError, RecursionError) as error:
            raise unprocessable(f"input '{name}': {show(str(error))}") from None
    with np.errstate(over="ignore"):  # what is beyond float32 is refused as not finite
        try:
            array = np.asarray(values, dtype)
        except ValueError:
            raise unprocessable(f"input '{name}': lists of different lengths") from None
    if array.size != math.prod(tensor.shape):
        raise unprocessable(f"input '{name}': {array.size:,} values in shape {tensor.shape}")
    return array.reshape(-1)


def answer(ask: Ask, model: str, outputs: Mapping[str, np.ndarray]) -> tuple[bytes, int | None]:
    """Returns the body of an answer, and the length of its JSON where binary tensors follow.

    `outputs` are float32, bool, or text, an array of dtype object.
    """
    wanted = ask.outputs or dict.fromkeys(outputs, ask.binary)
    described, tails = [], []
    for name, binary in wanted.items():
        if name not in outputs:
            raise unprocessable(f"no output '{show(name)}': choose from {', '.join(outputs)}")
        array = outputs[name]
        text = array.dtype == object
        one: dict[str, object] = {"name": name, "shape": list(array.shape)}
        one["datatype"] = "BYTES" if text else "FP32"
        if binary:
            tail = _bytes_of(array) if text else np.ascontiguousarray(array, "<f4").tobytes()
            one["parameters"] = {"binary_data_size": len(tail)}
            tails.append(tail)
        else:
            plain = array if text else np.maximum(array, np.float32(LOWEST)).astype(np.float64)
            one["data"] = plain.reshape(-1).tolist()
        described.append(one)
    content = {"model_name": model, "model_version": "1", "outputs": described}
    head = msgspec.json.encode({**content, "id": ask.id} if ask.id else content)
    return (b"".join([head, *tails]), len(head)) if tails else (head, None)


def _bytes_of(array: np.ndarray) -> bytes:
    """Returns texts as Triton writes them: four bytes of length before each, in UTF-8."""
    texts = [text.encode() for text in array.reshape(-1).tolist()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
