"""PLDA at published size: seconds of its fit, clips per second of its ranking, memory.

    python -m tests.benchmarks.closed_form [--clips=57820] [--num_identities=10034]

Clips of 30 made-up faces on average are resident. The fit has three parts: the settings, on
held-out clips; two passes over all clips for the sums; and the solution on the host. A ranking of
all clips is all of `vidjax.evaluation.scoring.score`. The memory of the fit is that of the clips,
of its sums and of what the solution holds of them at once:

    frames x D x 2 + K x (D + 1) x 4 + K x D x 8 x 4 bytes

with D features, K = 1 + identities, frames in float16, the sums in float32 and four float64 copies.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks import common, evaluation
from vidjax import devices
from vidjax.models import plda_fit
from vidjax.models.two_covariance import Settings

SETTINGS = Settings(
    within=0.8, between=0.75, scale=0.06, unenrolled=-2.0, stranger=2.0, centred=1.0
)


def fit_settings(num_clips: int, num_identities: int) -> None:
    """Fits the settings on as many made-up vectors as a fit looks at."""
    rng = np.random.default_rng(0)
    labels = 1 + np.arange(num_clips) % num_identities
    wanted = plda_fit.some_identities(labels, 0)
    vectors = rng.normal(size=(int(wanted.sum()), common.DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    plda_fit.fit_settings({"face": vectors}, labels[wanted], {}, 0)


def benchmark(args: argparse.Namespace) -> None:
    """Writes seconds, rates and memory."""
    size = {"num_identities": args.num_identities, "num_clips": args.clips}
    run = common.make_run("plda.py:face", batch_size=256, settings=SETTINGS._asdict(), **size)
    loop, mesh = common.make_loop(run), devices.make_mesh(1)
    seconds: dict[str, float] = {}

    def timed(name: str, began: float) -> float:
        seconds[name] = time.perf_counter() - began
        return time.perf_counter()

    began = time.perf_counter()
    fit_settings(args.clips, args.num_identities)
    began = timed("settings, with compilation", began)
    steps = jnp.int32(-(-2 * args.clips // 256))
    state, outcome = loop(run.state, run.tables, run.clips, steps)
    jax.block_until_ready(outcome)
    began = timed("two passes, with compilation", began)
    solved = devices.replicate(mesh, run.system.model.solve(state.params, state.model_state))
    timed("solution", began)

    model, _ = evaluation.make_model(run, args.num_identities, state.params, solved)
    rates = [evaluation.rank(model)["eval_clips_per_second"] for _ in range(3)]
    frames = len(run.clips["face"].number)
    dim, classes = common.DIM, 1 + args.num_identities
    expected = frames * dim * 2 + classes * (dim + 1) * 4 + classes * dim * 8 * 4
    sys.stdout.write(
        f"{common.describe()}, {args.clips:,} clips, {args.num_identities:,} people\n\n"
    )
    rows = [[name, f"{value:.1f} s"] for name, value in seconds.items()]
    rows.append(["fit in all", f"{sum(seconds.values()):.1f} s"])
    rows.append(["ranking, median of 3", f"{common.median(rates):,.0f} clips/s"])
    rows.append(["memory of the fit by the formula", f"{expected / common.MIB:,.0f} MiB"])
    rows.append(["largest memory of the process", f"{common.peak_bytes() / common.MIB:,.0f} MiB"])
    common.write_table(["PLDA", ""], rows)


def main() -> None:
    """Prints the table."""
    benchmark(common.parse(__doc__, clips=57_820, num_identities=10_034))


if __name__ == "__main__":
    main()
