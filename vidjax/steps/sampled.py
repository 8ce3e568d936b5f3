"""A training step on some of the classes: those of its clips, and others drawn at random.

A sampled step is a step of a smaller classifier. `draw` chooses class columns, `take` slices them
out of parameters and moments, `system_for_columns` gives the system for as many, and `put` writes
the slices back. Columns that are not drawn stay as they are, and weight decay does not reach them.
The devices of the axis `model` each draw as many of their own columns, so none moves between them.

On all classes, a column whose clips are not in the batch has gradients of nearly 0: its second
moments fade, and momentum moves it on. So the second moments of a drawn column first fade for the
steps since it was last drawn; otherwise the column would move too little. The first moments do not
fade: the next steps that draw the column make the moves that momentum still holds.

As published, the drawn columns do not represent the others. A loss that counts each of them several
times led to a lower MAP here: Adam evens out what is counted more.

Source: An et al., Partial FC: Training 10 Million Identities on a Single Machine, section 3.2.
Ours: what becomes of the moments of Adam.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from vidjax import optim
from vidjax.augment import MemberClips
from vidjax.batch import Array
from vidjax.steps.columns import NO_AXIS, ClassAxes, is_adam
from vidjax.system import System

Tree = TypeVar("Tree")  # a tree of arrays


def num_drawn(system: System, num_labels: int, num_devices: int) -> int:
    """Returns the number of columns that each device draws: enough for the labels of a step."""
    own = system.model.num_classes // num_devices
    share = math.ceil(system.sampled_classes * system.num_columns / num_devices)
    return min(own, max(share, num_labels))


def draw(rng: Array, labels: Array, class_mask: Array, count: int, mesh: Mesh) -> Array:
    """Draws class columns: all of the labels, and others with equal probabilities.

    Args:
      labels: [n] int32, class columns of the clips, n at most `count`.
      class_mask: [K] bool, the columns that may be drawn beside the labels.
      count: number of columns that each device of the axis `model` draws.

    Returns:
      [devices x count] int32, ascending; it depends on the number of devices. Where a device has
      fewer columns to draw than `count`, some are outside of the mask.
    """

    def on_each(rng: Array, labels: Array, mask: Array) -> Array:
        device = lax.axis_index("model")
        size, first = len(mask), device * len(mask)
        priority = jax.random.uniform(jax.random.fold_in(rng, device), (size,))
        priority = jnp.where(mask, priority, -1.0)
        is_own = (labels >= first) & (labels < first + size)
        places = jnp.where(is_own, labels - first, size)
        priority = priority.at[places].set(2.0, mode="drop")
        return jnp.sort(lax.top_k(priority, count)[1]) + first

    whole, split = PartitionSpec(), PartitionSpec("model")
    return _on_each(on_each, mesh, (whole, whole, split), split)(rng, labels, class_mask)


def take(axes: ClassAxes, state_axes: Tree, tree: Tree, columns: Array) -> Tree:
    """Returns one member's arrays with only the class columns `columns`, and other arrays whole.

    Arrays of `tree` have no axis E, but the numbers in `state_axes` are for arrays with axis E.
    """

    def of(axis: int, x: Array) -> Array:
        if axis == NO_AXIS:
            return x

        def on_each(x: Array, columns: Array) -> Array:
            return jnp.take(x, _own(columns, x.shape[axis]), axis=axis, mode="clip")

        split = _split(axis)
        return _on_each(on_each, axes.mesh, (split, PartitionSpec("model")), split)(x, columns)

    return jax.tree.map(of, _without_members(state_axes), tree)


def put(axes: ClassAxes, state_axes: Tree, tree: Tree, part: Tree, columns: Array) -> Tree:
    """Reverses `take`: writes the drawn columns of `part` into `tree`; replaces other arrays."""

    def of(axis: int, x: Array, new: Array) -> Array:
        if axis == NO_AXIS:
            return new

        def on_each(x: jax.Array, new: Array, columns: Array) -> Array:
            places = (*[slice(None)] * axis, _own(columns, x.shape[axis]))
            return x.at[places].set(new, indices_are_sorted=True, unique_indices=True)

        split = _split(axis)
        specs = (split, split, PartitionSpec("model"))
        return _on_each(on_each, axes.mesh, specs, split)(x, new, columns)

    return jax.tree.map(of, _without_members(state_axes), tree, part)


def system_for_columns(
    system: System, columns: Array, state_axes: optax.OptState, missed: Array
) -> System:
    """Returns the system for the drawn columns [n] alone.

    `missed`, [n] int32, is the number of steps between the last draw of a column and this one.
    """
    mask = system.class_mask[columns]
    return system._replace(
        model=system.model.with_classes(len(columns)),
        class_mask=mask,
        objective=system.make_objective(mask, columns=columns),
        tx=_decay_moments(system.tx, _without_members(state_axes), missed),
    )


def relabel(clips: MemberClips, columns: Array) -> MemberClips:
    """Replaces the labels of clips by their positions among the drawn columns."""

    def place(labels: Array) -> Array:
        return jnp.searchsorted(columns, labels).astype(jnp.int32)

    targets = tuple((place(labels), share) for labels, share in clips.targets)
    return clips._replace(labels=place(clips.labels), targets=targets)


def _decay_moments(
    tx: optax.GradientTransformation, axes: optax.OptState, missed: Array
) -> optax.GradientTransformation:
    """Returns `tx`, whose updates first multiply Adam's second moments by decay ** missed.

    That is what `missed` steps with gradients of 0 would have done.
    """

    def fade(axes: object, state: object) -> object:
        if not (isinstance(axes, optax.ScaleByAdamState) and isinstance(state, type(axes))):
            return state

        def of(axis: int, x: Array) -> Array:
            if axis == NO_AXIS:
                return x
            left = optim.SECOND_MOMENT_DECAY ** missed.astype(x.dtype)
            return x * left.reshape(-1, *[1] * (x.ndim - 1 - axis))

        return state._replace(nu=jax.tree.map(of, axes.nu, state.nu))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        faded = jax.tree.map(fade, axes, state, is_leaf=is_adam)
        return tx.update(updates, faded, params)

    return optax.GradientTransformation(tx.init, update)


def _without_members(state_axes: Tree) -> Tree:
    """Returns the axes in arrays without the leading axis E."""
    return jax.tree.map(lambda axis: axis if axis == NO_AXIS else axis - 1, state_axes)


def _own(columns: Array, size: int) -> Array:
    """Returns the positions of a device's columns among the `size` columns that it holds."""
    return columns - lax.axis_index("model") * size


def _split(axis: int) -> PartitionSpec:
    return PartitionSpec(*[None] * axis, "model")


def _on_each(
    function: Callable[..., Array],
    mesh: Mesh,
    in_specs: tuple[PartitionSpec, ...],
    out: PartitionSpec,
) -> Callable[..., Array]:
    """Maps a function over the axis `model` of the devices; `data` stays as it is."""
    mapped = functools.partial(jax.shard_map, axis_names={"model"}, check_vma=False)
    return mapped(function, mesh=mesh, in_specs=in_specs, out_specs=out)
