"""A gallery of a run gives the same answers as the run."""

import numpy as np
import pytest

import vidjax
from tests.helpers.made_galleries import random_clips
from tests.helpers.seen import refused
from vidjax.evaluation import predict
from vidjax.utils.errors import VidjaxWarning

pytestmark = pytest.mark.slow  # trains


@pytest.fixture(scope="module")
def run(trained, official_dir):
    """PLDA of the official files, with one fixed setting."""
    given = ["configs/plda.py:iqiyi_vid,face,audio", "--config.num_epochs=2"]
    given += ["--config.model.within=0.5", f"--config.data.dir={official_dir}"]
    return predict.restore(trained(*given), num_devices=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory, run, data):
    return vidjax.Gallery.create(tmp_path_factory.mktemp("galleries") / "g", run, data)


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
    ranked, wanted = made.rank(data, split="val"), run.rank(data, split="val")
    assert list(ranked) == list(wanted)
    for name, clips in wanted.items():
        assert dict(ranked[name]) == pytest.approx(dict(clips), abs=2e-3, rel=1e-3)


def test_a_clip_with_tiny_features_is_unknown_and_reported(made, run):
    """Devices compute in float32, in which the squares of these features are 0."""
    clips = random_clips(run, 1, 2)
    name = sorted(clips)[0]
    clips[name] = {part: x * np.float32(1e-25) for part, x in clips[name].items()}
    with pytest.warns(VidjaxWarning) as caught:
        answers = made.identify(clips)
    texts = [str(warning.message) for warning in caught]
    wanted = [f"{part}: 1 clip, such as {name}, have a vector that is 0" for part in run.modalities]
    assert [text[: len(words)] for text, words in zip(texts, wanted, strict=True)] == wanted
    assert answers[name].identity is None


def test_empty_gallery_has_strangers_and_accepts_new_people(tmp_path, run, data, made):
    gallery = vidjax.Gallery.create(tmp_path / "g", run, data, empty=True)
    clips = random_clips(run, 1, 2)
    assert gallery.identities == {}
    assert gallery.strangers == made.strangers  # as in a gallery with people
    of_train = vidjax.Gallery.create(tmp_path / "t", run, data, strangers="train").strangers
    assert made.strangers and not {*of_train} & {*made.strangers}
    for action in (gallery.identify, gallery.rank):
        refused(lambda action=action: action(clips), "nobody is enrolled")
    gallery.enrol(clips, people := {name: f"person of {name}" for name in clips})
    assert {name: answer.identity for name, answer in gallery.identify(clips).items()} == people


def test_people_with_photos_of_one_day_are_recognised_on_other_days(tmp_path, capsys):
    """4 photos of a person share 60 % of their noise. The run expects that new photos share it."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=(*shape, 64)).astype(np.float32)

    people, noise = draw(40), 0.6**0.5 * draw(40, 1) + 0.4**0.5 * draw(40, 4)
    photos = people[:, None] + 1.2 * noise
    train = {f"{p}_{n}": {"face": photos[p, n : n + 1]} for p in range(40) for n in range(4)}
    labels = {clip: f"person {clip.split('_')[0]}" for clip in train} | {"v": "person 0"}
    data = vidjax.load_data({"train": train, "val": {"v": {"face": photos[0, :2]}}}, labels=labels)
    words = ("--config.data.name=arrays", "--config.eval.report=False")
    vidjax.train(vidjax.load_config("plda:face", *words), tmp_path / "run", data)
    gallery = vidjax.Gallery.create(tmp_path / "g", tmp_path / "run", data)
    assert "as alike as photos of one day" in capsys.readouterr().err
    new = {f"{p}.{n}": {"face": people[p] + 1.2 * draw(1)} for p in range(40) for n in range(10)}
    answers = gallery.identify(new | {f"s{n}": {"face": draw(1)} for n in range(100)})
    right = sum(x.identity == f"person {clip.split('.')[0]}" for clip, x in answers.items())
    assert right > 120, "30 %, as with one photo of each person"
    assert sum(answer.identity is not None for answer in answers.values()) <= right + 20
