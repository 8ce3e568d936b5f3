"""Reads requests and writes answers of the Open Inference Protocol, version 2.

A body starts with JSON, and the bytes of binary tensors may follow. If they do, the header
`Inference-Header-Content-Length` contains the length of the JSON, and each tensor has a parameter
`binary_data_size` with the number of its bytes. The datatypes are `FP32` (float32), `BOOL` (bool)
and `BYTES` (text). JSON has no -inf, so JSON answers contain the lowest finite float32 instead.

Source: the specification of KServe's data plane, and the binary extension of Triton.
"""

import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vidjax.apps.serve.limits import unprocessable
from vidjax.apps.server_limits import Limits
from vidjax.utils.names import show

HEADER = "inference-header-content-length"
DTYPES = {"FP32": np.dtype("<f4"), "BOOL": np.dtype("?")}
LOWEST_FLOAT32 = np.finfo(np.float32).min
Name = Annotated[str, Meta(max_length=200)]
Sizes = Annotated[list[Annotated[int, Meta(ge=0, le=1 << 30)]], Meta(min_length=1, max_length=4)]
DEFAULT_K = 5
K = Annotated[int, Meta(ge=1, le=1000, description="largest number of identities per clip")]
Fpir = Annotated[
    float, Meta(gt=0, lt=1, description="the largest share of strangers who may wrongly get a name")
]
Fmr = Annotated[
    float, Meta(gt=0, lt=1, description="the largest share of other people's clips to accept")
]
Probability = Annotated[
    float, Meta(gt=0, le=1, description="the lowest probability of a name, instead of fpir")
]


class RuleParameters(Struct, forbid_unknown_fields=True, kw_only=True):
    """The rule by which a clip gets a name. If both are None, the gallery chooses the rule."""

    fpir: Fpir | None = None
    threshold: Probability | None = None


class Parameters(RuleParameters):
    """The parameters of a request to a model of the Open Inference Protocol."""

    k: K = DEFAULT_K
    binary_data_output: bool = False
    timeout: Annotated[
        int, Meta(ge=0, description="microseconds until the answer; 0 is the limit of the server")
    ] = 0


class InputParameters(Struct, forbid_unknown_fields=True, frozen=True):
    """The parameters of an input tensor."""

    # The number of bytes of a tensor that follows the JSON; None for a tensor in the JSON.
    binary_data_size: Annotated[int, Meta(ge=0)] | None = None


class Tensor(Struct):
    """An input tensor. Its values are in `data`, or are bytes after the JSON of the request."""

    name: Name
    shape: Sizes
    datatype: Name
    parameters: InputParameters = InputParameters()
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class OutputParameters(Struct, forbid_unknown_fields=True, frozen=True):
    """The parameters of an output tensor."""

    binary_data: bool = False  # True for bytes after the JSON, False for a list in the JSON


class Output(Struct):
    """An output tensor that the client wants."""

    name: Name
    parameters: OutputParameters = OutputParameters()


class InferRequest(Struct):
    """A request to a model for its outputs. If `outputs` is empty, the client gets all outputs."""

    inputs: Annotated[list[Tensor], Meta(min_length=1, max_length=64)]
    id: Name = ""
    parameters: Parameters = msgspec.field(default_factory=Parameters)
    outputs: Annotated[list[Output], Meta(max_length=64)] = []


class Spec(NamedTuple):
    """The name, datatype and shape of a tensor. The size -1 stands for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def parse(
    body: bytes, header_length: str | None, inputs: Sequence[Spec], limits: Limits
) -> tuple[InferRequest, dict[str, np.ndarray]]:
    """Parses the body of an `InferRequest`; returns the request and its tensors, name -> array.

    `header_length` is the value of the header `Inference-Header-Content-Length`. `inputs` are the
    tensors that the model takes. Raises Refused if the body or a tensor is wrong.
    """
    at = header_size = _read_header_size(body, header_length)
    if header_size > limits.json_bytes:
        raise unprocessable(
            f"the JSON has more than {limits.json_bytes:,} bytes: send binary tensors instead"
        )
    request = decode(memoryview(body)[:header_size], InferRequest)
    known = {spec.name: spec for spec in inputs}
    tensors: dict[str, np.ndarray] = {}
    for tensor in request.inputs:
        name = tensor.name
        if name not in known:
            raise unprocessable(
                f"the model has no input '{show(name)}': choose from {', '.join(known)}"
            )
        if name in tensors:
            raise unprocessable(f"input '{name}' occurs twice: send it once")
        spec = known[name]
        if tensor.datatype != spec.datatype:
            kind = show(tensor.datatype)
            raise unprocessable(f"input '{name}' has the datatype {kind}: send {spec.datatype}")
        pairs = zip(tensor.shape, spec.shape, strict=False)
        sizes_fit = all(expected in (-1, size) for size, expected in pairs)
        if len(tensor.shape) != len(spec.shape) or not sizes_fit:
            raise unprocessable(
                f"input '{name}' has the shape {tensor.shape}, but must have {list(spec.shape)}"
            )
        dtype, count = DTYPES[spec.datatype], math.prod(tensor.shape)
        length, size = tensor.parameters.binary_data_size, count * dtype.itemsize
        if length is None:
            array = _parse_values(tensor, name, dtype)
        elif length != size:
            raise unprocessable(
                f"input '{name}' takes {size:,} bytes, but binary_data_size is {length:,}"
            )
        elif len(bytes(tensor.data)):
            raise unprocessable(f"input '{name}' has data and binary_data_size: send one of them")
        elif at + size > len(body):
            raise unprocessable(f"the body is too short for the {size:,} bytes of input '{name}'")
        else:
            array = np.frombuffer(body, dtype, count, at)
            at += size
        tensors[name] = array.reshape(tensor.shape)
    if at != len(body):
        raise unprocessable(
            f"the body has {len(body) - at:,} bytes that belong to no tensor: remove them"
        )
    return request, tensors


def check_outputs(request: InferRequest, outputs: Sequence[Spec]) -> None:
    """Raises Refused if the client wants an output that the model does not have."""
    known = [spec.name for spec in outputs]
    if unknown := [output.name for output in request.outputs if output.name not in known]:
        raise unprocessable(
            f"the model has no output '{show(unknown[0])}': choose from {', '.join(known)}"
        )


def decode(content: bytes | memoryview, kind: Any) -> Any:  # noqa: ANN401 (an instance of kind)
    """Decodes JSON to an object of the type `kind`. Raises Refused if it does not fit the type."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        nan = re.search(rb"\b(NaN|Infinity)\b", content) and "invalid character" in str(error)
        hint = ": NaN and Infinity are not allowed" if nan else ""
        raise unprocessable(f"{describe(error, kind)}{hint}") from None
    except RecursionError:
        raise unprocessable("the JSON is nested too deeply: see /openapi.json") from None


def describe(error: Exception, kind: Any) -> str:  # noqa: ANN401 (the type of a body or query)
    """Returns the message of an error of msgspec, on one line, with the known fields."""
    text = show(str(error)).replace("Input data was truncated", "the JSON ends too early")
    is_field = "unknown field" in text and " - at `$" not in text  # not of a nested object
    return f"{text}: choose from {', '.join(kind.__struct_fields__)}" if is_field else text


def _read_header_size(body: bytes, header_length: str | None) -> int:
    if header_length is None:
        return len(body)
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
        raise unprocessable(f"the header {HEADER} must be the number of bytes of the JSON")
    if int(header_length) > len(body):
        raise unprocessable(
            f"the header {HEADER} is larger than the body: send the size of the JSON"
        )
    return int(header_length)


def _parse_values(tensor: Tensor, name: str, dtype: np.dtype) -> np.ndarray:
    """Returns the values of a tensor, a flat or nested list in JSON, as a flat array."""
    content = bytes(tensor.data)
    if not content:
        raise unprocessable(f"input '{name}' has no values: send data or binary_data_size")
    is_nested = re.match(rb"\s*\[\s*\[", content)
    kind: Any = bool if dtype.kind == "b" else float
    for _ in tensor.shape if is_nested else tensor.shape[:1]:
        kind = types.GenericAlias(list, kind)  # pyright may refuse `list[kind]`
    try:
        values = msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise unprocessable(f"input '{name}': {show(str(error))}") from None
    with np.errstate(over="ignore"):  # larger values become infinite and are refused later
        try:
            array = np.asarray(values, dtype)
        except ValueError:
            text = f"the data of input '{name}' are lists of different lengths"
            raise unprocessable(text) from None
    if array.size != math.prod(tensor.shape):
        raise unprocessable(
            f"input '{name}' has {array.size:,} values, which do not fit its shape {tensor.shape}"
        )
    return array.reshape(-1)


def encode_answer(
    request: InferRequest, model: str, outputs: Mapping[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """Encodes the answer of a model; returns the body, and the length of the JSON at its beginning.

    If the body contains no binary tensors, the length is None. `request` lists the outputs to send.
    `outputs` are name -> array of float32 or of text (dtype object).
    """
    requested = {output.name: output.parameters.binary_data for output in request.outputs}
    described, tails = [], []
    sent = requested or dict.fromkeys(outputs, request.parameters.binary_data_output)
    for name, binary in sent.items():
        array = outputs[name]
        text = array.dtype == object
        tensor: dict[str, object] = {"name": name, "shape": list(array.shape)}
        tensor["datatype"] = "BYTES" if text else "FP32"
        if binary:
            tail = _encode_texts(array) if text else np.ascontiguousarray(array, "<f4").tobytes()
            tensor["parameters"] = {"binary_data_size": len(tail)}
            tails.append(tail)
        else:
            plain = array if text else np.maximum(array, LOWEST_FLOAT32).astype(np.float64)
            tensor["data"] = plain.reshape(-1).tolist()
        described.append(tensor)
    content = {"model_name": model, "model_version": "1", "outputs": described}
    head = msgspec.json.encode({**content, "id": request.id} if request.id else content)
    return (b"".join([head, *tails]), len(head)) if tails else (head, None)


def _encode_texts(array: np.ndarray) -> bytes:
    """Encodes texts like Triton: for each text, its length in four bytes, and then its UTF-8."""
    texts = [text.encode() for text in array.reshape(-1).tolist()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
