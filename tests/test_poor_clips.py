"""Poor clips: the share of the training clips that a threshold catches."""

import jax
import numpy as np
import pytest

from tests.helpers.batches import real_frames
from tests.helpers.made_frames import make_frames, pad
from tests.helpers.small_runs import run, shrunk
from vidjax.core import fusion
from vidjax.core.batch import LazyFeatures
from vidjax.models import fallback
from vidjax.runs import checkpoint
from vidjax.training import plan as plan_lib
from vidjax.training.api import restore

SPEC = "configs/deepmef.py:iqiyi_vid,face,audio"
SHARE = "--config.model.threshold_share=0.2"
mean_measure = jax.jit(fusion.mean_measure, static_argnums=1)


def measures(data, split, measure="norm"):
    """Clip by clip in float64: the mean norm or quality of the raw faces; NaN without a face."""
    found = np.full(len(data.split(split).clips), np.nan)
    for clip, frames in real_frames(data, split):
        norms = np.linalg.norm(frames.features.astype(np.float64), axis=-1)
        if len(norms):
            found[clip] = (frames.quality if measure == "quality" else norms).mean()
    return found


def threshold(config, data):
    return (plan_lib.make_plan(config, data).task.settings or {}).get("threshold")


@pytest.mark.parametrize("measure", ["norm", "quality"])
def test_the_measure_is_that_of_a_loop(measure):
    frames = make_frames([5, 3, 0, 1], max_frames=5)
    frames.quality[0, 2] = np.nan
    norms = np.linalg.norm(frames.features.astype(np.float64), axis=-1)
    values = np.nan_to_num(frames.quality) if measure == "quality" else norms
    expected = [
        sum(row[mask]) / max(sum(mask), 1) for row, mask in zip(values, frames.mask, strict=True)
    ]
    found = np.asarray(mean_measure(frames, measure))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(mean_measure(pad(frames, 3), measure), found)
    rows = np.arange(20, dtype=np.int32).reshape(4, 5)
    lazy = LazyFeatures(frames.features.reshape(20, -1), rows)
    np.testing.assert_array_equal(mean_measure(frames._replace(features=lazy), measure), found)


def test_at_most_the_share_lies_below():
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for share in (0.01, 0.07, 0.1, 0.999):
        threshold = fallback.quantile(values, share)
        assert np.sum(values < threshold) == np.floor(share * 100 + 1e-9)
        assert fallback.quantile(np.ones(100, np.float32), share) == 1  # none of equals is poor


@pytest.mark.parametrize("measure", ["norm", "quality"])
def test_the_threshold_is_a_quantile_of_the_raw_training_clips(data, measure):
    """The measure uses all features, although each member of `views` sees only a part."""
    words = (SHARE, f"--config.model.measure={measure}", "--config.ensemble.views=3")
    both = "--config.data.train_splits=train,val"
    for splits, config in {
        ("train",): shrunk(*words, spec=SPEC),
        ("train", "val"): shrunk(*words, both, spec=f"{SPEC},trainval"),
    }.items():
        values = np.concatenate([measures(data, split, measure) for split in splits])
        values = np.sort(values[~np.isnan(values)])
        wanted = values[int(0.2 * len(values))]
        assert threshold(config, data) == pytest.approx(wanted, rel=1e-6)


def test_models_without_a_share_have_no_threshold(data):
    absolute, share = "--config.model.threshold=2.5", "--config.model.threshold_share=0"
    for config in (shrunk(), shrunk(absolute, share, spec=SPEC)):
        assert threshold(config, data) is None
    with pytest.raises(ValueError, match="set one of them to 0"):
        threshold(shrunk(absolute, spec=SPEC), data)


@pytest.mark.slow
def test_streaming_resident_and_a_restored_run_agree(data, tmp_path):
    config = shrunk(SHARE, "--config.num_epochs=1", spec=SPEC)
    run(config, tmp_path, data)
    manifests = checkpoint.manifests(tmp_path)
    found = manifests[max(manifests)]["settings"]["threshold"]
    for mode in ("resident", "streaming"):
        config.data.mode = mode
        assert found == threshold(config, data)
    assert getattr(restore(tmp_path).system.model, "threshold", None) == found
