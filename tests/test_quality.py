"""The quality of a user's features is given, or the length of a vector; all readers agree."""

from typing import Any

import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, small_runs
from tests.helpers.batches import real_frames
from tests.helpers.embeddings import unit
from vidjax.data import memory, sources

DIM = 5


def qualities(source, modality="face"):
    """Returns the qualities of the frames of each clip, as a model would get them."""
    return [frames.quality for _, frames in sorted(real_frames(source, "val", modality))]


def test_all_readers_compute_the_quality_that_the_setting_asks_for(tmp_path):
    """Records in the cache of one setting are not used for the other setting."""
    rng, given = np.random.default_rng(0), [9.0, 7.0, 8.0]
    bare, rated = (rng.normal(0, 4, (3, DIM)).astype(np.float16) for _ in range(2))
    voice = rng.normal(size=DIM).astype(np.float32)
    rated_face = {"features": rated, "quality": np.array(given)}
    clips = {"a": {"face": bare, "voice": voice}, "b": {"face": rated_face}}
    a, b = (np.linalg.norm(frames.astype(float), axis=1) for frames in (bare, rated))
    widths, cache = {"face": DIM, "voice": DIM}, tmp_path / "cache"
    folder = clip_files.write_npz(tmp_path / "own", {"val": clips})
    # Clip a has no qualities, so its qualities are the norms with both settings.
    wanted: Any = {"given": [a, given], "norm": [a, b]}
    for quality, of_clips in wanted.items():
        own = vidjax.load_data({"val": clips}, cache_dir=cache, quality=quality)
        for reader in (
            own,
            vidjax.load_data(folder, cache_dir=cache, quality=quality),
            memory.MemoryClips.pack(clips, widths, identities=(), quality=quality),
            memory.load_clips(folder, widths, identities=(), quality=quality),
        ):
            np.testing.assert_allclose(qualities(reader), of_clips, rtol=1e-6)
        of_voice, _ = qualities(own, "voice")  # clip b has no voice
        np.testing.assert_allclose(of_voice, [np.linalg.norm(voice.astype(float))])


@pytest.mark.slow
def test_run_scores_new_clips_with_its_configured_quality(tmp_path):
    """The norm of a feature replaces the quality that new clips give.

    Nearest neighbours compare quality-weighted means, so a wrong quality would change the scores.
    """
    splits, labels = {}, {}
    for split, clips, truth in clip_files.learnable_clips():
        splits[split], labels = clip_files.as_arrays(clips), labels | truth
    data = vidjax.load_data(splits, labels, cache_dir=tmp_path, quality="norm")
    words = ("--config.data.name=arrays", "--config.data.quality=norm", "--config.num_epochs=1")
    small_runs.run(small_runs.shrunk(*words, spec="configs/knn.py:face"), tmp_path / "run", data)
    run = vidjax.restore(tmp_path / "run", num_devices=1)
    wanted = run.scores(data, split="val")  # `load_data` has replaced the given quality
    np.testing.assert_allclose(run.scores(splits["val"]), wanted, rtol=1e-6)
    folder = clip_files.write_npz(tmp_path / "own", {"val": splits["val"]})
    np.testing.assert_allclose(run.scores(run.load(folder / "val")), wanted, rtol=1e-6)


def test_unit_length_features_without_quality_warn_once(tmp_path):
    """The lengths of unit vectors are no quality, which matters for clips of several frames."""
    x = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float32)
    units = unit(x)

    def load(*clips):
        splits = {"val": {f"c{number}": clip for number, clip in enumerate(clips)}}
        sources.load(splits, cache_dir=tmp_path)

    with pytest.warns(UserWarning, match=r"(?s)^face:.*face_quality") as caught:
        load({"face": units.astype(np.float16), "head": x})
    assert len(caught) == 1
    # Tests turn other warnings into errors.
    load({"face": x})  # not of unit length
    load({"face": {"features": units, "quality": [1.0, 2.0, 3.0, 4.0]}})
    load({"face": units[:1]}, {"face": units[1]})  # clips of one frame
