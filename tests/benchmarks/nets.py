"""Compares nets of faces: names on photos, by size of face, and CPU time.

    python -m tests.benchmarks.nets MODELS PHOTOS

Prints rows for the table of README.md. MODELS is a folder of nets that `vidjax convert` made.
PHOTOS contains NAME/PHOTO.jpg, with four photos or more of some people.
"""

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tests.benchmarks import common, decision
from tests.helpers.embeddings import unit
from vidjax.apps import cards
from vidjax.apps.gallery import backend
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.apps.video import clip_inputs, net_checks, nets, photos, pipeline
from vidjax.apps.video.media import PEOPLE
from vidjax.utils import terminal

HEIGHTS = (0, 100, 200, np.inf)  # limits of the groups of faces by their height in pixels
COUNTS = (1, 3)  # photos of each person
DRAWS = 20
NEAREST = 0.2  # the share of strangers who look most like an enrolled person
HEADER = (
    "net", "data", "photos", "right", "wrong", "strangers", "lookalikes",
    *(f"right, {low:g} to {high:g} px" for low, high in itertools.pairwise(HEIGHTS)),
    "ms per face", "ms per frame",
)  # fmt: skip


def read_photos(models: Path, folder: Path) -> SimpleNamespace:
    """Returns the faces of photos that show one usable face, as `decision.split_tracks`."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="vidjax-") as scratch:
        out = Path(scratch)
        comparison = Gallery.of_models(out / "vectors", models).backend
        found = photos.read_folder(folder, out, models, 1, terminal.print_note)
        clips = [x.track.clip for x in found.faces]
        vectors = select_usable_clips(clip_inputs.embed_clips(comparison, out / PEOPLE, clips))
        part = [*comparison.widths].index("face")
        for x in (x for x in found.faces if x.track.clip in vectors):
            assert x.track.box
            with Image.open(x.path) as image:
                height = ImageOps.exif_transpose(image).height * (x.track.box[3] - x.track.box[1])
            vector = comparison.split(vectors[x.track.clip].vector[None])[part][0]
            rows.append((unit(vector), x.person, x.track.clarity, height))
    vectors, shown, clarity, heights = map(np.array, zip(*rows, strict=True))
    names, people = np.unique(shown, return_inverse=True)
    common.print_text(f"{len(people)} photos of {len(names)} people are usable")
    return SimpleNamespace(
        vectors=vectors.astype(np.float32), people=people, clips=[f"{n}" for n in range(len(rows))],
        apart=[], clarity=clarity, heights=heights,
    )  # fmt: skip


def measure_names(model: backend.Backend, clips: Any, count: int) -> dict[str, float]:
    """Returns name -> share, as means over DRAWS random draws, which README.md explains.

    In each draw, people are enrolled with `count` of the photos `clips`. The rest is named.
    """
    rng, draws = np.random.default_rng(0), []
    found, counts = np.unique(clips.people, return_counts=True)
    pool = found[counts > max(COUNTS)]
    if not len(pool):
        raise SystemExit(f"nobody has more than {max(COUNTS)} usable photos")
    for _ in range(DRAWS):
        people = rng.permutation(pool)[: -(-2 * len(pool) // 3)]
        left = np.ones(len(clips.people), bool)
        rows = [rng.permutation(np.flatnonzero(clips.people == x))[:count] for x in people]
        enrolled, left[np.concatenate(rows)] = clips.vectors[np.stack(rows)], False
        draws.append(_judge(model, clips, people, enrolled, left))
    table = np.ma.masked_invalid([[*x.values()] for x in draws])
    return dict(zip(draws[0], table.mean(0).filled(np.nan).tolist(), strict=True))


def _judge(
    model: backend.Backend, clips: Any, people: np.ndarray, enrolled: np.ndarray, left: np.ndarray
) -> dict[str, float]:
    """Names the clips in the mask `left`, and returns name -> share, or NaN without such clips."""
    decided = decision.decide(model, clips, people, enrolled, np.arange(len(left)))
    known = left & np.isin(clips.people, people)
    strangers = left & ~np.isin(clips.people, people)
    right = decided.named & (decided.best == clips.people)
    middles = {x: unit(clips.vectors[clips.people == x].mean(0)) for x in set(clips.people)}
    likeness = np.array([max(middles[x] @ middles[y] for y in people) for x in clips.people])
    nearest = strangers & (likeness >= np.quantile(likeness[strangers], 1 - NEAREST))

    def share(of: np.ndarray, among: np.ndarray) -> float:
        return float(of[among].mean()) if among.any() else float("nan")

    shares = {
        "right": share(right, known), "wrong": share(decided.named & ~right, known),
        "strangers": share(decided.named, strangers), "lookalikes": share(decided.named, nearest),
    }  # fmt: skip
    for low, high in itertools.pairwise(HEIGHTS):
        inside = (clips.heights >= low) & (clips.heights < high)
        shares[f"{low:g}"] = share(right, known & inside)
    return shares


def measure_net(models: Path, photos: Path) -> list[list[str]]:
    """Returns the rows of a folder of nets: the cells of HEADER."""
    roles = cards.load(models)
    pair = [cards.require(roles, role, models) for role in pipeline.ROLES]
    times = [net_checks.measure_milliseconds(nets.Net(x)) for x in pair]
    back_end = pair[1].back_end
    if back_end is None:
        raise SystemExit(f"{pair[1].path} has no back_end: vidjax convert writes it")
    model, clips = backend.make_card_backend({"face": back_end}), read_photos(models, photos)
    name = " + ".join(x.path.stem for x in pair)
    name += "" if back_end.pairs[0] else " (card not measured)"
    rows = []
    for count in COUNTS:
        shares = measure_names(model, clips, count).values()
        cells = ["" if np.isnan(x) else f"{x:.3f}" for x in shares]
        rows.append([name, "photos", str(count), *cells, *(f"{x:.1f}" for x in times[::-1])])
    return rows


if __name__ == "__main__":
    args = common.parse(__doc__, models=Path, photos=Path)
    common.print_table(HEADER, measure_net(args.models, args.photos))
