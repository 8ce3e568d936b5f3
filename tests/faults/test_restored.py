"""Clips that do not fit a restored run, and numbers of clips at the edges (row 40)."""

import resource
import shutil

import numpy as np
import pytest

import vidjax
from vidjax.runs import checkpoint
from vidjax.utils import files

pytestmark = pytest.mark.slow  # it trains first
WIDTH = 24


@pytest.fixture(scope="module")
def run(trained):
    folder = trained("configs/mma.py:iqiyi_vid", "--config.modalities=face")
    return vidjax.restore(folder, num_devices=1)


def faces(count):
    rng = np.random.default_rng(0)
    return {
        f"clip_{i}": {"face": rng.normal(size=(1 + i % 5, WIDTH)).astype(np.float32)}
        for i in range(count)
    }


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((2, WIDTH - 1)), f"clip bad, face: .* {WIDTH - 1} wide, .* {WIDTH}"),
        (np.zeros((2, WIDTH), np.int64), "clip bad, face: .*int64"),
        ([[0.0] * WIDTH, [0.0]], "clip bad, face: .*rows of different lengths"),
        (None, "no clips"),
    ],
)
def test_restored_run_refuses_no_clips_or_clips_of_wrong_width_or_type(run, features, message):
    for function in (run.scores, run.rank, run.embed):
        with pytest.raises(ValueError, match=message):
            function({} if features is None else {"bad": {"face": features}})


def test_scores_do_not_depend_on_the_number_of_clips_in_a_call(run):
    clips = faces(37)
    scores, vectors = run.scores(clips), run.embed(clips)
    assert scores.shape == (37, len(run.identities)) and np.isfinite(scores).all()
    for count in (1, 2, 15, 16, 17):  # blocks hold 16 clips
        last_clips = dict(list(clips.items())[-count:])
        np.testing.assert_array_equal(run.scores(last_clips), scores[-count:])
        np.testing.assert_array_equal(run.embed(last_clips), vectors[-count:])
        assert all(len(ranked) == count for ranked in run.rank(last_clips).values())


def test_absurd_size_in_a_manifest_is_refused_without_allocation(run, tmp_path):
    folder = shutil.copytree(run.workdir, tmp_path / "theirs")
    for step, manifest in checkpoint.manifests(folder).items():
        changed = {**manifest, "num_identities": 2**31 - 1}
        files.write_manifest(folder / "checkpoints" / str(step) / "manifest.json", changed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(checkpoint.CheckpointError, match="2,147,48"):
        vidjax.restore(folder, num_devices=1).scores(faces(2))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KB
