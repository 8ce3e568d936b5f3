"""Converts a JAX function to an ONNX graph.

The function is traced to a jaxpr, the intermediate representation of JAX. Each primitive operation
of the jaxpr becomes a few ONNX nodes. The number of clips and the numbers of frames are symbols, so
the graph accepts arrays of any size. Values that do not depend on an input, such as weights and
random draws, are computed here and stored as constants. To add a primitive, add a line to RULES,
and a function if one line is not enough.

ONNX Runtime lacks some operators for bool and uint32. So a selection between bools uses logical
operators, and uint32 is computed as int64 modulo 2**32.
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

from vidjax.evaluation.export.function import LARGEST
from vidjax.utils.errors import UserError

OPSET, IR_VERSION = 18, 8  # ONNX Runtime 1.14 and later versions can read them
# dtype of JAX -> dtype in the graph. All other dtypes are the same.
_DTYPES = {"uint32": np.int64, "int8": np.int32, "uint8": np.int32, "bfloat16": np.float32,
           "float16": np.float32}  # fmt: skip
CUSTOM = ("custom_jvp_call", "custom_vjp_call")  # functions with a custom derivative
Eqn = Any  # a JaxprEqn, whose type annotations lack the shapes of values
# (graph, Eqn, names of the arguments) -> names of the results
Rule = Callable[["Graph", Any, Sequence[str]], Any]


def to_model(
    function: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """Converts a function of named arrays to an ONNX model.

    `inputs` are name -> shape and dtype. Sizes may be symbols. `outputs` are the names of the
    results, in the order of the model. Raises UserError if the function has an operation that is
    not in RULES (the supported operations), or if the model is too large.
    """
    names = sorted(inputs)  # JAX flattens a dict in this order
    traced = jax.make_jaxpr(function)(dict(inputs))
    graph = Graph()
    for name in names:
        for axis, dim in enumerate(inputs[name].shape):
            if str(dim).isidentifier():
                graph.symbols.setdefault(str(dim), (name, axis))
    values = graph.add_jaxpr(traced.jaxpr, traced.consts, names)
    results = dict(zip(sorted(outputs), values, strict=True))
    ends = [graph.node("Identity", results[name], name=name) for name in outputs]
    avals = dict(zip(sorted(outputs), traced.out_avals, strict=True))
    used = _find_inputs(graph.nodes)
    constants = [constant for constant in graph.constants if constant.name in used]
    if sum(len(constant.raw_data) for constant in constants) >= LARGEST:
        raise UserError(
            "--format=onnx cannot store the weights, because they have more than 2.1 GB\n"
            "choose --format=safetensors or --format=saved_model"
        )
    proto = helper.make_graph(
        graph.nodes,
        "vidjax",
        [_make_value_info(name, inputs[name]) for name in inputs],
        [_make_value_info(name, avals[name]) for name in ends],
        constants,
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(proto, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def _find_inputs(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Returns the names of all values that nodes use, including nodes in the bodies of loops."""
    names = set()
    for node in nodes:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _find_inputs(attribute.g.node)
                names.update(value.name for value in attribute.g.output)
    return names


def _make_value_info(name: str, aval: Any) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(_get_dtype(aval))
    dims = [int(dim) if isinstance(dim, int) else str(dim) for dim in aval.shape]
    return helper.make_tensor_value_info(name, kind, dims)


def _get_dtype(aval: Any) -> np.dtype:
    return np.dtype(_DTYPES.get(aval.dtype.name, aval.dtype))


def _make_error(primitive: str) -> UserError:
    return UserError(
        f"--format=onnx does not support an operation of this model: {primitive}\n"
        "choose --format=stablehlo or --format=saved_model"
    )


class Graph:
    """An ONNX graph under construction. Its methods take and return the names of values."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []  # in the order of computation
        self.constants: list[onnx.TensorProto] = []  # graphs of loop bodies share them
        self.symbols: dict[str, tuple[str, int]] = {}  # symbolic size -> (name of an input, axis)
        self._numbers = itertools.count(1)
        self.known: dict[str, Any] = {}  # name of a constant -> its value, an array or a random key
        self._names: dict[tuple[str, ...], str] = {}
        self._sizes: dict[str, str] = {}

    def body(self) -> "Graph":
        """Returns an empty graph for the body of a loop. It shares the constants of this graph."""
        inner = copy.copy(self)
        inner.nodes, inner._sizes = [], dict(self._sizes)
        return inner

    # ---- nodes

    def fresh(self) -> str:
        """Returns a new name for a value."""
        return f"v{next(self._numbers)}"

    def add_node(self, op: str, *inputs: str, names: list[str], **attributes: Any) -> list[str]:
        """Adds a node for the ONNX operator `op`; returns `names`, the names of its outputs."""
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node with a single output; returns the name of the output."""
        return self.add_node(op, *inputs, names=[name or self.fresh()], **attributes)[0]

    def ints(self, value: int | Sequence[int]) -> str:
        """Adds an int64 constant, and returns its name."""
        return self.constant(value, np.int64)

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Adds a constant, and returns its name. An equal constant is not added twice."""
        name = self.fresh()
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            self.known[name] = value  # ONNX cannot store random keys, only the drawn numbers
            return name
        original = np.asarray(value, dtype, order="C")
        digest = hashlib.sha256(original.tobytes()).hexdigest()
        known = self._names.setdefault((original.dtype.name, str(original.shape), digest), name)
        if known == name:
            array = original.astype(_DTYPES.get(original.dtype.name, original.dtype), copy=False)
            self.constants.append(numpy_helper.from_array(array, name))
            self.known[name] = original
        return known

    # ---- sizes

    def size(self, dim: Any) -> str:
        """Adds nodes that compute a size as an int64 scalar, and returns its name.

        `dim` is an integer, or a symbolic size, which is computed from the shapes of the inputs.
        """
        if isinstance(dim, int):
            return self.ints(dim)
        text = str(dim)
        if text not in self._sizes:
            self._sizes[text] = self._expression(ast.parse(text, mode="eval").body)
        return self._sizes[text]

    def _expression(self, tree: ast.expr) -> str:
        """Adds nodes that compute a parsed symbolic size, such as `2*T - 1` or `max(0, T)`."""
        if isinstance(tree, ast.Constant):
            return self.constant(tree.value, np.int64)
        if isinstance(tree, ast.Name):
            name, axis = self.symbols[tree.id]
            return self.node("Gather", self.node("Shape", name), self.ints(axis))
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
        """Adds nodes that convert the n sizes `dims` of a shape to an int64 array [n]."""
        if all(isinstance(dim, int) for dim in dims):
            return self.ints(list(dims))
        return self.node("Concat", *(self.vector(self.size(dim)) for dim in dims), axis=0)

    def vector(self, scalar: str) -> str:
        """Adds nodes that convert a scalar to an int64 array [1]."""
        if scalar in self.known:
            return self.constant(self.known[scalar].reshape(1), np.int64)
        return self.cast(self.node("Reshape", scalar, self.ints([1])), np.int64)

    # ---- operations of several primitives

    def reshape(self, x: str, dims: Sequence[Any]) -> str:
        """Adds a node that reshapes `x` to the sizes `dims`, and returns the name of the result."""
        known = [dim for dim in dims if isinstance(dim, int)]
        if len(known) == len(dims) - 1 and all(known):
            dims = [dim if isinstance(dim, int) else -1 for dim in dims]
        return self.node("Reshape", x, self.shape(dims))

    def transpose(self, x: str, order: Sequence[int]) -> str:
        """Adds a node that transposes `x`. Axis n of the result is axis `order[n]` of `x`."""
        order = [int(axis) for axis in order]
        return x if order == sorted(order) else self.node("Transpose", x, perm=order)

    def cast(self, x: str, dtype: Any) -> str:
        """Adds a node that casts `x` to `dtype`."""
        return self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def line(self, dims: Sequence[Any], axis: int) -> str:
        """Adds nodes that make an int64 array 0, 1, 2, ... along an axis; returns its name.

        The size of this axis is `dims[axis]`. The other axes of the array have size 1.
        """
        line = self.node("Range", self.ints(0), self.size(dims[axis]), self.ints(1))
        if len(dims) == 1:
            return line
        return self.reshape(line, [dim if n == axis else 1 for n, dim in enumerate(dims)])

    def reduce(self, op: str, x: str, axes: Sequence[int], *, logic: bool = False) -> str:
        """Adds nodes that reduce `x` over `axes` with an ONNX operator, such as ReduceMax.

        `logic` is True if `x` has bools.
        """
        x = self.cast(x, np.int32) if logic else x
        result = self.node(op, x, self.ints(list(axes)), keepdims=0)
        return self.cast(result, np.bool_) if logic else result

    def top(self, x: str, count: Any, axis: int, *, largest: bool) -> list[str]:
        """Adds a node that finds the `count` largest or smallest values of `x` along an axis.

        Returns the names of the values and of their indices.
        """
        names, how = [self.fresh(), self.fresh()], {"largest": int(largest), "sorted": 1}
        count = self.vector(self.size(count))
        return self.add_node("TopK", x, count, names=names, axis=axis, **how)

    def select(self, which: str, yes: str, no: str, aval: Any) -> str:
        """Adds nodes that choose the values of `yes` where `which` is True, and of `no` elsewhere.

        `aval.dtype` is the dtype of `yes` and `no`.
        """
        if aval.dtype != bool:
            return self.node("Where", which, yes, no)
        chosen = self.node("And", which, yes)
        return self.node("Or", chosen, self.node("And", self.node("Not", which), no))

    def clamp(self, index: str, most: str) -> str:
        """Adds nodes that cast `index` to int64 and limit it to 0 to `most`; returns the name."""
        index = self.cast(index, np.int64)
        return self.node("Max", self.node("Min", index, most), self.ints(0))

    # ---- the jaxpr

    def add_jaxpr(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[str]
    ) -> list[str]:
        """Adds the nodes of a jaxpr, a traced function; returns the names of its results.

        `consts` are the constants of the jaxpr, and `inputs` the names of its arguments.
        """
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
                results = eqn.primitive.bind(*(self.known[name] for name in args), **eqn.params)
                results = results if eqn.primitive.multiple_results else [results]
                values |= dict(zip(eqn.outvars, map(self.constant, results), strict=True))
                continue
            rule = RULES.get(eqn.primitive.name)
            if rule is None:
                raise _make_error(f"'{eqn.primitive.name}'")
            out = rule(self, eqn, args)
            values |= dict(zip(eqn.outvars, [out] if isinstance(out, str) else out, strict=True))
        return [read(x) for x in jaxpr.outvars]


def _is_foldable(eqn: Eqn) -> bool:
    """Returns True if an operation on constants can be computed during the conversion."""
    sizes = (dim for var in eqn.outvars for dim in getattr(var.aval, "shape", ()))
    unfoldable = eqn.primitive.name in ("dim_as_value", *CUSTOM)
    return not unfoldable and all(isinstance(dim, int) for dim in sizes)


def _log1p(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Adds nodes for log(1 + x), exact for small x: log(u) x / (u - 1) with u = 1 + x.

    Source: Kahan; Goldberg 1991, What every computer scientist should know about floating-point.
    """
    unit = graph.constant(1, _get_dtype(eqn.outvars[0].aval))
    u = graph.node("Add", x[0], unit)
    difference = graph.node("Sub", u, unit)
    tiny = graph.node("Equal", u, unit)
    huge = graph.node("IsInf", u)
    result = graph.node("Div", graph.node("Mul", graph.node("Log", u), x[0]), difference)
    result = graph.node("Where", huge, graph.node("Log", u), result)
    return graph.node("Where", tiny, x[0], result)


def _expm1(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Adds nodes for exp(x) - 1, exact for small x: (u - 1) x / log(u) with u = exp(x)."""
    unit = graph.constant(1, _get_dtype(eqn.outvars[0].aval))
    u = graph.node("Exp", x[0])
    difference = graph.node("Sub", u, unit)
    tiny = graph.node("Equal", u, unit)
    low = graph.node("Equal", difference, graph.node("Neg", unit))
    exact = graph.node("Or", low, graph.node("IsInf", u))
    result = graph.node("Div", graph.node("Mul", difference, x[0]), graph.node("Log", u))
    result = graph.node("Where", exact, difference, result)
    return graph.node("Where", tiny, x[0], result)


def _select(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    which, result, *others = x
    is_flag = eqn.invars[0].aval.dtype == bool  # otherwise it is the number of a case
    for number, case in enumerate(others, 1):
        chosen = which if is_flag else graph.node("Equal", which, graph.constant(number, np.int32))
        result = graph.select(chosen, case, result, eqn.outvars[0].aval)
    return result


def _broadcast(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    inner = [1] * len(after)
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        inner[place] = before[axis]
    value = x[0] if tuple(inner) == tuple(before) else graph.reshape(x[0], inner)
    if tuple(inner) == tuple(after):
        return value
    return graph.node("Expand", value, graph.shape(after))


def _iota(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    aval = eqn.outvars[0].aval
    line = graph.cast(graph.line(aval.shape, eqn.params["dimension"]), _get_dtype(aval))
    return line if len(aval.shape) == 1 else graph.node("Expand", line, graph.shape(aval.shape))


def _stack(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    axis = eqn.params.get("axis", 0)
    values = (graph.node("Unsqueeze", value, graph.ints([axis])) for value in x)
    return graph.node("Concat", *values, axis=axis)


def _slice(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    steps = eqn.params["strides"] or [1] * len(eqn.params["start_indices"])
    axes = graph.ints(list(range(len(steps))))
    bounds = (graph.shape(eqn.params[name]) for name in ("start_indices", "limit_indices"))
    return graph.node("Slice", x[0], *bounds, axes, graph.shape(steps))


def _rev(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    axes = list(eqn.params["dimensions"])
    ends = [[-1] * len(axes), [np.iinfo(np.int64).min] * len(axes), axes, [-1] * len(axes)]
    return graph.node("Slice", x[0], *map(graph.ints, ends))


def _slice_windows(graph: Graph, x: str, dims: Sequence[Any], windows: Mapping[int, tuple[str, Any]]
              ) -> str:  # fmt: skip
    """Adds nodes that take a slice of `x`, whose shape is `dims`.

    `windows` are axis -> (name of the start, size of the slice). As in JAX, a slice that would end
    outside of `x` is shifted into `x`.
    """
    for axis, (start, size) in windows.items():
        if str(size) == str(dims[axis]):
            continue
        most = graph.node("Sub", graph.size(dims[axis]), graph.size(size))
        start = graph.clamp(graph.reshape(start, ()), most)
        end = graph.node("Add", start, graph.size(size))
        x = graph.node("Slice", x, graph.vector(start), graph.vector(end), graph.ints([axis]))
    return x


def _dynamic_slice(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    windows = dict(enumerate(zip(x[1:], eqn.params["slice_sizes"], strict=True)))
    return _slice_windows(graph, x[0], eqn.invars[0].aval.shape, windows)


def _argmax(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    (axis,) = eqn.params["axes"]
    value = graph.cast(x[0], np.int32) if eqn.invars[0].aval.dtype == bool else x[0]
    name = "ArgMax" if eqn.primitive.name == "argmax" else "ArgMin"
    index = graph.node(name, value, axis=axis, keepdims=0)
    return graph.cast(index, _get_dtype(eqn.outvars[0].aval))


def _dot(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    letters = iter(string.ascii_letters)
    names = [[""] * len(var.aval.shape) for var in eqn.invars]
    for left, right in (*zip(left_batch, right_batch, strict=True),
                        *zip(left_sum, right_sum, strict=True)):  # fmt: skip
        names[0][left] = names[1][right] = next(letters)
    names = [[name or next(letters) for name in axes] for axes in names]
    out = [names[0][axis] for axis in left_batch]
    summed = {names[0][axis] for axis in left_sum}
    out += [name for axes in names for name in axes if name not in summed and name not in out]
    wide = _get_dtype(eqn.outvars[0].aval)
    x = [value if _get_dtype(var.aval) == wide else graph.cast(value, wide)
         for value, var in zip(x, eqn.invars, strict=True)]  # fmt: skip
    if len(names[1]) == 2 and out == [*names[0][:-1], names[1][1]] and names[0][-1] == names[1][0]:
        return graph.node("MatMul", *x)  # faster than Einsum if a factor is constant
    text = f"{''.join(names[0])},{''.join(names[1])}->{''.join(out)}"
    return graph.node("Einsum", *x, equation=text)


def _sort(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    """Adds nodes that sort all operands by the first operand, ascending. Ties keep their order."""
    axis, key = eqn.params["dimension"], x[0]
    if eqn.params["num_keys"] != 1:
        raise _make_error("'sort' must have a single key")
    aval = eqn.invars[0].aval
    if aval.dtype == bool:
        key = graph.cast(key, np.int32)
    ordered, places = graph.top(key, aval.shape[axis], axis, largest=False)
    if len(x) > 1:
        places = _sort_ties(graph, ordered, places, aval.shape[axis], axis)
    return [graph.node("GatherElements", value, places, axis=axis) for value in x]


def _sort_ties(graph: Graph, ordered: str, places: str, size: Any, axis: int) -> str:
    """Adds nodes that bring the indices of equal values into ascending order.

    The operator TopK has sorted `size` values along `axis`: `ordered` are the sorted values, and
    `places` are their indices before the sort. Returns the name of the new indices.
    """
    # TopK of OpenVINO may change the order of equal values. So the indices are sorted again, by
    # keys that are never equal.
    start, second, end, along = (graph.ints([n]) for n in (0, 1, -1, axis))
    earlier = [graph.node("Slice", ordered, start, stop, along) for stop in (second, end)]
    same = graph.node("Equal", ordered, graph.node("Concat", *earlier, axis=axis))
    group = graph.node("CumSum", graph.cast(graph.node("Not", same), np.int64), graph.ints(axis))
    key = graph.node("Add", graph.node("Mul", group, graph.size(size)), places)
    keys, _ = graph.top(key, size, axis, largest=False)
    return graph.node("Mod", keys, graph.size(size))


def _top_k(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    values, places = graph.top(x[0], eqn.params["k"], -1, largest=True)
    return [values, graph.cast(places, np.int32)]


def _gather(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Adds nodes for a gather of JAX: one slice of any size, or rows such as `x[:, indices]`.

    An index outside of the array is replaced by the nearest valid index. Raises UserError for any
    other gather.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (dims, places), out = (var.aval.shape for var in eqn.invars), eqn.outvars[0].aval.shape
    starts = [int(axis) for axis in numbers.start_index_map]
    batch = [int(axis) for axis in numbers.operand_batching_dims]
    prefix = len(places) - 1
    indexed = [n for n, axis in enumerate(starts) if str(sizes[axis]) != str(dims[axis])]
    if not prefix:  # a single slice, of any size
        windows = {starts[n]: (_take_component(graph, x[1], n), sizes[starts[n]]) for n in indexed}
        return graph.reshape(_slice_windows(graph, x[0], dims, windows), out)
    if not indexed:
        indexed = [n for n, axis in enumerate(starts) if axis in numbers.collapsed_slice_dims]
    axes = [starts[n] for n in indexed]
    if not axes or any(sizes[axis] != 1 for axis in axes):
        raise _make_error(f"'gather' must take one slice or rows, not slices of shape {sizes}")
    whole = [axis for axis in range(len(dims)) if axis not in (*batch, *axes)]
    operand = graph.transpose(x[0], [*batch, *axes, *whole])
    batching = [int(axis) for axis in numbers.start_indices_batching_dims]
    rest = [axis for axis in range(prefix) if axis not in batching]
    order = [*batching, *rest]  # new order of the axes of the indices, except for the last axis
    parts = []
    for n, axis in zip(indexed, axes, strict=True):
        most = graph.node("Sub", graph.size(dims[axis]), graph.ints(1))
        part = graph.transpose(_take_component(graph, x[1], n, keep=True), [*order, prefix])
        parts.append(graph.clamp(part, most))
    index = parts[0] if len(parts) == 1 else graph.node("Concat", *parts, axis=prefix)
    gathered = graph.node("GatherND", operand, index, batch_dims=len(batch))
    # The result now has the axes `order`, then `whole`. They are moved to where JAX puts them.
    offsets = [int(axis) for axis in numbers.offset_dims]
    kept = [axis for axis in range(len(dims))
            if axis not in (*batch, *(int(a) for a in numbers.collapsed_slice_dims))]  # fmt: skip
    place = {axis: prefix + n for n, axis in enumerate(whole)}
    ahead = iter([order.index(axis) for axis in range(prefix)])
    slices = dict(zip(offsets, kept, strict=True))
    axes = [place.get(slices[n]) if n in slices else next(ahead) for n in range(len(out))]
    gathered = graph.transpose(gathered, [n for n in axes if n is not None])
    return graph.reshape(gathered, out)


def _take_component(graph: Graph, index: str, n: int, *, keep: bool = False) -> str:
    """Adds a node for `index[..., n]`, or for `index[..., n : n + 1]` if `keep` is True."""
    return graph.node("Gather", index, graph.ints([n] if keep else n), axis=-1)


def _scatter(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Adds nodes for a scatter of JAX that replaces one slice of an array."""
    numbers, aval = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    axes = [int(axis) for axis in numbers.scatter_dims_to_operand_dims]
    if eqn.invars[1].aval.shape != (1,) or list(numbers.inserted_window_dims) != axes:
        raise _make_error("'scatter' must replace a single slice of an array")
    (axis,) = axes
    is_slice = graph.node("Equal", graph.line(aval.shape, axis), graph.cast(x[1], np.int64))
    new = graph.node("Unsqueeze", x[2], graph.ints([axis]))
    return graph.select(is_slice, new, x[0], aval)


def _scatter_rows(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    """Adds nodes for `array.at[index].add(rows)` or `array.at[index].max(rows)`.

    `index` has the row numbers in `array`. Rows with an index outside of `array` are ignored.
    """
    # Such rows are written to an additional row, which is removed at the end.
    numbers, dims = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    if tuple(numbers.inserted_window_dims) != (0,) or len(eqn.invars[1].aval.shape) != 2:
        raise _make_error(f"'{eqn.primitive.name}' must change whole rows of an array")
    zero = graph.ints([0])
    spare = graph.node("Slice", x[0], zero, graph.ints([1]), zero)
    operand = graph.node("Concat", x[0], spare, axis=0)
    count = graph.size(dims[0])
    index = graph.cast(x[1], np.int64)
    outside = graph.node("Less", index, graph.ints(0))
    index = graph.node("Min", graph.node("Where", outside, count, index), count)
    how = eqn.primitive.name.removeprefix("scatter-")
    reduced = graph.node("ScatterND", operand, index, x[2], reduction=how)
    return graph.node("Slice", reduced, zero, graph.vector(count), zero)


def _call(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    closed = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr") or eqn.params["fun_jaxpr"]
    if isinstance(closed, core.ClosedJaxpr):
        return graph.add_jaxpr(closed.jaxpr, closed.consts, x)
    return graph.add_jaxpr(closed, (), x)


def _while(graph: Graph, eqn: Eqn, x: Sequence[str]) -> list[str]:
    """Adds an ONNX Loop for a while loop of JAX."""
    # ONNX tests the condition after each round, so the first test is before the loop.
    params = eqn.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = x[:num_cond], x[num_cond : num_cond + num_body]
    state, carried = x[num_cond + num_body :], eqn.outvars
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    (start,) = graph.add_jaxpr(cond.jaxpr, cond.consts, [*cond_consts, *state])
    inner = graph.body()
    names = [inner.fresh() for _ in carried]
    after = inner.add_jaxpr(body.jaxpr, body.consts, [*body_consts, *names])
    if several := len(cond.out_avals[0].shape):  # vmap: some loops go on, others have ended
        (goes_on,) = inner.add_jaxpr(cond.jaxpr, cond.consts, [*cond_consts, *names])
        for place, (old, var) in enumerate(zip(names, carried, strict=True)):
            axes = list(range(several, len(var.aval.shape)))  # so that the bools broadcast
            flags = inner.node("Unsqueeze", goes_on, inner.ints(axes)) if axes else goes_on
            after[place] = inner.select(flags, after[place], old, var.aval)
    (again,) = inner.add_jaxpr(cond.jaxpr, cond.consts, [*cond_consts, *after])
    if several:
        start, again = (
            owner.reduce("ReduceMax", flags, range(several), logic=True)
            for owner, flags in ((graph, start), (inner, again))
        )
    ends = [inner.node("Identity", value) for value in (again, *after)]
    scalar, types = helper.make_tensor_value_info, onnx.TensorProto
    entering = [scalar(inner.fresh(), types.INT64, []), scalar(inner.fresh(), types.BOOL, [])]
    leaving = [scalar(ends[0], types.BOOL, [])]
    avals = [var.aval for var in carried]
    entering += map(_make_value_info, names, avals)
    leaving += map(_make_value_info, ends[1:], avals)
    proto = helper.make_graph(inner.nodes, inner.fresh(), entering, leaving)
    results = [graph.fresh() for _ in carried]
    return graph.add_node("Loop", "", start, *state, names=results, body=proto)


def _one_to_one(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    out = graph.node(ONE_TO_ONE[eqn.primitive.name], *x)
    if eqn.outvars[0].aval.dtype.name == "uint32":
        out = graph.node("Mod", out, graph.ints(1 << 32))
    return out


def _logic(graph: Graph, eqn: Eqn, x: Sequence[str]) -> str:
    name = eqn.primitive.name.capitalize()
    return graph.node(name if eqn.outvars[0].aval.dtype == bool else f"Bitwise{name}", *x)


def _reduce(op: str, *, logic: bool = False) -> Rule:
    return lambda graph, eqn, x: graph.reduce(op, x[0], eqn.params["axes"], logic=logic)


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
    "convert_element_type": lambda graph, eqn, x: graph.cast(x[0], _get_dtype(eqn.outvars[0].aval)),
    "cumsum": lambda graph, eqn, x: graph.node(
        "CumSum", x[0], graph.ints(eqn.params["axis"]), reverse=int(eqn.params["reverse"])
    ),
    "dim_as_value": lambda graph, eqn, x: graph.cast(
        graph.size(eqn.params["dim"]), _get_dtype(eqn.outvars[0].aval)
    ),
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "expm1": _expm1,
    "gather": _gather,
    "integer_pow": lambda graph, eqn, x: graph.node(
        "Pow", x[0], graph.constant(eqn.params["y"], _get_dtype(eqn.outvars[0].aval))
    ),
    "iota": _iota,
    "is_finite": lambda graph, eqn, x: graph.node(
        "Not", graph.node("Or", graph.node("IsNaN", x[0]), graph.node("IsInf", x[0]))
    ),
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
