"""Generates a dataset like iQIYI-VID: pickles of features in the official layout, and ground truth.

In each modality, a person is a unit vector in a subspace of 64 dimensions. In each clip, the vector
is displaced. A part of the displacement is along a few directions that all people share, like
poses. The frames of the clip are spread around the displaced vector, at low quality more than at
high quality. So clips of a person differ more than frames of a clip. There are also look-alikes,
strangers, frames of the wrong person, modalities without information, and missing modalities.

The displacement (`Size.spread`) was chosen once, from the MAP of single modalities. The table has
the MAP@100 on val, including distractors, of MLPs with two layers of 1024 units. An MLP reads one
modality, and fuses one to five random frames of a clip, but only one frame in the column *one
random face*. In the column *face, weighted*, the frames are weighted by quality.

| size | face, weighted | one random face | head | audio | body | scene |
|---|---|---|---|---|---|---|
| standard, seed 0 | 0.85 | 0.72 | 0.54 | 0.12 | 0.05 | 0.19 |
| small, mean of seeds 0-2 | 0.86 (0.83-0.89) | 0.73 | 0.54 | 0.14 | 0.06 | 0.20 |

Source: our design. Sizes, rates of missing modalities and distributions of scores follow published
figures of iQIYI-VID-2019. Unpublished properties (TV programmes, strangers, boxes) are invented.
"""

import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.utils import exit_codes, files
from vidjax.utils.errors import UserError, check_choice
from vidjax.utils.parser import Parser

RANK = 64  # dimensions in which people differ
_SINGLETON_RATE = 0.4  # share of distractors whose stranger has only one clip
_CLUSTER_SIZE = 5  # mean number of clips of other strangers
_LOOKALIKE_COSINE = 0.75
_POSE_RANK = 8
_CLIPS_PER_IDENTITY = {"train": 5.76, "val": 4.55, "test": 4.55}
_DISTRACTOR_RATE = 0.375
_NEAR_RATE = 0.1  # share of strangers who look like an identity
_LOOKALIKE_RATE = 0.15  # share of identities who look like another identity
_UNRECOGNISABLE_RATE = 0.065  # share of labelled clips that do not show the person
_WRONG_FRAME_RATE = 0.025
_CHUNK_CLIPS = 256
_MAX_FRAMES = 300
_BOX_SCALE = {"face": 1.0, "head": 1.5, "body": 2.2}


class _Modality(NamedTuple):
    """The properties of a modality that do not depend on the size of the dataset."""

    every: int  # n if every n-th frame has a feature, 0 if a clip has a single feature
    blank_rate: float  # share of clips in which the modality has no information about the person
    missing_rate: float  # share of clips without the modality
    resembles: bool  # True if look-alikes have similar features, and some clips are harder


_MODALITIES = {
    "face": _Modality(1, 0.0, 0.02, True),
    "head": _Modality(2, 0.1, 0.02, True),
    "body": _Modality(3, 1 / 3, 0.05, False),
    "audio": _Modality(0, 0.5, 0.15, False),
    "scene": _Modality(0, 0.0, 0.0, False),
}


class Size(NamedTuple):
    """The size and the difficulty of a dataset."""

    identities: int  # number of known people
    mean_frames: float  # mean number of frames per clip
    dims: Mapping[str, int]  # modality -> feature width
    # The difficulty: modality -> median distance of a clip from the unit vector of its person.
    spread: Mapping[str, float]


# The small dataset has short clips and narrow features, so that a first run takes under a minute.
SIZES = {
    "small": Size(
        100,
        12.0,
        {"face": 128, "head": 128, "body": 96, "audio": 96, "scene": 256},
        {"face": 0.65, "head": 1.25, "body": 2.8, "audio": 1.45, "scene": 0.4},
    ),
    "standard": Size(
        1000,
        29.5,
        {"face": 512, "head": 512, "body": 512, "audio": 512, "scene": 2048},
        {"face": 0.75, "head": 1.25, "body": 2.4, "audio": 1.2, "scene": 0.4},
    ),
}


class SyntheticOptions(NamedTuple):
    """Options that change the difficulty of the dataset.

    An option changes only the property that it describes. All other random values stay the same. If
    `train_distractors` changes, the whole train split changes.

    Attributes:
      wrong_clips: share of clips in which a third of the frames show another person. These frames
        are consecutive. If they include the first frame, the voice and the scene differ, too. The
        iQIYI-VID paper allows several people in up to 70 % of the frames (section 3.2).
      blur: how strongly the noise of a frame depends on its quality. The noise is proportional to
        exp(blur (78 - quality) / 50).
      label_noise: share of labelled train clips with the label of another person. The iQIYI-VID
        paper reports at most 0.002 (section 3.4).
      train_distractors: share of train clips that show a stranger. In iQIYI-VID, the share is 0 in
        train, and 0.375 in val.
      missing_rate: share of clips from which the face is removed. Heads, bodies and voices are
        removed at the same rate, independently of each other. Before the removal, a share of 0.02
        of the clips has no face, 0.02 no head, 0.05 no body, and 0.15 no voice.
      false_modality: share of clips in which the face or the voice (with equal probability) belongs
        to another person. The causes in real clips are a tracker that follows the wrong face, and a
        voice-over (iQIYI-VID paper, sections 1, 6.4).
    """

    wrong_clips: float = 0.15
    blur: float = 1.0
    label_noise: float = 0.0
    train_distractors: float = 0.0
    missing_rate: float = 0.0
    false_modality: float = 0.0


CALIBRATED = SyntheticOptions()
LARGEST = SyntheticOptions(1.0, 4.0, 1.0, 0.9, 1.0, 1.0)  # upper limits; all lower limits are 0


def write(
    out_dir: str | Path, *, size: str, seed: int = 0, options: SyntheticOptions = CALIBRATED
) -> None:
    """Writes the synthetic dataset to a folder, as files in the layout of iQIYI-VID.

    Each modality of each split is a pickle, such as `head_val.pickle`. The ground truth is in
    `train_gt.txt`, `val_gt.txt` and `test_gt.txt`. Equal arguments give equal bytes on the same
    machine with the same version of numpy.

    Args:
      out_dir: the folder. It must be empty or missing.
      size: 'small' or 'standard'.
      seed: the random seed, 0 or more.
    """
    check_choice("size", size, SIZES)
    if seed < 0:
        raise UserError(f"seed={seed} is negative: choose 0 or more")
    for name, value in options._asdict().items():
        if not 0 <= value <= (largest := getattr(LARGEST, name)):
            raise UserError(f"config.data.{name}={value} is out of range: choose 0 to {largest:g}")
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"'{out_dir}' exists and is not an empty folder: name a new folder")
    # Files are moved when all are complete, so that an interrupted call leaves no files.
    with files.scratch_folder(out_dir / ".partial") as partial:
        world = _World(SIZES[size], np.random.default_rng([seed, 0]))
        for index, split in enumerate(_CLIPS_PER_IDENTITY):
            _write_split(partial, _Clips(world, split, [seed, 1 + index], options), split)
        for path in sorted(partial.iterdir()):
            path.rename(out_dir / path.name)


def _write_split(folder: Path, clips: "_Clips", split: str) -> None:
    starts = range(0, len(clips.names), _CHUNK_CLIPS)
    chunks = [np.arange(len(clips.names))[start : start + _CHUNK_CLIPS] for start in starts]
    frames = [clips.frames(rows) for rows in chunks]
    for modality in _MODALITIES:
        content = {}
        for rows, drawn in zip(chunks, frames, strict=True):
            names = clips.names[rows[0] : rows[-1] + 1]
            content.update(drawn.pop(modality).entries(modality, names))
        version = "_v2" if modality == "face" and split != "test" else ""
        with (folder / f"{modality}_{split}{version}.pickle").open("wb") as file:
            pickle.dump(content, file, protocol=4)
    _write_ground_truth(folder / f"{split}_gt.txt", clips, inverted=split != "train")


def _write_ground_truth(path: Path, clips: "_Clips", *, inverted: bool) -> None:
    by_identity: dict[int, list[str]] = {c: [] for c in range(1, clips.labels.max() + 1)}
    for name, label in sorted(zip(clips.names, clips.truth.tolist(), strict=True)):
        if label:
            by_identity[label].append(f"{name}.mp4")
    if inverted:
        lines = [f"{label} {' '.join(names)}" for label, names in by_identity.items()]
    else:
        lines = [f"{name} {label}" for label, names in by_identity.items() for name in names]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="ascii", newline="\n")


class _FlatFrames(NamedTuple):
    """The F frames of n clips in a modality, clip by clip."""

    present: np.ndarray  # [n] bool, False for clips whose frames are not written to the pickle
    lengths: np.ndarray  # [n] int, number of frames of each clip
    number: np.ndarray  # [F] int, number of the frame in the video
    box: np.ndarray  # [F, 4] float64, x1, y1, x2, y2 in pixels
    detection: np.ndarray  # [F] float64, detection score of the frame
    quality: np.ndarray  # [F] float64, quality score of the frame
    features: np.ndarray  # [F, D] float16 or float32

    def entries(self, modality: str, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yields the name and the frames of each clip, as in the pickles of iQIYI-VID."""
        columns = [list(map(str, self.number.tolist()))]
        columns += [x.tolist() for x in (self.box, self.detection, self.quality)]
        columns = columns[: {"face": 4, "head": 3}.get(modality, 2)]
        start = 0
        for name, length, present in zip(names, self.lengths.tolist(), self.present, strict=True):
            rows = slice(start, start + length * present)
            start += length
            features = list(self.features[rows])
            if modality == "audio" and present:
                yield name, features[0]
            elif modality == "scene" and present:
                yield name, list(enumerate(features))
            elif present or modality == "face":  # official face files list clips without a face
                fields = zip(*(column[rows] for column in columns), features, strict=True)
                yield name, list(map(list, fields))


class _World:
    """The people and TV programmes that all splits share, with their vectors in each modality."""

    def __init__(self, size: Size, rng: np.random.Generator) -> None:
        self.size = size
        count = size.identities
        num_alike = round(count * _LOOKALIKE_RATE / 2)
        pairs = rng.permutation(count)[: 2 * num_alike].reshape(2, num_alike)
        self.points, self.basis, self.pose, self.garbage = {}, {}, {}, {}
        for modality, kind in _MODALITIES.items():
            points = _draw_unit_points(rng, count if modality != "scene" else count // 2)
            if kind.resembles:
                points[pairs[1]] = _draw_resembling(rng, points[pairs[0]])
            dim = size.dims[modality]
            self.points[modality] = points
            self.basis[modality] = _draw_orthonormal(rng, RANK, dim)  # [R, D]
            self.pose[modality] = _draw_orthonormal(rng, _POSE_RANK, RANK)  # [P, R]
            self.garbage[modality] = _draw_unit_points(rng, 1, dim)  # [1, D]
        self.popularity = rng.lognormal(0.0, 0.85, count)
        self.popularity /= self.popularity.mean()
        # Each person appears in three programmes, and mostly in the first.
        self.programmes = rng.integers(0, count // 2, (count, 3))


class _Clips:
    """The clips of a split in random order, with the person, length and quality of each clip."""

    def __init__(
        self, world: _World, split: str, seeds: Sequence[int], options: SyntheticOptions
    ) -> None:
        self.world, self.options = world, options
        self.rng = rng = np.random.default_rng(seeds)
        count = world.size.identities
        per_identity = 1 + rng.poisson(world.popularity * (_CLIPS_PER_IDENTITY[split] - 1))
        num_labelled = int(per_identity.sum())
        labelled = np.repeat(np.arange(count), per_identity)
        strange = options.train_distractors if split == "train" else _DISTRACTOR_RATE
        num_strange = round(num_labelled * strange / (1 - strange))
        strangers = count + _draw_strangers(rng, num_strange)
        order = rng.permutation(num_labelled + num_strange)
        person = np.concatenate([labelled, strangers])[order]
        total = len(person)
        self.labels = np.where(person < count, person + 1, 0)
        self.names = [f"SYNTHETIC_{split.upper()}_{i:07d}" for i in 1 + rng.permutation(total)]

        # Numbers of people: first the identities, then strangers, then a passer-by for each clip.
        num_strangers = int(person.max()) + 1 - count if num_strange else 0
        passer_by = count + num_strangers + np.arange(total)
        near = np.flatnonzero(rng.random(num_strangers) < _NEAR_RATE)
        near_to = rng.integers(0, count, len(near))
        self.points = {}
        for modality, kind in _MODALITIES.items():
            if modality == "scene":
                continue
            others = _draw_unit_points(rng, num_strangers + total)
            if kind.resembles:
                others[near] = _draw_resembling(rng, world.points[modality][near_to])
            self.points[modality] = np.concatenate([world.points[modality], others])

        lost = (self.labels > 0) & (rng.random(total) < _UNRECOGNISABLE_RATE)
        self.person = np.where(lost, passer_by, person)
        self.passer_by = passer_by
        costar = rng.integers(0, count, total)
        self.other = np.where(rng.random(total) < 0.5, costar, passer_by)
        self.length = np.clip(
            np.rint(rng.gamma(1.5, world.size.mean_frames / 1.5, total)), 1, _MAX_FRAMES
        ).astype(np.int64)
        self.wrong_clip = rng.random(total) < options.wrong_clips
        self.quality = rng.normal(79.5, 21.0, total)
        self.hardness = rng.lognormal(0.0, 0.3, total)

        programme = rng.integers(0, count // 2, total)
        favourite = rng.choice(3, total, p=[0.7, 0.2, 0.1])
        known = self.person < count
        programme[known] = world.programmes[self.person[known], favourite[known]]
        self.programme = programme
        self.missing = {m: rng.random(total) < k.missing_rate for m, k in _MODALITIES.items()}
        self.blank = {m: rng.random(total) < k.blank_rate for m, k in _MODALITIES.items()}

        # These options have separate generators, so that they do not change other random values.
        generators = (np.random.default_rng([*seeds, number]) for number in (1, 2, 3))
        label_rng, missing_rng, false_rng = generators
        self.truth = self.labels
        if split == "train":
            wrong = (self.labels > 0) & (label_rng.random(total) < options.label_noise)
            step = label_rng.integers(1, count, total)  # never 0, so the label changes
            self.truth = np.where(wrong, 1 + (self.labels - 1 + step) % count, self.labels)
        # Every clip keeps its scene, so that every clip has a modality.
        rates = {m: options.missing_rate if m != "scene" else 0.0 for m in _MODALITIES}
        self.lost = {m: missing_rng.random(total) < rate for m, rate in rates.items()}
        is_false, of_face = false_rng.random((2, total)) < [[options.false_modality], [0.5]]
        self.false = {"face": is_false & of_face, "audio": is_false & ~of_face}

    def frames(self, rows: np.ndarray) -> dict[str, _FlatFrames]:
        """Draws the frames of the clips at the positions `rows` [n]. Returns modality -> frames."""
        rng = self.rng
        lengths = self.length[rows]
        clip = np.repeat(np.arange(len(rows)), lengths)  # [F]
        position = np.arange(len(clip)) - np.repeat(np.cumsum(lengths) - lengths, lengths)

        # In a clip of `wrong_clip`, a third of the frames, in a row, shows another person. In other
        # clips, a few frames do.
        run = np.rint(lengths / 3).astype(np.int64)
        first = rng.integers(0, lengths - run + 1)[clip]
        in_run = self.wrong_clip[rows][clip] & (position >= first) & (position < first + run[clip])
        stray = ~self.wrong_clip[rows][clip] & (rng.random(len(clip)) < _WRONG_FRAME_RATE)
        wrong = in_run | stray
        quality = self.quality[rows][clip] + rng.normal(0, 20.0, len(clip)) - 20.0 * wrong
        number = 1 + rng.integers(0, 20, len(rows))[clip] + _draw_frame_steps(rng, clip, position)
        width = 60 + 0.8 * np.clip(quality, 0, None) + rng.normal(0, 4, len(clip))
        centre = rng.uniform((300, 200), (980, 420), (len(rows), 2))[clip]
        centre += rng.normal(0, 6, centre.shape)

        # The frames of another person in a clip are a track of their own.
        track = clip + len(rows) * wrong
        result = {}
        for modality, kind in _MODALITIES.items():
            present = ~self.missing[modality][rows]
            keep = np.flatnonzero(present[clip] & (position % (kind.every or _MAX_FRAMES) == 0))
            if modality == "scene":
                keep = np.repeat(keep, rng.integers(1, 4, len(keep)))
            spread = self.world.size.spread[modality] * rng.lognormal(0, 0.3, 2 * len(rows))
            if kind.resembles:
                spread *= np.tile(self.hardness[rows], 2)
            clarity = quality[keep] if kind.every else np.full(len(keep), 78.0)
            detection = 1 - 0.01 * rng.exponential(1 + np.exp((40 - clarity) / 25))
            points = self._points_shown(modality, rows[clip[keep]], wrong[keep])
            result[modality] = _FlatFrames(
                present & ~self.lost[modality][rows],
                np.bincount(clip[keep], minlength=len(rows)),
                number[keep],
                _place_boxes(centre[keep], width[keep] * _BOX_SCALE.get(modality, 0)),
                np.clip(detection, 0.5, 0.9999),
                clarity,
                self._features(modality, points, spread, track[keep], position[keep], clarity),
            )
        return result

    def _points_shown(self, modality: str, rows: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        """Returns the vectors [F, RANK] of the people in F frames, or of scenes for "scene".

        `rows` [F] is the clip of each frame. `wrong` [F] is True if the frame shows another person
        than most frames of the clip.
        """
        if modality == "scene":
            return self.world.points["scene"][self.programme[rows]]
        person = np.where(self.blank[modality], self.passer_by, self.person)
        person = np.where(self.false.get(modality, False), self.other, person)[rows]
        if _MODALITIES[modality].every:
            person = np.where(wrong, self.other[rows], person)
        return self.points[modality][person]

    def _features(
        self,
        modality: str,
        points: np.ndarray,
        spread: np.ndarray,
        track: np.ndarray,
        position: np.ndarray,
        quality: np.ndarray,
    ) -> np.ndarray:
        """Draws the features [F, D] of F frames from `points` [F, RANK], see `_points_shown`.

        A track is the frames of one person in one clip. `track` [F] is the index of the track of
        each frame. `spread` is the distance of each track from the vector of the person.
        """
        rng, num_tracks, num_frames = self.rng, len(spread), len(track)
        pose = _draw_unit_points(rng, num_tracks, _POSE_RANK) @ self.world.pose[modality]
        shift = np.sqrt(0.5) * (pose + _draw_unit_points(rng, num_tracks))
        latent = points + (spread.astype(np.float32)[:, None] * shift)[track]  # [F, R]
        # A mean over frames reduces the noise of frames, but not this slow drift.
        phase = rng.uniform(0, 2 * np.pi, num_tracks)[track] + position / 15
        drift = _draw_unit_points(rng, 2 * num_tracks).reshape(2, num_tracks, RANK)
        for wave, direction in zip((np.cos(phase), np.sin(phase)), drift, strict=True):
            latent += (0.3 * wave).astype(np.float32)[:, None] * direction[track]
        blur = np.exp(self.options.blur * np.clip(78 - quality, -80, 110) / 50)
        blur = blur.astype(np.float32)[:, None]
        latent += 0.5 * blur * _draw_unit_points(rng, num_frames)
        features = latent @ self.world.basis[modality]  # [F, D]
        dim = features.shape[1]
        features += (0.5 / np.sqrt(dim)) * blur * rng.standard_normal(features.shape, np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        bad = (1 / (1 + np.exp((quality - 12) / 6))).astype(np.float32)[:, None]
        features += bad * (self.world.garbage[modality] - features)
        norm = np.clip(8 + 0.12 * quality, 3, None) * rng.lognormal(0, 0.03, num_frames)
        features *= (norm / np.linalg.norm(features, axis=1)).astype(np.float32)[:, None]
        return features.astype(np.float32 if modality == "scene" else np.float16)


def _draw_unit_points(rng: np.random.Generator, count: int, dim: int = RANK) -> np.ndarray:
    """Draws unit vectors [count, dim] float32 with uniformly distributed directions."""
    points = rng.standard_normal((count, dim), np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _draw_resembling(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """Draws a unit vector for each row of `points` [n, RANK]; its cosine to the row is ~ 0.75."""
    side = np.sqrt(1 - _LOOKALIKE_COSINE**2).astype(np.float32)
    mixed = np.float32(_LOOKALIKE_COSINE) * points + side * _draw_unit_points(rng, len(points))
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def _draw_orthonormal(rng: np.random.Generator, rank: int, dim: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((dim, rank)))[0].T.astype(np.float32)


def _draw_strangers(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draws which stranger each of `count` clips shows: [count] int, counted from 0."""
    singles = round(count * _SINGLETON_RATE)
    sizes, left = [1] * singles, count - singles
    while left > 0:
        sizes.append(min(2 + int(rng.poisson(_CLUSTER_SIZE - 2)), left))
        left -= sizes[-1]
    return np.repeat(np.arange(len(sizes)), sizes)


def _draw_frame_steps(
    rng: np.random.Generator, clip: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """Draws the video frame numbers of F frames, [F] int. The first frame of each clip has 0."""
    step = np.where(rng.random(len(clip)) < 0.02, 0, rng.integers(1, 8, len(clip)))
    total = np.cumsum(np.where(position == 0, 0, step))
    return total - total[position == 0][clip]


def _place_boxes(centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Returns boxes [F, 4] (x1, y1, x2, y2) around `centre` [F, 2], of height 1.3 `width` [F]."""
    half = np.stack([width / 2, width * 0.65], axis=1)
    return np.round(np.concatenate([centre - half, centre + half], axis=1), 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that writes the synthetic dataset, and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="python -m vidjax.data.synthetic",
        usage="%(prog)s OUT_DIR [--size=small|standard] [--seed=0] [--OPTION=VALUE]",
        description="Write the synthetic dataset in the layout of iQIYI-VID. configs/README.md "
        "explains each option as the field data.OPTION.",
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--seed", type=int, default=0)
    for name, value in CALIBRATED._asdict().items():
        parser.add_argument(f"--{name}", type=float, default=value)

    def command() -> int:
        args = vars(parser.parse_args(words))
        out_dir, size, seed = (args.pop(name) for name in ("out_dir", "size", "seed"))
        write(out_dir, size=size, seed=seed, options=SyntheticOptions(**args))
        return 0

    return exit_codes.run_to_exit_code(command, words)


if __name__ == "__main__":
    exit_codes.run_main(main)
