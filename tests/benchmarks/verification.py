"""Measures the false match rate and the true accept rate of `vidjax gallery verify`.

    python -m tests.benchmarks.verification [--run=RUN] [--tracks=FOLDER]

In each of 200 draws, people are enrolled with three clips each, and clips of strangers are stored.
A threshold for 1 % or 0.1 % is measured for one person. Then clips of other strangers, and new
clips of the person, are compared with the person. Columns:

    FMR           mean share of the other strangers' clips that are accepted
    above         share of the draws in which this share is above the chosen rate
    in interval   share of the draws in which this share is in the 95 % interval of the rule
    TAR           true accept rate, the mean share of the person's new clips that are accepted
    by the model  FMR and TAR of the rule for galleries with too few strangers

RUN is a PLDA run of real clips, for example of `configs/plda.py:iqiyi_vid,few,face`. FOLDER
contains `tracks.npz`, see `decision`. There, several clips show the same stranger.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.benchmarks import common, decision
from tests.helpers import embeddings
from vidjax.apps.gallery import backend as backend_lib, index as index_lib, ratios, verification
from vidjax.apps.gallery.backend import Backend

DRAWS = 200
ENROLLED, NEW = 3, 2  # clips of each person
PEOPLE = 50  # enrolled people
RATES = {0.01: 99, 0.001: 999}  # false match rate -> clips of strangers in the gallery
ALARMS = 20  # the expected number of accepted clips of other strangers
TURNS = 10  # draws with the same enrolled people, if clips are real


class Draw(NamedTuple):
    """A gallery with one modality, and clips that are compared with its first person."""

    backend: Backend
    enrolled: np.ndarray  # [P, K, D] float32, K clips of each of P people
    strangers: np.ndarray  # [S, D] float32, clips of strangers in the gallery
    others: np.ndarray  # [O, D] float32, clips of other strangers
    shown: np.ndarray  # [Q, D] float32, new clips of the first person


def make_comparison(draw: Draw, *, pairs: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that compares clips [N, D] with the first person, or with one clip."""
    model, (people, clips, width) = draw.backend, draw.enrolled.shape
    if pairs:
        one = ratios.of_clips(model, [draw.enrolled[0, :1]])
        return lambda x: ratios.compare(model, one, ratios.of_clips(model, [x]))[0]
    enrolled = draw.enrolled.reshape(-1, width)
    owner = np.arange(people).repeat(clips)
    index = index_lib.Index(model, [model.enrol([*map(str, range(people))], enrolled, owner)])
    return lambda x: index.ratios([x], "0")[0]


def measure(draws: Iterator[Draw], rate: float, *, pairs: bool = False) -> dict[str, float]:
    """Returns the columns of the table, as means over draws. `pairs` is True for two clips."""
    rows = []
    for draw in draws:
        compare = make_comparison(draw, pairs=pairs)
        if pairs:
            known, other = (
                verification.pair_strangers(draw.backend, [*map(str, range(len(x)))], [x])[0]
                for x in (draw.strangers, draw.others)
            )
        else:
            known, other = compare(draw.strangers), compare(draw.others)
        rule, shown = verification.make_rule(known, rate, pairs=pairs), compare(draw.shown)
        assert rule.threshold is not None
        low, high = rule.threshold.interval
        found = float(np.mean(other >= rule.log_ratio))
        rows.append({
            "FMR": found, "above": found > rate, "in interval": low <= found <= high,
            "TAR": np.mean(shown >= rule.log_ratio),
            "FMR by the model": np.mean(other >= -np.log(rate)),
            "TAR by the model": np.mean(shown >= -np.log(rate)),
        })  # fmt: skip
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def draw_card(seed: int, strangers: int, others: int) -> Draw:
    """Draws clips to which the card of dlib's net applies."""
    made = embeddings.Population(seed)
    clips = made.photos(made.people(PEOPLE), ENROLLED + NEW).astype(np.float32)
    new = made.photos(made.people(strangers + others), 1).astype(np.float32)[:, 0]
    return Draw(
        backend_lib.make_card_backend({"face": embeddings.CARD_WITHOUT_MEAN}),
        clips[:, :ENROLLED], new[:strangers], new[strangers:], clips[0, ENROLLED:],
    )  # fmt: skip


def make_plda_draws(width: int = 64, within: float = 0.6) -> Callable[[int, int, int], Draw]:
    """Returns a function like `draw_card` for PLDA, which is fitted to 300 other people."""
    fitted = embeddings.exact(np.random.default_rng(9), 300, 4, width, within).astype(np.float32)
    labels = 1 + np.arange(300).repeat(4)
    model = backend_lib.fit({"face": fitted.reshape(-1, width)}, labels, centred=False)

    def draw(seed: int, strangers: int, others: int) -> Draw:
        rng = np.random.default_rng(seed)
        clips = embeddings.exact(rng, PEOPLE, ENROLLED + NEW, width, within).astype(np.float32)
        new = embeddings.exact(rng, strangers + others, 1, width, within).astype(np.float32)[:, 0]
        return Draw(
            model, clips[:, :ENROLLED], new[:strangers], new[strangers:], clips[0, ENROLLED:]
        )

    return draw


def split_strangers(
    rng: np.random.Generator, people: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits clips of strangers, `people` [N], into `size` clips of a gallery and clips of others.

    No stranger is in both parts. Returns the indices of the clips. There is one clip of each
    stranger, or all clips if there are fewer than twice `size` strangers.
    """
    order, mixed = rng.permutation(np.unique(people)), rng.permutation(len(people))
    if len(order) >= 2 * size:
        first = dict(zip(people[mixed].tolist(), mixed.tolist(), strict=True))
        rows = np.array([first[name] for name in order.tolist()])
        return rows[:size], rows[size:]
    turn = np.argsort(order)[np.searchsorted(np.sort(order), people)]
    inside = np.argsort(turn, kind="stable")[:size]
    return inside, np.flatnonzero(~np.isin(people, people[inside]))


def draw_real(
    draws: int, vectors: np.ndarray, people: np.ndarray, size: int,
    fit: Callable[[np.ndarray, np.ndarray], Backend], *, known: int,
) -> Iterator[Draw]:  # fmt: skip
    """Yields draws of `known` people among those with enough of the N clips.

    `vectors` [N, D] are the clips, and `people` [N] the people. `fit` makes a back end from the
    clips and labels of the known people.
    """
    names, counts = np.unique(people, return_counts=True)
    rng, turns = np.random.default_rng(0), min(TURNS, known)
    chosen, rows, model = np.zeros(0, int), list[np.ndarray](), None
    for draw in range(draws):
        if model is None or draw % turns == 0:  # other people are enrolled
            chosen = rng.permutation(names[counts > ENROLLED])[:known]
            rows = [rng.permutation(np.flatnonzero(people == name)) for name in chosen]
            labels = 1 + np.arange(known).repeat(ENROLLED)
            model = fit(vectors[np.concatenate([row[:ENROLLED] for row in rows])], labels)
        rows = [*rows[1:], rows[0]]
        strangers = np.flatnonzero(~np.isin(people, chosen))
        parts = split_strangers(rng, people[strangers], size)
        gallery, others = (vectors[strangers[part]] for part in parts)
        enrolled = np.stack([row[:ENROLLED] for row in rows])
        yield Draw(model, vectors[enrolled], gallery, others, vectors[rows[0][ENROLLED:]])


def load_run(run: Path) -> tuple[np.ndarray, np.ndarray, Callable[..., Backend]]:
    """Returns clips [N, D] of a PLDA run, their people [N], and the argument `fit` of `draw_real`.

    A clip without a label is another person.
    """
    from vidjax.apps.gallery import run_vectors
    from vidjax.evaluation import predict
    from vidjax.training.public import load_data

    predictor = predict.restore_run(run)
    data, vectors, people = load_data(predictor.config), [], []
    for split in ("train", "val"):
        found = run_vectors.RunVectors(predictor).embed(data, split)
        (x,) = found.parts.values()
        usable = np.any(x != 0, axis=1).tolist()
        vectors.append(x[usable])
        names = zip(found.names, found.labels, usable, strict=True)
        people += [label or f"{split} {name}" for name, label, has in names if has]
    settings = predictor.model.system.model.gallery_settings()

    def fit(x: np.ndarray, labels: np.ndarray) -> Backend:
        return backend_lib.fit({"face": x}, labels, centred=True, settings=settings)

    return np.concatenate(vectors), np.unique(people, return_inverse=True)[1], fit


def load_tracks(folder: Path) -> tuple[np.ndarray, np.ndarray, Callable[..., Backend]]:
    """Returns photos and tracks as `load_run` does, and the back end of the card of dlib's net."""
    films, photos = decision.load(folder)
    vectors = np.concatenate([photos.reshape(-1, photos.shape[-1]), films.vectors])
    people = np.concatenate([np.arange(len(photos)).repeat(photos.shape[1]), films.people])
    model = backend_lib.make_card_backend({"face": embeddings.CARD})
    return vectors, people, lambda x, labels: model


def print_figures(name: str, rate: float, figures: dict[str, float]) -> None:
    cells = " | ".join(
        f"{key} {value:.4f}" if "FMR" in key else f"{key} {value:.3f}"
        for key, value in figures.items()
    )
    common.print_text(f"{name} | {rate:g} | {cells}")


def main() -> None:
    args = common.parse(__doc__, run="", tracks="", draws=DRAWS)
    makers = {"card": draw_card, "PLDA": make_plda_draws()}
    for name, make in makers.items():
        for rate, size in RATES.items():
            for pairs in (False, True):
                sizes = [count * (1 + pairs) for count in (size, round(ALARMS / rate))]
                draws = (make(seed, *sizes) for seed in range(args.draws))
                figures = measure(draws, rate, pairs=pairs)
                print_figures(f"{name}, {'two clips' if pairs else 'a person'}", rate, figures)
    for name, path, load, known in (
        ("real clips", args.run, load_run, 200), ("tracks", args.tracks, load_tracks, 6),
    ):  # fmt: skip
        if not path:
            continue
        vectors, people, fit = load(Path(path))
        for rate, size in RATES.items():
            if 1.3 * size < len(people) - 4 * known:
                draws = draw_real(args.draws, vectors, people, size, fit, known=known)
                print_figures(name, rate, measure(draws, rate))


if __name__ == "__main__":
    main()
