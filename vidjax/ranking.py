"""The best 100 clips of every identity, and the submission file that lists them.

On the device: `Ranking` keeps an exact top k over a stream of score blocks, built of `init_top`,
`update_top` and `finish_top`. On disk: `write_ranking`, `load_ranking` and the scorer,
`python -m vidjax.ranking GT RANKING`.

The order is everywhere the same: score descending, then clip index ascending, which is the order
of clip names.
"""

import argparse
import codecs
import functools
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vidjax import metrics
from vidjax.batch import Array
from vidjax.run import workdir

NO_CLIP = np.iinfo(np.int32).max  # the index of an empty place: sorts after every clip
MAX_NAMES = 100  # clips an identity may list in a submission
CHUNK = 256  # identities merged at a time: their scores stay in a CPU's cache
GROUP = 8  # rows that are looked at together
MOST_GROUPS = (32, 128)  # of them that are looked into: the first of these that is enough


class TopK(NamedTuple):
    """The best clips of every identity.

    Attributes:
      scores: [C, k] float32; -inf at an empty place.
      index: [C, k] int32, the clip; NO_CLIP at an empty place.
    """

    scores: Array
    index: Array


Block = tuple[Array, Array, Array]  # scores [B, C], clip_index [B], batch_mask [B]


def init_top(num_identities: int, k: int = MAX_NAMES) -> TopK:
    """Returns the top k of C identities before the first block: empty places only."""
    return TopK(
        scores=jnp.full((num_identities, k), -jnp.inf, jnp.float32),
        index=jnp.full((num_identities, k), NO_CLIP, jnp.int32),
    )


def update_top(top: TopK, blocks: Sequence[Block]) -> TopK:
    """Returns the best k of `top` and of some blocks of clips, exactly; `finish_top` orders them.

    The choice depends neither on the order of the blocks nor on their size or padding. Most of the
    cost is per call: few calls with many clips are cheaper than many with few.

    Args:
      top: the best so far.
      blocks: (scores [B, C] float, clip_index [B] int32, batch_mask [B] bool). The scores are the
        identity columns only; NaN counts as -inf, so that a broken score ranks last, and a
        magnitude below the smallest normal float32 counts as 0, on every backend. A clip_index
        comes once in the whole stream and is below 2**31 - 2**25. Rows where the mask is False
        never enter.
    """
    num_identities = len(top.scores)
    size = min(CHUNK, num_identities)
    clips = jnp.concatenate([jnp.where(mask, index, NO_CLIP) for _, index, mask in blocks])

    def update_chunk(chunk: Array, updated: TopK) -> TopK:
        # Slices are clamped, so the last chunk may overlap the one before it, which changes
        # nothing: both read `top`.
        start = chunk * size
        old = TopK(*(lax.dynamic_slice_in_dim(part, start, size) for part in top))
        rows = [
            _clean(lax.dynamic_slice_in_dim(scores, start, size, axis=1), mask)
            for scores, _, mask in blocks
        ]
        new = _merge(old, jnp.concatenate(rows), clips)
        return TopK(
            *(
                lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
                for whole, part in zip(updated, new, strict=True)
            )
        )

    return lax.fori_loop(0, -(-num_identities // size), update_chunk, top)


def finish_top(top: TopK) -> TopK:
    """Returns `top` in order: score descending, then clip index ascending, empty places last."""
    descending, index = lax.sort((-top.scores, top.index), num_keys=2)
    return TopK(scores=-descending, index=index)


class Ranking:
    """A running top k that blocks of scores are fed to.

    The first device does the work; blocks that are split over several are gathered there.
    """

    def __init__(self, num_identities: int, k: int = MAX_NAMES, *, rows: int = 2048):
        """Begins with nothing ranked.

        Args:
          num_identities: C.
          k: clips to keep for every identity.
          rows: clips that are gathered before they are merged. It bounds the memory, O(C x rows),
            and sets the pace, not the result.
        """
        self._device = jax.devices()[0]
        self._top = jax.device_put(init_top(num_identities, k), self._device)
        self._rows = rows
        self._waiting: list[Block] = []

    def add(self, block: Block) -> None:
        """Takes a block as in `update_top`; all are of one shape."""
        self._waiting.append(jax.device_put(block, self._device))
        if len(self._waiting) * len(block[0]) >= self._rows:
            self.flush()

    def flush(self) -> None:
        """Merges the blocks that wait, so that nothing but the top k is held."""
        if not self._waiting:
            return
        # Filled up to the usual number of blocks, so that the program is not compiled again.
        scores, clip_index, batch_mask = self._waiting[-1]
        missing = -(-self._rows // len(scores)) - len(self._waiting)
        empty = (scores, clip_index, batch_mask & False)
        jax.block_until_ready(self._top)  # not the scores of many merges that are still to come
        self._top = _update(self._top, [*self._waiting, *[empty] * missing])
        self._waiting = []

    def finish(self) -> TopK:
        """Returns the top k of every identity, in order, on the host."""
        self.flush()
        return jax.device_get(_finish(self._top))


_update, _finish = jax.jit(update_top), jax.jit(finish_top)


def rank(
    blocks: Iterable[Block], num_identities: int, k: int = MAX_NAMES, *, rows: int = 2048
) -> TopK:
    """Returns the top k of every identity over a stream of blocks; arguments as in `Ranking`."""
    ranking = Ranking(num_identities, k, rows=rows)
    for block in blocks:
        ranking.add(block)
    return ranking.finish()


def _clean(scores: Array, batch_mask: Array) -> Array:
    """Returns [B, C] float32 scores without NaN, -0 or denormals; -inf on padded rows."""
    scores = scores.astype(jnp.float32)
    scores = jnp.where(jnp.abs(scores) < jnp.finfo(jnp.float32).tiny, 0.0, scores)
    return jnp.where(batch_mask[:, None] & ~jnp.isnan(scores), scores, -jnp.inf)


def _merge(old: TopK, rows: Array, clips: Array) -> TopK:
    """Returns the best k of `old` and of rows [B, C], scores of the clips [B].

    Once many clips have been ranked, few rows hold anything for an identity. Those that do are
    found by the best of every 8 rows, and only they are sorted, where no identity has too many.
    """
    num_groups = len(rows) // GROUP
    sizes = [size for size in MOST_GROUPS if 4 * size <= num_groups]

    def of_all() -> TopK:
        return _select(old, jnp.concatenate([old.scores.T, rows]).T, clips[None])

    if len(rows) % GROUP or not sizes:
        return of_all()
    best = jnp.max(rows.reshape(num_groups, GROUP, -1), axis=1).T  # [C, B / 8]
    # An equal score may enter by its clip index.
    seen = jnp.cumsum(best >= jnp.min(old.scores, axis=1, keepdims=True), axis=1)
    counts = seen[:, -1]

    def of_few(size: int) -> TopK:
        number = jnp.arange(1, size + 1)
        # Where the count of groups reaches a number is the group of that number.
        groups = jax.vmap(lambda row: jnp.searchsorted(row, number, method="scan_unrolled"))(seen)
        groups = jnp.minimum(groups, num_groups - 1)
        chosen = (groups[:, :, None] * GROUP + jnp.arange(GROUP)).reshape(len(groups), -1)
        real = jnp.repeat(number <= counts[:, None], GROUP, axis=1)
        scores = jnp.where(real, rows[chosen, jnp.arange(len(chosen))[:, None]], -jnp.inf)
        chosen_clips = jnp.where(real, clips[chosen], NO_CLIP)
        return _select(old, jnp.concatenate([old.scores, scores], axis=1), chosen_clips)

    enough = jnp.searchsorted(jnp.array(sizes), jnp.max(counts))
    return lax.switch(enough, [*(functools.partial(of_few, size) for size in sizes), of_all])


def _select(old: TopK, scores: Array, clips: Array) -> TopK:
    """Returns the best k of [C, k + B] `scores`: of `old`, then of `clips` [C, B] or [1, B]."""
    k = old.scores.shape[1]
    # One place more than needed shows whether equal scores straddle the last place: among equals
    # top_k takes the earlier column, which need not be the earlier clip. Without the barriers XLA
    # merges the slices below into the top_k and falls back to a full sort, 10 times slower on CPU;
    # with one barrier around both outputs its partitioner aborts.
    values, columns = map(lax.optimization_barrier, lax.top_k(scores, k + 1))

    def clips_of(columns: Array) -> Array:
        kept = jnp.take_along_axis(old.index, jnp.minimum(columns, k - 1), axis=1)
        new = jnp.take_along_axis(clips, jnp.maximum(columns - k, 0), axis=1)
        return jnp.where(columns < k, kept, new)

    def keep_order() -> TopK:
        return TopK(values[:, :k], clips_of(columns[:, :k]))

    def settle_ties() -> TopK:
        last = values[:, k - 1 : k]
        index = jnp.broadcast_to(clips, (len(old.index), clips.shape[1]))
        index = jnp.concatenate([old.index, index], axis=1)
        # The bits of a positive float32 are ordered as the float is: a key for a whole integer.
        # NO_CLIP gives the bits of -inf: after every clip.
        bits = lax.bitcast_convert_type(jnp.finfo(jnp.float32).max, jnp.int32) - index
        key = lax.bitcast_convert_type(bits, jnp.float32)
        key = jnp.where(scores > last, jnp.inf, jnp.where(scores == last, key, -jnp.inf))
        _, chosen = lax.top_k(key, k)
        return TopK(jnp.take_along_axis(scores, chosen, axis=1), clips_of(chosen))

    return lax.cond(jnp.any(values[:, k - 1] == values[:, k]), settle_ties, keep_order)


def write_ranking(
    path: str | Path, identities: Sequence[str], clips: Sequence[str], top: TopK
) -> None:
    """Writes the submission file, whole or not at all.

    One line an identity, `{identity} {clip}.mp4 {clip}.mp4 ...`, best first, at most 100 clips.
    Every name ends in `.mp4` once, whether or not `clips` carry it.

    Args:
      path: the file to write or replace.
      identities: [C] names, in the order of the rows of `top`.
      clips: [N] names, in the order of the clip indices.
      top: the finished ranking; empty places are left out.

    Raises:
      ValueError: a name is empty, repeated or holds white space, or the rows are not C.
      OSError: the file cannot be written; what was at `path` before is intact.
    """
    path = Path(path)
    index = np.asarray(top.index)[:, :MAX_NAMES]
    if len(index) != len(identities):
        raise ValueError(f"{path}: {len(identities)} identities, {len(index)} ranked lists")
    names = [clip.removesuffix(".mp4") + ".mp4" for clip in clips]
    _check_names(path, "clip", names)
    _check_names(path, "identity", identities)
    lines = (
        " ".join((identity, *(names[clip] for clip in row[row != NO_CLIP].tolist())))
        for identity, row in zip(identities, index, strict=True)
    )
    workdir.write_text(path, "".join(f"{line}\n" for line in lines))


def _check_names(path: Path, what: str, names: Sequence[str]) -> None:
    """Raises ValueError for a name that a submission line could not hold."""
    for name in names:
        if name.split() != [name]:
            raise ValueError(f"{path}: {what} {name!r} is empty or holds white space")
    if len(set(names)) < len(names):
        repeated = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"{path}: {what} {repeated!r} is repeated")


def load_ranking(
    path: str | Path, *, identities: Collection[str] | None = None
) -> dict[str, list[str]]:
    """Returns the submission at `path`: identity -> clip names, best first.

    CRLF, a byte order mark and trailing blanks are no faults.

    Args:
      path: a file as `write_ranking` writes it.
      identities: the known identities, any other being a fault; None knows them all.

    Raises:
      ValueError: with line numbers, in at most 3 lines: an empty line, fields that are not
        separated by single spaces, an identity that is repeated or unknown, a name that is
        repeated in its line, more than 100 names.
    """
    ranking, faults = _read_ranking(Path(path), identities)
    if faults:
        raise ValueError(_summary(faults))
    return ranking


def score_files(gt_path: str | Path, ranking_path: str | Path) -> float:
    """Returns MAP@100 of a submission, as the organisers' script computes it.

    What that script is known to bear is scored as it does: names that repeat in a line are dropped,
    first kept, before ranks are counted and before the 100 are; an identity that the submission
    lacks counts 0, one that the ground truth lacks is ignored; names match as exact strings.

    Args:
      gt_path: `NAME.mp4 ID` lines or `ID NAME.mp4 NAME.mp4 ...` lines.
      ranking_path: the submission.

    Raises:
      ValueError: with a line number. Of the submission: all that `load_ranking` refuses but names
        that repeat. Of the ground truth: an empty line, an identity that has two lines or no clip,
        a clip that is listed twice, a form that cannot be told.
    """
    positives = _read_ground_truth(Path(gt_path))
    ranking, _ = _read_ranking(Path(ranking_path))
    return _score(positives, ranking)


def _score(positives: dict[str, list[str]], ranking: dict[str, list[str]]) -> float:
    """Returns MAP@100 of identity -> ranked names against identity -> names that show it."""
    columns = [column for column, clips in enumerate(positives.values(), 1) for _ in clips]
    clips = [clip for clips in positives.values() for clip in clips]
    rows = {clip: row for row, clip in enumerate(clips)}
    index = np.full((len(positives), MAX_NAMES), NO_CLIP, np.int64)
    for places, identity in zip(index, positives, strict=True):
        names = ranking.get(identity, [])
        places[: len(names)] = [rows.get(name, NO_CLIP) for name in names]
    counts = np.array([len(clips) for clips in positives.values()])
    return metrics.mean_average_precision(index, np.array(columns), counts)


def _read_ranking(
    path: Path, identities: Collection[str] | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """Returns identity -> names without repeats, and the faults that a scorer can live with."""
    ranking: dict[str, list[str]] = {}
    faults = []
    for where, line in _read_lines(path):
        if "" in line.split(" ") or "\t" in line:
            raise ValueError(f"{where}: fields are not separated by single spaces")
        identity, *given = line.split(" ")
        names = list(dict.fromkeys(given))
        if len(names) < len(given):
            repeated = next(name for name, count in Counter(given).items() if count > 1)
            faults.append(f"{where}: {repeated!r} is repeated")
        if len(names) > MAX_NAMES:
            raise ValueError(f"{where}: {len(names)} names, at most {MAX_NAMES} are allowed")
        if identity in ranking:
            raise ValueError(f"{where}: identity {identity!r} has a line already")
        if identities is not None and identity not in identities:
            faults.append(f"{where}: identity {identity!r} is unknown")
        ranking[identity] = names
    return ranking, faults


def _read_ground_truth(path: Path) -> dict[str, list[str]]:
    """Returns identity -> the clips that show it, from either form."""
    lines = [(where, line.split()) for where, line in _read_lines(path)]
    for where, fields in lines:
        if len(fields) < 2:
            raise ValueError(f"{where}: {fields[0]!r} stands alone, without a positive")
    direct = _names_come_first(path, [fields for _, fields in lines])
    positives: dict[str, list[str]] = {}
    seen = set()
    for where, fields in lines:
        if direct and len(fields) > 2:
            raise ValueError(f"{where}: {len(fields)} fields where 'NAME.mp4 ID' is expected")
        identity, clips = (fields[1], fields[:1]) if direct else (fields[0], fields[1:])
        if identity in positives and not direct:
            raise ValueError(f"{where}: identity {identity!r} has a line already")
        for clip in clips:
            if clip in seen:
                raise ValueError(f"{where}: clip {clip!r} is listed twice")
            seen.add(clip)
        positives.setdefault(identity, []).extend(clips)
    return positives


def _names_come_first(path: Path, lines: Sequence[Sequence[str]]) -> bool:
    """Returns True for `NAME ID` lines, False for `ID NAME NAME ...` lines."""
    first = [fields[0] for fields in lines]
    others = [name for fields in lines for name in fields[1:]]
    for is_name in (lambda field: field.endswith(".mp4"), lambda field: not field.isdecimal()):
        if all(map(is_name, first)) != all(map(is_name, others)):
            return all(map(is_name, first))
    if len(others) > len(first):
        return False
    if len(set(others)) < len(others):
        return True
    raise ValueError(f"{path}: which field is the clip? Names that end in .mp4 would tell")


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ("path: line n", the line without its end and trailing blanks).

    Raises:
      ValueError: a line is empty or not UTF-8, or there is none.
    """
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()  # the end of the last line
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        try:
            text = line.decode().rstrip(" \t\r")
        except UnicodeDecodeError:
            raise ValueError(f"{where}: not UTF-8 text") from None
        if not text.strip(" \t"):
            raise ValueError(f"{where}: the line is empty")
        yield where, text


def _summary(faults: Sequence[str]) -> str:
    """Returns at most 3 lines about any number of faults."""
    return "\n".join(faults if len(faults) <= 3 else [*faults[:2], f"and {len(faults) - 2} more"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m vidjax.ranking GT RANKING` and returns the exit code.

    The last line of stdout is the score. A submission with faults that the organisers' script bears
    is scored as well, but the faults go to stderr and the exit code is 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vidjax.ranking",
        description="Validates a submission and prints its MAP@100, last on stdout.",
    )
    parser.add_argument("gt", metavar="GT", type=Path, help="'NAME.mp4 ID' or 'ID NAME.mp4 ...'")
    parser.add_argument("ranking", metavar="RANKING", type=Path, help="'ID NAME.mp4 NAME.mp4 ...'")
    arguments = parser.parse_args(argv)
    try:
        positives = _read_ground_truth(arguments.gt)
        ranking, faults = _read_ranking(arguments.ranking)
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        sys.stderr.write(f"{text}\n")
        return 2
    score = _score(positives, ranking)
    common = len(positives.keys() & ranking.keys())
    sys.stdout.write(
        f"{arguments.gt}: {len(positives)} identities, {sum(map(len, positives.values()))} clips\n"
        f"{arguments.ranking}: {common} of them ranked, {len(positives) - common} missing, "
        f"{len(ranking) - common} others ignored\n"
        f"MAP@{MAX_NAMES}\n{score:.17g}\n"
    )
    if faults:
        sys.stderr.write(f"{_summary(faults)}\n")
        return 2
    wanted = {clip for clips in positives.values() for clip in clips}
    given = {name for names in ranking.values() for name in names}
    if not common:
        sys.stderr.write(f"{arguments.ranking}: no identity of the ground truth is ranked\n")
    if wanted.isdisjoint(given):
        sys.stderr.write(
            f"{arguments.ranking}: no clip of the ground truth is ranked; suffix? "
            f"{min(wanted)!r} is in the one, {min(given, default='nothing')!r} in the other\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
