"""Faults of checkpoints: random damage, another configuration, a full disk; nothing is lost."""

import contextlib
import json
import random
import re
import shutil
import signal
import warnings

import jax
import numpy as np
import pytest

from tests.campaigns.mutations import cut, flip, remove
from tests.helpers.limits import file_limit, filled
from tests.helpers.seen import contents
from tests.helpers.small_runs import (
    ROOT,
    RUN_FILES,
    STREAMED,
    Interrupting,
    assert_same_run,
    flat,
    run,
)
from vidjax.cli import program
from vidjax.core import devices
from vidjax.runs import checkpoint, config_io, signals
from vidjax.utils import files, messages

# Where a save fails, threads of Orbax complain after it to an event loop that is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SPEC = "configs/quality_fusion.py:iqiyi_vid,face"
WORDS = (
    "--config.model.layers=((256,'swish',True,0.5),)",
    "--config.batch_size=32",
    "--config.num_epochs=8",
    "--config.log_every_steps=5",
    "--config.eval.every_epochs=3",
    "--config.eval.block_size=16",
    STREAMED,
)


# ---- random damage, in a folder of two steps


def blank(path, rng):
    del rng
    path.write_bytes(bytes(path.stat().st_size))


def replace(path, rng):
    path.write_bytes(rng.randbytes(rng.randrange(200)))


def make_items(seed):
    rng = np.random.default_rng(seed)
    params = {"a": rng.normal(size=(40, 20)).astype(np.float32), "b": np.arange(5, dtype=np.int32)}
    return {"params": params, "train": {"rng": jax.random.key(seed)}, "model_state": {}}


def content_of(items):
    return {name: x.tobytes() for name, x in flat(items).items()}


@pytest.mark.slow
def test_random_damage_is_never_restored(tmp_path, campaign):
    """Flipped bits, cuts, removals: a good step is used if there is one, and nothing is deleted."""
    pristine = tmp_path / "pristine"
    everywhere = devices.replicated(devices.make_mesh(1))
    scores = {3: 0.9, 8: 0.1}
    saved = {step: content_of(make_items(step)) for step in scores}
    for step, score in scores.items():
        checkpoint.save(pristine, step, make_items(step), {"map": score, "evaluated": True})
    folder = pristine / "checkpoints"
    users = ("7_backup/manifest.json", "11/weights.bin", "notes.txt", "08/x")
    for name in users:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"the user's {name}")
    before = contents(folder)
    files = [name for name in before if name not in users and before[name]]
    rng = random.Random(0)
    found_steps = []
    for trial in range(1000 if campaign else 30):
        workdir = tmp_path / "damaged"
        shutil.copytree(pristine, workdir)
        for _ in range(rng.randrange(1, 4)):
            path = workdir / "checkpoints" / rng.choice(files)
            damage = rng.choice((flip, flip, cut, remove, blank, replace))
            if path.exists() and path.stat().st_size:
                damage(path, rng)
        after = contents(workdir / "checkpoints")
        touched = {int(name.split("/")[0]) for name in files if after.get(name) != before[name]}
        good = scores.keys() - touched
        prefer = ("latest", "best")[trial % 2]
        order = (8, 3) if prefer == "latest" else (3, 8)
        wanted = next((step for step in order if step in good), None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = checkpoint.find(workdir, prefer)
            except checkpoint.CheckpointError:
                found = None
            assert contents(workdir / "checkpoints") == after
            if found is None:
                assert wanted is None, (trial, touched)
                found_steps.append(None)
            else:
                step = found.manifest["step"]
                restored = checkpoint.load(found, make_items(0), everywhere)
                assert content_of(restored) == saved[step], trial
                assert step == wanted or step in touched, trial  # a blank that means nothing
                assert step == order[0] or caught, trial
                found_steps.append(step)
            if trial % 10 == 0 and found is not None:  # and training goes on to step 8 again
                checkpoint.set_aside_later(workdir, found.manifest["step"])
                checkpoint.save(workdir, 8, make_items(8), {"evaluated": True})
                checkpoint.save(workdir, 8, make_items(8), {"map": 0.2})
                again = checkpoint.find(workdir)
                assert again is not None and again.manifest["step"] == 8
                assert content_of(checkpoint.load(again, make_items(0), everywhere)) == saved[8]
        left = contents(workdir / "checkpoints")
        texts = set(left.values())
        assert all(before[name] in texts for name in users), trial
        shutil.rmtree(workdir)
    assert {3, 8, None} <= set(found_steps)


def test_a_folder_of_the_user_that_bears_a_steps_name_is_kept(tmp_path):
    folder = tmp_path / "checkpoints" / "8"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_text("the user's")
    assert checkpoint.find(tmp_path) is None
    checkpoint.save(tmp_path, 8, make_items(8), {})
    assert (tmp_path / "checkpoints" / "8.damaged" / "weights.bin").read_text() == "the user's"


# ---- a run


@pytest.fixture(scope="module")
def words(official_dir, cache_dir):
    """The run's words on the command line, but for its folder."""
    places = (f"--config.data.dir={official_dir}", f"--config.data.cache_dir={cache_dir}")
    return (f"--config={ROOT / SPEC}", *WORDS, *places)


@pytest.fixture(scope="module")
def config(words):
    return config_io.override(config_io.load_file(words[0].partition("=")[2]), words[1:])


@pytest.fixture(scope="module")
def whole(config, data, tmp_path_factory):
    """The folder of a run that was never stopped: evaluated at steps 9, 18 and 24."""
    folder = tmp_path_factory.mktemp("checkpoints") / "whole"
    run(config, folder, data)
    return folder


@pytest.fixture(scope="module")
def stopped(config, data, tmp_path_factory):
    """The folder of the same run, stopped by SIGINT after step 9."""
    folder = tmp_path_factory.mktemp("checkpoints") / "stopped"
    with pytest.raises(signals.Interrupted):
        run(config, folder, Interrupting(data, 12, signal.SIGINT))
    assert 9 < max(checkpoint.manifests(folder)) < 18
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "finished")


@pytest.fixture
def parts(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "parts")


def command(capsys, *words):
    """Runs the command line in this process; returns the exit code and what it complained of."""
    capsys.readouterr()
    code = program.main(words)
    said = capsys.readouterr().err.splitlines()
    begin = [i for i, line in enumerate(said) if line.startswith("vidjax: ")]
    complaint = said[begin[-1] :] if begin else []
    assert bool(complaint) == bool(code)
    assert len(complaint) <= 3, complaint
    return code, "\n".join(complaint)


def largest(workdir, step):
    files = (workdir / "checkpoints" / str(step) / "state").rglob("*")
    return max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.slow
def test_a_manifest_that_lacks_an_entry_is_one_error(capsys, words, parts):
    manifests = checkpoint.manifests(parts)
    for name in ("members_sha256", "config", "modalities"):
        for step, manifest in manifests.items():
            manifest = {key: value for key, value in manifest.items() if key != name}
            files.write_manifest(parts / "checkpoints" / str(step) / "manifest.json", manifest)
        for more in (words, ("--mode=evaluate", *words[-2:])):
            code, said = command(capsys, *more, f"--workdir={parts}")
            assert code == 3 and f"has no entry '{name}'" in said, said


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("num_identities", None, "got `null`"),
        ("seconds", None, "got `null`"),
        ("map", None, "got `null`"),
        ("evaluated", None, "got `null`"),
        ("num_identities", -1, "`int` >= 1"),
        ("num_clips", 0, "`int` >= 1"),
        ("num_clusters", 1 << 40, "`int` <= "),
        ("modalities", {"f": 0}, "`int` >= 1"),
    ],
)
def test_a_manifest_with_a_null_or_a_size_out_of_range_is_damaged(tmp_path, name, value, kind):
    folder = tmp_path / "checkpoints" / "3"
    (folder / "state").mkdir(parents=True)
    entries = {"step": 3, "files": {}, "arrays": {}, "num_clusters": None, "num_identities": 2}
    files.write_manifest(folder / "manifest.json", entries)
    assert checkpoint.read_manifest(folder) == entries
    files.write_manifest(folder / "manifest.json", {**entries, name: value})
    with pytest.raises(checkpoint.DamagedError, match=rf"{re.escape(kind)}.*{name}"):
        checkpoint.read_manifest(folder)
    assert checkpoint.manifests(tmp_path) == {}


@pytest.mark.slow
def test_no_score_is_computed_from_damaged_weights(capsys, finished):
    for step in checkpoint.manifests(finished):
        flip(largest(finished, step), random.Random(step))
    before = contents(finished)
    for prefer in ("latest", "best"):
        with pytest.warns(UserWarning, match="is not used"):
            code, said = command(
                capsys,
                "--mode=evaluate",
                f"--workdir={finished}",
                f"--config.eval.checkpoint={prefer}",
            )
        assert code == 3
        assert "every checkpoint" in said and str(finished) in said
        assert contents(finished) == before


def change_digit(path):
    text = path.read_text()
    path.write_text(text.replace('"gamma": 2.0', '"gamma": 6.0'))
    assert path.read_text() != text


def swap_names(path):
    names = json.loads(path.read_text())
    path.write_text(json.dumps([names[1], names[0], *names[2:]]))


@pytest.mark.slow
def test_what_gives_a_checkpoint_its_meaning_is_verified(capsys, finished):
    ranking = (finished / "ranking.txt").read_bytes()
    for name, damage in (
        ("identities.json", swap_names),
        ("identities.json", lambda path: path.unlink()),
        ("identities.json", lambda path: path.write_text("7")),
        ("members.npz", lambda path: cut(path, random.Random(0))),
        ("members.npz", lambda path: path.unlink()),
        ("config.json", change_digit),
    ):
        before = (finished / name).read_bytes()
        damage(finished / name)
        code, said = command(capsys, "--mode=evaluate", f"--workdir={finished}")
        assert code == 3
        assert str(finished / name) in said
        assert (finished / "ranking.txt").read_bytes() == ranking
        (finished / name).write_bytes(before)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_what_was_lost_beside_the_checkpoint_is_written_anew(
    config, data, finished, whole, damaged
):
    """The files are written as the message says; a damaged step is trained to the same bits."""
    for name in ("identities.json", "members.npz", "metrics.json", "ranking.txt"):
        (finished / name).unlink()
    if damaged:
        flip(largest(finished, 24), random.Random(5))
    told = pytest.warns(UserWarning, match="checkpoint 24 is not used")
    with told if damaged else contextlib.nullcontext():
        run(config, finished, data)
    assert_same_run(finished, whole, RUN_FILES)
    assert (finished / "checkpoints" / "24.damaged" / "manifest.json").exists() == damaged
    assert (finished / "members.npz").read_bytes() == (whole / "members.npz").read_bytes()


# ---- another configuration, other data


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["config.json", "the manifest's"])
def test_another_configuration_is_refused_with_the_difference(capsys, words, parts, kept):
    """Even where config.json is gone: the checkpoint remembers."""
    before = contents(parts / "checkpoints")
    if not kept:
        (parts / "config.json").unlink()
    for word, shown in [
        ("model.layers=((16,'swish',True,0.5),)", "model.layers: ((256,"),
        ("seed=3", "seed: 0 -> 3"),
        ("modalities=head,face", "modalities: ('face',) -> ('head', 'face')"),
        ("optim.clip_norm=0.5", "optim.clip_norm: 0.0 -> 0.5"),
        ("eval.block_size=32", "eval.block_size: 16 -> 32"),
        ("num_epochs=2", "num_epochs: 8.0 -> 2.0"),
    ]:
        code, said = command(capsys, *words, f"--workdir={parts}", f"--config.{word}")
        assert code == 2, said
        assert shown in said and "use another workdir" in said
    assert contents(parts / "checkpoints") == before


@pytest.mark.slow
def test_more_epochs_go_on_and_a_kill_leaves_the_run_unfinished(
    config, words, data, finished, capsys
):
    more = ("--config.num_epochs=9", "--config.checkpoint_every_seconds=77")
    with pytest.raises(signals.Interrupted):
        run(config_io.override(config, more), finished, Interrupting(data, 1, signal.SIGINT))
    assert config_io.load_workdir(finished).num_epochs == 9
    code, said = command(capsys, *words, f"--workdir={finished}")
    assert code == 2 and "num_epochs: 9.0 -> 8.0" in said
    assert command(capsys, *words, *more, f"--workdir={finished}")[0] == 0
    assert max(checkpoint.manifests(finished)) == 27
    assert json.loads((finished / "metrics.json").read_text())["step"] == 27


@pytest.mark.slow
def test_another_list_of_identities_is_refused(config, data, parts):
    with pytest.warns(UserWarning, match="without a class"):
        data = data.with_identities(("999", *data.identities[1:]))
    with pytest.raises(checkpoint.CheckpointError, match="another list of identities"):
        run(config, parts, data)


# ---- moved, cut and full


@pytest.mark.slow
@pytest.mark.parametrize("linked", [False, True])
def test_a_workdir_may_be_anywhere(capsys, monkeypatch, finished, whole, tmp_path, linked):
    """Copied, moved, behind a link, with a space, a slash at its end, or relative."""
    place = tmp_path / "another place"
    if linked:
        place.symlink_to(finished, target_is_directory=True)
    else:
        finished.rename(place)
    monkeypatch.chdir(tmp_path)
    given = "./another place" if linked else f"{place}/"
    (place / "ranking.txt").unlink()
    assert command(capsys, "--mode=evaluate", f"--workdir={given}")[0] == 0
    assert (place / "ranking.txt").read_bytes() == (whole / "ranking.txt").read_bytes()


@pytest.mark.slow
def test_a_moved_run_with_half_lines_goes_on_to_the_same_bytes(config, data, parts, whole):
    """Lines after the checkpoint and a half line, as a kill leaves them; none twice, none gone."""
    step = max(checkpoint.manifests(parts))
    for name in ("metrics.jsonl", "timing.jsonl"):
        with open(parts / name, "a") as file:
            file.write(f'{{"step": {step + 1}, "train_loss": 9.0}}\n{{"step": {step + 2}, "tra')
    place = parts.rename(parts.parent / "elsewhere")
    run(config, place, data)
    assert_same_run(place, whole, RUN_FILES)
    steps = [json.loads(line)["step"] for line in (place / "timing.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def failing_run(config, folder, data):
    """Trains into a folder where that must fail; returns what the command line would say."""
    with pytest.raises(OSError) as caught:
        run(config, folder, data)
    assert messages.exit_code(caught.value) == 2
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def assert_nothing_lost(folder, before):
    """Asserts that the earlier steps are as they were and that no name is of half a file."""
    after = contents(folder / "checkpoints")
    assert {name: after.get(name) for name in before} == before
    found = checkpoint.find(folder)
    assert found is not None
    for step in checkpoint.manifests(folder):
        checkpoint.verify(folder / "checkpoints" / str(step))
    assert not list(folder.glob("*partial*"))
    for name in ("config.json", "identities.json"):
        json.loads((folder / name).read_text())


@pytest.mark.slow
def test_a_save_that_fails_surfaces_at_once_and_loses_nothing(config, data, parts, whole):
    step = max(checkpoint.manifests(parts))
    before = contents(parts / "checkpoints")
    with file_limit(largest(parts, step).stat().st_size * 3 // 4):
        said = failing_run(config, parts, data)
    assert f"cannot save a checkpoint in '{parts / 'checkpoints' / '18'}'" in said
    assert_nothing_lost(parts, before)
    lines = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) < 18 + 5  # the save of step 18 was the last act
    assert not (parts / "metrics.json").exists()
    run(config, parts, data)
    assert_same_run(parts, whole, RUN_FILES)


@pytest.fixture
def small_disk(mounted):
    return mounted("size=16m,mode=777") or pytest.skip("no file system may be mounted here")


@pytest.mark.slow
def test_a_disk_that_fills_up_loses_nothing(config, data, stopped, whole, small_disk, campaign):
    """Filled but for some bytes: writing fails at the start, in a log or in a save, by how many."""
    parts = small_disk / "parts"
    rng = np.random.default_rng(0)
    step = stopped / "checkpoints" / str(max(checkpoint.manifests(stopped)))
    one_save = sum(len(content) for content in contents(step).values())
    shares = rng.uniform(0, 0.9, 20) if campaign else (0.0, 0.5)
    failed = []
    for size in (int(share * one_save) for share in shares):
        shutil.copytree(stopped, parts)
        before = contents(parts / "checkpoints")
        with filled(small_disk, size):
            said = failing_run(config, parts, data)
        assert str(parts) in said and "No space left" in said, said
        assert_nothing_lost(parts, before)
        failed.append(said.split("'")[1].removeprefix(str(parts)))
        run(config, parts, data)
        assert_same_run(parts, whole, RUN_FILES)
        shutil.rmtree(parts)
    assert len(set(failed)) > 1, failed
