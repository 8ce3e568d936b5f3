"""A JAX function as an ONNX graph: each primitive of its jaxpr becomes a few nodes.

The jaxpr is traced with symbols for B and T, so the graph takes arrays of any size. What depends on
no input is computed here and stored: weights and random draws become constants. A new primitive
gets a function below with the decorator `emits`.

ONNX Runtime lacks some operators for bool and uint32. So choices between bools are logic, and
uint32 is int64 modulo 2**32.
"""

import ast
import copy
import hashlib
import itertools
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from vidjax.errors import UserError
from vidjax.export.function import LARGEST

OPSET, IR_VERSION = 18, 8  # those that ONNX Runtime 1.14 and later read
_DTYPES = {"uint32": np.int64, "int8": np.int32, "uint8": np.int32, "bfloat16": np.float32,
           "float16": np.float32}  # fmt: skip
CUSTOM = ("custom_jvp_call", "custom_vjp_call")  # functions with a derivative of their own
Eqn = Any  # a JaxprEqn, whose types lack the shapes of its values
Emit = Callable[["Graph", Any, Sequence[str]], Any]
_EMITTERS: dict[str, Emit] = {}


def to_model(
    function: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """Returns a function of named arrays as an ONNX model.

    Args:
      function: inputs -> outputs, dicts of arrays.
      inputs: name -> shape, with symbolic dimensions, and dtype.
      outputs: names of the outputs, in their order in the model.

    Raises:
      UserError: the function needs what ONNX, or this module, cannot express.
    """
    names = sorted(inputs)  # as JAX flattens a dict
    traced = jax.make_jaxpr(function)(dict(inputs))
    graph = Graph()
    for name in names:
        for axis, dim in enumerate(inputs[name].shape):
            if str(dim).isidentifier():
                graph.symbols.setdefault(str(dim), (name, axis))
    found = graph.run(traced.jaxpr, traced.consts, names)
    results = dict(zip(sorted(outputs), found, strict=True))
    ends = [graph.node("Identity", results[name], name=name) for name in outputs]
    avals = dict(zip(sorted(outputs), traced.out_avals, strict=True))
    used = _used(graph.nodes)
    constants = [one for one in graph.constants if one.name in used]
    if sum(len(one.raw_data) for one in constants) >= LARGEST:
        raise UserError("--format=onnx holds 2.1 GB: choose safetensors or saved_model")
    proto = helper.make_graph(
        graph.nodes,
        "vidjax",
        [_info(name, inputs[name]) for name in inputs],
        [_info(name, avals[name]) for name in ends],
        constants,
    )
    made = helper.make_opsetid("", OPSET)
    model = helper.make_model(proto, opset_imports=[made], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def _used(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Returns the names of the values that nodes and the bodies of their loops read."""
    names = set()
    for node in nodes:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _used(attribute.g.node) | {one.name for one in attribute.g.output}
    return names


def _info(name: str, aval: Any) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
    return helper.make_tensor_value_info(name, kind, [_plain(dim) for dim in aval.shape])


def _plain(dim: Any) -> int | str:
    return int(dim) if isinstance(dim, int) else str(dim)


def _dtype(aval: Any) -> np.dtype:
    """Returns the dtype in which the graph computes a value."""
    return np.dtype(_DTYPES.get(aval.dtype.name, aval.dtype))


def _kind(aval: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(_dtype(aval))


class Graph:
    """Nodes under construction; a value is the name of a node's output.

    Attributes:
      nodes: in the order of computation.
      constants: arrays, shared by all inner graphs.
      known: name of a constant -> its value, an array or a random key.
      symbols: name of a dimension -> the input and its axis that have this size.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.symbols: dict[str, tuple[str, int]] = {}
        self._numbers = itertools.count(1)
        self.known: dict[str, Any] = {}
        self._names: dict[tuple[str, ...], str] = {}
        self._sizes: dict[str, str] = {}

    def body(self) -> "Graph":
        """Returns a graph for the body of a loop in this graph."""
        inner = copy.copy(self)
        inner.nodes, inner._sizes = [], dict(self._sizes)
        return inner

    # ---- nodes

    def fresh(self) -> str:
        """Returns a new name."""
        return f"v{next(self._numbers)}"

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node with one output, whose name it returns."""
        name = name or self.fresh()
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Returns the name of a constant; equal ones are stored once."""
        name = self.fresh()
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            self.known[name] = value  # only what is drawn by it can be stored
            return name
        given = np.asarray(value, dtype, order="C")
        digest = hashlib.sha256(given.tobytes()).hexdigest()
        known = self._names.setdefault((given.dtype.name, str(given.shape), digest), name)
        if known == name:
            array = given.astype(_DTYPES.get(given.dtype.name, given.dtype), copy=False)
            self.constants.append(numpy_helper.from_array(array, name))
            self.known[name] = given
        return known

    # ---- sizes

    def size(self, dim: Any) -> str:
        """Returns a dimension as int64 []; symbolic ones are computed from the inputs' shapes."""
        if isinstance(dim, int):
            return self.constant(dim, np.int64)
        text = str(dim)
        if text not in self._sizes:
            self._sizes[text] = self._expression(ast.parse(text, mode="eval").body)
        return self._sizes[text]

    def _expression(self, tree: ast.expr) -> str:
        """Computes the printed form of a symbolic dimension, such as `2*T - 1` or `max(0, T)`."""
        if isinstance(tree, ast.Constant):
            return self.constant(tree.value, np.int64)
        if isinstance(tree, ast.Name):
            name, axis = self.symbols[tree.id]
            shape = self.node("Shape", name)
            return self.node("Gather", shape, self.constant(axis, np.int64))
        if isinstance(tree, ast.UnaryOp):
            return self.node("Neg", self._expression(tree.operand))
        if isinstance(tree, ast.BinOp):
            ops = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
            sides = (self._expression(tree.left), self._expression(tree.right))
            return self.node(ops[type(tree.op)], *sides)
        assert isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)
        ops = {"max": "Max", "min": "Min", "floordiv": "Div"}  # sizes are never negative
        return self.node(ops[tree.func.id], *map(self._expression, tree.args))

    def shape(self, dims: Sequence[Any]) -> str:
        """Returns a shape, as int64 [n]."""
        if all(isinstance(dim, int) for dim in dims):
            return self.constant(list(dims), np.int64)
        return self.node("Concat", *(self.vector(self.size(dim)) for dim in dims), axis=0)

    def vector(self, scalar: str) -> str:
        """Returns an int64 [1] of a scalar of any integer type."""
        if scalar in self.known:
            return self.constant(self.known[scalar].reshape(1), np.int64)
        one = self.node("Reshape", scalar, self.constant([1], np.int64))
        return self.node("Cast", one, to=onnx.TensorProto.INT64)

    # ---- what several primitives use

    def reshape(self, x: str, dims: Sequence[Any]) -> str:
        """Returns x in another shape; one unknown size is left to the runtime."""
        unknown = [axis for axis, dim in enumerate(dims) if not isinstance(dim, int)]
        if len(unknown) == 1 and all(
            dims[axis] for axis in range(len(dims)) if axis not in unknown
        ):
            dims = [-1 if axis in unknown else dim for axis, dim in enumerate(dims)]
        return self.node("Reshape", x, self.shape(dims))

    def transpose(self, x: str, order: Sequence[int]) -> str:
        """Returns x with its axes in another order."""
        order = [int(axis) for axis in order]
        return x if order == sorted(order) else self.node("Transpose", x, perm=order)

    def cast(self, x: str, dtype: Any) -> str:
        """Returns x in another dtype of the graph."""
        return self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def select(self, which: str, yes: str, no: str, aval: Any) -> str:
        """Returns `yes` where `which` is True, else `no`."""
        if aval.dtype != bool:
            return self.node("Where", which, yes, no)
        chosen = self.node("And", which, yes)
        return self.node("Or", chosen, self.node("And", self.node("Not", which), no))

    def clamp(self, index: str, most: str) -> str:
        """Returns an int64 index between 0 and `most`."""
        index = self.cast(index, np.int64)
        return self.node("Max", self.node("Min", index, most), self.constant(0, np.int64))

    # ---- the jaxpr

    def run(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[str]) -> list[str]:
        """Emits a jaxpr; returns the names of its results."""
        values: dict[Any, str] = {}

        def read(x: Any) -> str:
            if isinstance(x, core.Literal):
                aval: Any = x.aval
                return self.constant(x.val, aval.dtype)
            return values[x]

        values |= {var: self.constant(x) for var, x in zip(jaxpr.constvars, consts, strict=True)}
        values |= dict(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            args = [read(x) for x in eqn.invars]
            if _is_foldable(eqn) and all(name in self.known for name in args):
                found = eqn.primitive.bind(*(self.known[name] for name in args), **eqn.params)
                found = found if eqn.primitive.multiple_results else [found]
                values |= dict(zip(eqn.outvars, map(self.constant, found), strict=True))
                continue
            emit = _EMITTERS.get(eqn.primitive.name)
            if emit is None:
                raise UserError(
                    f"onnx: no form is known of the operation '{eqn.primitive.name}' of this model"
                    "\nchoose stablehlo or saved_model"
                )
            out = emit(self, eqn, args)
            values |= dict(zip(eqn.outvars, [out] if isinstance(out, str) else out, strict=True))
        return [read(x) for x in jaxpr.outvars]


def _is_foldable(eqn: Eqn) -> bool:
    """Returns True if an equation can be computed here: all its results have known sizes."""
    if eqn.primitive.name in ("dim_as_value", *CUSTOM):
        return False
    return all(
        isinstance(dim, int) for var in eqn.outvars for dim in getattr(var.aval, "shape", ())
    )


def emits(*names: str) -> Callable[[Emit], Emit]:
    """Declares the function below to emit the primitives of these names."""

    def add(emit: Emit) -> Emit:
        _EMITTERS.update(dict.fromkeys(names, emit))
        return emit

    return add


_ONE_TO_ONE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min",
    "pow": "Pow", "neg": "Neg", "abs": "Abs", "sign": "Sign", "exp": "Exp", "log": "Log",
    "sqrt": "Sqrt", "logistic": "Sigmoid", "tanh": "Tanh", "erf": "Erf", "floor": "Floor",
    "ceil": "Ceil", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "sin": "Sin", "cos": "Cos", "stop_gradient": "Identity",
    "copy": "Identity", "copy_p": "Identity", "optimization_barrier": "Identity",
}  # fmt: skip


def _one_to_one(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    aval = eqn.outvars[0].aval
    out = graph.node(_ONE_TO_ONE[eqn.primitive.name], *x)
    if aval.dtype.name == "uint32":
        out = graph.node("Mod", out, graph.constant(1 << 32, np.int64))
    return out


emits(*_ONE_TO_ONE)(_one_to_one)

_EMITTERS |= {
    "ne": lambda graph, eqn, x: graph.node("Not", graph.node("Equal", *x)),
    "square": lambda graph, eqn, x: graph.node("Mul", x[0], x[0]),
    "integer_pow": lambda graph, eqn, x: graph.node(
        "Pow", x[0], graph.constant(eqn.params["y"], _dtype(eqn.outvars[0].aval))
    ),
    "rsqrt": lambda graph, eqn, x: graph.node("Reciprocal", graph.node("Sqrt", x[0])),
    "rem": lambda graph, eqn, x: graph.node("Mod", *x, fmod=1),
    "shift_right_logical": lambda graph, eqn, x: graph.node(
        "Div", x[0], graph.node("Pow", graph.constant(2, np.int64), x[1])
    ),
    "clamp": lambda graph, eqn, x: graph.node("Min", graph.node("Max", x[1], x[0]), x[2]),
    "convert_element_type": lambda graph, eqn, x: graph.cast(x[0], _dtype(eqn.outvars[0].aval)),
    "dim_as_value": lambda graph, eqn, x: graph.cast(
        graph.size(eqn.params["dim"]), _dtype(eqn.outvars[0].aval)
    ),
    "transpose": lambda graph, eqn, x: graph.transpose(x[0], eqn.params["permutation"]),
    "concatenate": lambda graph, eqn, x: graph.node("Concat", *x, axis=eqn.params["dimension"]),
    **dict.fromkeys(
        ("reshape", "squeeze", "expand_dims"),
        lambda graph, eqn, x: graph.reshape(x[0], eqn.outvars[0].aval.shape),
    ),
}


@emits("and", "or", "xor", "not")
def _logic(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    name = {"and": "And", "or": "Or", "xor": "Xor", "not": "Not"}[eqn.primitive.name]
    return graph.node(name if eqn.outvars[0].aval.dtype == bool else f"Bitwise{name}", *x)


@emits("is_finite")
def _is_finite(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    bad = graph.node("Or", graph.node("IsNaN", x[0]), graph.node("IsInf", x[0]))
    return graph.node("Not", bad)


@emits("log1p")
def _log1p(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Emits log(u) x / (u - 1) with u = 1 + x, which keeps all digits of a small x.

    Source: Kahan; Goldberg 1991, What every computer scientist should know about floating-point.
    """
    one = graph.constant(1, _dtype(eqn.outvars[0].aval))
    u = graph.node("Add", x[0], one)
    less = graph.node("Sub", u, one)
    tiny = graph.node("Equal", u, one)
    huge = graph.node("IsInf", u)
    found = graph.node("Div", graph.node("Mul", graph.node("Log", u), x[0]), less)
    found = graph.node("Where", huge, graph.node("Log", u), found)
    return graph.node("Where", tiny, x[0], found)


@emits("expm1")
def _expm1(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Emits (u - 1) x / log(u) with u = exp(x), see `_log1p`; exact also for x of -inf and 0."""
    one = graph.constant(1, _dtype(eqn.outvars[0].aval))
    u = graph.node("Exp", x[0])
    less = graph.node("Sub", u, one)
    tiny = graph.node("Equal", u, one)
    low = graph.node("Equal", less, graph.node("Neg", one))
    found = graph.node("Div", graph.node("Mul", less, x[0]), graph.node("Log", u))
    found = graph.node("Where", graph.node("Or", low, graph.node("IsInf", u)), less, found)
    return graph.node("Where", tiny, x[0], found)


@emits("select_n")
def _select(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    (which, *cases), aval = x, eqn.outvars[0].aval
    if eqn.invars[0].aval.dtype == bool:
        return graph.select(which, cases[1], cases[0], aval)
    found = cases[0]
    for number, case in enumerate(cases[1:], 1):
        here = graph.node("Equal", which, graph.constant(number, np.int32))
        found = graph.select(here, case, found, aval)
    return found


# ---- shapes


@emits("broadcast_in_dim")
def _broadcast(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    inner = [1] * len(after)
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        inner[place] = before[axis]
    value = x[0] if tuple(inner) == tuple(before) else graph.reshape(x[0], inner)
    return (
        value if tuple(inner) == tuple(after) else graph.node("Expand", value, graph.shape(after))
    )


@emits("iota")
def _iota(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    aval, axis = eqn.outvars[0].aval, eqn.params["dimension"]
    ends = graph.constant(0, np.int64), graph.size(aval.shape[axis]), graph.constant(1, np.int64)
    line = graph.cast(graph.node("Range", *ends), _dtype(aval))
    if len(aval.shape) == 1:
        return line
    line = graph.reshape(line, [d if n == axis else 1 for n, d in enumerate(aval.shape)])
    return graph.node("Expand", line, graph.shape(aval.shape))


@emits("stack")
def _stack(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    axis = graph.constant([eqn.params.get("axis", 0)], np.int64)
    return graph.node("Concat", *(graph.node("Unsqueeze", one, axis) for one in x),
                      axis=eqn.params.get("axis", 0))  # fmt: skip


@emits("slice")
def _slice(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    steps = eqn.params["strides"] or [1] * len(eqn.params["start_indices"])
    axes = graph.constant(list(range(len(steps))), np.int64)
    bounds = (graph.shape(eqn.params[name]) for name in ("start_indices", "limit_indices"))
    return graph.node("Slice", x[0], *bounds, axes, graph.shape(steps))


@emits("rev")
def _rev(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    axes = list(eqn.params["dimensions"])
    ends = [[-1] * len(axes), [np.iinfo(np.int64).min] * len(axes), axes, [-1] * len(axes)]
    return graph.node("Slice", x[0], *(graph.constant(one, np.int64) for one in ends))


def _windowed(graph: Graph, x: str, dims: Sequence[Any], windows: Mapping[int, tuple[str, Any]]
              ) -> str:  # fmt: skip
    """Returns x within windows, axis -> (start, size); starts are moved so that windows fit."""
    for axis, (start, size) in windows.items():
        if str(size) == str(dims[axis]):
            continue
        most = graph.node("Sub", graph.size(dims[axis]), graph.size(size))
        start = graph.clamp(graph.reshape(start, ()), most)
        end = graph.node("Add", start, graph.size(size))
        x = graph.node("Slice", x, graph.vector(start), graph.vector(end),
                       graph.constant([axis], np.int64))  # fmt: skip
    return x


@emits("dynamic_slice")
def _dynamic_slice(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    sizes = eqn.params["slice_sizes"]
    windows = {axis: (x[1 + axis], size) for axis, size in enumerate(sizes)}
    return _windowed(graph, x[0], eqn.invars[0].aval.shape, windows)


# ---- sums and searches


@emits("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    name = {"sum": "ReduceSum", "max": "ReduceMax", "min": "ReduceMin", "prod": "ReduceProd"}
    axes = graph.constant(list(eqn.params["axes"]), np.int64)
    return graph.node(name[eqn.primitive.name.removeprefix("reduce_")], x[0], axes, keepdims=0)


@emits("reduce_or", "reduce_and")
def _reduce_logic(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    name = "ReduceMax" if eqn.primitive.name == "reduce_or" else "ReduceMin"
    return _reduced(graph, name, x[0], eqn.params["axes"])


def _reduced(graph: Graph, name: str, x: str, axes: Sequence[int]) -> str:
    """Returns a reduction of bools over some axes."""
    places = graph.constant(list(axes), np.int64)
    return graph.cast(graph.node(name, graph.cast(x, np.int32), places, keepdims=0), np.bool_)


@emits("argmax", "argmin")
def _argmax(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    (axis,) = eqn.params["axes"]
    value = graph.cast(x[0], np.int32) if eqn.invars[0].aval.dtype == bool else x[0]
    name = "ArgMax" if eqn.primitive.name == "argmax" else "ArgMin"
    found = graph.node(name, value, axis=axis, keepdims=0)
    return graph.cast(found, _dtype(eqn.outvars[0].aval))


@emits("cumsum")
def _cumsum(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    axis = graph.constant(eqn.params["axis"], np.int64)
    return graph.node("CumSum", x[0], axis, reverse=int(eqn.params["reverse"]))


@emits("dot_general")
def _dot(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    letters = iter(string.ascii_letters)
    names = [[""] * len(var.aval.shape) for var in eqn.invars]
    for left, right in (*zip(left_batch, right_batch, strict=True),
                        *zip(left_sum, right_sum, strict=True)):  # fmt: skip
        names[0][left] = names[1][right] = next(letters)
    names = [[name or next(letters) for name in own] for own in names]
    out = [names[0][axis] for axis in left_batch]
    summed = {names[0][axis] for axis in left_sum}
    out += [name for own in names for name in own if name not in summed and name not in out]
    wide = _dtype(eqn.outvars[0].aval)
    x = [one if _dtype(var.aval) == wide else graph.cast(one, wide)
         for one, var in zip(x, eqn.invars, strict=True)]  # fmt: skip
    text = f"{''.join(names[0])},{''.join(names[1])}->{''.join(out)}"
    return graph.node("Einsum", *x, equation=text)


@emits("sort")
def _sort(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    """Sorts all operands by the first one, in ascending order; equal keys keep theirs."""
    axis, key = eqn.params["dimension"], x[0]
    if eqn.params["num_keys"] != 1:
        raise UserError("onnx: no sort by several keys is known\nchoose stablehlo or saved_model")
    aval = eqn.invars[0].aval
    if aval.dtype == bool:
        key = graph.cast(key, np.int32)
    names = [graph.fresh(), graph.fresh()]
    size = graph.vector(graph.size(aval.shape[axis]))
    graph.nodes.append(helper.make_node("TopK", [key, size], names, axis=axis, largest=0, sorted=1))
    return [graph.node("GatherElements", one, names[1], axis=axis) for one in x]


@emits("top_k")
def _top_k(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    names = [graph.fresh(), graph.fresh()]
    size = graph.vector(graph.size(eqn.params["k"]))
    graph.nodes.append(helper.make_node("TopK", [x[0], size], names, axis=-1, largest=1, sorted=1))
    return [names[0], graph.cast(names[1], np.int32)]


# ---- gathering and scattering


@emits("gather")
def _gather(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Emits a gather whose slices are whole along all axes but those that are indexed.

    Indices outside of the operand are moved to its border, whatever the mode says of them.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (dims, places), out = (var.aval.shape for var in eqn.invars), eqn.outvars[0].aval.shape
    starts = [int(axis) for axis in numbers.start_index_map]
    batch = [int(axis) for axis in numbers.operand_batching_dims]
    prefix = len(places) - 1
    indexed = [n for n, axis in enumerate(starts) if str(sizes[axis]) != str(dims[axis])]
    if not prefix:  # one slice, of any size
        windows = {starts[n]: (_component(graph, x[1], n), sizes[starts[n]]) for n in indexed}
        return graph.reshape(_windowed(graph, x[0], dims, windows), out)
    if not indexed:
        indexed = [n for n, axis in enumerate(starts) if axis in numbers.collapsed_slice_dims]
    axes = [starts[n] for n in indexed]
    if not axes or any(sizes[axis] != 1 for axis in axes):
        raise UserError("onnx: no gather of this form is known\nchoose stablehlo or saved_model")
    whole = [axis for axis in range(len(dims)) if axis not in (*batch, *axes)]
    operand = graph.transpose(x[0], [*batch, *axes, *whole])
    own = [int(axis) for axis in numbers.start_indices_batching_dims]
    rest = [axis for axis in range(prefix) if axis not in own]
    order = [*own, *rest]  # of the axes of the indices before the last one
    parts = []
    for n, axis in zip(indexed, axes, strict=True):
        most = graph.node("Sub", graph.size(dims[axis]), graph.constant(1, np.int64))
        part = graph.transpose(_component(graph, x[1], n, keep=True), [*order, prefix])
        parts.append(graph.clamp(part, most))
    index = parts[0] if len(parts) == 1 else graph.node("Concat", *parts, axis=prefix)
    found = graph.node("GatherND", operand, index, batch_dims=len(batch))
    # Now the axes are those of the indices in `order`, then `whole`; the result wants its own.
    offsets = [int(axis) for axis in numbers.offset_dims]
    kept = [axis for axis in range(len(dims))
            if axis not in (*batch, *(int(a) for a in numbers.collapsed_slice_dims))]  # fmt: skip
    place = {axis: prefix + n for n, axis in enumerate(whole)}
    ahead = iter([order.index(axis) for axis in range(prefix)])
    slices = dict(zip(offsets, kept, strict=True))
    wanted = [place.get(slices[n]) if n in slices else next(ahead) for n in range(len(out))]
    found = graph.transpose(found, [n for n in wanted if n is not None])
    return graph.reshape(found, out)


def _component(graph: Graph, index: str, n: int, *, keep: bool = False) -> str:
    """Returns number n along the last axis of indices."""
    place = graph.constant([n] if keep else n, np.int64)
    return graph.node("Gather", index, place, axis=-1)


@emits("scatter")
def _scatter(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Emits the replacement of one slice, at one place along one axis."""
    numbers, aval = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    axes = [int(axis) for axis in numbers.scatter_dims_to_operand_dims]
    if eqn.invars[1].aval.shape != (1,) or list(numbers.inserted_window_dims) != axes:
        raise UserError("onnx: no scatter of this form is known\nchoose stablehlo or saved_model")
    (axis,) = axes
    ends = graph.constant(0, np.int64), graph.size(aval.shape[axis]), graph.constant(1, np.int64)
    line = graph.reshape(graph.node("Range", *ends),
                         [d if n == axis else 1 for n, d in enumerate(aval.shape)])  # fmt: skip
    here = graph.node("Equal", line, graph.cast(x[1], np.int64))
    new = graph.node("Unsqueeze", x[2], graph.constant([axis], np.int64))
    return graph.select(here, new, x[0], aval)


@emits("scatter-max", "scatter-add")
def _scatter_rows(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Emits the largest, or the sum, of rows [N, ...] by their place in [K, ...].

    Rows of other places are dropped: they go to a row K that is cut off again.
    """
    numbers, dims = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    if tuple(numbers.inserted_window_dims) != (0,) or len(eqn.invars[1].aval.shape) != 2:
        raise UserError("onnx: no scatter of this form is known\nchoose stablehlo or saved_model")
    zero, one = graph.constant([0], np.int64), graph.constant([1], np.int64)
    spare = graph.node("Slice", x[0], zero, one, zero)
    operand = graph.node("Concat", x[0], spare, axis=0)
    count = graph.size(dims[0])
    index = graph.cast(x[1], np.int64)
    outside = graph.node("Less", index, graph.constant(0, np.int64))
    index = graph.node("Min", graph.node("Where", outside, count, index), count)
    how = eqn.primitive.name.removeprefix("scatter-")
    found = graph.node("ScatterND", operand, index, x[2], reduction=how)
    return graph.node("Slice", found, zero, graph.vector(count), zero)


# ---- functions and loops


@emits("jit", "pjit", "closed_call", "core_call", "checkpoint", *CUSTOM)
def _call(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    closed = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr") or eqn.params["fun_jaxpr"]
    if isinstance(closed, core.ClosedJaxpr):
        return graph.run(closed.jaxpr, closed.consts, x)
    return graph.run(closed, (), x)


def _as_column(graph: Graph, flags: str, rank: int, aval: Any) -> str:
    """Returns flags of the first `rank` axes, for a choice between values of more axes."""
    axes = list(range(rank, len(aval.shape)))
    return graph.node("Unsqueeze", flags, graph.constant(axes, np.int64)) if axes else flags


@emits("while")
def _while(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    """Emits a Loop, whose condition for the first round is computed before it."""
    params = eqn.params
    ahead, own = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = x[:ahead], x[ahead : ahead + own]
    state, carried = x[ahead + own :], eqn.outvars
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    (start,) = graph.run(cond.jaxpr, cond.consts, [*cond_consts, *state])
    inner = graph.body()
    names = [inner.fresh() for _ in carried]
    after = inner.run(body.jaxpr, body.consts, [*body_consts, *names])
    if several := len(cond.out_avals[0].shape):  # of vmap: some go on while others have ended
        (goes_on,) = inner.run(cond.jaxpr, cond.consts, [*cond_consts, *names])
        after = [
            inner.select(_as_column(inner, goes_on, several, var.aval), new, old, var.aval)
            for new, old, var in zip(after, names, carried, strict=True)
        ]
    (again,) = inner.run(cond.jaxpr, cond.consts, [*cond_consts, *after])
    if several:
        start, again = (
            _reduced(one, "ReduceMax", flags, range(several))
            for one, flags in ((graph, start), (inner, again))
        )
    ends = [inner.node("Identity", value) for value in (again, *after)]
    count, going = inner.fresh(), inner.fresh()

    def info(name: str, aval: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, _kind(aval), [_plain(d) for d in aval.shape])

    flag = helper.make_tensor_value_info
    entering = [flag(count, onnx.TensorProto.INT64, []), flag(going, onnx.TensorProto.BOOL, [])]
    leaving = [flag(ends[0], onnx.TensorProto.BOOL, [])]
    entering += [info(name, var.aval) for name, var in zip(names, carried, strict=True)]
    leaving += [info(name, var.aval) for name, var in zip(ends[1:], carried, strict=True)]
    proto = helper.make_graph(inner.nodes, inner.fresh(), entering, leaving)
    results = [graph.fresh() for _ in carried]
    graph.nodes.append(helper.make_node("Loop", ["", start, *state], results, body=proto))
    return results
