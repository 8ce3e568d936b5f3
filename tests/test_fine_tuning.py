"""Training from the weights of a run, with frozen parameters, early stops, and several splits."""

import functools
import itertools
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import clip_files, small_runs as small
from tests.helpers.cases import quick_first
from tests.helpers.seen import refused
from vidjax.core import devices, ensemble
from vidjax.core.ensemble import Member, TrainingSets
from vidjax.runs import checkpoint, config_io, members_file, results as results_lib, signals
from vidjax.runs.run_folder import RunFolder
from vidjax.training import early_stop, init_from, profiler, public, resume, train_step
from vidjax.training.dry_run import dry_run
from vidjax.training.plan import make_plan
from vidjax.utils.errors import UserError, VidjaxWarning

MLP = "configs/quality_fusion.py:iqiyi_vid"
OPTIONS = (
    "--config.num_epochs=6", "--config.eval.every_epochs=1", "--config.early_stop.patience=2",
    "--config.early_stop.metric=top1", "--config.optim.accumulate=4",
    "--config.optim.freeze=layer_0/dense/kernel",
)  # fmt: skip


@pytest.fixture(scope="session")
def half_run(data, tmp_path_factory):
    """Returns a function that trains with every second identity. The others are distractors."""

    @functools.cache
    def train(spec):
        folder = tmp_path_factory.mktemp("half")
        with pytest.warns(VidjaxWarning, match="not in the training data"):
            half = data.with_identities(data.identities[::2])
        small.run(small.shrunk("--config.num_epochs=1", spec=spec), folder, half)
        return folder

    return train


def started(config, data, source):
    """Returns path -> array at step 0 of a new run, first with random weights, then as loaded."""
    plan, mesh = make_plan(config, data), devices.make_mesh(1)
    members = plan.training_sets.members
    labels = jnp.tile(jnp.asarray(plan.labels, jnp.int32), (len(members), 1))
    rngs = ensemble.make_rngs(members, config.seed)
    states = []

    def load(state):
        found, _ = init_from.load_state(source, plan.system, config, data.identities, state, mesh)
        states.extend([flat(state), flat(found)])
        return found

    state = train_step.make_state(
        lambda: train_step.init_state(plan.system, rngs, labels), plan.system.tx, mesh, load
    )
    assert int(state.step) == 0
    return states


def flat(state):
    return small.flat({"params": state.params, "model_state": state.model_state})


@pytest.mark.parametrize("name", quick_first([
    "quality_fusion", *quick_first(["noise_classes", "mma", "deepmef"], 1, pytest.mark.nightly)
]))  # fmt: skip
def test_classes_get_the_weights_of_the_same_name_and_new_classes_stay_random(data, half_run, name):
    spec = f"configs/{name}.py:iqiyi_vid"
    folder, config = half_run(spec), small.shrunk(spec=spec)
    config.init_from = str(folder)
    fresh, loaded = started(config, data, init_from.find_source(config))
    old = small.weights(folder)
    assert fresh.keys() == loaded.keys() == old.keys()
    classes = [key for key in old if old[key].shape != fresh[key].shape]
    assert classes and len(classes) < len(old)
    for key, value in loaded.items():
        if key not in classes:
            np.testing.assert_array_equal(value, old[key], key)
            continue
        # The classes are on the last axis. Identities 1, 3, ... are the identities of the old run.
        for column in range(1, 1 + len(data.identities)):
            like = old[key][..., (column + 1) // 2] if column % 2 else fresh[key][..., column]
            np.testing.assert_array_equal(value[..., column], like, f"{key} {column}")
        # Only the old run is trained on distractors. Noise classes differ between the runs.
        for rest in (slice(0, 1), slice(1 + len(data.identities), None)):
            np.testing.assert_array_equal(value[..., rest], fresh[key][..., rest])


@pytest.mark.slow
def test_resumed_fine_tuning_equals_a_whole_one_without_the_first_run(data, half_run, tmp_path):
    """Training is stopped in the middle of an accumulation, and after the last evaluation."""
    source = shutil.copytree(half_run(MLP), tmp_path / "source")
    config = small.shrunk(*OPTIONS, small.STREAMED, f"--config.init_from={source}", spec=MLP)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = small.run(config, whole, data)
    with pytest.raises(signals.Interrupted):
        small.run(config, parts, small.Interrupting(data, 6, signal.SIGTERM))
    assert max(checkpoint.manifests(parts)) % 4
    with pytest.raises(UserError, match=r"init_from: .* -> empty"):
        small.run(config_io.override(config, ["--config.init_from="]), parts, data)
    other = config_io.override(config, [f"--config.init_from={whole}"])
    with pytest.raises(UserError, match=r"init_from: .*source -> .*whole"):
        small.run(other, parts, data)
    other.init_from = str(source.rename(tmp_path / "moved"))
    with pytest.raises(signals.Interrupted):
        small.run(other, parts, small.Interrupting(data, 3, signal.SIGTERM))
    shutil.rmtree(other.init_from)
    small.run(config, parts, data)
    names = ("metrics.jsonl", "ranking.txt", "members.npz", "identities.json")
    small.assert_same_run(parts, whole, names)
    after, before = small.weights(whole), small.weights(half_run(MLP))
    frozen = {key for key in after if np.array_equal(after[key], before[key])}
    assert frozen == {key for key in after if "layer_0" in key and "kernel" in key}
    assert done["init_from"] == RunFolder(parts).metrics()["init_from"]
    assert (done["init_from"]["run"], done["init_from"]["identities"]) == (str(source), 6)
    assert done["init_from"]["step"] == max(checkpoint.manifests(half_run(MLP)))


@pytest.mark.slow
def test_runs_of_other_kinds_are_refused(data, half_run, trained, official_dir, tmp_path, command):
    """Another model, size or ensemble, a damaged run, and a model without steps."""
    source = half_run(MLP)

    def refuse(*words, config="quality_fusion", run=source, code=2):
        flags = (f"--config={config}", f"--config.init_from={run}", f"--workdir={tmp_path / 'new'}")
        data = ("--config.data.name=iqiyi_vid", f"--config.data.dir={official_dir}")
        done = command(*flags, *data, "--config.modalities=face", *words)
        assert done.code == code, done.err
        return done.err

    assert "model 'dense', but this run trains the model 'mma'" in refuse(config="mma")
    assert "has no effect" in refuse(config="plda") and "no run in" in refuse(run=tmp_path)
    damaged = shutil.copytree(source, tmp_path / "damaged")
    for file in damaged.glob("checkpoints/*/state/**/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes() + b"x")
    with pytest.warns(VidjaxWarning, match="is not used"):
        assert "is damaged" in refuse(run=damaged, code=3)
    (damaged / "metrics.json").unlink()
    assert "is not finished" in refuse(run=damaged)
    run = trained(MLP, "--config.ensemble.seeds=3")
    assert "has 3 members, but this run has 2" in refuse("--config.ensemble.seeds=2", run=run)
    assert not (tmp_path / "new").exists()
    config = small.shrunk("--config.model.layers=((9,'swish',True,0.5),)", spec=MLP)
    config.init_from, config.modalities = str(source), ("audio",)
    found = init_from.find_source(config)
    refused(lambda: started(config, data, found), "no weight matrix", "--config.modalities")


def test_a_member_has_seen_the_clips_of_the_run_that_it_continues():
    """So no member scores them, and MAP is not measured on clips that all members have seen."""
    members = (Member(0), Member(1))
    one = TrainingSets(members[:1], ("a", "x"), np.array([[True, True]]))
    two = TrainingSets(members, ("b", "a"), np.array([[True, False], [False, True]]))
    both = ensemble.add_trained_clips(two, one)
    assert both.clips == ("b", "a", "x") and both.members == members
    np.testing.assert_array_equal(both.trained, [[1, 1, 1], [0, 1, 1]])
    again = ensemble.add_trained_clips(two, both)  # as a resumed run does
    assert members_file.make_lists([], again) == members_file.make_lists([], both)
    alone = ensemble.add_trained_clips(one._replace(clips=("c", "d")), one)
    assert ensemble.choose_scoring_members(alone, ["x", "y"])[1]  # in sample


@pytest.mark.parametrize(("metric", "values", "stop"), [
    ("map", [0.1, 0.3, 0.2, 0.3], [4]), ("map", [0.1, 0.2, 0.1, 0.3, 0.1], []),
    ("eval_loss", [3.0, 2.0, 2.5, 2.0], [4]), ("eval_loss", [3.0, 2.0, 2.5, 1.0], []),
])  # fmt: skip
def test_training_ends_after_evaluations_without_a_better_value(metric, values, stop):
    config = small.shrunk("--config.early_stop.patience=2", f"--config.early_stop.metric={metric}")
    entry, stopped = None, []
    for step, value in enumerate(values, start=1):
        entry = early_stop.add_evaluation(config, entry, step, {metric: value})
        stopped += [step] * entry.stopped
    assert stopped == stop
    refused(lambda: early_stop.add_evaluation(config, None, 1, {}), metric, "eval.split")
    config.early_stop.metric = "mpa"
    refused(lambda: dry_run(config), "did you mean 'map'?")


def test_more_epochs_continue_a_training_that_ended_early():
    stopped = {"metric": "map", "best": 0.5, "step": 2, "waited": 2, "stopped": True}
    manifest = {"step": 6, "config": {"num_epochs": 5}, "early_stop": stopped}
    again, longer = (resume.continue_facts(manifest, number)["early_stop"] for number in (5, 6))
    assert again.stopped and not longer.stopped
    assert (longer.waited, longer.best, longer.step) == (0, 0.5, 2)


@pytest.mark.parametrize(("manifest", "num_epochs", "wanted"), [
    ({"step": 3, "config": {"num_epochs": 5}}, 5, []),
    ({"step": 3, "config": {"num_epochs": 5}}, 6, [[0, 5], [3, 6]]),
    ({"step": 9, "config": {"num_epochs": 6}, "extended": [[0, 5], [3, 6]]}, 6, [[0, 5], [3, 6]]),
    # No step was trained with 6 epochs.
    ({"step": 3, "config": {"num_epochs": 6}, "extended": [[0, 5], [3, 6]]}, 8, [[0, 5], [3, 8]]),
])  # fmt: skip
def test_epochs_of_a_run_are_listed_from_the_step_of_each_change(manifest, num_epochs, wanted):
    assert resume.list_epochs(manifest, num_epochs) == wanted


@pytest.mark.parametrize(("window", "traced"), [((), []), ((1, 3), [2, 3]), ((3, 9), [4, 5])])
def test_steps_of_the_window_are_traced(tmp_path, monkeypatch, window, traced):
    """A run of 5 steps. The trace also ends if the training ends before the window."""
    running, seen = [False], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: running.__setitem__(0, True))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: running.__setitem__(0, False))
    with profiler.trace_steps(tmp_path, window) as start_or_stop:
        for step in range(5):
            start_or_stop(step)
            seen += [step + 1] * running[0]
        start_or_stop(5)
    assert seen == traced and not running[0]


def write_labelled(folder):
    """Writes six clips of three people in each of three splits. Returns flags of a training."""
    rng, clips, labels = np.random.default_rng(0), {}, {}
    for split, number in itertools.product(("train", "val", "test"), range(6)):
        features = (np.eye(3, 8)[number % 3] + rng.normal(0, 0.4, (2, 8))).astype(np.float32)
        clips.setdefault(split, {})[f"{split}{number}"] = {"face": {"features": features}}
        labels[f"{split}{number}"] = f"person {number % 3}"
    clip_files.write_labels(clip_files.write_npz(folder, clips) / "labels.csv", labels)
    return ("--config=quality_fusion:face", "--config.data.name=arrays", small.LAYER,
            f"--config.data.dir={folder}", "--config.batch_size=3")  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_several_splits_are_evaluated_and_one_chooses_the_best_step(tmp_path, say, command):
    """A training without a better MAP ends early, and says so. It has the loss of each split."""
    run = f"--workdir={tmp_path / 'run'}"
    flags = (*write_labelled(tmp_path / "data"), run)
    words = ("--config.early_stop.patience=2", "--config.optim.learning_rate=0")
    words += ("--config.eval.splits=test,train", "--config.profile=1,3", "--config.num_epochs=9")
    out = say(*flags, *words)
    assert "ended early" in out and "map has not improved since step 2" in out
    assert "in sample: the run was trained" in out.partition("on train")[2]
    assert "on test" in out and (tmp_path / "run" / "profile").is_dir()
    assert say(*flags, *words).count("map has not improved since step 2") == 1  # the finished run
    folder = RunFolder(tmp_path / "run")
    scored = [x for x in results_lib.read_lines(folder.path / "metrics.jsonl") if "split" in x]
    assert [line["step"] for line in scored] == [2, 4, 6]
    results = {"val": folder.metrics(), "test": folder.metrics(folder.paths("test"))}
    assert folder.metrics(folder.paths("train"))["map_kind"] == "in_sample"
    assert results["val"]["best_map"] == results["test"]["best_map"] == scored[0]["map"]
    assert results["val"]["best_step"] == 6  # the last of equal steps
    assert results["val"]["early_stop"]["stopped"]
    for key in ("map", "top1", "eval_loss"):
        assert scored[-1][key] == results["val"][key]
        assert scored[-1][f"test/{key}"] == results["test"][key]
    both = say("evaluate", run, "--config.eval.splits=test", "--json")
    assert both["splits"]["test"]["map"] == results["test"]["map"]
    data = public.load_data(folder.config)
    model = small.restored(folder.path, data, folder.config)
    for split in ("val", "test"):
        own = small.scores(model, split)[np.arange(6), data.split(split).labels - 1]
        assert results[split]["eval_loss"] == pytest.approx(-own.mean(), rel=1e-5)
    page = (folder.path / "report.html").read_text()
    assert "report_test.html" in page and "has not improved" in page
    for bad in ("eval.split=train", "profile=3,1", "profile=999,1000"):
        done = command(*flags[:-1], f"--config.{bad}", f"--workdir={tmp_path / 'new'}")
        assert done.refused(f"config.{bad.partition('=')[0]}")
