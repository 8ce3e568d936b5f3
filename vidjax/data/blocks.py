"""Which clips of a block, and which rows of a batch, each of several processes reads.

All of it follows from plan and share: processes agree without a word, and read no clip for it.
"""

from collections.abc import Iterator

import numpy as np

from vidjax.cluster.share import Share
from vidjax.errors import UserError


def own_blocks(bucket: np.ndarray, rows: int, share: Share) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the blocks of a process, bucket by bucket.

    The n clips of a bucket form ceil(n / (rows * parts)) blocks in every process. A process takes
    a range of them, so that it opens the files of its range alone: if it took every parts-th block,
    it would open nearly all files. Hence blocks at the end of the last ranges may be empty.

    Args:
      bucket: [N] int, bucket of each clip in the order in which clips are stored; -1 for a clip
        that is left out.
      rows: number of rows per block of a process.
      share: the process.

    Yields:
      the bucket, and [n] int, places in `bucket` of the clips of the block, n from 0 to `rows`.
    """
    for number in range(bucket.max(initial=-1) + 1):
        places = np.flatnonzero(bucket == number)
        num_blocks = -(-len(places) // (rows * share.parts))
        first = share.number * num_blocks * rows
        for at in range(first, first + num_blocks * rows, rows):
            yield number, places[at : at + rows]


def own_places(bucket: np.ndarray, rows: int, share: Share) -> np.ndarray:
    """Returns [n] int, places of all clips that a process reads; arguments as of `own_blocks`."""
    none = np.zeros(0, np.intp)
    return np.concatenate([none, *(places for _, places in own_blocks(bucket, rows, share))])


def own_rows(batch_size: int, share: Share) -> slice:
    """Returns the rows of every training batch that a process reads.

    Raises:
      ValueError: processes would have different numbers of rows.
    """
    if batch_size % share.parts:
        raise UserError(
            f"config.batch_size={batch_size} cannot be split over {share.parts} processes: "
            "use a multiple"
        )
    count = batch_size // share.parts
    return slice(share.number * count, (share.number + 1) * count)
