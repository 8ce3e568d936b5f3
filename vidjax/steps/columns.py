"""The class columns of a state: their axes in its arrays, their padding, their split over devices.

The kernel and the bias of a classifier, their moments and the sums of PLDA have an axis of class
columns. No model declares it: it is where the shapes of two models differ, one with a column more.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vidjax import devices
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
        return jax.tree.map(lambda axis: _along(self.mesh, axis), axes)


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
        count = system.num_identities
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


def _along(mesh: Mesh, axis: int) -> NamedSharding:
    if axis == NO_AXIS:
        return devices.replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model"))
