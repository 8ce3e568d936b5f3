"""Resident clips, which stay in the memory of devices, give the same batches as streamed clips."""

from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from tests.conftest import run_here
from tests.helpers import small_runs as small
from tests.helpers.batches import assert_equal, eval_batches, real_frames, rows_of, train_batches
from tests.helpers.cases import nightly_after_first, quick_first
from tests.helpers.clip_files import RAGGED, as_arrays, ragged_clips, random_clip, write_ragged
from tests.helpers.datasets import load_dataset
from tests.helpers.seen import refused
from vidjax.core import devices as devices_lib, fusion
from vidjax.core.batch import LazyFeatures, Packed
from vidjax.data import resident, sources
from vidjax.data.clips import BatchPlan, draw_clips, make_batch_plan
from vidjax.runs.checkpoint import manifests
from vidjax.training import placement

SPEC = "configs/quality_fusion.py:iqiyi_vid"
MODALITIES = ("face", "audio", "body")
COUNTS = {"train": 33, "val": 20, "test": 6}
CHOSEN = np.sort(np.random.default_rng(1).permutation(33)[:29]).astype(np.int32)  # of train


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
        order, uniform = rng.permutation(num_clips), rng.random((2, plan.num_places))
        for place in range(plan.num_places):
            clip = order[place] if place < num_clips else -1
            clip = clip if chosen is None else chosen[clip]
            spare = [max(0, lengths[name][clip] - padded[name]) + 1 for name in lengths]
            rows.append([clip, place < num_clips, *(uniform[:, place] * spare).astype(int)])
    for step, count in ((0, 1), (0, 5), (3, 4), (7, 1)):
        drawn = draw_clips(plan, step, count)
        assert [x.dtype for x in jax.tree.leaves(drawn)] == [np.int32, bool, np.int32, np.int32]
        found = np.stack([*drawn[:2], *(drawn.first[name] for name in lengths)], axis=1)
        wanted = np.array(rows[step * batch_size : (step + count) * batch_size])
        np.testing.assert_array_equal(found, wanted)
        stacked = jax.tree.leaves(resident.draw_steps(plan, step, count))
        stacked = np.stack(stacked, axis=-1)[..., [0, 1, 3, 2]]
        assert stacked.shape == (resident.DRAWN_CLIPS // batch_size, batch_size, 4)
        np.testing.assert_array_equal(stacked[:count].reshape(wanted.shape), wanted)
        assert not stacked[count:].any()


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Clips of 0 to 10,000 frames. In a few clips, frames have equal qualities."""
    folder = write_ragged(tmp_path_factory.mktemp("ragged"), COUNTS)
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
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
    for names, chosen, number in (
        (("face",), {"only": only}, only.sum()), (("face",), {"only": np.zeros_like(only)}, 0),
        (("body", "audio"), {}, count),
    ):  # fmt: skip
        arguments = {"split": split, "rows": 2 * devices, "modalities": names, **chosen}
        wanted = rows_of(eval_batches(ragged, **arguments))
        for data in (clips, in_memory):
            assert_equal(rows_of(eval_batches(data, **arguments)), wanted)
        assert len(wanted) == number


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
    drawn = jax.device_put(resident.draw_steps(plan, first_step, num_steps))

    @jax.jit
    def gather(number):
        rows = jax.tree.map(lambda rows: rows[number], drawn)
        batch = resident.gather_batch(clips.train, *rows, sizes=plan.padded_lengths.items())
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

    @jax.jit
    def fuse(value):
        fused = fusion.make_fusion(spec)(jax.random.key(4), value)
        return fused._replace(features=fusion.read(fused.features))

    assert_equal(fuse(lazy), fuse(lazy._replace(features=fusion.read(lazy.features))))


@pytest.mark.slow
@nightly_after_first("mode", ["resident", "streaming"])
def test_non_finite_steps_are_skipped_and_too_many_end_the_run(data, tmp_path, mode):
    """A NaN in a face makes the step of the clip non-finite. Three such steps in turn end a run."""
    words = ("--config.batch_size=8", "--config.num_epochs=1", f"--config.data.mode={mode}")
    config = small.shrunk(*words, "--config.log_every_steps=20", spec=SPEC)
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
    words = "--config.batch_size=8", "--config.num_epochs=1"
    config, draw = small.shrunk(*words, spec=SPEC), mock.Mock(wraps=resident.draw_steps)
    monkeypatch.setattr(resident, "draw_steps", draw)
    for name, drawn_clips in (("many", 1 << 18), ("three", 31)):
        monkeypatch.setattr(resident, "DRAWN_CLIPS", drawn_clips)
        draw.reset_mock()
        small.run(config, tmp_path / name, data)
        most = max(count for _, _, count in (call.args for call in draw.call_args_list))
        assert most == 3 if name == "three" else most > 3
    small.assert_equal_weights(tmp_path / "many", tmp_path / "three")


@pytest.mark.slow
def test_layout_predicts_the_bytes_of_resident_clips(ragged):
    """A clip of more than 512 frames is stored twice: whole, and its best 512 for evaluation."""
    clips, layout, _ = clips_of(ragged)
    # Each modality also has an empty frame for padding. Features are float16, of 2 bytes.
    empty_frames = sum(2 * width + resident.SCALAR_BYTES for width in RAGGED.values())
    taken = [array.nbytes for x in clips.train.values() for array in x[:4]]  # without starts
    assert sum(taken) == layout.nbytes + empty_frames


@pytest.fixture
def choose(data, monkeypatch):
    """Returns a function that chooses a mode and a number of members, with given free bytes.

    A step of n members needs 1000 n bytes, and 100 more if clips are streamed.
    """
    (_, layout, _), mesh = clips_of(data, ("face", "audio")), devices_lib.make_mesh(1)
    measured: list[tuple[str, int]] = []

    def measure(mode, size):
        measured.append((mode, size))
        return 1000 * size + 100 * (mode == "streaming")

    def choose(free, mode="auto", sizes=(1,), **changed):
        monkeypatch.setattr(resident, "find_least_free_bytes", lambda mesh: free)
        measured.clear()
        return placement.choose_placement(mode, layout._replace(**changed), mesh, sizes, measure)

    return SimpleNamespace(placement=choose, measured=measured, nbytes=layout.nbytes)


def test_auto_mode_is_resident_if_clips_fit_in_memory_and_frames_in_int32(choose):
    """Clips may take half of the free memory that a training step leaves."""
    twice = 2 * choose.nbytes
    for free, wanted, measured in (
        (twice + 1000, "resident", ["resident", "resident"]),
        (twice + 999, "streaming", ["resident", "resident", "resident", "streaming"]),
        (twice - 1, "streaming", ["streaming"]),  # no program of resident steps is compiled
    ):
        assert choose.placement(free) == (wanted, 1)
        assert {mode for mode, _ in choose.measured} == {*measured}
        for mode in ("resident", "streaming"):
            assert choose.placement(free, mode) == (mode, 1) and choose.measured == [(mode, 1)]
    huge = {"num_frames": {"face": 2**31 - 1}}
    assert choose.placement(float("inf"), **huge) == ("streaming", 1)
    with pytest.raises(ValueError, match="too many for an int32"):
        choose.placement(float("inf"), "resident", **huge)


def test_members_train_together_as_far_as_the_memory_allows(choose):
    """Clips come first. Members get the rest, also of memory that clips may not take."""
    nbytes, sizes = choose.nbytes, (8, 4, 2, 1)
    assert nbytes > 8000
    for size in sizes:
        below = max(1, size // 2)
        for free, mode, wanted in (
            (1000 * size + 2 * nbytes, "auto", ("resident", 8)),
            (1000 * size + nbytes, "resident", ("resident", size)),
            (1000 * size + nbytes - 1, "resident", ("resident", below)),
            (1000 * size + 100, "streaming", ("streaming", size)),
            (1000 * size + 99, "streaming", ("streaming", below)),
        ):
            assert choose.placement(free, mode, sizes) == wanted, (size, mode)
    # A step of a single member leaves enough room for clips, and a step of all members does not.
    assert choose.placement(1000 + 2 * nbytes, sizes=sizes) == ("resident", 8)
    assert choose.measured[-1] == ("resident", 1)
    assert choose.placement(999 + 2 * nbytes, sizes=sizes) == ("streaming", 8)
    assert choose.placement(2000 + nbytes, "resident", (2, 8, 4, 1))[1] == 2
    assert choose.placement(0.0, sizes=sizes) == ("streaming", 1)  # the device raises an error


@pytest.mark.slow
def test_program_whose_memory_was_compared_is_the_one_run(data, tmp_path, monkeypatch, request):
    """A second program is compiled only if clips fit, but not together with a step."""
    compiled = Counter[str]()

    def count(event: str, duration_secs: float, **facts: str | int) -> None:
        compiled[f"{event} {facts.get('fun_name')}"] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(count))
    words = "--config.ensemble.seeds=2", "--config.eval.split=val", "--config.modalities=face"
    sizes: Any = {"batch_size": 32, "max_frames": 64, "crop": "window", "seed": 0}
    plan = make_batch_plan([data.split("train")], ("face",), **sizes)
    twice = 2.0 * resident.make_resident_plan(data, plan, ["val"]).nbytes
    for name, epochs, on_cpu, free, mode, group_size, num_compiled in (
        ("auto", 1, True, np.inf, "resident", 1, 1),
        ("auto", 2, False, np.inf, "resident", 1, 1),  # as in the first epoch
        ("accelerator", 1, False, np.inf, "resident", 2, 1),
        ("tight", 1, True, twice, "streaming", 1, 2),
    ):
        monkeypatch.setattr(devices_lib, "is_cpu", lambda mesh, on_cpu=on_cpu: on_cpu)
        monkeypatch.setattr(resident, "find_least_free_bytes", lambda mesh, free=free: free)
        compiled.clear()
        more = f"--config.num_epochs={epochs}"
        small.run(small.shrunk(*words, more, spec=SPEC), tmp_path / name, data)
        manifest = max(manifests(tmp_path / name).items())[1]
        num_loops = compiled["/jax/core/compile/backend_compile_duration jit(loop)"]
        found = manifest["mode"], manifest["group_size"], num_loops
        assert found == (mode, group_size, num_compiled), name


def test_best_frames_of_a_clip_are_stored_in_time_order(data):
    clips, *_ = clips_of(data, ("face",), crop="quality", max_frames=2)
    stored = jax.tree.map(np.asarray, clips.train["face"])
    lengths = data.split("train").lengths["face"]
    np.testing.assert_array_equal(stored.length, np.minimum(lengths, 2))
    assert np.sum(lengths > 2) > 9
    for clip, frames in real_frames(data, "train"):
        best = np.sort(np.argsort(-frames.quality, kind="stable")[:2])
        rows = slice(stored.start[clip], stored.start[clip] + len(best))
        for found, wanted in zip(stored[:4], frames[:4], strict=True):
            np.testing.assert_array_equal(found[rows], wanted[best])


def test_uploading_clips_in_chunks_changes_no_value(data, monkeypatch):
    """A chunk contains 4 frames of faces, so a longer clip is in several chunks."""
    whole, *_ = clips_of(data, ("face", "audio"))
    monkeypatch.setattr(resident, "CHUNK_BYTES", 4 * 48)  # a face has 24 float16
    chunked, *_ = clips_of(data, ("face", "audio"))
    jax.tree.map(np.testing.assert_array_equal, chunked.train, whole.train)
