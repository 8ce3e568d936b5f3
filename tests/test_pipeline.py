"""Batches of training and evaluation: their clips, the order, and the frames of each clip."""

import collections
import functools
import itertools
import sys
import types
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.conftest import ROOT, run_here
from tests.helpers import clip_files
from tests.helpers.batches import eval_batches, rows_of, train_batches
from tests.helpers.clip_files import RAGGED, as_arrays, ragged_clips
from tests.helpers.datasets import load_dataset
from tests.helpers.seen import refused
from vidjax.core.batch import BATCHED, Frames
from vidjax.data import sources
from vidjax.data.memory import MemoryClips

COUNTS, MAX_FRAMES = {"train": 45, "val": 26}, 7
TRAIN = {"splits": ("train",), "modalities": ("face", "audio"), "max_frames": MAX_FRAMES,
         "crop": "window", "seed": 3, "batch_size": 8}  # fmt: skip
CLIPS = {split: ragged_clips(split, count) for split, count in COUNTS.items()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The clips of CLIPS, read from official files; val has no file of bodies."""
    folder = clip_files.write_ragged(
        tmp_path_factory.mktemp("source"), COUNTS, lacks=[("body", "val")]
    )
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        with pytest.warns(UserWarning, match="val: the split has no features of body"):
            return load_dataset("iqiyi_vid", directory=folder, cache_dir=folder / "cache")


def take_batches(dataset, count, **options):
    return list(itertools.islice(train_batches(dataset, **{**TRAIN, **options}), count))


def source_clip(dataset, split, modality, index):
    """Returns the frames that a batch must contain of a clip of CLIPS."""
    empty = clip_files.random_clip(np.random.default_rng(0), 0, RAGGED[modality])
    name = dataset.split(split).clips[index]
    return clip_files.as_read(modality, CLIPS[split][modality].get(name, empty))


def real_fields(frames):
    """Returns field -> values of the real frames of one clip; asserts that the other rows are 0."""
    length = int(frames.mask.sum())
    assert not any(values[length:].any() for values in frames)
    return {field: getattr(frames, field)[:length] for field in BATCHED}


@pytest.mark.filterwarnings("ignore:train, face. 1 of 10,883 frames have a quality")
def test_window_crop_keeps_short_clips_whole_and_cuts_long_clips():
    """A window is MAX_FRAMES neighbouring frames. Windows of a clip of 10 frames start anywhere."""
    own, starts_in_10_frames = sources.load({"train": as_arrays(CLIPS["train"])}), set()
    for batch in take_batches(own, 40):
        assert batch.frames["face"].features.shape == (8, MAX_FRAMES, 6)
        assert set(batch.frames) == {"face", "audio"}  # nothing else is read
        for row, modality in itertools.product(range(8), batch.frames):
            clip = source_clip(own, "train", modality, batch.clip_index[row])
            fields = real_fields(Frames(*(values[row] for values in batch.frames[modality])))
            length, total = len(fields["features"]), len(clip.features)
            assert length == min(total, MAX_FRAMES)
            # All fields of the clip must equal the window from one of its frames `starts` on.
            starts = range(total - length + 1)
            for field, values in fields.items():
                whole = getattr(clip, field)
                starts = [n for n in starts if np.array_equal(values, whole[n : n + length])]
            assert starts
            if modality == "face" and total == 10:
                starts_in_10_frames |= {*starts}
    assert starts_in_10_frames == {0, 1, 2, 3}  # of windows of 7 frames


@pytest.mark.parametrize(("split", "rows", "in_memory"), [
    ("train", 4, False), ("val", 64, False), ("val", 64, True),
])  # fmt: skip
def test_evaluation_batches_have_each_clip_once_with_best_frames(dataset, split, rows, in_memory):
    data = dataset
    if in_memory:
        data = MemoryClips.pack(as_arrays(CLIPS[split]), {"face": 6, "audio": 4}, ())
    batches = [*eval_batches(data, split=split, modalities=("face", "audio"), rows=rows)]
    assert all(batch.clip_index.shape == batch.batch_mask.shape == (rows,) for batch in batches)
    clips = rows_of(batches)
    for index, modality in itertools.product(clips, ("face", "audio")):
        clip = source_clip(dataset, split, modality, index)
        best = np.sort(np.argsort(-clip.quality, kind="stable")[:512])  # in time order
        for field, values in real_fields(clips[index][modality]).items():
            np.testing.assert_array_equal(values, getattr(clip, field)[best])
    # Clips of up to 32, up to 128 and more frames are padded or cut to 32, 128 and 512 frames.
    lengths = data.split(split).lengths["face"]
    padded = [len(clips[index]["face"].mask) for index in range(len(lengths))]
    assert padded == np.where(lengths <= 32, 32, np.where(lengths <= 128, 128, 512)).tolist()


def test_batch_streams_refuse_invalid_arguments(dataset):
    for changed, message in (
        ({"splits": ("test",)}, "no split 'test', only train, val\nchoose from train, val"),
        ({"modalities": ("scene",)}, "no features of 'scene'\n"),
        ({"splits": ("val",), "modalities": ("body",)}, "'val' has no features of 'body'"),
        ({"modalities": ("face", "face")}, "config.modalities=face,face: "),
        ({"modalities": ()}, "config.modalities=: give"),
        ({"splits": ()}, "config.data.train_splits=: give"),
    ):
        refused(functools.partial(take_batches, dataset, 1, **changed), message)


@pytest.mark.filterwarnings("ignore:train, face. 1 of 10,883 frames have a quality")
def test_streamed_bytes_are_the_frames_of_batches_in_memory(dataset, monkeypatch):
    """TensorFlow, whose import takes seconds, is replaced: a queue returns what it gets."""
    own = sources.load({"train": as_arrays(CLIPS["train"])})
    wanted = take_batches(own, 9)
    ours, official = (x.report["splits"]["train"]["sha256"] for x in (own, dataset))
    for field in ("names", "features"):
        assert ours[field] == official[field]
    fake, waiting = mock.MagicMock(), collections.deque()
    fake.errors.OpError, fake.queue.FIFOQueue.return_value.enqueue = KeyError, waiting.append
    monkeypatch.setattr("vidjax.data.dataset.require_packages", mock.Mock())
    package: Any = types.ModuleType("vidjax.data.tfds")
    package.__path__ = [str(ROOT / "vidjax/data/tfds")]
    pipeline = mock.Mock(as_numpy_iterator=lambda: iter(waiting.popleft, None))
    with mock.patch.dict(sys.modules, {"tensorflow": fake, "vidjax.data.tfds": package}):
        sys.modules.pop("vidjax.data.tfds.streaming", None)
        from vidjax.data.tfds import streaming

        monkeypatch.setattr(streaming, "_make_pipeline", lambda *_: pipeline)
        found: Any = take_batches(dataset, 9)
    fake.queue.FIFOQueue.return_value.close.assert_called_once_with()  # no reader is left
    for (clip_index, _, *strings), batch in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(clip_index, batch.clip_index)
        fields = [(x.mask, getattr(x, f)) for x in batch.frames.values() for f in BATCHED]
        for rows, (mask, values) in zip(strings, fields, strict=True):
            assert rows == [x[real].tobytes() for x, real in zip(values, mask, strict=True)]
