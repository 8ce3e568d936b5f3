"""The matrix products of a dense layer in every form, in GFLOP/s: which ones is XLA fast at?

    python -m tests.benchmarks.products [--batch_size=1024] [--widths=1024,4096] [--classes=10035]
        [--members=3] [--peer] [--rounds=5]

A layer x [B, D] @ w [D, C] has three products: the forward pass, the gradient of w, and the
gradient of x. Each is measured with float32 operands; with bfloat16 operands and float32 or
bfloat16 results; and in the layouts that it can be written in. *transposed* means that the operand
is copied into another layout first, which is part of what is timed. `vmap` and `map` have as many
members. With `--peer`, PyTorch's (the extra `bench`). Forms with a star are those of
`vidjax.models.layers`. All take turns; medians of rounds.
"""

# pyright: reportMissingImports=false

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.benchmarks import common
from vidjax.models import layers

REPEATS = 4  # in one program, so that no product waits for memory
TYPES = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16 in, float32 out": (jnp.bfloat16, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
}


def product(left: Any, right: Any, axes: tuple[int, int], out: Any) -> Any:
    """Returns the sums over one axis of each operand."""
    dimension_numbers = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(left, right, dimension_numbers, preferred_element_type=out)


def forms(out: Any) -> dict[str, tuple[str, Callable[[Any, Any], Any]]]:
    """Returns form -> (names of its operands, function of them)."""
    turn = layers.transposed
    return {
        "x @ w *": ("xw", lambda x, w: product(x, w, (1, 0), out)),
        "gradient of w: x.T @ g": ("xg", lambda x, g: product(x, g, (0, 0), out)),
        "gradient of w: (g.T @ x).T": ("xg", lambda x, g: product(g, x, (0, 0), out).T),
        "gradient of w: x transposed @ g *": ("xg", lambda x, g: product(turn(x), g, (1, 0), out)),
        "gradient of x: g @ w.T *": ("gw", lambda g, w: product(g, w, (1, 1), out)),
        "gradient of x: g @ w transposed": ("gw", lambda g, w: product(g, turn(w), (1, 0), out)),
    }


def repeated(function: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
    """Returns a program that computes a product REPEATS times."""

    @jax.jit
    def program(*operands: Any) -> Any:
        def body(_: Any, total: Any) -> Any:
            pair = lax.optimization_barrier((operands, total))[0]
            result = lax.optimization_barrier(function(*pair))
            return total + jnp.ravel(result)[0].astype(jnp.float32)

        return lax.fori_loop(0, REPEATS, body, jnp.float32(0))

    return lambda: program(*operands)


def make_operands(sizes: tuple[int, int, int], dtype: Any, lead: tuple[int, ...] = ()) -> dict:
    """Returns made-up x [B, D], w [D, C] and g [B, C], with leading axes."""
    rows, width, classes = sizes
    shapes = {"x": (rows, width), "w": (width, classes), "g": (rows, classes)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, (*lead, *shape)).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def make_functions(sizes: tuple[int, int, int], members: int) -> dict[str, Callable[[], Any]]:
    """Returns `form | types` -> program."""
    functions = {}
    for types, (dtype, out) in TYPES.items():
        operands = make_operands(sizes, dtype)
        for form, (names, function) in forms(out).items():
            chosen = [operands[name] for name in names]
            functions[f"{form} | {types}"] = repeated(function, *chosen)
    if not members:
        return functions
    for types, (dtype, out) in list(TYPES.items())[:2]:
        operands = make_operands(sizes, dtype, (members,))
        for form, (names, function) in forms(out).items():
            if form.endswith("*"):
                chosen = [operands[name] for name in names]

                def each(*pair: Any, function: Callable[..., Any] = function) -> Any:
                    return lax.map(lambda one: function(*one), pair)

                functions[f"{form}, vmap | {types}"] = repeated(jax.vmap(function), *chosen)
                functions[f"{form}, map | {types}"] = repeated(each, *chosen)
    return functions


def make_peers(sizes: tuple[int, int, int]) -> dict[str, Callable[[], Any]]:
    """Returns the products of PyTorch, whose weights are [C, D]."""
    import torch

    rows, width, classes = sizes
    functions = {}
    for types, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, w = torch.randn(rows, width).to(dtype), torch.randn(classes, width).to(dtype)
        g = torch.randn(rows, classes).to(dtype)
        peers: dict[str, Callable[[], Any]] = {
            "x @ w": lambda x=x, w=w: x @ w.T,
            "gradient of w": lambda x=x, g=g: g.T @ x,
            "gradient of x": lambda g=g, w=w: g @ w,
        }
        for form, function in peers.items():
            functions[f"PyTorch, {form} | {types}"] = function
    return functions


def main() -> None:
    """Prints a table for every width."""
    sizes = {"batch_size": 1024, "classes": 10_035, "members": 0, "rounds": 5}
    args = common.parse(__doc__, "--peer", widths="1024,4096", **sizes)
    for width in map(int, args.widths.split(",")):
        sizes = (args.batch_size, width, args.classes)
        functions = make_functions(sizes, args.members)
        functions |= make_peers(sizes) if args.peer else {}
        seconds = common.in_turns(functions, args.rounds)
        flops = 2 * sizes[0] * sizes[1] * sizes[2] / 1e9
        found: dict[str, dict[str, str]] = {}
        for name, values in seconds.items():
            form, types = name.split(" | ")
            times = 1 if form.startswith("PyTorch") else REPEATS
            times *= args.members if "map" in form else 1
            found.setdefault(form, {})[types] = f"{times * flops / common.median(values):,.0f}"
        sys.stdout.write(
            f"{common.describe()}; x [{sizes[0]}, {width}], {args.classes} classes\n\n"
        )
        rows = [
            [f"{form}, D = {width}", *(row.get(types, "") for types in TYPES)]
            for form, row in found.items()
        ]
        common.write_table(["GFLOP/s", *TYPES], rows)


if __name__ == "__main__":
    main()
