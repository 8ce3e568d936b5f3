"""Faults of checkpoints: random damage, another configuration, a full disk."""

import contextlib
import json
import random
import shutil
import signal
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.campaigns.mutations import cut, flip
from tests.helpers import small_runs
from tests.helpers.batches import assert_equal
from tests.helpers.limits import file_limit
from tests.helpers.seen import contents
from tests.helpers.small_runs import ROOT, RUN_FILES, Interrupting, assert_same_run, run
from vidjax.core import devices
from vidjax.evaluation import predict
from vidjax.runs import checkpoint, config_io, signals
from vidjax.utils import exit_codes, files

# After a failed save, threads of Orbax call an event loop that is already closed.
ignored = "ignore::pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(ignored)]


def make_items(seed):
    rng = np.random.default_rng(seed)
    params = {"a": rng.normal(size=(40, 20)).astype(np.float32), "b": np.arange(5, dtype=np.int32)}
    return {"params": params, "train": {"rng": jax.random.key(seed)}, "model_state": {}}


def test_randomly_damaged_checkpoints_are_never_restored(tmp_path, campaign):
    """If only the preferred step is damaged, the other step is restored with a warning."""
    folder, workdir = tmp_path / "pristine" / "checkpoints", tmp_path / "damaged"
    for step, mean_ap in {3: 0.9, 8: 0.1}.items():  # step 3 is the best, and step 8 the latest
        checkpoint.save(folder.parent, step, make_items(step), {"map": mean_ap, "evaluated": True})
    before = contents(folder)
    names = [name for name, content in before.items() if content]  # files that are not empty
    everywhere = devices.replicated_layout(devices.make_mesh(1))
    rng, found_steps = random.Random(0), set()
    for trial in range(1000 if campaign else 20):
        shutil.copytree(folder.parent, workdir)
        for name in rng.sample(names, rng.randrange(1, 4)):
            damage = rng.choice((flip, flip, cut, lambda path, rng: path.unlink()))
            damage(workdir / "checkpoints" / name, rng)
        damaged = contents(workdir / "checkpoints")
        bad_steps = {int(name.split("/")[0]) for name in names if damaged.get(name) != before[name]}
        prefer, order = rng.choice((("latest", [8, 3]), ("best", [3, 8])))
        wanted = next((step for step in order if step not in bad_steps), None)
        found = None
        all_warnings = warnings.catch_warnings(record=True, action="always")
        with all_warnings as warned, contextlib.suppress(checkpoint.CheckpointError):
            found = checkpoint.find(workdir, prefer)
        assert contents(workdir / "checkpoints") == damaged  # no file has changed
        step = found.manifest["step"] if found else None
        assert step == wanted, trial
        if found:
            restored = checkpoint.load(found, make_items(0), everywhere)
            assert_equal(small_runs.flat(restored), small_runs.flat(make_items(step)))
            assert warned or step == order[0], trial
        found_steps.add(step)
        shutil.rmtree(workdir)
    assert found_steps == {3, 8, None}  # the random damages cause each outcome


def test_save_renames_a_users_folder_that_has_the_name_of_a_step(tmp_path):
    folder = tmp_path / "checkpoints" / "8"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_text("the user's")
    assert checkpoint.find(tmp_path) is None
    checkpoint.save(tmp_path, 8, make_items(8), {})
    assert (tmp_path / "checkpoints" / "8.damaged" / "weights.bin").read_text() == "the user's"


@pytest.fixture(scope="module")
def words(official_dir, cache_dir):
    """The arguments of the command that trains the run."""
    return (
        f"--config={ROOT}/configs/quality_fusion.py:iqiyi_vid,face",
        f"--config.data.dir={official_dir}", f"--config.data.cache_dir={cache_dir}",
        "--config.model.layers=((256,'swish',True,0.5),)", "--config.batch_size=32",
        "--config.num_epochs=5", "--config.log_every_steps=5", "--config.eval.every_epochs=2",
        "--config.eval.block_size=16", "--config.eval.report=False", small_runs.STREAMED,
    )  # fmt: skip


@pytest.fixture(scope="module")
def config(words):
    return config_io.override(config_io.load_file(words[0].removeprefix("--config=")), words[1:])


@pytest.fixture(scope="module")
def whole(config, data, tmp_path_factory):
    """The folder of a run of 5 epochs of 3 steps, evaluated at steps 6, 12 and 15."""
    folder = tmp_path_factory.mktemp("checkpoints") / "whole"
    run(config, folder, data)
    return folder


@pytest.fixture(scope="module")
def stopped(config, data, tmp_path_factory):
    """The folder of the same run, stopped by SIGINT between steps 6 and 12. Tests copy it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "stopped"
    with pytest.raises(signals.Interrupted):
        run(config, folder, Interrupting(data, batch=9, signum=signal.SIGINT))
    assert 6 < max(checkpoint.manifests(folder)) < 12
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "finished")


@pytest.fixture
def parts(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "parts")


def largest(workdir, step):
    """Returns the path of the largest file of a checkpoint."""
    files = (workdir / "checkpoints" / str(step) / "state").rglob("*")
    return max(filter(Path.is_file, files), key=lambda path: path.stat().st_size)


def test_evaluate_refuses_changed_configurations_and_checkpoints(command, finished):
    def assert_refused(*expected):
        with warnings.catch_warnings(action="ignore"):
            done = command("evaluate", f"--workdir={finished}", "--config.eval.checkpoint=best")
        error = done.err[done.err.rindex("vidjax: ") :]
        assert done.code == 3 and len(error.splitlines()) <= 3, done.err
        assert all(word in error for word in expected), error

    ranking = (finished / "ranking.txt").read_bytes()
    path, old = finished / "config.json", b'"gamma": 2.0'
    before = path.read_bytes()
    assert old in before
    path.write_bytes(before.replace(old, b'"gamma": 6.0'))
    assert_refused(str(path))
    path.write_bytes(before)
    manifests = checkpoint.manifests(finished)
    for name in ("config", "modalities"):
        for step, manifest in manifests.items():
            lacking = {key: value for key, value in manifest.items() if key != name}
            files.write_manifest(finished / "checkpoints" / str(step) / "manifest.json", lacking)
        assert_refused(f"has no entry '{name}'")
    for step in manifests:
        flip(largest(finished, step), random.Random(step))
    before = contents(finished)
    assert_refused("every checkpoint", str(finished))
    assert contents(finished) == before
    assert before["ranking.txt"] == ranking  # no refused command has written a ranking


def test_resuming_with_another_configuration_is_refused_with_the_difference(say, words, parts):
    """Checkpoints also contain the configuration, so config.json may be missing."""
    before = contents(parts / "checkpoints")
    for word, difference in [
        ("model.layers=((16,'swish',True,0.5),)", "model.layers: ((256,"),
        ("modalities=head,face", "modalities: ('face',) -> ('head', 'face')"),
        ("num_epochs=2", "num_epochs: 5.0 -> 2.0"),
    ]:
        error = say(*words, f"--workdir={parts}", f"--config.{word}", code=2)
        assert difference in error and "use another workdir" in error
        (parts / "config.json").unlink(missing_ok=True)
    assert contents(parts / "checkpoints") == before


def read_metrics(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


def test_extended_run_is_marked_if_and_only_if_it_was_extended(command, words, finished):
    assert "extended" not in read_metrics(finished)
    assert all("extended" not in manifest for manifest in checkpoint.manifests(finished).values())
    words = (*words, f"--workdir={finished}", "--config.eval.report=True")
    done = command(*words, "--config.num_epochs=6")  # the learning rate falls until the last epoch
    assert "warning: config.num_epochs grows from 5 to 6" in done.err
    assert "5, 6 from step 15" in done.out and read_metrics(finished)["step"] == 18
    assert command(*words).refused("num_epochs: 6.0 -> 5.0")  # not fewer epochs
    command(*words, "--config.num_epochs=7")
    wanted = [[0, 5.0], [15, 6.0], [18, 7.0]]
    assert checkpoint.manifests(finished)[21]["extended"] == wanted
    assert read_metrics(finished)["extended"] == wanted
    assert "5, 6 from step 15, 7 from step 18" in (finished / "report.html").read_text()
    command("evaluate", f"--workdir={finished}")  # keeps the mark
    assert read_metrics(finished)["extended"] == wanted
    done = command(*words, "--config.num_epochs=7")
    assert "was finished before" in done.out and "warning" not in done.err


def test_scores_of_another_checkpoint_do_not_replace_the_results_of_training(say, finished):
    names = ("metrics.json", "ranking.txt")
    before = [(finished / name).read_bytes() for name in names]
    step = checkpoint.find_best(checkpoint.manifests(finished))
    say("evaluate", f"--workdir={finished}", "--config.eval.checkpoint=best")
    best = read_metrics(finished, "metrics_val.json")
    assert best["step"] == step and best["overrides"] == {"eval.checkpoint": "best"}
    # Both checkpoints keep their thresholds.
    assert predict.restore(finished, num_devices=1).results == read_metrics(finished)
    assert predict.restore(finished, step="best", num_devices=1).results == best
    assert [(finished / name).read_bytes() for name in names] == before
    # The same applies if the latest checkpoint is damaged.
    flip(largest(finished, 15), random.Random(5))
    with pytest.warns(UserWarning, match="checkpoint 15 is not used"):
        say("evaluate", f"--workdir={finished}", "--config.eval.checkpoint=latest")
    assert read_metrics(finished, "metrics_val.json")["overrides"] == {"eval.checkpoint": "step 12"}
    assert predict.restore(finished, step="best", num_devices=1).results.get("step") in (None, 12)
    assert [(finished / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("empty", [False, True])
def test_run_without_its_checkpoints_is_refused_and_keeps_its_logs(
    command, config, data, words, parts, whole, tmp_path, empty
):
    """The folders of the steps are empty, or only `timing.jsonl` shows that there were steps."""
    for step in checkpoint.manifests(parts):
        shutil.rmtree(parts / "checkpoints" / str(step))
        if empty:
            (parts / "checkpoints" / str(step)).mkdir()
    if not empty:
        lines = (parts / "metrics.jsonl").read_text().splitlines(True)
        text = "".join(line for line in lines if '"split"' not in line)
        (parts / "metrics.jsonl").write_text(text)
    before = contents(parts)
    for command_words in (words, (*words, "--config.seed=3"), ("evaluate",)):
        done = command(*command_words, f"--workdir={parts}")
        assert done.code == 3 and str(parts / "checkpoints") in done.err
        assert "--workdir=FOLDER" in done.err and len(done.err.strip().splitlines()) <= 6
        assert contents(parts) == before
    for name in ("metrics.jsonl", "timing.jsonl"):  # the remedy
        (parts / name).rename(tmp_path / name)
    run(config, parts, data)
    assert_same_run(parts, whole, RUN_FILES)


def test_finished_run_without_checkpoints_keeps_its_results(command, words, finished):
    shutil.rmtree(finished / "checkpoints")
    before = contents(finished)
    assert "was finished before" in command(*words, f"--workdir={finished}").out
    for name in ("timing.jsonl", "metrics.jsonl"):  # without logs, metrics.json is the evidence
        done = command(*words, f"--workdir={finished}", "--config.num_epochs=6")
        assert done.code == 3 and "metrics.json" in done.err
        assert before.items() >= contents(finished).items()
        (finished / name).unlink()


def test_run_that_failed_before_its_first_checkpoint_starts_again(
    config, data, tmp_path, whole, capsys, monkeypatch
):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    folder, logs = tmp_path / "run", []
    for batch in (4, 4):  # twice, so that two earlier logs are kept
        with pytest.raises(OSError, match="disk is gone"):
            run(config, folder, Interrupting(data, batch, None))
        logs.append((folder / "metrics.jsonl").read_bytes())
    assert all(logs) and not checkpoint.manifests(folder)
    run(config, folder, data)
    assert "earlier logs are kept: metrics.2.jsonl" in capsys.readouterr().err
    assert [(folder / f"metrics.{i}.jsonl").read_bytes() for i in (1, 2)] == logs
    assert_same_run(folder, whole, RUN_FILES)


def test_missing_best_or_latest_checkpoint_is_reported(command, words, finished, tmp_path):
    logged = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    best = max((line["map"], line["step"]) for line in logged if "map" in line)[1]
    for number, (prefer, step, again) in enumerate((
        ("best", best, ("evaluate", "--config.eval.checkpoint=best")),
        ("latest", 15, ("check",)), ("latest", 15, (*words, "--config.num_epochs=6")),
    )):  # fmt: skip
        folder = shutil.copytree(finished, tmp_path / str(number))
        shutil.rmtree(folder / "checkpoints" / str(step))
        with pytest.warns(UserWarning, match=f"the {prefer} checkpoint, of step {step}, is missin"):
            assert command(*again, f"--workdir={folder}").code == 0


def test_resuming_with_another_list_of_identities_is_refused(config, data, parts):
    with pytest.warns(UserWarning, match="not in the training data"):  # nobody is called 999
        data = data.with_identities(("999", *data.identities[1:]))
    with pytest.raises(checkpoint.CheckpointError, match="other identities"):
        run(config, parts, data)


def test_moved_and_damaged_run_resumes_to_the_same_bytes(
    say, monkeypatch, config, data, parts, whole, tmp_path
):
    """The stopped run is moved. Its last checkpoint is damaged, and some files are deleted."""
    step = max(checkpoint.manifests(parts))
    flip(largest(parts, step), random.Random(5))
    for name in ("identities.json", "members.npz"):
        (parts / name).unlink()
    # A line of a step after the checkpoint, and half a line.
    for name in ("metrics.jsonl", "timing.jsonl"):
        with open(parts / name, "a") as file:
            file.write(f'{{"step": {step + 1}, "train_loss": 9.0}}\n{{"step": {step + 2}, "tra')
    place = parts.rename(tmp_path / "another place")
    (tmp_path / "a link").symlink_to("another place")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=f"checkpoint {step} is not used"):
        run(config, tmp_path / "a link", data)
    assert_same_run(place, whole, (*RUN_FILES, "members.npz"))
    steps = [json.loads(line)["step"] for line in (place / "timing.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    (place / "ranking.txt").unlink()  # the evaluation writes it again
    say("evaluate", "--workdir=./a link/")
    assert_same_run(place, whole)


def test_failed_save_stops_training_and_keeps_earlier_checkpoints(config, data, parts, whole):
    """The run was stopped before step 12, at which it saves the next checkpoint."""
    before = contents(parts / "checkpoints")
    # Files are limited to three quarters of the largest file of a checkpoint.
    size = largest(parts, max(checkpoint.manifests(parts))).stat().st_size
    with file_limit(size * 3 // 4), pytest.raises(OSError) as caught:
        run(config, parts, data)
    error = str(caught.value)
    assert exit_codes.get_exit_code(caught.value) == 2 and len(error.splitlines()) <= 3
    assert f"cannot save a checkpoint in '{parts / 'checkpoints' / '12'}'" in error
    assert before.items() <= contents(parts / "checkpoints").items()
    for step in checkpoint.manifests(parts):
        checkpoint.verify(parts / "checkpoints" / str(step))
    assert not list(parts.glob("*partial*"))
    lines = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    # A run writes a line every 5 steps. Step 15 was not reached, because the save at 12 failed.
    assert max(line["step"] for line in lines) == 10
    assert not (parts / "metrics.json").exists()
    run(config, parts, data)
    assert_same_run(parts, whole, RUN_FILES)
