"""Strangers: errors of a gallery at the rates that a user chose, on strangers it was not set on.

    python -m tests.benchmarks.strangers --run=W [--out=FILE]

A gallery is made of a trained run. The clips without a label of the evaluated split are halved at
random: thresholds are set on one half, and FPIR is measured on the other one; FNIR on the labelled
clips. Figures are means over 200 halvings; `held` is the share of them in which the measured rate
is one that chance allows where the true rate lies within the interval that the threshold tells.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from vidjax import metrics, predict
from vidjax.api import load_data
from vidjax.gallery import answers as answers_lib
from vidjax.gallery.gallery import Gallery

HALVINGS = 200
RATES = (0.01, 0.02, 0.05, 0.1)


def measure(workdir: str) -> dict[str, Any]:
    """Returns errors of the gallery of a run on its evaluated split."""
    run = predict.restore(workdir)
    data = load_data(run.config)
    with tempfile.TemporaryDirectory() as folder:
        gallery = Gallery.create(f"{folder}/g", run, data)
    found = gallery.embed(data, run.config.eval.split)
    answers = list(gallery.identify(found, 1).values())
    score = np.array([answer.score for answer in answers])
    known = np.array([label is not None for label in found.labels])
    right = np.array([
        bool(answer.best) and answer.best[0][0] == label
        for answer, label in zip(answers, found.labels, strict=True)
    ])  # fmt: skip
    strangers, num_people = score[~known], len(gallery.identities)
    result: dict[str, Any] = {"people": num_people, "known": int(known.sum())}
    result |= {"strangers": len(strangers), "auroc": metrics.auroc(score, known)}
    rng = np.random.default_rng(0)
    for fpir in RATES:
        rows = []
        for _ in range(HALVINGS):
            order = rng.permutation(len(strangers))
            seen, unseen = np.split(strangers[order], [len(order) // 2])
            limit = answers_lib.threshold(seen, fpir, num_people)
            alarms = int(np.sum(unseen >= limit.score))
            missed = float(np.mean(~right[known] | (score[known] < limit.score)))
            least = stats.binom.ppf(0.025, len(unseen), limit.low)
            most = stats.binom.ppf(0.975, len(unseen), limit.high)
            rows.append((alarms / len(unseen), missed, least <= alarms <= most))
        rate, fnir, held = np.mean(rows, axis=0).tolist()
        result[f"fpir {fpir:g}"] = {"measured_fpir": rate, "fnir": fnir, "held": held}
        errors = metrics.identification_errors(score, right, known, fpir=fpir)
        assert errors is not None
        result[f"fpir {fpir:g}"]["fnir_on_the_same_strangers"] = errors.fnir
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the errors as JSON, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    text = json.dumps(measure(args.run), indent=2) + "\n"
    sys.stdout.write(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
