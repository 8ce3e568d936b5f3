"""The axis E: who trains on what, members against separate runs, honest scores."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.cases import quick_first
from tests.helpers.small_runs import ROOT, Spoilt, restored, run, shrunk, weights
from vidjax.core import devices, ensemble
from vidjax.data.clips import EvalPlan, split_blocks
from vidjax.evaluation import eval_step, scoring
from vidjax.models.system import TaskSpec, make_model, make_system
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
        ({"views": 17}, "at most chunks=16"),
        ({"folds": 2, "bootstraps": 2}, "exclude"),
        ({"only": (1,)}, "only=1: choose from 0 to 0"),
        ({"folds": 3, "only": (1, 1)}, "name each member once"),
    ],
)
def test_specifications_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        ensemble.make_members({**SPEC, **change})


def test_a_view_that_would_hide_nothing_is_refused():
    config = config_lib.default()
    config.ensemble.views = 3
    task = TaskSpec({"face": 8}, 12, None, 20, 1, train_other=True)
    with pytest.raises(ValueError, match="no modality has 16 features"):
        make_model(config.to_dict(), task)


@pytest.mark.parametrize("num_folds", [2, 5, 10])
def test_folds_split_every_identity_evenly(num_folds):
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(40), rng.integers(1, 9, 40)), np.zeros(33, int)])
    labels = rng.permutation(labels)
    folds = ensemble.stratified_folds(labels, num_folds, seed=3)
    for rows in [np.arange(len(labels)), *(np.flatnonzero(labels == c) for c in range(40))]:
        counts = np.bincount(folds[rows], minlength=num_folds)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(folds, ensemble.stratified_folds(labels, num_folds, seed=3))
    assert (folds != ensemble.stratified_folds(labels, num_folds, seed=4)).any()


def test_bootstrap_samples_lose_no_identity():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(50), np.arange(50) % 7 + 1))
    counts = np.stack([ensemble.bootstrap_counts(labels, number, seed=0) for number in range(200)])
    for column in range(50):
        rows = labels == column
        assert (counts[:, rows].sum(axis=1) == rows.sum()).all()
    left_out = (counts == 0)[:, np.bincount(labels)[labels] == 7].mean()
    assert left_out == pytest.approx((1 - 1 / 7) ** 7, abs=0.02)


def test_samples_of_all_clips_lose_identities_of_one_or_two_clips():
    """Of n clips each is missing with probability (1 - 1/n)^n."""
    labels = np.repeat(np.arange(60), np.arange(60) % 3 + 1)  # one, two and three clips each
    counts = np.stack([ensemble.bootstrap_counts(labels, i, 0, "all") for i in range(400)])
    assert (counts.sum(axis=1) == len(labels)).all()
    missing = 1 - 1 / np.e
    for number in (1, 2, 3):
        columns = [column for column in range(60) if column % 3 + 1 == number]
        lost = [(counts[:, labels == column].sum(axis=1) == 0).mean() for column in columns]
        assert np.mean(lost) == pytest.approx((1 - missing) ** number, abs=0.02)
    members = ensemble.make_members({**SPEC, "bootstraps": 2})
    rows = ensemble.partition(members, labels, 0, 0, "all")
    np.testing.assert_array_equal(rows, counts[:2])


def plan_of(name, data, *words):
    config = config_io.override(config_io.load_file(f"{ROOT}/configs/{name}"), [*words])
    return config, plan_lib.make_plan(config, data)


def test_trainval_of_the_residual_net_is_nine_to_one(data):
    """One tenth of train and val is left out by all three quality subsets; "other" is a class."""
    _, plan = plan_of("residual_dense.py:iqiyi_vid,trainval,face,few", data)
    truth = np.concatenate([data.split(name).labels for name in ("train", "val")])
    trained = plan.training_sets.trained
    assert trained.shape == (3, len(truth))
    assert (trained == trained[0]).all()
    for rows in (truth >= 0, truth == 0, truth > 0):
        assert abs((~trained[0])[rows].sum() - rows.sum() / 10) <= 1.2
    assert [member.min_quality for member in plan.training_sets.members] == [-1000, 20, 40]
    assert plan.task.train_other
    assert not plan_of("residual_dense.py:iqiyi_vid,face,few", data)[1].task.train_other
    one = plan_of("residual_dense.py:iqiyi_vid,trainval,face,few,one", data)[1].training_sets
    np.testing.assert_array_equal(one.trained, trained[:1])


def test_trainval_of_quality_fusion_is_five_stratified_folds(data):
    config, plan = plan_of("quality_fusion.py:iqiyi_vid,trainval,few", data)
    truth = np.concatenate([data.split(name).labels for name in ("train", "val")])
    left_out = ~plan.training_sets.trained  # [5, N]
    np.testing.assert_array_equal(left_out.sum(axis=0), 1)
    for column in range(13):
        sizes = left_out[:, truth == column].sum(axis=1)
        assert sizes.max() - sizes.min() <= 1
    assert plan.task.train_other  # 1 + C columns, as published
    assert make_system(config.to_dict(), plan.task).class_mask.all()
    assert not plan_of("quality_fusion.py:iqiyi_vid,few", data)[1].task.train_other


def test_held_out_goes_by_name():
    trained = np.array([[True, False, True], [False, True, True]])
    training_sets = ensemble.TrainingSets(
        (ensemble.Member(), ensemble.Member(1)), ("a", "b", "c"), trained
    )
    found, in_sample = ensemble.scoring_members(training_sets, ("c", "new", "b", "a"))
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


@pytest.mark.parametrize("view", [0, 1, 15])
def test_a_view_lacks_its_chunk(view):
    features = np.arange(2 * 512).reshape(2, 512)
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
    total = eval_step.no_scores(jnp.zeros((6, 5)), logs=logs)
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
    total = eval_step.no_scores(jnp.zeros((2, 1)), logs=True)
    for lack in lacks:
        logs = jnp.asarray(np.log1p(-lack)[:, None], jnp.float32)
        logs = jnp.where(logs == 0, -jnp.asarray(lack, jnp.float32)[:, None], logs)
        total = eval_step.add_scores(total, logs, jnp.ones(2))
    wanted = -lacks.mean(axis=0)  # log(1 - x) is -x
    np.testing.assert_allclose(eval_step.mean_scores(total)[:, 0], wanted, rtol=1e-5)


def test_a_weighted_sum_counts_what_lacks_to_one_as_probability_zero():
    total = eval_step.no_scores(jnp.zeros((2, 1)), logs=True)
    for weight in (0.5, 0.25):
        one = jnp.full((2, 1), -1e-12, jnp.float32)
        total = eval_step.add_scores(total, one, jnp.array([weight, 2 * weight - 0.25]))
    found = np.exp(np.asarray(eval_step.sum_scores(total), np.float64))[:, 0]
    np.testing.assert_allclose(found, [0.75, 1.0], rtol=1e-6)


def test_a_sum_of_weights_above_one_rises_with_every_probability():
    """Two branches of weight 1 each, from unlikely to nearly sure."""
    p = np.array([1e-6, 0.3, 0.5, 0.7, 0.9, 1 - 1e-6])
    total = eval_step.no_scores(jnp.zeros((6, 1)), logs=True)
    for _ in range(2):
        total = eval_step.add_scores(total, jnp.log(jnp.asarray(p[:, None])), jnp.ones(6))
    found = np.asarray(eval_step.sum_scores(total), np.float64)[:, 0]
    np.testing.assert_allclose(found, np.log(2 * p), rtol=1e-6, atol=1e-6)


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
    """In what it learns, and in how it scores the clips that it has not seen."""
    folder, together = everyone
    config = shrunk(SPLITS, *FOLDS, "--config.ensemble.only=1", spec=MLP)
    only = run(config, tmp_path, data)
    assert_member(folder, tmp_path, 1)
    assert only["map_kind"] == "out_of_fold"
    assert only["num_clips"] < together["num_clips"] == len(data.split("val").clips)
    assert together["map_kind"] == "out_of_fold" and len(together["members"]) == 3
    assert only["map"] == together["members"][1]["map"]
    lines = (tmp_path / "ranking.txt").read_text().split()
    assert len([word for word in lines if word.endswith(".mp4")]) == 12 * only["num_clips"]


@pytest.mark.slow
def test_scores_of_all_members_never_exist_at_once(data, everyone):
    folder, _ = everyone
    mesh, one = devices.make_mesh(1), restored(folder, data)
    twice = one._replace(
        params=jax.tree.map(lambda x: jnp.concatenate([x, x]), one.params),
        model_state=jax.tree.map(lambda x: jnp.concatenate([x, x]), one.model_state),
        training_sets=one.training_sets._replace(
            members=one.training_sets.members * 2,
            trained=np.concatenate([one.training_sets.trained] * 2),
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
    # Each clip was left out by one of three members: no other member scores it.
    used, in_sample = ensemble.scoring_members(one.training_sets, one.data.split("val").clips)
    assert not in_sample and (used.sum(axis=0) == 1).all()
    # A block for every 16 clips, and for each of three lengths a last one and a mixed one.
    assert len(used[0]) / 16 <= calls[0] <= len(used[0]) / 16 + 3 * (3 + 3)
    assert calls[1] == 2 * calls[0]
    # Every block holds its two running sums, however many members there are.
    assert most[1] <= most[0] + 2 < 4 * calls[0]


def test_a_block_holds_clips_of_the_same_members():
    """Folds cost one pass over the clips; sets of few clips share blocks, and nobody is lost."""
    rng = np.random.default_rng(0)
    num_clips, rows = 1000, 16
    bucket = rng.integers(-1, 3, num_clips)
    plan = EvalPlan("val", ("face",), bucket, {"face": (32, 128, 512)})
    folds = rng.integers(0, 5, num_clips) == np.arange(5)[:, None]  # [E, N]
    rare = np.zeros((5, num_clips), bool)
    rare[:3, :4] = True  # a set of four clips

    def work(use):
        found = scoring.by_members(plan, use, rows)
        blocks = [(number, clips) for number, clips in split_blocks(found.bucket, rows)]
        clips = np.concatenate([clips for _, clips in blocks])
        assert sorted(clips) == np.flatnonzero(bucket >= 0).tolist()
        for number, clips in blocks:
            assert (bucket[clips] == bucket[clips[0]]).all()
            assert found.padded_lengths["face"][number] == (32, 128, 512)[bucket[clips[0]]]
        return sum(rows * use[:, clips].any(axis=1).sum() for _, clips in blocks)

    wanted = np.sum(bucket >= 0)
    assert wanted <= work(folds) <= wanted + 3 * 5 * rows
    assert work(folds | rare) <= wanted + 3 * 5 * rows + 3 * 5 * rows
    alone = np.eye(5, num_clips, dtype=bool) | (np.arange(num_clips) >= 5)
    assert work(alone) <= 5 * (num_clips + 3 * 2 * rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    quick_first(
        ["mma", "plda:face,audio", "cosine", "residual_dense:face,one", "deepmef:face,audio"],
        2,
        mark=pytest.mark.nightly,
    ),
)
def test_members_of_every_system_equal_their_own_runs(data, tmp_path, spec):
    name, _, words = spec.partition(":")
    config = shrunk(*FOLDS, spec=f"configs/{name}.py:iqiyi_vid,{words}")
    run(config, tmp_path / "all", data)
    run(config_io.override(config, ["--config.ensemble.only=2"]), tmp_path / "own", data)
    assert_member(tmp_path / "all", tmp_path / "own", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    quick_first(
        [f"{MLP},mlp1", "configs/mma.py:iqiyi_vid", "configs/cosine.py:iqiyi_vid"],
        mark=pytest.mark.nightly,
    ),
    ids=["mlp1", "mma", "cosine"],
)
def test_vmap_agrees_with_separate_steps(data, tmp_path, spec):
    sgd = (*FOLDS, "--config.optim.name=sgd", "--config.optim.learning_rate=0.05")
    for mapping in ("map", "vmap"):
        config = shrunk(*sgd, f"--config.ensemble.mapping={mapping}", spec=spec)
        run(config, tmp_path / mapping, data)
    left, right = weights(tmp_path / "map"), weights(tmp_path / "vmap")
    for name, value in left.items():
        if "params" in name:
            np.testing.assert_allclose(value, right[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_members_do_not_see_what_they_leave_out(data, everyone, tmp_path):
    config = shrunk(SPLITS, *FOLDS, spec=MLP)
    plain, _ = everyone
    held = ~ensemble.load(plain).trained[1]
    rows = {"train": slice(0, 96), "val": slice(96, 156)}

    class Relabelled(Spoilt):
        def split(self, name):
            split = data.split(name)
            hidden, many = held[rows[name]], np.full_like(split.positives, 99)
            labels = np.where(hidden, split.labels % len(data.identities) + 1, split.labels)
            return split.__class__(
                **{**vars(split), "labels": labels.astype(np.int32), "positives": many}
            )

    hidden = {name: held[at] for name, at in rows.items()}
    folds = ensemble.stratified_folds
    try:  # of the labels as they were: a fold must not move with the labels that are spoilt
        labels = np.concatenate([data.split(name).labels for name in rows])
        fixed = folds(labels, 3, config.seed)
        ensemble.stratified_folds = lambda *args: fixed
        run(config, tmp_path, Relabelled(data, hidden))
    finally:
        ensemble.stratified_folds = folds
    left, right = weights(plain), weights(tmp_path)
    changed = [not np.array_equal(value[0], right[name][0]) for name, value in left.items()]
    assert any(changed)
    for name, value in left.items():
        np.testing.assert_array_equal(value[1], right[name][1], err_msg=name)
