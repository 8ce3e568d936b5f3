"""Resident clips, which stay in the memory of devices, give the same batches as streamed clips."""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from tests.helpers import small_runs as small
from tests.helpers.batches import assert_equal, eval_batches, rows_of, train_batches
from tests.helpers.cases import nightly_after_first, quick_first
from tests.helpers.clip_files import RAGGED, as_arrays, ragged_clips, random_clip, write_ragged
from tests.helpers.datasets import load_dataset
from tests.helpers.seen import refused
from vidjax.core import devices as devices_lib, fusion
from vidjax.core.batch import LazyFeatures, Packed
from vidjax.data import order as order_lib, resident, sources
from vidjax.data.clips import BatchPlan, longest, make_batch_plan
from vidjax.models.build_system import TaskSpec, make_system
from vidjax.runs import config_io
from vidjax.runs.checkpoint import manifests
from vidjax.training import feed, placement

MODALITIES = ("face", "audio", "body")


def test_shuffles_are_uniform_and_differ_between_epochs_and_seeds():
    """Chi-squared tests of the places of clips, and of pairs of neighbours."""
    n, epochs = 12, 3000

    def orders_of(seed, first_epoch):
        """Returns the clip at each place of each epoch, [epochs, n]."""
        plan = BatchPlan(("train",), n, n, {"face": 1}, "quality", {}, seed)
        return order_lib.draw_clips(plan, first_epoch, epochs).clip_index.reshape(epochs, n)

    orders = orders_of(seed=0, first_epoch=0)
    np.testing.assert_array_equal(np.sort(orders), [np.arange(n)] * epochs)

    # Every clip is equally often at every place, with (n - 1)^2 degrees of freedom. The usual
    # statistic is multiplied by (n - 1) / n, because a clip has exactly one place in each epoch.
    counts = np.stack([np.bincount(place, minlength=n) for place in orders.T])
    statistic = np.sum((counts - epochs / n) ** 2) / (epochs / n) * (n - 1) / n
    assert stats.chi2.sf(statistic, (n - 1) ** 2) > 1e-3

    # Every pair of different clips is equally often at two neighbouring places.
    for left, right in itertools.pairwise(orders.T):
        pairs = np.bincount(n * left + right, minlength=n**2).reshape(n, n)[~np.eye(n, dtype=bool)]
        assert stats.chisquare(pairs, np.full(pairs.size, epochs / pairs.size)).pvalue > 1e-4

    # Other epochs and seeds have other orders. The order depends only on the seed and the epoch.
    assert (orders_of(seed=1, first_epoch=0) != orders).any()
    assert len(np.unique(orders, axis=0)) > 2990  # of 3000 epochs
    np.testing.assert_array_equal(orders[20:], orders_of(seed=0, first_epoch=20)[:-20])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 16, 50])
@pytest.mark.parametrize("chosen", [None, np.array([8, 3, 5, 0, 6, 1, 9])])
def test_drawn_clips_equal_a_plain_loop_over_epochs(chosen, batch_size):
    """Batches span epochs, except if the clips are chosen: then the last batch has empty rows."""
    lengths = {"face": np.array([3, 9, 0, 40, 8, 7, 1, 16, 12, 7]), "body": np.arange(10)}
    num_clips = len(lengths["face"]) if chosen is None else len(chosen)
    padded = {"face": 7, "audio": 1, "body": 4}
    plan = BatchPlan(("train",), batch_size, num_clips, padded, "window", lengths, 5, chosen)
    rows = []
    for epoch in range(60):
        rng = np.random.Generator(np.random.Philox(key=[5, epoch]))
        order = rng.permutation(num_clips)
        uniform = rng.random((2, plan.num_places))
        for place in range(plan.num_places):
            clip = order[place] if place < num_clips else -1
            clip = clip if chosen is None else chosen[clip]
            firsts = [
                int(number[place] * (max(0, lengths[name][clip] - padded[name]) + 1))
                for name, number in zip(lengths, uniform, strict=True)
            ]
            rows.append([clip, place < num_clips, *firsts])
    for step, count in ((0, 1), (0, 5), (3, 4), (7, 1)):
        drawn = order_lib.draw_clips(plan, step, count)
        assert [x.dtype for x in jax.tree.leaves(drawn)] == [np.int32, bool, np.int32, np.int32]
        found = np.stack([*drawn[:2], *(drawn.first[name] for name in lengths)], axis=1)
        wanted = np.array(rows[step * batch_size : (step + count) * batch_size])
        np.testing.assert_array_equal(found, wanted)
        padding = np.zeros(((6 - count) * batch_size, len(wanted[0])), int)
        stacked = jax.tree.leaves(order_lib.draw_steps(plan, step, count, 6))
        wanted = np.concatenate([wanted, padding]).reshape(6, batch_size, -1)
        np.testing.assert_array_equal(np.stack(stacked, axis=-1), wanted[..., [0, 1, 3, 2]])


COUNTS = {"train": 33, "val": 20, "test": 6}


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Clips of 0 to 10,000 frames. In a few clips, frames have equal qualities."""
    folder = write_ragged(tmp_path_factory.mktemp("ragged"), COUNTS)
    return load_dataset("iqiyi_vid", directory=folder, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def in_memory(ragged):
    """The same clips as `ragged`, from arrays in memory. Splits of any dataset have digests."""
    data = sources.load({x: as_arrays(ragged_clips(x, count)) for x, count in COUNTS.items()})
    for split in COUNTS:
        first, second = (x.report["splits"][split]["sha256"] for x in (data, ragged))
        assert first["features"] == second["features"] and first["names"] == second["names"]
    return data


def clips_of(data, modalities=MODALITIES, devices=1, splits=("train",), **changed):
    """Returns the train and val splits as Resident, their layout, and a plan of training."""
    options: Any = {"batch_size": 8, "max_frames": 7, "crop": "window", "seed": 3, **changed}
    plan = make_batch_plan([data.split(name) for name in splits], modalities, **options)
    layout = resident.make_resident_plan(data, plan, ["val"])
    return resident.Resident(data, layout, devices_lib.make_mesh(devices)), layout, plan


@pytest.mark.slow
@nightly_after_first("split, devices", [("val", 8), ("train", 1)])
def test_resident_evaluation_batches_equal_streaming_batches(ragged, in_memory, split, devices):
    (clips, *_), count = clips_of(ragged, devices=devices), COUNTS[split]
    assert clips.split(split) is ragged.split(split) and clips.identities == ragged.identities

    only = np.random.default_rng(0).random(count) < 0.4  # scores only these clips
    lengths = np.maximum(longest(ragged.split(split), MODALITIES), 40)  # more padding than needed
    for names, chosen, number in (
        (("face",), {"only": only}, only.sum()), (("face",), {"only": np.zeros_like(only)}, 0),
        (("body", "audio"), {"lengths": lengths}, count),
    ):  # fmt: skip
        arguments = {"split": split, "rows": 2 * devices, "modalities": names, **chosen}
        wanted = rows_of(eval_batches(ragged, **arguments))
        for data in (clips, in_memory):
            assert_equal(rows_of(eval_batches(data, **arguments)), wanted)
        assert len(wanted) == number


# 29 of the 33 clips of train.
CHOSEN = np.sort(np.random.default_rng(1).permutation(33)[:29]).astype(np.int32)


@pytest.mark.slow
@nightly_after_first("crop, splits, modalities, first_step, epoch_clips", [
    ("quality", ("val", "train"), ("body", "face"), 3, CHOSEN),
    ("window", ("train",), MODALITIES, 0, None),
])  # fmt: skip
def test_resident_training_batches_equal_streaming_batches(
    ragged, in_memory, crop, splits, modalities, first_step, epoch_clips
):
    """The steps cover three epochs of chosen clips or of all clips."""
    options = {"splits": splits, "crop": crop, "epoch_clips": epoch_clips}
    clips, _, plan = clips_of(ragged, modalities, batch_size=12, **options)

    num_steps = 3 * plan.num_places // plan.batch_size
    drawn = jax.device_put(order_lib.draw_steps(plan, first_step, num_steps, num_steps))

    @jax.jit
    def gather(number):
        batch = resident.gather_batch(clips.train, drawn, number, plan.padded_lengths)
        frames = {k: x._replace(features=fusion.read(x.features)) for k, x in batch.frames.items()}
        return batch._replace(frames=frames)

    # TensorFlow makes the batches of clips on the disk, and numpy the batches of clips in memory.
    streams = [data.train_batches(plan, step=first_step) for data in (ragged, in_memory)]
    for number in range(num_steps):
        resident_batch = gather(np.int32(number))
        for stream in streams:
            jax.tree.map(np.testing.assert_array_equal, next(stream), resident_batch)


FILTERS = {"min_quality": 70.0, "min_detection": 0.85, "top_share": 0.7}
FUSIONS: list[dict[str, Any]] = [
    {"name": "mean", "weighting": "graded", **FILTERS},
    {"name": "random", "num_draws": 3, "sampling": "quality", "weighting": "quality", **FILTERS},
    {"name": "random", "num_draws": 2, "replacement": False, "weighting": "mixup"},
    {"name": "sample", "num_frames": 5, **FILTERS},
    {"name": "top", "num_frames": 5, **FILTERS},
    # The other fusions have their defaults.
    *({"name": name} for name in fusion.FUSIONS if name not in ("mean", "random", "sample", "top")),
]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    "spec", quick_first(FUSIONS, mark=pytest.mark.nightly), ids=lambda spec: spec["name"]
)
def test_fusion_of_lazy_features_equals_fusion_of_arrays(spec):
    """Lazy features are read from the resident clips only for the frames that a fusion chooses."""
    lengths = np.array((9, 0, 3, 1, 5, 16), np.int32)
    frames = random_clip(np.random.default_rng(0), lengths.sum() + 1, 5)
    for field in frames[:4]:
        field[-1] = 0  # the last frame is the empty frame of padding
    starts = np.cumsum(lengths, dtype=np.int32) - lengths
    packed = jax.device_put(Packed(*frames[:4], starts, lengths))
    is_clip = np.arange(6) < 5  # the last row stays empty
    lazy = resident.gather_frames(packed, np.arange(6), batch_mask=is_clip, size=12)
    assert isinstance(lazy.features, LazyFeatures) and lazy.features.shape == (6, 12, 5)
    plain = lazy._replace(features=fusion.read(lazy.features))

    @jax.jit
    def fuse(value):
        fused = fusion.make_fusion(spec)(jax.random.key(4), value)
        return fused._replace(features=fusion.read(fused.features))

    assert_equal(fuse(lazy), fuse(plain))


@pytest.mark.slow
@nightly_after_first("mode", ["resident", "streaming"])
def test_non_finite_steps_are_skipped_and_too_many_end_the_run(data, tmp_path, mode):
    """A NaN in a face makes the step of the clip non-finite. Three such steps in turn end a run."""
    words = ("--config.batch_size=8", "--config.num_epochs=1", f"--config.data.mode={mode}")
    spec = "configs/quality_fusion.py:iqiyi_vid"
    config = small.shrunk(*words, "--config.log_every_steps=20", spec=spec)
    options = {"batch_size": 96, "max_frames": 8, "crop": "window", "seed": 0}
    epoch = next(train_batches(data, splits=("train",), modalities=("face",), **options))
    steps = epoch.clip_index.reshape(12, 8).tolist()  # 12 steps of 8 clips, in both modes
    has_face = data.split("train").lengths["face"] > 0
    # In each of the steps 6, 7 and 8, the first clip with a face.
    sixth, seventh, eighth = (next(c for c in step if has_face[c]) for step in steps[5:8])

    def with_nan(*clips):
        hidden = {"train": np.isin(np.arange(96), clips), "val": np.zeros(60, bool)}
        return small.Spoilt(data, hidden, np.nan)

    # A warning comes with a line of the log. After step 5, step 10 is the next step with a line.
    with pytest.warns(UserWarning, match="up to step 10, 1 step had no effect"):
        small.run(config, tmp_path / "one", with_nan(sixth))
    assert all(np.isfinite(value).all() for value in small.weights(tmp_path / "one").values())

    three = with_nan(sixth, seventh, eighth)
    message = "not finite at step 8 and", "config.optim.learning_rate"
    refused(lambda: small.run(config, tmp_path / "three", three), *message)
    assert not manifests(tmp_path / "three")


@pytest.mark.slow
def test_number_of_clips_drawn_at_once_changes_no_weight(data, tmp_path, monkeypatch):
    """A call of the compiled loop takes at most three steps, or 2 ** 18 / 8."""
    config, counts = small.shrunk("--config.batch_size=8", "--config.num_epochs=3"), []

    def draw(plan, step, count, size, draw=order_lib.draw_steps):
        counts.append((count, size))
        return draw(plan, step, count, size)

    monkeypatch.setattr(order_lib, "draw_steps", draw)
    small.run(config, tmp_path / "many", data)
    assert {size for _, size in counts} == {1 << 15} and max(counts)[0] > 3
    counts.clear()
    monkeypatch.setattr(feed, "DRAWN_CLIPS", 31)
    small.run(config, tmp_path / "three", data)
    assert {size for _, size in counts} == {3} and max(counts)[0] == 3
    assert_equal(*(small.weights(tmp_path / name) for name in ("many", "three")))


@pytest.mark.slow
def test_layout_predicts_the_bytes_of_resident_clips(ragged):
    """A clip of more than 512 frames is stored twice: whole, and its best 512 for evaluation."""
    clips, layout, _ = clips_of(ragged)
    # Each modality also has an empty frame for padding. Features are float16, of 2 bytes.
    empty_frames = sum(2 * width + resident.SCALAR_BYTES for width in RAGGED.values())
    fields = ("features", "quality", "detection", "number")
    taken = [getattr(x, field).nbytes for x in clips.train.values() for field in fields]
    assert sum(taken) == layout.nbytes + empty_frames


def test_auto_mode_is_resident_if_clips_fit_in_memory_and_frames_in_int32(data, monkeypatch):
    """Clips may take half of the free memory that a training step leaves."""
    (_, layout, _), mesh = clips_of(data, ("face", "audio")), devices_lib.make_mesh(1)
    twice = 2.0 * layout.nbytes
    for free, taken_by_step, wanted in (
        (twice, 0, "resident"), (0.995 * twice, 0, "streaming"),
        (twice + 1000, 1000, "resident"), (twice + 1000, 1001, "streaming"),
    ):  # fmt: skip
        monkeypatch.setattr(resident, "find_least_free_bytes", lambda mesh, free=free: free)
        chosen = resident.choose_mode("auto", layout, mesh, taken=taken_by_step)
        assert chosen == wanted
        for mode in ("resident", "streaming"):
            assert resident.choose_mode(mode, layout, mesh) == mode

    monkeypatch.setattr(resident, "find_least_free_bytes", lambda mesh: float("inf"))
    huge = layout._replace(num_frames={**layout.num_frames, "face": 2**31})
    assert resident.choose_mode("auto", huge, mesh) == "streaming"
    with pytest.raises(ValueError, match="too many for an int32"):
        resident.choose_mode("resident", huge, mesh)


def test_members_train_together_as_far_as_the_memory_allows(data, monkeypatch):
    """Clips come first. A resumed run keeps its groups if they fit."""
    (_, layout, plan), mesh = clips_of(data, ("face", "audio")), devices_lib.make_mesh(1)
    config = config_io.load_file("configs/noise_classes.py").to_dict()
    task = TaskSpec(dict(layout.widths), 12, 3, plan.num_clips, 10, True)
    system = make_system(config, task)
    state: Any = SimpleNamespace(
        labels=np.zeros((8, plan.num_clips)), params={"w": np.zeros((8, 5))}
    )
    plan = plan._replace(batch_size=1 << 16)
    step = functools.partial(placement.estimate_step_bytes, system, plan, 5.0 * 8, mesh)

    def choose(free, before=None, mode="auto"):
        monkeypatch.setattr(resident, "find_least_free_bytes", lambda mesh: free)
        return placement.choose_placement(mode, layout, system, plan, state, mesh, before)

    assert choose(step(8) + 2 * layout.nbytes) == ("resident", 1)  # members of a CPU train in turn
    monkeypatch.setattr(devices_lib, "is_cpu", lambda mesh: False)
    for size in (1, 2, 4, 8):
        assert choose(step(size) + 2 * layout.nbytes) == ("resident", size)
    assert choose(step(4) + 2 * layout.nbytes, before=2).group_size == 2
    assert choose(step(4) + 2 * layout.nbytes, before=8).group_size == 4
    assert choose(step(1) + layout.nbytes) == ("streaming", 1)
    assert choose(0.0) == ("streaming", 1)  # an error of the device would be clearer than ours


def test_uploading_clips_in_chunks_changes_no_value(data, monkeypatch):
    """A chunk contains 4 frames of faces, so a longer clip is in several chunks."""
    whole, *_ = clips_of(data, ("face", "audio"))
    monkeypatch.setattr(resident, "CHUNK_BYTES", 4 * 48)  # a face has 24 float16
    chunked, *_ = clips_of(data, ("face", "audio"))
    jax.tree.map(np.testing.assert_array_equal, chunked.train, whole.train)
