"""A JAX function as an ONNX graph: each primitive of its jaxpr becomes a few nodes.

The jaxpr is traced with symbols for B and T, so the graph takes arrays of any size. What depends on
no input is computed here and stored: weights and random draws become constants. A new primitive
gets a line in RULES, with a function above it where one line does not do.

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

from vidjax.apps.export.function import LARGEST
from vidjax.utils.errors import UserError

OPSET, IR_VERSION = 18, 8  # those that ONNX Runtime 1.14 and later read
_DTYPES = {"uint32": np.int64, "int8": np.int32, "uint8": np.int32, "bfloat16": np.float32,
           "float16": np.float32}  # fmt: skip
CUSTOM = ("custom_jvp_call", "custom_vjp_call")  # functions with a derivative of their own
Eqn = Any  # a JaxprEqn, whose types lack the shapes of its values
Rule = Callable[["Graph", Any, Sequence[str]], Any]  # of an Eqn and the names of its arguments


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
    kind = helper.np_dtype_to_tensor_dtype(_dtype(aval))
    dims = [int(dim) if isinstance(dim, int) else str(dim) for dim in aval.shape]
    return helper.make_tensor_value_info(name, kind, dims)


def _dtype(aval: Any) -> np.dtype:
    """Returns the dtype in which the graph computes a value."""
    return np.dtype(_DTYPES.get(aval.dtype.name, aval.dtype))


def _unknown(what: str) -> UserError:
    return UserError(f"onnx: no {what} is known\nchoose stablehlo or saved_model")


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

    def nodes_of(self, op: str, *inputs: str, names: list[str], **attributes: Any) -> list[str]:
        """Adds a node with outputs of these names, and returns them."""
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node with one output, whose name it returns."""
        return self.nodes_of(op, *inputs, names=[name or self.fresh()], **attributes)[0]

    def ints(self, value: int | Sequence[int]) -> str:
        """Returns the name of a constant of int64."""
        return self.constant(value, np.int64)

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
            return self.ints(dim)
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
            return self.node("Gather", shape, self.ints(axis))
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
            return self.ints(list(dims))
        return self.node("Concat", *(self.vector(self.size(dim)) for dim in dims), axis=0)

    def vector(self, scalar: str) -> str:
        """Returns an int64 [1] of a scalar of any integer type."""
        if scalar in self.known:
            return self.constant(self.known[scalar].reshape(1), np.int64)
        return self.cast(self.node("Reshape", scalar, self.ints([1])), np.int64)

    # ---- what several primitives use

    def reshape(self, x: str, dims: Sequence[Any]) -> str:
        """Returns x in another shape; one unknown size is left to the runtime."""
        known = [dim for dim in dims if isinstance(dim, int)]
        if len(known) == len(dims) - 1 and all(known):
            dims = [dim if isinstance(dim, int) else -1 for dim in dims]
        return self.node("Reshape", x, self.shape(dims))

    def transpose(self, x: str, order: Sequence[int]) -> str:
        """Returns x with its axes in another order."""
        order = [int(axis) for axis in order]
        return x if order == sorted(order) else self.node("Transpose", x, perm=order)

    def cast(self, x: str, dtype: Any) -> str:
        """Returns x in another dtype of the graph."""
        return self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def line(self, dims: Sequence[Any], axis: int) -> str:
        """Returns the places 0, 1, ... along one axis of an array of `dims`, 1 long elsewhere."""
        line = self.node("Range", self.ints(0), self.size(dims[axis]), self.ints(1))
        if len(dims) == 1:
            return line
        return self.reshape(line, [dim if n == axis else 1 for n, dim in enumerate(dims)])

    def reduced(self, op: str, x: str, axes: Sequence[int], *, logic: bool = False) -> str:
        """Returns a reduction over some axes; with `logic`, x are bools."""
        x = self.cast(x, np.int32) if logic else x
        found = self.node(op, x, self.ints(list(axes)), keepdims=0)
        return self.cast(found, np.bool_) if logic else found

    def top(self, x: str, count: Any, axis: int, *, largest: bool) -> list[str]:
        """Returns the first of the sorted values along an axis, and their places."""
        names, how = [self.fresh(), self.fresh()], {"largest": int(largest), "sorted": 1}
        count = self.vector(self.size(count))
        return self.nodes_of("TopK", x, count, names=names, axis=axis, **how)

    def select(self, which: str, yes: str, no: str, aval: Any) -> str:
        """Returns `yes` where `which` is True, else `no`."""
        if aval.dtype != bool:
            return self.node("Where", which, yes, no)
        chosen = self.node("And", which, yes)
        return self.node("Or", chosen, self.node("And", self.node("Not", which), no))

    def clamp(self, index: str, most: str) -> str:
        """Returns an int64 index between 0 and `most`."""
        index = self.cast(index, np.int64)
        return self.node("Max", self.node("Min", index, most), self.ints(0))

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
            rule = RULES.get(eqn.primitive.name)
            if rule is None:
                raise UserError(
                    f"onnx: no form is known of the operation '{eqn.primitive.name}' of this model"
                    "\nchoose stablehlo or saved_model"
                )
            out = rule(self, eqn, args)
            values |= dict(zip(eqn.outvars, [out] if isinstance(out, str) else out, strict=True))
        return [read(x) for x in jaxpr.outvars]


def _is_foldable(eqn: Eqn) -> bool:
    """Returns True if an equation can be computed here: all its results have known sizes."""
    if eqn.primitive.name in ("dim_as_value", *CUSTOM):
        return False
    return all(
        isinstance(dim, int) for var in eqn.outvars for dim in getattr(var.aval, "shape", ())
    )


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


def _select(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    (which, *cases), aval = x, eqn.outvars[0].aval
    if eqn.invars[0].aval.dtype == bool:
        return graph.select(which, cases[1], cases[0], aval)
    found = cases[0]
    for number, case in enumerate(cases[1:], 1):
        here = graph.node("Equal", which, graph.constant(number, np.int32))
        found = graph.select(here, case, found, aval)
    return found


def _broadcast(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    inner = [1] * len(after)
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        inner[place] = before[axis]
    value = x[0] if tuple(inner) == tuple(before) else graph.reshape(x[0], inner)
    return (
        value if tuple(inner) == tuple(after) else graph.node("Expand", value, graph.shape(after))
    )


def _iota(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    aval = eqn.outvars[0].aval
    line = graph.cast(graph.line(aval.shape, eqn.params["dimension"]), _dtype(aval))
    return line if len(aval.shape) == 1 else graph.node("Expand", line, graph.shape(aval.shape))


def _stack(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    axis = eqn.params.get("axis", 0)
    return graph.node("Concat", *(graph.node("Unsqueeze", one, graph.ints([axis])) for one in x),
                      axis=axis)  # fmt: skip


def _slice(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    steps = eqn.params["strides"] or [1] * len(eqn.params["start_indices"])
    axes = graph.ints(list(range(len(steps))))
    bounds = (graph.shape(eqn.params[name]) for name in ("start_indices", "limit_indices"))
    return graph.node("Slice", x[0], *bounds, axes, graph.shape(steps))


def _rev(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    axes = list(eqn.params["dimensions"])
    ends = [[-1] * len(axes), [np.iinfo(np.int64).min] * len(axes), axes, [-1] * len(axes)]
    return graph.node("Slice", x[0], *map(graph.ints, ends))


def _windowed(graph: Graph, x: str, dims: Sequence[Any], windows: Mapping[int, tuple[str, Any]]
              ) -> str:  # fmt: skip
    """Returns x within windows, axis -> (start, size); starts are moved so that windows fit."""
    for axis, (start, size) in windows.items():
        if str(size) == str(dims[axis]):
            continue
        most = graph.node("Sub", graph.size(dims[axis]), graph.size(size))
        start = graph.clamp(graph.reshape(start, ()), most)
        end = graph.node("Add", start, graph.size(size))
        x = graph.node("Slice", x, graph.vector(start), graph.vector(end), graph.ints([axis]))
    return x


def _dynamic_slice(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    sizes = eqn.params["slice_sizes"]
    windows = {axis: (x[1 + axis], size) for axis, size in enumerate(sizes)}
    return _windowed(graph, x[0], eqn.invars[0].aval.shape, windows)


def _argmax(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    (axis,) = eqn.params["axes"]
    value = graph.cast(x[0], np.int32) if eqn.invars[0].aval.dtype == bool else x[0]
    name = "ArgMax" if eqn.primitive.name == "argmax" else "ArgMin"
    return graph.cast(graph.node(name, value, axis=axis, keepdims=0), _dtype(eqn.outvars[0].aval))


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
    if len(names[1]) == 2 and out == [*names[0][:-1], names[1][1]] and names[0][-1] == names[1][0]:
        return graph.node("MatMul", *x)  # whose constant factor a runtime may pack once
    text = f"{''.join(names[0])},{''.join(names[1])}->{''.join(out)}"
    return graph.node("Einsum", *x, equation=text)


def _sort(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    """Sorts all operands by the first one, in ascending order; equal keys keep theirs."""
    axis, key = eqn.params["dimension"], x[0]
    if eqn.params["num_keys"] != 1:
        raise _unknown("sort by several keys")
    aval = eqn.invars[0].aval
    if aval.dtype == bool:
        key = graph.cast(key, np.int32)
    ordered, places = graph.top(key, aval.shape[axis], axis, largest=False)
    if len(x) > 1:
        places = _ties_by_place(graph, ordered, places, aval.shape[axis], axis)
    return [graph.node("GatherElements", one, places, axis=axis) for one in x]


def _ties_by_place(graph: Graph, ordered: str, places: str, size: Any, axis: int) -> str:
    """Returns the places of sorted values with ascending places for equal values.

    ONNX wants them so of TopK, and OpenVINO does not do it. A second sort has no equal values.
    """
    start, one, end, along = (graph.ints([n]) for n in (0, 1, -1, axis))
    earlier = [graph.node("Slice", ordered, start, to, along) for to in (one, end)]
    same = graph.node("Equal", ordered, graph.node("Concat", *earlier, axis=axis))
    run = graph.node("CumSum", graph.cast(graph.node("Not", same), np.int64), graph.ints(axis))
    key = graph.node("Add", graph.node("Mul", run, graph.size(size)), places)
    found, _ = graph.top(key, size, axis, largest=False)
    return graph.node("Mod", found, graph.size(size))


def _top_k(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    values, places = graph.top(x[0], eqn.params["k"], -1, largest=True)
    return [values, graph.cast(places, np.int32)]


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
        raise _unknown("gather of this form")
    whole = [axis for axis in range(len(dims)) if axis not in (*batch, *axes)]
    operand = graph.transpose(x[0], [*batch, *axes, *whole])
    own = [int(axis) for axis in numbers.start_indices_batching_dims]
    rest = [axis for axis in range(prefix) if axis not in own]
    order = [*own, *rest]  # of the axes of the indices before the last one
    parts = []
    for n, axis in zip(indexed, axes, strict=True):
        most = graph.node("Sub", graph.size(dims[axis]), graph.ints(1))
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
    place = graph.ints([n] if keep else n)
    return graph.node("Gather", index, place, axis=-1)


def _scatter(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Emits the replacement of one slice, at one place along one axis."""
    numbers, aval = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    axes = [int(axis) for axis in numbers.scatter_dims_to_operand_dims]
    if eqn.invars[1].aval.shape != (1,) or list(numbers.inserted_window_dims) != axes:
        raise _unknown("scatter of this form")
    (axis,) = axes
    here = graph.node("Equal", graph.line(aval.shape, axis), graph.cast(x[1], np.int64))
    new = graph.node("Unsqueeze", x[2], graph.ints([axis]))
    return graph.select(here, new, x[0], aval)


def _scatter_rows(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Emits the largest, or the sum, of rows [N, ...] by their place in [K, ...].

    Rows of other places are dropped: they go to a row K that is cut off again.
    """
    numbers, dims = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    if tuple(numbers.inserted_window_dims) != (0,) or len(eqn.invars[1].aval.shape) != 2:
        raise _unknown("scatter of this form")
    zero = graph.ints([0])
    spare = graph.node("Slice", x[0], zero, graph.ints([1]), zero)
    operand = graph.node("Concat", x[0], spare, axis=0)
    count = graph.size(dims[0])
    index = graph.cast(x[1], np.int64)
    outside = graph.node("Less", index, graph.ints(0))
    index = graph.node("Min", graph.node("Where", outside, count, index), count)
    how = eqn.primitive.name.removeprefix("scatter-")
    found = graph.node("ScatterND", operand, index, x[2], reduction=how)
    return graph.node("Slice", found, zero, graph.vector(count), zero)


def _call(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    closed = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr") or eqn.params["fun_jaxpr"]
    if isinstance(closed, core.ClosedJaxpr):
        return graph.run(closed.jaxpr, closed.consts, x)
    return graph.run(closed, (), x)


def _as_column(graph: Graph, flags: str, rank: int, aval: Any) -> str:
    """Returns flags of the first `rank` axes, for a choice between values of more axes."""
    axes = list(range(rank, len(aval.shape)))
    return graph.node("Unsqueeze", flags, graph.ints(axes)) if axes else flags


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
            one.reduced("ReduceMax", flags, range(several), logic=True)
            for one, flags in ((graph, start), (inner, again))
        )
    ends = [inner.node("Identity", value) for value in (again, *after)]
    count, going = inner.fresh(), inner.fresh()
    flag = helper.make_tensor_value_info
    entering = [flag(count, onnx.TensorProto.INT64, []), flag(going, onnx.TensorProto.BOOL, [])]
    leaving = [flag(ends[0], onnx.TensorProto.BOOL, [])]
    entering += [_info(name, var.aval) for name, var in zip(names, carried, strict=True)]
    leaving += [_info(name, var.aval) for name, var in zip(ends[1:], carried, strict=True)]
    proto = helper.make_graph(inner.nodes, inner.fresh(), entering, leaving)
    results = [graph.fresh() for _ in carried]
    return graph.nodes_of("Loop", "", start, *state, names=results, body=proto)


def _one_to_one(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    out = graph.node(ONE_TO_ONE[eqn.primitive.name], *x)
    if eqn.outvars[0].aval.dtype.name == "uint32":
        out = graph.node("Mod", out, graph.ints(1 << 32))
    return out


def _logic(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    name = eqn.primitive.name.capitalize()
    return graph.node(name if eqn.outvars[0].aval.dtype == bool else f"Bitwise{name}", *x)


def _is_finite(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    return graph.node("Not", graph.node("Or", graph.node("IsNaN", x[0]), graph.node("IsInf", x[0])))


def _reduce(op: str, *, logic: bool = False) -> Rule:
    return lambda graph, eqn, x: graph.reduced(op, x[0], eqn.params["axes"], logic=logic)


ONE_TO_ONE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min",
    "pow": "Pow", "neg": "Neg", "abs": "Abs", "sign": "Sign", "exp": "Exp", "log": "Log",
    "sqrt": "Sqrt", "logistic": "Sigmoid", "tanh": "Tanh", "erf": "Erf", "floor": "Floor",
    "ceil": "Ceil", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "sin": "Sin", "cos": "Cos", "stop_gradient": "Identity",
    "copy": "Identity", "copy_p": "Identity", "optimization_barrier": "Identity",
}  # fmt: skip
RULES: dict[str, Rule] = {
    **dict.fromkeys(ONE_TO_ONE, _one_to_one),
    **dict.fromkeys(("and", "or", "xor", "not"), _logic),
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "checkpoint", *CUSTOM), _call),
    **dict.fromkeys(
        ("reshape", "squeeze", "expand_dims"),
        lambda graph, eqn, x: graph.reshape(x[0], eqn.outvars[0].aval.shape),
    ),
    "argmax": _argmax,
    "argmin": _argmax,
    "broadcast_in_dim": _broadcast,
    "clamp": lambda graph, eqn, x: graph.node("Min", graph.node("Max", x[1], x[0]), x[2]),
    "concatenate": lambda graph, eqn, x: graph.node("Concat", *x, axis=eqn.params["dimension"]),
    "convert_element_type": lambda graph, eqn, x: graph.cast(x[0], _dtype(eqn.outvars[0].aval)),
    "cumsum": lambda graph, eqn, x: graph.node(
        "CumSum", x[0], graph.ints(eqn.params["axis"]), reverse=int(eqn.params["reverse"])
    ),
    "dim_as_value": lambda graph, eqn, x: graph.cast(
        graph.size(eqn.params["dim"]), _dtype(eqn.outvars[0].aval)
    ),
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "expm1": _expm1,
    "gather": _gather,
    "integer_pow": lambda graph, eqn, x: graph.node(
        "Pow", x[0], graph.constant(eqn.params["y"], _dtype(eqn.outvars[0].aval))
    ),
    "iota": _iota,
    "is_finite": _is_finite,
    "log1p": _log1p,
    "ne": lambda graph, eqn, x: graph.node("Not", graph.node("Equal", *x)),
    "reduce_and": _reduce("ReduceMin", logic=True),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax", logic=True),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_sum": _reduce("ReduceSum"),
    "rem": lambda graph, eqn, x: graph.node("Mod", *x, fmod=1),
    "rev": _rev,
    "rsqrt": lambda graph, eqn, x: graph.node("Reciprocal", graph.node("Sqrt", x[0])),
    "scatter": _scatter,
    "scatter-add": _scatter_rows,
    "scatter-max": _scatter_rows,
    "select_n": _select,
    "shift_right_logical": lambda graph, eqn, x: graph.node(
        "Div", x[0], graph.node("Pow", graph.ints(2), x[1])
    ),
    "slice": _slice,
    "sort": _sort,
    "square": lambda graph, eqn, x: graph.node("Mul", x[0], x[0]),
    "stack": _stack,
    "top_k": _top_k,
    "transpose": lambda graph, eqn, x: graph.transpose(x[0], eqn.params["permutation"]),
    "while": _while,
}
