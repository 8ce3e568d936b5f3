"""The axis E: who trains on what, members against separate runs, honest scores."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.small_runs import ROOT, Spoilt, restored, run, shrunk, weights
from vidjax.core import devices, ensemble
from vidjax.data.clips import EvalPlan, split_blocks
from vidjax.evaluation import eval_step, scoring
from vidjax.models.system import TaskSpec, make_model
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.training import plan as plan_lib

SPEC = config_lib.default().ensemble.to_dict()


def test_members_are_the_product_of_what_varies():
    spec = {**SPEC, "folds": 5, "seeds": 5}
    everyone = ensemble.make_members(spec)
    assert len(everyone) == len(set(everyone)) == 25
    assert [member.fold for member in everyone] == [fold for fold in range(5) for _ in range(5)]
    assert [member.number for member in everyone] == list(range(25))
    assert ensemble.make_members({**spec, "only": (7, 3)}) == (everyone[7], everyone[3])
    views = ensemble.make_members({**SPEC, "views": 11, "min_quality": (-1e9, 20, 40)})
    assert {(m.view, m.min_quality) for m in views} == set(
        itertools.product(range(11), (-1e9, 20.0, 40.0))
    )
    assert ensemble.make_members(SPEC) == (ensemble.Member(),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 1}, "folds=1"),
        ({"views": 17}, "at most config.ensemble.chunks=16"),
        ({"folds": 2, "bootstraps": 2}, "exclude"),
        ({"only": (1,)}, "only=1: choose from 0 to 0"),
        ({"folds": 3, "only": (1, 1)}, "name each member once"),
        ({"views": 3}, "no modality has 16 or more features"),
    ],
)
def test_specifications_that_make_no_sense(change, message):
    config = config_lib.default()
    config.ensemble.update(change)
    with pytest.raises(ValueError, match=message):
        ensemble.make_members(config.ensemble.to_dict())
        make_model(config.to_dict(), TaskSpec({"face": 8}, 12, None, 20, 1, train_other=True))


def test_folds_split_every_identity_evenly():
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(40), rng.integers(1, 9, 40)), np.zeros(33, int)])
    labels = rng.permutation(labels)
    folds = ensemble.assign_folds(labels, 5, seed=3)
    for rows in [np.arange(len(labels)), *(np.flatnonzero(labels == c) for c in range(40))]:
        counts = np.bincount(folds[rows], minlength=5)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(folds, ensemble.assign_folds(labels, 5, seed=3))
    assert (folds != ensemble.assign_folds(labels, 5, seed=4)).any()


def test_held_out_goes_by_name():
    trained = np.array([[True, False, True], [False, True, True]])
    members = (ensemble.Member(), ensemble.Member(1))
    training_sets = ensemble.TrainingSets(members, ("a", "b", "c"), trained)
    found, in_sample = ensemble.choose_scoring_members(training_sets, ("c", "new", "b", "a"))
    assert not in_sample
    np.testing.assert_array_equal(found, [[0, 1, 1, 0], [0, 1, 0, 1]])


def test_membership_survives_the_disk(tmp_path):
    trained = np.array([[True, False], [False, True]])
    everyone = ensemble.make_members({**SPEC, "folds": 2, "min_quality": (20.0,)})
    training_sets = ensemble.TrainingSets(everyone, ("clip", "ünï-§"), trained)
    ensemble.save(tmp_path, training_sets)
    again = ensemble.load(tmp_path)
    assert again[:2] == training_sets[:2]
    np.testing.assert_array_equal(again.trained, trained)
    assert ensemble.digest(again) == ensemble.digest(training_sets)
    other = training_sets._replace(trained=~trained)
    assert ensemble.digest(other) != ensemble.digest(training_sets)
    path = tmp_path / ensemble.FILE
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cannot read .*members\.npz"):
        ensemble.load(tmp_path)


def test_a_view_lacks_its_chunk():
    features = np.arange(2 * 512).reshape(2, 512)
    for view in (0, 1, 15):
        found = ensemble.drop_chunk(jnp.asarray(features), jnp.int32(view), 16)
        wanted = np.delete(features, np.s_[32 * view : 32 * (view + 1)], axis=1)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("logs", [True, False])
def test_scores_combine_as_means(logs):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 6, 5)) * 30 - 40
    use = rng.random((4, 6)) < 0.6
    use[:, 0], use[:, 1] = False, True
    scores = np.minimum(scores, 0) if logs else scores
    total = eval_step.make_no_scores(jnp.zeros((6, 5)), logs=logs)
    for one, rows in zip(scores, use, strict=True):
        total = eval_step.add_scores(total, jnp.asarray(one), jnp.asarray(rows, jnp.float32))
    found = np.asarray(eval_step.mean_scores(total))
    assert (found[0] == -np.inf).all()
    for clip in range(1, 6):
        voted = scores[use[:, clip], clip]
        wanted = np.log(np.exp(voted).mean(axis=0)) if logs else voted.mean(axis=0)
        np.testing.assert_allclose(found[clip], wanted, rtol=1e-5)


def test_means_of_probabilities_near_one_keep_their_digits():
    """Two members are sure of a clip, one more than the other: the mean lies between them."""
    lacks = np.array([[1e-9, 1e-30], [3e-9, 3e-30]])  # 1 - p of two members for two clips
    total = eval_step.make_no_scores(jnp.zeros((2, 1)), logs=True)
    for lack in lacks:  # log(1 - x) is -x
        total = eval_step.add_scores(total, -jnp.asarray(lack, jnp.float32)[:, None], jnp.ones(2))
    wanted = -lacks.mean(axis=0)
    np.testing.assert_allclose(eval_step.mean_scores(total)[:, 0], wanted, rtol=1e-5)


MLP = "configs/quality_fusion.py:iqiyi_vid"
FOLDS = ("--config.ensemble.folds=3", "--config.num_epochs=2")
SPLITS = "--config.data.train_splits=train,val"


@pytest.fixture(scope="module")
def everyone(data, tmp_path_factory):
    """The folder and the metrics of three members that leave out a fold of train and val each."""
    folder = tmp_path_factory.mktemp("members") / "all"
    return folder, run(shrunk(SPLITS, *FOLDS, spec=MLP), folder, data)


def assert_member(folder, alone, number):
    """Asserts that a run of one member is that member of another run, bit for bit."""
    together, own = weights(folder), weights(alone)
    assert own.keys() == together.keys()
    for name, value in own.items():
        np.testing.assert_array_equal(value[0], together[name][number], err_msg=name)


@pytest.mark.slow
def test_a_member_equals_its_own_run_to_the_bit(data, everyone, tmp_path):
    """It has the same weights, and gives the same scores to clips that it has not seen."""
    folder, together = everyone
    only = run(shrunk(SPLITS, *FOLDS, "--config.ensemble.only=1", spec=MLP), tmp_path, data)
    assert_member(folder, tmp_path, 1)
    assert only["map_kind"] == together["map_kind"] == "out_of_fold"
    assert only["num_clips"] < together["num_clips"] == len(data.split("val").clips)
    assert [one["map"] for one in together["members"]][1] == only["map"]
    assert (tmp_path / "ranking.txt").read_text().count(".mp4") == 12 * only["num_clips"]


@pytest.mark.slow
def test_scores_of_all_members_never_exist_at_once(data, everyone):
    mesh, one = devices.make_mesh(1), restored(everyone[0], data)
    double = lambda tree: jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)  # noqa: E731
    sets = one.training_sets
    twice = one._replace(
        params=double(one.params),
        model_state=double(one.model_state),
        training_sets=sets._replace(
            members=sets.members * 2, trained=np.concatenate([sets.trained] * 2)
        ),
    )
    most, calls = [], []
    for model in (one, twice):
        alive = []

        def counting(*args, alive=alive):
            scores = one.eval_step(*args)
            alive.append(sum(x.shape == scores.shape for x in jax.live_arrays()))
            return scores

        scoring.score([model._replace(eval_step=counting)], "val", mesh, block_size=16)
        calls.append(len(alive))
        most.append(max(alive) - alive[0])
    assert calls[1] == 2 * calls[0]
    # Every block holds its two running sums, however many members there are.
    assert most[1] <= most[0] + 2 < 4 * calls[0]


def test_a_block_holds_clips_of_the_same_members():
    """Folds cost one pass over the clips; sets of few clips share blocks, and nobody is lost."""
    rng = np.random.default_rng(0)
    bucket = rng.integers(-1, 3, 1000)
    plan = EvalPlan("val", ("face",), bucket, {"face": (32, 128, 512)})
    folds = rng.integers(0, 5, 1000) == np.arange(5)[:, None]  # [E, N]
    rare = np.zeros((5, 1000), bool)
    rare[:3, :4] = True  # a set of four clips

    def work(use):
        found = scoring.split_by_members(plan, use, 16)
        blocks = [(number, clips) for number, clips in split_blocks(found.bucket, 16)]
        clips = np.concatenate([clips for _, clips in blocks])
        assert sorted(clips) == np.flatnonzero(bucket >= 0).tolist()
        for number, clips in blocks:
            assert (bucket[clips] == bucket[clips[0]]).all()
            assert found.padded_lengths["face"][number] == (32, 128, 512)[bucket[clips[0]]]
        return sum(16 * use[:, clips].any(axis=1).sum() for _, clips in blocks)

    wanted = np.sum(bucket >= 0)
    assert wanted <= work(folds) <= wanted + 3 * 5 * 16
    assert work(folds | rare) <= wanted + 6 * 5 * 16


@pytest.mark.slow
def test_vmap_agrees_with_separate_steps(data, tmp_path):
    sgd = (*FOLDS, "--config.optim.name=sgd", "--config.optim.learning_rate=0.05")
    for mapping in ("map", "vmap"):
        config = shrunk(*sgd, f"--config.ensemble.mapping={mapping}", spec=MLP)
        run(config, tmp_path / mapping, data)
    left, right = weights(tmp_path / "map"), weights(tmp_path / "vmap")
    for name in [name for name in left if "params" in name]:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_members_do_not_see_what_they_leave_out(data, everyone, tmp_path, monkeypatch):
    plain, _ = everyone
    held = ~ensemble.load(plain).trained[1]
    rows = {"train": slice(0, 96), "val": slice(96, 156)}

    class Relabelled(Spoilt):
        def split(self, name):
            split = data.split(name)
            many = np.full_like(split.positives, 99)
            labels = np.where(held[rows[name]], split.labels % 12 + 1, split.labels)
            fields = {**vars(split), "labels": labels.astype(np.int32), "positives": many}
            return split.__class__(**fields)

    config = shrunk(SPLITS, *FOLDS, spec=MLP)
    # Folds of the labels as they were: they must not move with the labels that are spoilt.
    labels = np.concatenate([data.split(name).labels for name in rows])
    folds = ensemble.assign_folds(labels, 3, config.seed)
    monkeypatch.setattr(ensemble, "assign_folds", lambda *args: folds)
    run(config, tmp_path, Relabelled(data, {name: held[at] for name, at in rows.items()}))
    left, right = weights(plain), weights(tmp_path)
    assert any(not np.array_equal(left[name][0], right[name][0]) for name in left)
    for name, value in left.items():
        np.testing.assert_array_equal(value[1], right[name][1], err_msg=name)


def test_bootstrap_samples_lose_no_identity_but_samples_of_all_clips_do():
    """A draw of n clips lacks each with probability (1 - 1/n)^n."""
    labels = np.repeat(np.arange(60), np.arange(60) % 3 + 1)  # one, two and three clips each
    own, every = (
        np.stack([ensemble.draw_bootstrap(labels, i, 0, *kind) for i in range(400)])
        for kind in ((), ("all",))
    )
    assert (every.sum(axis=1) == len(labels)).all()
    for number in (1, 2, 3):
        columns = [labels == column for column in range(60) if column % 3 + 1 == number]
        assert all((own[:, column].sum(axis=1) == number).all() for column in columns)
        left_out = np.mean([own[:, column] == 0 for column in columns])
        assert left_out == pytest.approx((1 - 1 / number) ** number, abs=0.02)
        lost = np.mean([every[:, column].sum(axis=1) == 0 for column in columns])
        assert lost == pytest.approx(np.exp(-number), abs=0.02)
    members = ensemble.make_members({**SPEC, "bootstraps": 2})
    rows = ensemble.count_clip_uses(members, labels, 0, 0, "all")
    np.testing.assert_array_equal(rows, every[:2])


def test_a_sum_of_weights_rises_with_every_probability():
    """Two branches whose weights are together above 1 or below, from unlikely to nearly sure."""
    p = np.array([1e-6, 0.3, 0.5, 0.7, 0.9, 1 - 1e-6])
    for weight in (1.0, 0.375):
        total = eval_step.make_no_scores(jnp.zeros((6, 1)), logs=True)
        for _ in range(2):
            one = jnp.log(jnp.asarray(p[:, None]))
            total = eval_step.add_scores(total, one, jnp.full(6, weight))
        found = np.asarray(eval_step.sum_scores(total), np.float64)[:, 0]
        np.testing.assert_allclose(found, np.log(2 * weight * p), rtol=1e-6, atol=1e-6)


def test_trainval_is_nine_to_one_or_five_stratified_folds(data):
    """All three quality subsets of the residual net leave out a tenth; "other" is a class."""
    truth = np.concatenate([data.split(name).labels for name in ("train", "val")])

    def plan(spec):
        config = config_io.load_file(f"{ROOT}/configs/{spec}")
        found = plan_lib.make_plan(config, data)
        assert found.task.train_other == ("trainval" in spec)
        return found.training_sets

    thrice = plan("residual_dense.py:iqiyi_vid,trainval,face,few")
    assert thrice.trained.shape == (3, len(truth)) and (thrice.trained == thrice.trained[0]).all()
    for rows in (truth >= 0, truth == 0, truth > 0):
        assert abs((~thrice.trained[0])[rows].sum() - rows.sum() / 10) <= 1.2
    assert [member.min_quality for member in thrice.members] == [-1000, 20, 40]
    one = plan("residual_dense.py:iqiyi_vid,trainval,face,few,one")
    np.testing.assert_array_equal(one.trained, thrice.trained[:1])
    left_out = ~plan("quality_fusion.py:iqiyi_vid,trainval,few").trained  # [5, N]
    np.testing.assert_array_equal(left_out.sum(axis=0), 1)
    for column in range(13):
        assert np.ptp(left_out[:, truth == column].sum(axis=1)) <= 1
    plan("residual_dense.py:iqiyi_vid,face,few")
    plan("quality_fusion.py:iqiyi_vid,few")
