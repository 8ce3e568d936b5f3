"""The Open Inference Protocol, version 2: requests and answers as tensors, in JSON and in binary.

A body is JSON; after it may come the bytes of tensors. Then the header
`Inference-Header-Content-Length` says where the JSON ends, and the parameter `binary_data_size` of
a tensor how many bytes are its own. Tensors are arrays: `FP32` float32, `BOOL` bool, `BYTES` text.

Source: the specification of KServe's data plane, and the binary extension of Triton. `FP32` that
JSON lacks (-inf) is the lowest finite float32 there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vidjax.apps.serve.limits import Limits, unprocessable
from vidjax.data.untrusted.names import show

HEADER = "inference-header-content-length"
DTYPES = {"FP32": np.dtype("<f4"), "BOOL": np.dtype("?")}
LOWEST = float(np.finfo(np.float32).min)
Name = Annotated[str, Meta(max_length=200)]
Sizes = Annotated[list[Annotated[int, Meta(ge=0, le=1 << 30)]], Meta(min_length=1, max_length=4)]
DEFAULT_K = 5
K = Annotated[int, Meta(ge=1, le=1000, description="the most identities of a clip")]

Fpir = Annotated[float, Meta(gt=0, lt=1, description="share of strangers who may get a name")]
Probability = Annotated[float, Meta(gt=0, le=1, description="instead: the lowest of a name")]


class Rule(Struct, forbid_unknown_fields=True, kw_only=True):
    """When a clip gets a name."""

    fpir: Fpir | None = None
    threshold: Probability | None = None


class Parameters(Rule):
    """Parameters of a request."""

    k: K = DEFAULT_K
    binary_data_output: bool = False
    timeout: Annotated[int, Meta(ge=0, description="microseconds for the answer; 0: no limit")] = 0


class InputParameters(Struct, forbid_unknown_fields=True, frozen=True):
    """How an input is sent: without a size, its values are in the JSON."""

    binary_data_size: Annotated[int, Meta(ge=0)] | None = None


class Tensor(Struct):
    """An input: its values are `data`, or lie behind the JSON."""

    name: Name
    shape: Sizes
    datatype: Name
    parameters: InputParameters = InputParameters()
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class OutputParameters(Struct, forbid_unknown_fields=True, frozen=True):
    """How an output is wanted: as bytes, or else in the JSON."""

    binary_data: bool = False


class Output(Struct):
    """An output that is wanted."""

    name: Name
    parameters: OutputParameters = OutputParameters()


class Ask(Struct):
    """A request for answers to tensors; without `outputs`, all are wanted."""

    inputs: Annotated[list[Tensor], Meta(min_length=1, max_length=64)]
    id: Name = ""
    parameters: Parameters = msgspec.field(default_factory=Parameters)
    outputs: Annotated[list[Output], Meta(max_length=64)] = []


class Spec(NamedTuple):
    """A tensor of a model: its name, datatype, and shape with -1 for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def parse(
    body: bytes, header_length: str | None, inputs: Sequence[Spec], limits: Limits
) -> tuple[Ask, dict[str, np.ndarray]]:
    """Returns a request, and its arrays by name; Refused names the tensor that is wrong."""
    at = size = _header_size(body, header_length)
    if size > limits.json_bytes:
        raise unprocessable(
            f"the JSON has {limits.json_bytes:,} bytes at most: send binary tensors"
        )
    asked = decode(memoryview(body)[:size], Ask)
    known = {spec.name: spec for spec in inputs}
    tensors: dict[str, np.ndarray] = {}
    for tensor in asked.inputs:
        name = tensor.name
        if name not in known:
            raise unprocessable(f"no input '{show(name)}': choose from {', '.join(known)}")
        if name in tensors:
            raise unprocessable(f"input '{name}' comes twice")
        spec = known[name]
        if tensor.datatype != spec.datatype:
            raise unprocessable(f"input '{name}' is {spec.datatype}, not {show(tensor.datatype)}")
        if not _fits(tensor.shape, spec.shape):
            raise unprocessable(f"input '{name}': shape {tensor.shape}, wanted {list(spec.shape)}")
        dtype = DTYPES[spec.datatype]
        length = tensor.parameters.binary_data_size
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
    return asked, tensors


def check_outputs(asked: Ask, outputs: Sequence[Spec]) -> None:
    """Raises Refused for an output that a model does not have."""
    known = [spec.name for spec in outputs]
    if unknown := [one.name for one in asked.outputs if one.name not in known]:
        raise unprocessable(f"no output '{show(unknown[0])}': choose from {', '.join(known)}")


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


def _of_json(tensor: Tensor, name: str, dtype: np.dtype) -> np.ndarray:
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


def answer(asked: Ask, model: str, outputs: Mapping[str, np.ndarray]) -> tuple[bytes, int | None]:
    """Returns the body of an answer, and the length of its JSON if binary tensors follow.

    `outputs` are all outputs of the model: float32, bool, or text, an array of dtype object.
    """
    wanted = {one.name: one.parameters.binary_data for one in asked.outputs}
    described, tails = [], []
    for name, binary in (
        wanted or dict.fromkeys(outputs, asked.parameters.binary_data_output)
    ).items():
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
    head = msgspec.json.encode({**content, "id": asked.id} if asked.id else content)
    return (b"".join([head, *tails]), len(head)) if tails else (head, None)


def _bytes_of(array: np.ndarray) -> bytes:
    """Returns texts as Triton writes them: four bytes of length before each, in UTF-8."""
    texts = [text.encode() for text in array.reshape(-1).tolist()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
