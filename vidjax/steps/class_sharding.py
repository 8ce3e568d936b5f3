"""The class columns of a state: split over devices, or a training step on some of them.

The kernel and the bias of a classifier, their moments and the sums of PLDA have an axis of class
columns. No model declares it: it is where the shapes of two models differ, one with a column more.

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
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vidjax import devices, optim
from vidjax.augment import MemberClips
from vidjax.batch import Array
from vidjax.errors import UserError
from vidjax.steps import state as state_lib
from vidjax.system import System, padded_columns

Tree = TypeVar("Tree")  # a tree of arrays

NO_AXIS = -1
BLOCK_BYTES = 256 << 20  # of scores in a block at most: it cuts `eval.block_size` where C is large
WAITING_BYTES = 1 << 30  # of scores that wait for a merge of the ranking at most


class ClassAxes(NamedTuple):
    """The axis of the class columns in every array of a state."""

    mesh: Mesh  # the class columns are split over its axis `model`
    state: state_lib.TrainState  # has, in place of every array, the number of that axis or NO_AXIS

    def layout(self, name: str | None = None) -> devices.Layout:
        """Returns a tree of shardings, for the field `name` of the state or for all of it."""
        axes = getattr(self.state, name) if name else self.state
        return jax.tree.map(lambda axis: NamedSharding(self.mesh, _split(axis)), axes)


def find_class_axes(system: System, modalities: Mapping[str, int], mesh: Mesh) -> ClassAxes | None:
    """Finds the axes of class columns; None if they are neither split over devices nor sampled.

    Raises:
      ValueError: Classes are sampled, but no parameter has class columns, or the optimiser keeps
        other numbers for each column than the moments of Adam.
    """
    is_sampled = system.sampled_classes < 1
    if mesh.shape["model"] == 1 and not is_sampled:
        return None
    count = system.model.num_classes
    shapes = [abstract_state(system, modalities, number) for number in (count, count + 1)]
    axes = jax.tree.map(_differing_axis, *shapes)
    if is_sampled and all(axis == NO_AXIS for axis in jax.tree.leaves(axes.params)):
        raise UserError(
            f"config.loss.sampled_classes={system.sampled_classes}: the model has no classifier\n"
            "leave it out: --config.loss.sampled_classes=1"
        )
    states = jax.tree.leaves(axes.opt_state, is_leaf=is_adam)
    rest = [state for state in states if not is_adam(state)]
    if is_sampled and any(axis != NO_AXIS for axis in jax.tree.leaves(rest)):
        raise UserError(
            f"config.loss.sampled_classes={system.sampled_classes}: of classes that are not "
            "drawn only the moments of adam fade\n"
            "--config.optim.name=adam, or sgd with --config.optim.momentum=0"
        )
    return ClassAxes(mesh, axes)


def is_adam(state: object) -> bool:
    """Returns whether a part of an optimiser's state is Adam's."""
    return isinstance(state, optax.ScaleByAdamState)


def abstract_state(
    system: System, modalities: Mapping[str, int], num_columns: int, num_members: int = 1
) -> state_lib.TrainState:
    """Returns the shapes and dtypes of a state for `num_columns` class columns and one clip."""
    resized = system._replace(model=system.model.with_classes(num_columns))

    def init() -> state_lib.TrainState:
        rngs = jax.random.split(jax.random.key(0), num_members)
        labels = jnp.zeros((num_members, 1), jnp.int32)
        return state_lib.init_state(resized, modalities, rngs, labels)

    return jax.eval_shape(init)


class ScoreColumns(NamedTuple):
    """The columns of scores in evaluation, [B, total].

    If the axis `model` has one device, they are the C identities. Several devices, which share the
    classes, also keep column 0 and padding, with scores of -inf; without these, columns would move
    between devices.
    """

    mesh: Mesh  # rows are split over its axis `data`, and columns over `model`
    total: int  # number of columns
    first: int  # column of the first identity
    num_identities: int  # C

    @classmethod
    def of(cls, system: System, mesh: Mesh) -> "ScoreColumns":
        """Returns the columns of the scores of a system, whose padding fits the mesh."""
        count = system.task.num_identities
        if mesh.shape["model"] == 1:
            return cls(mesh, count, 0, count)
        # Noise classes have columns of their own behind the identities.
        return cls(mesh, padded_columns(1 + count, mesh.shape["model"]), 1, count)

    @property
    def identities(self) -> slice:
        """The columns of the identities."""
        return slice(self.first, self.first + self.num_identities)

    @property
    def max_block_rows(self) -> int:
        """Largest number of rows of a block on a device.

        It is the same for every mesh, since the bits of scores may depend on the number of rows.
        """
        return max(1, BLOCK_BYTES // (4 * self.num_identities))

    @property
    def max_pending_rows(self) -> int:
        """Largest number of clips whose scores may wait to be merged into the ranking."""
        return max(1, WAITING_BYTES // (4 * self.num_identities))

    def select(self, scores: Array) -> Array:
        """Returns the columns [B, total] of scores [B, K] of all class columns."""
        if not self.first:
            return scores[:, 1 : 1 + self.total]
        column = jnp.arange(self.total)
        is_identity = (column >= self.first) & (column < self.identities.stop)
        return jnp.where(is_identity, scores[:, : self.total], -jnp.inf)


def state_layout(mesh: Mesh, axes: ClassAxes | None) -> devices.Layout:
    """Returns the layout of a TrainState: a sharding for all arrays, or a tree of shardings."""
    return axes.layout() if axes else devices.replicated(mesh)


def fitting_layout(layout: devices.Layout, abstract: Tree) -> Tree:
    """Returns a tree of layouts for arrays that another number of devices may have saved.

    An array whose class columns the devices cannot share evenly lies whole on every device.
    """

    def fit(sharding: NamedSharding, x: jax.ShapeDtypeStruct) -> NamedSharding:
        try:
            sharding.shard_shape(x.shape)
        except ValueError:
            return NamedSharding(sharding.mesh, PartitionSpec())
        return sharding

    return jax.tree.map(fit, jax.tree.broadcast(layout, abstract), abstract)


def resize(tree: Tree, like: Tree) -> Tree:
    """Cuts the arrays of `tree`, or pads them with zeros, to the shapes of those of `like`.

    Padded columns are 0 and stay 0: no loss sees them.
    """

    def fit(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if x.shape == wanted.shape:
            return x
        x = x[tuple(slice(0, size) for size in wanted.shape)]
        return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, wanted.shape, strict=True)])

    return jax.tree.map(fit, tree, like)


def _differing_axis(few: jax.ShapeDtypeStruct, more: jax.ShapeDtypeStruct) -> int:
    pairs = enumerate(zip(few.shape, more.shape, strict=True))
    return next((axis for axis, (a, b) in pairs if a != b), NO_AXIS)


def num_drawn(system: System, num_labels: int, num_devices: int) -> int:
    """Returns the number of columns that each device draws: enough for the labels of a step."""
    own = system.model.num_classes // num_devices
    share = math.ceil(system.sampled_classes * system.task.num_columns / num_devices)
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
    """Returns the numbers of axes less 1, for arrays without the leading axis E."""
    return jax.tree.map(lambda axis: axis if axis == NO_AXIS else axis - 1, state_axes)


def _own(columns: Array, size: int) -> Array:
    """Returns the positions of a device's columns among the `size` columns that it holds."""
    return columns - lax.axis_index("model") * size


def _split(axis: int) -> PartitionSpec:
    return PartitionSpec() if axis == NO_AXIS else PartitionSpec(*[None] * axis, "model")


def _on_each(
    function: Callable[..., Array],
    mesh: Mesh,
    in_specs: tuple[PartitionSpec, ...],
    out: PartitionSpec,
) -> Callable[..., Array]:
    """Maps a function over the axis `model` of the devices; `data` stays as it is."""
    mapped = functools.partial(jax.shard_map, axis_names={"model"}, check_vma=False)
    return mapped(function, mesh=mesh, in_specs=in_specs, out_specs=out)
