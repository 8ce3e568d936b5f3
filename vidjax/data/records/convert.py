"""From any source of frames to records in the cache: converted once, checked at every load."""

import tempfile
from pathlib import Path
from typing import Any

from vidjax import files
from vidjax.data.cache import cache_folder, exclusive, mark_used
from vidjax.data.frame_fields import NonFinite, RecordSource
from vidjax.data.records.engines import ALL_CORES, Engine, check_engine
from vidjax.data.records.manifest import VERSION, Records, load_records
from vidjax.errors import UserError


def convert(
    source: RecordSource,
    cache_dir: str | Path | None = None,
    *,
    non_finite: NonFinite = "drop",
    engine: Engine = ALL_CORES,
) -> Records:
    """Returns the records of a source, converting it unless the cache has them.

    Args:
      source: the frames.
      cache_dir: folder of the cache; None for `$VIDJAX_CACHE` or `~/.cache/vidjax`.
      non_finite: 'drop' skips and counts frames whose feature holds a NaN or an Inf; 'error'
        refuses them.
      engine: what writes the shards; the records are the same.

    Raises:
      ValueError: the engine cannot run here, the source contradicts itself, the records are
        damaged, or, with `non_finite='error'`, a feature is not finite.
      OSError: the cache cannot be written.
    """
    if non_finite not in ("drop", "error"):
        raise UserError(f"config.data.non_finite is 'drop' or 'error', got {non_finite!r}")
    check_engine(engine)
    fingerprint = source.fingerprint()
    folder = _folder(source.kind, fingerprint, cache_dir)
    if not (folder / "manifest.json").exists():
        with exclusive(folder):
            if not (folder / "manifest.json").exists():
                with files.atomic_folder(folder) as partial:
                    from vidjax.data.records.write import write_records

                    write_records(source, fingerprint, partial, non_finite, engine)
                    if source.fingerprint() != fingerprint:
                        raise UserError(
                            f"{source.place}: changed during the conversion\n"
                            "run the command again once no program writes to it"
                        )
    records = load_records(folder)
    mark_used(folder)
    if non_finite == "error":  # the records may be those of an earlier conversion with 'drop'
        _refuse_dropped(records, source)
    return records


def records_folder(source: RecordSource, cache_dir: str | Path | None = None) -> Path:
    """Returns the folder of a source's records; a manifest.json in it says that they are there.

    Raises:
      OSError: a file of the source is gone.
    """
    return _folder(source.kind, source.fingerprint(), cache_dir)


def _folder(kind: str, fingerprint: list[dict[str, Any]], cache_dir: str | Path | None) -> Path:
    return cache_folder(cache_dir, kind, [VERSION, fingerprint])


def _refuse_dropped(records: Records, source: RecordSource) -> None:
    """Raises ValueError, with the first clip, when a frame was left out of the records."""
    for split in records.report["splits"].values():
        for counts in split["modalities"].values():
            if counts["frames_skipped"].get("non_finite"):
                with tempfile.TemporaryDirectory() as scratch:  # reading again names the clip
                    source.read(Path(scratch), "error")
