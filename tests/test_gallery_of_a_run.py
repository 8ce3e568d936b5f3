"""A gallery of a run gives the same answers as the run."""

import numpy as np
import pytest

import vidjax
from tests.helpers.made_galleries import random_clips
from tests.helpers.seen import refused
from vidjax.apps.gallery import backend as backend_lib
from vidjax.evaluation import predict
from vidjax.utils.errors import VidjaxWarning


@pytest.fixture(scope="module")
def run(trained, official_dir):
    """PLDA of the official files, with one fixed setting."""
    given = ["configs/plda.py:iqiyi_vid,face,audio", "--config.num_epochs=2"]
    given += ["--config.model.within=0.5", f"--config.data.dir={official_dir}"]
    return predict.restore(trained(*given), num_devices=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory, run, data):
    return vidjax.Gallery.create(tmp_path_factory.mktemp("galleries") / "g", run, data)


@pytest.mark.slow
def test_gallery_has_the_settings_and_clips_of_its_run_and_ranks_like_it(made, run, data):
    """At most 3 training clips lack a usable frame. All strangers are distractors of val."""
    assert made.backend.settings._asdict() == run.manifest["settings"] | {"within": 0.5}  # fixed
    labels, val = data.split("train").labels, data.split("val")
    assert {*made.identities} == {*data.identities}
    assert 0 <= np.sum(labels > 0) - sum(made.identities.values()) <= 3
    distractors = {c for c, label in zip(val.clips, val.labels, strict=True) if label == 0}
    assert {*made.strangers} <= distractors and len(made.strangers) > 3
    clips = random_clips(run, 1, 2, 3, 4)
    together = made.embed(clips)
    for name in together.names:  # a vector does not depend on the other clips
        np.testing.assert_equal(made.embed({name: clips[name]}), together.only([name]))
    # Devices compute in float32, in which the squares of these features are 0.
    tiny = {part: x * np.float32(1e-25) for part, x in clips.pop("clip 0").items()}
    with pytest.warns(VidjaxWarning) as caught:
        assert made.identify({**clips, "tiny": tiny})["tiny"].identity is None
    for warning, part in zip(caught, run.modalities, strict=True):
        assert f"{part}: 1 clip, such as tiny, have a vector that is 0" in str(warning.message)
    ranked, wanted = made.rank(data, split="val"), run.rank(data, split="val")
    assert list(ranked) == list(wanted)
    for name, clips in wanted.items():
        assert dict(ranked[name]) == pytest.approx(dict(clips), abs=2e-3, rel=1e-3)


def test_empty_gallery_has_strangers_and_accepts_new_people(tmp_path, nearest_run, data):
    run = predict.restore_run(nearest_run, num_devices=1)
    made, gallery = (
        vidjax.Gallery.create(tmp_path / f"{x}", run, data, empty=x) for x in (False, True)
    )
    clips = random_clips(run, 1, 2)
    assert gallery.identities == {} != made.identities
    assert gallery.strangers == made.strangers  # as in a gallery with people
    of_train = vidjax.Gallery.create(tmp_path / "t", run, data, strangers="train").strangers
    assert made.strangers and not {*of_train} & {*made.strangers}
    for action in (gallery.identify, gallery.rank):
        refused(lambda action=action: action(clips), "nobody is enrolled")
    gallery.enrol(clips, people := {name: f"person of {name}" for name in clips})
    assert {name: answer.identity for name, answer in gallery.identify(clips).items()} == people


@pytest.mark.slow
def test_gallery_is_fitted_again_if_clips_are_as_alike_as_photos_of_one_day(
    tmp_path, run, data, made, monkeypatch, capsys
):
    monkeypatch.setattr(backend_lib, "MOST_SHARED", -1.0)  # as if they were
    gallery = vidjax.Gallery.create(tmp_path / "g", run, data)
    assert "as alike as photos of one day" in capsys.readouterr().err
    assert gallery.origin.refitted and gallery.backend.settings != made.backend.settings
    again = vidjax.Gallery(gallery.folder, run=run.workdir)
    assert again.identify(data, split="val") == gallery.identify(data, split="val")
