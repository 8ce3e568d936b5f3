"""Ensembles. Axes: E members, N or B clips, K identities."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vidjax
from tests.helpers import small_runs
from tests.helpers.batches import assert_equal
from tests.helpers.seen import refused
from tests.helpers.small_runs import evaluate, training_sets, weights
from vidjax.core import devices, ensemble
from vidjax.evaluation import eval_step, predict
from vidjax.models.build_system import TaskSpec, make_model
from vidjax.runs import checkpoint, config as config_lib, config_io, members_file
from vidjax.runs.run_folder import RunFolder
from vidjax.training import plan as plan_lib, public
from vidjax.utils import files

COPIES = ("identities.json", "members.npz")
add_scores = jax.jit(eval_step.add_scores)  # operation by operation it takes seconds
FOLDS = (
    "--config.ensemble.folds=3", "--config.num_epochs=1", "--config.data.train_splits=train,val",
    "--config.eval.report=False", "--config.optim.name=sgd", "--config.optim.learning_rate=0.05",
)  # fmt: skip


def make_members(**options):
    return ensemble.make_members(config_lib.default().ensemble.to_dict() | options)


def test_members_are_the_product_of_folds_seeds_views_and_qualities():
    assert make_members() == (ensemble.Member(),)
    members = make_members(folds=2, seeds=2)
    assert [(member.fold, member.number) for member in members] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert make_members(folds=2, seeds=2, only=(3, 1)) == (members[3], members[1])
    views = make_members(views=2, min_quality=(-1e9, 20))
    pairs = {(member.view, member.min_quality) for member in views}
    assert pairs == {(0, -1e9), (0, 20), (1, -1e9), (1, 20)}


@pytest.mark.parametrize(("change", "message"), [
    ({"folds": 1}, "folds=1"), ({"views": 17}, "at most config.ensemble.chunks=16"),
    ({"folds": 2, "bootstraps": 2}, "exclude"), ({"only": (1,)}, "choose from 0 to 0"),
    ({"folds": 3, "only": (1, 1)}, "name each member once"),
    ({"views": 3}, "no modality has 16 or more features"),  # from make_model: a face has 8
], ids=str)  # fmt: skip
def test_impossible_ensemble_specifications_are_refused(change, message):
    config = config_lib.default()
    config.ensemble.update(change)
    task = TaskSpec({"face": 8}, 12, None, num_clips=20, total_steps=1, train_other=True)
    with pytest.raises(ValueError, match=message):
        make_members(**change)
        make_model(config.to_dict(), task)


def test_training_sets_match_clips_by_name_and_survive_saving(tmp_path):
    """Members score the clips that they were not trained on. Both were trained on clip c."""
    trained = np.array([[True, False, True], [False, True, True]])
    members = make_members(folds=2, min_quality=(20.0,))
    sets = ensemble.TrainingSets(members, ("a", "ünï-§", "c"), trained)
    scoring, in_sample = ensemble.choose_scoring_members(sets, ("c", "new", "ünï-§", "a"))
    assert not in_sample  # True needs members that were all trained on all three clips
    np.testing.assert_array_equal(scoring, [[0, 1, 1, 0], [0, 1, 0, 1]])  # [members, clips]
    lists = members_file.make_lists(("Ä", "b"), sets)
    assert lists != members_file.make_lists(("Ä", "b"), sets._replace(trained=~trained))
    checkpoint.save(tmp_path, 1, {"params": jnp.ones(2), **lists}, {})
    loaded = training_sets(tmp_path)
    assert (loaded.members, loaded.clips) == (members, sets.clips)
    np.testing.assert_array_equal(loaded.trained, trained, strict=True)


def test_run_is_restored_from_its_checkpoint_and_not_from_copies(nearest_run, data, tmp_path):
    """The next evaluation repairs `identities.json`, because its results refer to the file."""
    folder, wanted = shutil.copytree(nearest_run, tmp_path / "run"), restored(nearest_run)
    wide = dataclasses.replace(wanted, modalities={"face": 24, "audio": 8})
    clips = {name: {"face": np.ones((1, 24), np.float32)} for name in "abcdefghi"}
    for method in (wide.embed, wide.scores):
        with pytest.warns(UserWarning, match="0 % have audio"):
            method(clips)
    for content in (None, b'["a", 3]'):
        for name in COPIES:
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        run = restored(folder)
        assert (run.identities, run.digest) == (wanted.identities, wanted.digest)
    (folder / "ranking.txt").unlink()
    evaluate(RunFolder(folder).config, folder, data)
    for name in ("ranking.txt", "identities.json"):
        assert (folder / name).read_bytes() == (nearest_run / name).read_bytes()
    for name in ("map", "top1"):
        assert RunFolder(folder).metrics()[name] == RunFolder(nearest_run).metrics()[name] > 0
    assert '"saved": true' in (nearest_run / "timing.jsonl").read_text()


def test_a_run_that_was_killed_before_its_end_is_completed(nearest_run, data, tmp_path):
    folder = RunFolder(shutil.copytree(nearest_run, tmp_path / "run"))
    before = folder.metrics()
    for finished in (True, False):
        folder.write_metrics({**before, "finished": finished})
        results, was_finished = public.train_run(folder.config, folder, data)
        assert was_finished == finished and results["map"] == before["map"]
    assert RunFolder(folder.path).metrics()["finished"]


def restored(folder):
    return predict.restore_run(folder, num_devices=1)


def test_run_of_an_earlier_version_is_refused_in_two_lines(nearest_run, data, tmp_path):
    folder = shutil.copytree(nearest_run, tmp_path / "run")
    small_runs.make_earlier(folder)
    (folder / "metrics.json").unlink()
    for use in (restored, lambda x: public.train_run(RunFolder(x).config, RunFolder(x), data)):
        with pytest.raises(
            checkpoint.CheckpointError, match="an earlier version of vidjax wrote"
        ) as caught:
            use(folder)
        assert str(caught.value).splitlines()[1:] == ["train the run again, in a new folder"]


def test_gallery_whose_run_cannot_be_read_names_the_commands_for_a_new_one(
    nearest_run, data, tmp_path
):
    run = shutil.copytree(nearest_run, tmp_path / "run")
    gallery = vidjax.Gallery.create(tmp_path / "gallery", run, data)
    for step, manifest in checkpoint.manifests(run).items():
        manifest["arrays"] = {f"{name}['old']": kind for name, kind in manifest["arrays"].items()}
        files.write_manifest(run / "checkpoints" / str(step) / "manifest.json", manifest)
    refused(
        lambda: vidjax.Gallery(gallery.folder).identify({"a": {"face": np.ones((1, 24))}}),
        "gallery create NEW --run=FOLDER --empty", "gallery enrol NEW --input=FEATURES",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [
    ("identities", ["a", 3]), ("members", {"members": [], "clips": ["a"], "trained": []}),
    ("members", {"members": [[0, -1, -1, 0, 0.0]], "clips": [], "trained": [""]}),
    ("members", {"members": [[0, -1, -1, 0, 0.0]], "clips": ["a"], "trained": ["?"]}),
    ("members", {"members": [[0] * 5] * 2, "clips": ["a"], "trained": ["gA==", "gIA="]}),
    ("members", {"members": [["a"]], "clips": ["a"], "trained": ["gA=="]}), ("members", None),
], ids=str)  # fmt: skip
def test_lists_of_a_stranger_that_do_not_fit_each_other_are_refused(tmp_path, name, value):
    sets = ensemble.TrainingSets((ensemble.Member(),), ("a",), np.ones((1, 1), bool))
    items = {"params": jnp.ones(2), **members_file.make_lists(["b"], sets), name: value}
    checkpoint.save(tmp_path, 1, items, {})
    with pytest.raises(checkpoint.CheckpointError, match=f"{tmp_path}") as caught:
        training_sets(tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def add_up(members, weights, *, logs):
    """Returns the running total of scores [E, B, K] with weights [E, B]."""
    total = eval_step.make_no_scores(jnp.zeros(np.shape(members)[1:]), logs=logs)
    for member, weight in zip(members, weights, strict=True):
        total = add_scores(total, np.float32(member), np.float32(weight))
    return total


@pytest.mark.parametrize("logs", [True, False])
def test_member_scores_are_averaged_and_log_scores_as_probabilities(logs):
    """The mean of a clip is over the members that score it. Without such a member, it is -inf."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 6, 5)) * 30 - 40  # [E, B, K]
    scores = np.minimum(scores, 0) if logs else scores
    has_score = rng.random((4, 6)) < 0.6  # [E, B]
    has_score[:, 0] = False  # no member scores clip 0
    has_score[:, 1] = True  # all members score clip 1
    means = np.asarray(eval_step.mean_scores(add_up(scores, has_score, logs=logs)))
    assert (means[0] == -np.inf).all()
    for clip in range(1, 6):
        given = scores[has_score[:, clip], clip]
        wanted = np.log(np.exp(given).mean(axis=0)) if logs else given.mean(axis=0)
        np.testing.assert_allclose(means[clip], wanted, rtol=1e-5)


def test_means_and_sums_of_log_probabilities_keep_their_precision():
    # Probabilities near 1 of two members for six clips: log p is -(1 - p).
    complements = np.array([[1e-9, 1e-30] * 3, [3e-9, 3e-30] * 3])  # 1 - p
    total = add_up(np.repeat(-complements[..., None], 5, axis=2), np.ones((2, 6)), logs=True)
    means = eval_step.mean_scores(total)[:, 0]
    np.testing.assert_allclose(means, -complements.mean(axis=0), rtol=1e-5)
    # Weighted sums of two equal scores. The weights add up to 2 or 0.75.
    p = np.array([1e-6, 0.3, 0.5, 0.7, 0.9, 1 - 1e-6])
    for weight in (1.0, 0.375):
        logs = np.log([np.repeat(p[:, None], 5, axis=1)] * 2)
        total = add_up(logs, np.full((2, 6), weight), logs=True)
        sums = np.asarray(eval_step.sum_scores(total), np.float64)[:, 0]
        np.testing.assert_allclose(sums, np.log(2 * weight * p), rtol=1e-6, atol=1e-6)


def train(folder, data, *words):
    """Trains three members on train and val; each leaves out a fold. Returns the metrics."""
    config = small_runs.shrunk(*FOLDS, *words, spec="configs/quality_fusion.py:iqiyi_vid")
    return small_runs.run(config, folder, data)


@pytest.fixture(scope="module")
def ensemble_run(data, tmp_path_factory):
    """The folder and the metrics of a run of three members."""
    folder = tmp_path_factory.mktemp("members")
    return folder, train(folder, data)


def member_of(folder, number):
    """Returns the weights of one member of a run."""
    return jax.tree.map(lambda value: value[number], weights(folder))


@pytest.mark.slow
def test_a_member_equals_a_separate_run_bit_for_bit(data, ensemble_run, tmp_path):
    folder, of_all = ensemble_run
    of_one = train(tmp_path, data, "--config.ensemble.only=1")
    assert_equal(member_of(tmp_path, 0), member_of(folder, 1))
    assert of_all["members"][1]["map"] == of_one["map"]
    # One member scores only the fold that it leaves out, for 12 identities; three score all clips.
    assert of_one["map_kind"] == of_all["map_kind"] == "out_of_fold"
    assert of_one["num_clips"] < of_all["num_clips"] == len(data.split("val").clips)
    assert (tmp_path / "ranking.txt").read_text().count(".mp4") == 12 * of_one["num_clips"]


@pytest.mark.slow
def test_vmap_over_members_agrees_with_separate_steps(data, ensemble_run, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "is_cpu", lambda mesh: False)  # as on a GPU
    train(tmp_path, data)
    (manifest,) = checkpoint.manifests(tmp_path).values()
    assert manifest["group_size"] == 3
    separate, mapped = weights(ensemble_run[0]), weights(tmp_path)
    for name in separate:
        if "params" in name:  # not the running statistics
            np.testing.assert_allclose(mapped[name], separate[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_members_do_not_depend_on_clips_they_leave_out(data, ensemble_run, tmp_path, monkeypatch):
    """The features and labels of the clips that member 1 leaves out are spoilt."""
    plain, _ = ensemble_run
    left_out = ~training_sets(plain).trained[1]
    rows = {"train": slice(0, 96), "val": slice(96, 156)}  # the clips of each split

    class Relabelled(small_runs.Spoilt):
        def split(self, name):
            split = data.split(name)
            wrong = np.full_like(split.positives, 99)  # not the true numbers of clips
            # 12 identities: a wrong label is the next identity.
            spoilt = left_out[rows[name]] if name in rows else False
            labels = np.where(spoilt, split.labels % 12 + 1, split.labels)
            return dataclasses.replace(split, labels=labels.astype(np.int32), positives=wrong)

    # The folds depend on the labels, so the folds of the original labels are used.
    labels = np.concatenate([data.split(name).labels for name in rows])
    folds = ensemble.assign_folds(labels, 3, config_lib.default().seed)
    monkeypatch.setattr(ensemble, "assign_folds", lambda *args: folds)
    train(tmp_path, Relabelled(data, {name: left_out[at] for name, at in rows.items()}))
    assert_equal(member_of(plain, 1), member_of(tmp_path, 1))
    with pytest.raises(AssertionError):  # other members were trained on these clips
        assert_equal(member_of(plain, 0), member_of(tmp_path, 0))


def test_bootstrap_samples_lose_no_identity_but_samples_of_all_clips_do():
    """A draw of n from n clips lacks a clip with probability (1 - 1/n)^n, near exp(-1)."""
    # So a draw from all clips lacks all n clips of an identity with a probability near exp(-n).
    labels = np.repeat(np.arange(60), np.arange(60) % 3 + 1)  # one, two or three clips each
    draw = functools.partial(ensemble.draw_bootstrap, labels, seed=0)
    of_identities = np.stack([draw(n, resample="identity") for n in range(400)])
    of_all = np.stack([draw(n, resample="all") for n in range(400)])
    assert (of_all.sum(axis=1) == len(labels)).all()
    for n in (1, 2, 3):
        # Identities n - 1, n + 2, n + 5 and so on have n clips.
        masks = [labels == identity for identity in range(n - 1, 60, 3)]
        assert all((of_identities[:, clips].sum(axis=1) == n).all() for clips in masks)
        left_out = np.mean([of_identities[:, clips] == 0 for clips in masks])
        assert left_out == pytest.approx((1 - 1 / n) ** n, abs=0.02)
        lost = np.mean([of_all[:, clips].sum(axis=1) == 0 for clips in masks])  # all n clips
        assert lost == pytest.approx(np.exp(-n), abs=0.02)
    members = make_members(bootstraps=2)
    uses = ensemble.count_clip_uses(members, labels, folds=0, seed=0, resample="all")
    np.testing.assert_array_equal(uses, of_all[:2])


def test_each_of_five_folds_has_a_fifth_of_the_clips_of_every_label(data):
    config = config_io.load_file("quality_fusion:iqiyi_vid,trainval,few")
    left_out = ~plan_lib.make_plan(config, data).training_sets.trained  # [5, N]
    np.testing.assert_array_equal(left_out.sum(axis=0), 1)
    truth = np.concatenate([data.split(name).labels for name in ("train", "val")])
    for some in (truth >= 0, *(truth == label for label in range(13))):  # all, and each label
        assert np.ptp(left_out[:, some].sum(axis=1)) <= 1
