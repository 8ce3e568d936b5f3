"""Ranks clips whose scores are on the devices: finds the exact k best clips of every identity.

The scores come in blocks, see `topk`. If the devices are CPUs, the host ranks the clips with
`topk`. Accelerators rank the clips themselves, because copying the scores to the host would take
longer.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from vidjax.core import devices
from vidjax.core.batch import Array
from vidjax.evaluation.topk import MAX_NAMES, NO_CLIP, HostTopK, ScoreBlock, TopK, join_tops

CHUNK = 1 << 14  # identities per merge, which limits the memory of a merge
GROUP = 8  # clips per group; a group is sorted only if its best score can enter the top k
# Numbers of groups that may be sorted per identity. The smallest number that is enough is used. If
# neither is enough, all clips are sorted.
MOST_GROUPS = (32, 128)


def start_top_k(
    num_identities: int, k: int = MAX_NAMES, *, rows: int = 2048, mesh: Mesh
) -> "DeviceTopK | RunningTopK":
    """Returns an object that ranks the clips of blocks of scores on the devices of `mesh`.

    Accelerators collect the scores of `rows` clips for all identities before they merge these clips
    into the k best clips. More rows need more memory. The ranking does not depend on `rows`.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return RunningTopK(num_identities, k, mesh)
    return DeviceTopK(num_identities, k, rows, mesh)


class RunningTopK:
    """Keeps the k best clips of each identity over all blocks of scores, on CPU devices.

    If there are several processes, each process ranks the clips that its devices scored.
    """

    def __init__(self, num_identities: int, k: int, mesh: Mesh):
        self._top = HostTopK(num_identities, k)
        self._layout = devices.row_layout(mesh)
        self._waiting: list[ScoreBlock] = []

    def add(self, block: ScoreBlock) -> None:
        """Adds a block, see `HostTopK.add`. The next call of `add` or `flush` ranks the block."""
        self.flush()
        self._waiting.append(block)

    def flush(self) -> None:
        """Ranks the last block, so that the memory of its scores can be freed."""
        for block in self._waiting:
            if jax.process_count() > 1:
                parts = [part.addressable_shards for part in devices.put(block, self._layout)]
                block = [np.concatenate([np.asarray(x.data) for x in part]) for part in parts]
            self._top.add(*map(np.asarray, block))
        self._waiting = []

    def finish(self) -> TopK:
        """Returns the sorted top k of every identity as numpy arrays."""
        self.flush()
        top = self._top.finish()
        if jax.process_count() == 1:
            return top
        return join_tops(multihost_utils.process_allgather(top))


def update_top(top: TopK, blocks: Sequence[ScoreBlock]) -> TopK:
    """Merges blocks of scores into the k best clips so far. Returns the k best clips, unsorted.

    For blocks, see `HostTopK.add`. The index of a clip must be below 2**31 - 2**25, because
    `_select` reads its bits as a float. A few calls with many clips are cheaper than many calls
    with few clips.
    """
    num_identities = len(top.scores)
    size = min(CHUNK, num_identities)
    clips = jnp.concatenate([jnp.where(mask, index, NO_CLIP) for _, index, mask in blocks])

    def update_chunk(chunk: Array, updated: TopK) -> TopK:
        # XLA clamps slices, so the last chunk may overlap the chunk before it. Both chunks read
        # `top`, so overlapping rows get equal values.
        start = chunk * size
        old = jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, start, size), top)
        rows = [
            _clean(lax.dynamic_slice_in_dim(scores, start, size, axis=1), mask)
            for scores, _, mask in blocks
        ]
        new = _merge(old, jnp.concatenate(rows), clips)
        return jax.tree.map(
            lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, start, axis=0),
            updated,
            new,
        )

    return lax.fori_loop(0, -(-num_identities // size), update_chunk, top)


class DeviceTopK:
    """Ranks blocks of scores on accelerators. Every device ranks its part of the clips."""

    def __init__(self, num_identities: int, k: int, rows: int, mesh: Mesh):
        self._layout = devices.row_layout(mesh)
        shape = (mesh.size, num_identities, k)
        empty = TopK(np.full(shape, -np.inf, np.float32), np.full(shape, NO_CLIP, np.int32))
        self._top = devices.put(empty, self._layout)
        self._update, self._rows = _make_update(mesh), rows
        self._waiting: list[ScoreBlock] = []

    def add(self, block: ScoreBlock) -> None:
        """Adds a block of scores, see `HostTopK.add`. All blocks must have the same shape."""
        self._waiting.append(devices.put(block, self._layout))
        if len(self._waiting) * len(block[0]) >= self._rows:
            self.flush()

    def flush(self) -> None:
        """Merges the blocks that wait into the top k, so that their memory can be freed."""
        if not self._waiting:
            return
        # Empty blocks fill the list to its usual length, so that the program compiles only once.
        scores, clip_index, batch_mask = self._waiting[-1]
        missing = -(-self._rows // len(scores)) - len(self._waiting)
        empty = (scores, clip_index, batch_mask & False)
        jax.block_until_ready(self._top)  # so that the scores of unfinished merges do not pile up
        self._top = self._update(self._top, [*self._waiting, *[empty] * missing])
        self._waiting = []

    def finish(self) -> TopK:
        """Returns the sorted top k of every identity as numpy arrays."""
        self.flush()
        return join_tops(devices.fetch(self._top))


@functools.cache
def _make_update(mesh: Mesh) -> Callable[[TopK, Sequence[ScoreBlock]], TopK]:
    """Returns a compiled `update_top` that every device applies to its part of the clips."""

    def on_each(top: TopK, *columns: Sequence[Array]) -> TopK:
        blocks = list(zip(*columns, strict=True))
        new = update_top(TopK(*(part[0] for part in top)), blocks)
        return TopK(*(part[None] for part in new))

    rows = PartitionSpec("data")
    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return jax.jit(lambda top, blocks: mapped(top, *zip(*blocks, strict=True)))


def _clean(scores: Array, batch_mask: Array) -> Array:
    """Returns scores [B, C] as float32 without NaN, -0 and denormals. Padded rows get -inf."""
    scores = scores.astype(jnp.float32)
    scores = jnp.where(jnp.abs(scores) < jnp.finfo(jnp.float32).tiny, 0.0, scores)
    return jnp.where(batch_mask[:, None] & ~jnp.isnan(scores), scores, -jnp.inf)


def _merge(old: TopK, rows: Array, clips: Array) -> TopK:
    """Merges the scores `rows` [B, C] of `clips` [B] into `old`, the k best clips so far.

    After many clips, only a few new clips can still enter the top k of an identity. The best score
    of each group of 8 clips shows whether the group contains such a candidate. Only groups with
    candidates are sorted. If an identity has too many candidates, all clips are sorted.
    """
    num_groups = len(rows) // GROUP
    sizes = [size for size in MOST_GROUPS if 4 * size <= num_groups]

    def select_all() -> TopK:
        return _select(old, jnp.concatenate([old.scores.T, rows]).T, clips[None])

    if len(rows) % GROUP or not sizes:
        return select_all()
    best = jnp.max(rows.reshape(num_groups, GROUP, -1), axis=1).T  # [C, B / 8]
    # An equal score can enter, too, if its clip has a lower index.
    num_seen = jnp.cumsum(best >= jnp.min(old.scores, axis=1, keepdims=True), axis=1)
    counts = num_seen[:, -1]

    def select_few(size: int) -> TopK:
        number = jnp.arange(1, size + 1)
        # The n-th group with a candidate is at the position where the running count reaches n.
        groups = jax.vmap(lambda row: jnp.searchsorted(row, number, method="scan_unrolled"))(
            num_seen
        )
        groups = jnp.minimum(groups, num_groups - 1)
        chosen = (groups[:, :, None] * GROUP + jnp.arange(GROUP)).reshape(len(groups), -1)
        real = jnp.repeat(number <= counts[:, None], GROUP, axis=1)
        scores = jnp.where(real, rows[chosen, jnp.arange(len(chosen))[:, None]], -jnp.inf)
        chosen_clips = jnp.where(real, clips[chosen], NO_CLIP)
        return _select(old, jnp.concatenate([old.scores, scores], axis=1), chosen_clips)

    enough = jnp.searchsorted(jnp.array(sizes), jnp.max(counts))
    return lax.switch(enough, [*(functools.partial(select_few, n) for n in sizes), select_all])


def _select(old: TopK, scores: Array, clips: Array) -> TopK:
    """Selects the best k of k + B candidates per identity by their scores [C, k + B].

    The first k candidates are the clips of `old`. The others are `clips`, [C, B], or [1, B] if all
    identities have the same candidates.
    """
    k = old.scores.shape[1]
    # If the scores k and k + 1 are equal, top_k prefers the earlier column, but the earlier column
    # may be the later clip. The extra score k + 1 detects these ties. If the barriers are removed,
    # XLA merges the slices below into the top_k and falls back to a full sort, 10 times slower on
    # CPU. If a single barrier encloses both outputs, the partitioner of XLA aborts.
    values, columns = map(lax.optimization_barrier, lax.top_k(scores, k + 1))

    def clips_of(columns: Array) -> Array:
        kept = jnp.take_along_axis(old.index, jnp.minimum(columns, k - 1), axis=1)
        new = jnp.take_along_axis(clips, jnp.maximum(columns - k, 0), axis=1)
        return jnp.where(columns < k, kept, new)

    def settle_ties() -> TopK:
        last = values[:, k - 1 : k]
        index = jnp.broadcast_to(clips, (len(old.index), clips.shape[1]))
        index = jnp.concatenate([old.index, index], axis=1)
        # Positive float32 numbers sort like the integers with the same bits. So a clip index
        # becomes an exact float key for top_k. NO_CLIP gets the lowest key.
        bits = lax.bitcast_convert_type(jnp.finfo(jnp.float32).max, jnp.int32) - index
        key = lax.bitcast_convert_type(bits, jnp.float32)
        key = jnp.where(scores > last, jnp.inf, jnp.where(scores == last, key, -jnp.inf))
        _, chosen = lax.top_k(key, k)
        return TopK(jnp.take_along_axis(scores, chosen, axis=1), clips_of(chosen))

    is_tie = jnp.any(values[:, k - 1] == values[:, k])
    return lax.cond(is_tie, settle_ties, lambda: TopK(values[:, :k], clips_of(columns[:, :k])))
