"""Ranks clips on the host while the devices compute the scores of the next clips."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vidjax.core import devices
from vidjax.evaluation.topk import MAX_NAMES, HostTopK, ScoreBlock, TopK, join_tops


class RunningTopK:
    """Keeps the k best clips of each identity over all blocks of scores.

    If there are several processes, each process ranks the clips that its devices scored.
    """

    def __init__(self, num_identities: int, mesh: Mesh, k: int = MAX_NAMES):
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
