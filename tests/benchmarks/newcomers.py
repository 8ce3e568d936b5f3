"""Newcomers: people who are enrolled in a gallery that was fitted without them.

    python -m tests.benchmarks.newcomers [--data=small,standard,real] [--real=PATH] [--out=FILE]

Of every dataset some people are kept out: 100, or half of them where there are fewer than 200. The
coordinates and settings are fitted to the training clips of all others. Then everybody is enrolled,
the newcomers with k training clips each, and the val split is searched. Beside it stands what the
same enrolment reaches where the coordinates and settings were fitted to these clips, too.

MAP is that of the newcomers alone. FNIR is the share of the newcomers' val clips that are missed or
misnamed where 1 % or 10 % of the val distractors get a name, both by posterior. Newcomers are drawn
among people with val clips and as many training clips as possible: the column `clips` tells how
many of the k clips they have on average. Seeds draw the newcomers and their clips; the synthetic
dataset, too.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vidjax import config as config_lib
from vidjax import config_io, fusion, metrics
from vidjax.api import load_data
from vidjax.batch import Array, Frames
from vidjax.data.clips import TrainingData
from vidjax.gallery.gallery import Gallery, Vectors, fit_backend
from vidjax.gallery.store import Clip, Origin
from vidjax.models.layers import unit_vectors
from vidjax.training.plan import values_of_clips

CONFIG = str(Path(__file__).parents[2] / "configs" / "plda.py")
MOST_NEWCOMERS = 100
SHOTS = (1, 2, 5, 10)  # clips that newcomers are enrolled with
RUN = Origin("none: vectors of frames", "0" * 64, centred=False)


class Dataset(NamedTuple):
    """Clips as vectors: those to enrol, if they have a label, and those to search for."""

    train: Vectors
    val: Vectors


def load(kind: str, seed: int, real: str | None) -> Dataset:
    """Loads a dataset and computes the mean frame of every clip and modality."""
    spec, words = f"{CONFIG}:iqiyi_vid,face,head,audio", [f"--config.data.dir={real}"]
    if kind != "real":
        words = ["name=synthetic", f"seed={seed}", f"size={kind}"]
        spec, words = CONFIG, [f"--config.data.{word}" for word in words]
    config = config_io.override(config_io.load_file(spec), words)
    data = load_data(config)
    return Dataset(*(_vectors(config, data, split) for split in ("train", "val")))


@jax.jit
def _mean(frames: Frames) -> Array:
    return unit_vectors(fusion.mean_frame(frames, weighting="quality").features[:, 0])


def _vectors(config: config_lib.Config, data: TrainingData, split: str) -> Vectors:
    """Returns the vectors of all clips of a split."""
    config = config_io.override(config, [f"--config.data.train_splits={split}"])
    found = data.split(split)
    every = np.ones(len(found.clips), bool)
    parts = {
        name: np.asarray(
            values_of_clips(
                config, data, (name,), lambda batch, name=name: _mean(batch.frames[name]), every
            ),
            np.float32,
        )
        for name in config.modalities
    }
    known = (None, *data.identities)
    return Vectors(found.clips, parts, tuple(known[label] for label in found.labels.tolist()))


def draw(data: Dataset, seed: int) -> tuple[list[str], dict[str, list[int]]]:
    """Returns the newcomers, and for every person the training clips in the order of enrolment."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.train.names))
    usable = np.any([np.any(x != 0, axis=1) for x in data.train.parts.values()], axis=0)
    clips: dict[str, list[int]] = {}
    for place in order.tolist():
        label = data.train.labels[place]
        if label is not None and usable[place]:
            clips.setdefault(label, []).append(place)
    shown = {label for label in data.val.labels if label is not None}
    people = sorted(shown & clips.keys())
    count = min(MOST_NEWCOMERS, len(clips) // 2)
    return [people[n] for n in rng.permutation(len(people))[:count].tolist()], clips


def measure(data: Dataset, seed: int) -> list[dict[str, Any]]:
    """Returns a row for every k."""
    newcomers, clips_of = draw(data, seed)
    rows = np.concatenate(list(data.train.parts.values()), axis=1)
    widths = {name: x.shape[1] for name, x in data.train.parts.items()}

    def clips(people: Sequence[str], most: int | None) -> dict[str, Clip]:
        return {
            data.train.names[place]: Clip(person, rows[place])
            for person in people
            for place in clips_of[person][:most]
        }

    others = clips(sorted(set(clips_of) - set(newcomers)), None)
    without = fit_backend(others, widths, centred=False)
    found = []
    for shots in SHOTS:
        new = clips(newcomers, shots)
        row: dict[str, Any] = {"k": shots, "clips": len(new) / len(newcomers), "seed": seed}
        row |= {"newcomers": len(newcomers), "people": len(clips_of)}
        together = others | new
        fronts = {"enrolled": without, "fitted": fit_backend(together, widths, centred=False)}
        for name, front in fronts.items():
            with tempfile.TemporaryDirectory() as folder:
                Gallery.of_clips(f"{folder}/g", RUN, front, together)
                row[name] = scores(Gallery(f"{folder}/g"), data.val, newcomers)
        found.append(row)
    return found


def scores(gallery: Gallery, val: Vectors, newcomers: Sequence[str]) -> dict[str, float]:
    """Returns MAP and FNIR of newcomers on the val split."""
    ranked = gallery.top(val)
    column = {name: number for number, name in enumerate(newcomers, 1)}
    label_of = dict(zip(val.names, val.labels, strict=True))
    labels = np.array([column.get(label_of[name] or "", 0) for name in ranked.clips])
    rows = [ranked.identities.index(name) for name in newcomers]
    positives = np.bincount(labels, minlength=len(column) + 1)[1:]
    answers = list(gallery.identify(val, 1).values())
    best = np.array([answer.score for answer in answers])
    right = [answer.best[:1] and answer.best[0][0] == label
             for answer, label in zip(answers, val.labels, strict=True)]  # fmt: skip
    chosen = np.array([label is None or label in set(newcomers) for label in val.labels])
    known = np.array([label is not None for label in val.labels])
    values = {"map": metrics.mean_average_precision(ranked.top.index[rows], labels, positives)}
    for fpir in (0.01, 0.1):
        errors = metrics.identification_errors(
            best[chosen], np.array(right, bool)[chosen], known[chosen], fpir=fpir
        )
        assert errors is not None
        values[f"fnir_at_fpir_{fpir:g}"] = errors.fnir
    return values


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns means over the seeds as text."""
    lines = [
        f"{'data':9} {'k':>2} {'clips':>6}   {'MAP enrolled':>12} {'fitted':>7} {'less':>6}   "
        f"{'FNIR 1 %':>8} {'fitted':>7}   {'FNIR 10 %':>9} {'fitted':>7}"
    ]
    for data, shots in dict.fromkeys((row["data"], row["k"]) for row in rows):
        some = [row for row in rows if (row["data"], row["k"]) == (data, shots)]

        def mean(arm: str, name: str, some: list[dict[str, Any]] = some) -> float:
            return float(np.mean([row[arm][name] for row in some]))

        low, high = mean("enrolled", "map"), mean("fitted", "map")
        clips = float(np.mean([row["clips"] for row in some]))
        cells = "   ".join(
            f"{mean('enrolled', name):>{width}.3f} {mean('fitted', name):>7.3f}"
            for name, width in (("fnir_at_fpir_0.01", 8), ("fnir_at_fpir_0.1", 9))
        )
        head = f"{data:9} {shots:>2} {clips:>6.2f}"
        lines.append(f"{head}   {low:>12.4f} {high:>7.4f} {high - low:>6.4f}   {cells}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes all rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="small,standard,real")
    parser.add_argument("--real", default=os.environ.get("VIDJAX_REAL_DATA"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for kind in args.data.split(","):
        for seed in range(args.seeds):
            for row in measure(load(kind, seed, args.real), seed):
                rows.append({"data": kind, **row})
                sys.stderr.write(f"{json.dumps(rows[-1])}\n")
            if args.out:
                args.out.write_text(json.dumps(rows, indent=2) + "\n")
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
