"""Evaluation in parts: whatever the parts, they merge to the bytes of the whole."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.test_topk import full_sort
from vidjax import config_io
from vidjax.analysis import analysis
from vidjax.commands import parts
from vidjax.data.clips import BUCKETS, make_eval_plan
from vidjax.data.records import padding
from vidjax.main import main
from vidjax.run import parts as parts_lib
from vidjax.run.parts import Shard
from vidjax.steps import topk

COUNTS = (1, 3, 7)
TIMES = ("eval_seconds", "eval_date", "eval_clips_per_second")
NO_REPORT = "--config.eval.report=False"


@pytest.fixture(scope="module")
def nearest(nearest_run, tmp_path_factory):
    """A run that learns nothing, without its results."""
    folder = tmp_path_factory.mktemp("nearest") / "run"
    shutil.copytree(nearest_run, folder)
    for path in [*folder.glob("ranking*"), *folder.glob("events*")]:
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def in_parts(nearest, data, tmp_path_factory):
    """Returns a function that makes all parts of that run, on eight devices, once."""
    place = tmp_path_factory.mktemp("parts")

    @functools.cache
    def made(total):
        folder = shutil.copytree(nearest, place / str(total))
        found = make_all((folder, of(folder, NO_REPORT)), data, total)
        assert not any(before for _, before in found)
        return folder

    return made


@pytest.fixture
def parted(in_parts, tmp_path):
    """Returns a function that copies a run with its parts, and its configuration."""

    def copy(total=3):
        folder = shutil.copytree(in_parts(total), tmp_path / "run")
        return folder, of(folder, NO_REPORT)

    return copy


@pytest.fixture(scope="module")
def whole(nearest, data, tmp_path_factory):
    """What one process writes of that run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(nearest, folder)
    analysis.evaluate(of(folder, NO_REPORT), folder, data, num_devices=1)
    return results_of(folder)


def of(folder, *overrides):
    return config_io.override(config_io.load_workdir(folder), overrides)


def make(run, data, shard_text, **options):
    folder, config = run
    return parts.evaluate_part(config, folder, data, Shard.parse(shard_text), **options)


def make_all(run, data, total, **options):
    """Makes all parts, the last one first."""
    return [make(run, data, f"{k}/{total}", **options) for k in range(total, 0, -1)]


def results_of(folder, split="val"):
    """Returns what an evaluation wrote, but for its times."""
    suffix = "" if split == "val" else f"_{split}"
    metrics = json.loads((folder / f"metrics{suffix}.json").read_text())
    found = {"metrics": json.dumps({k: v for k, v in metrics.items() if k not in TIMES})}
    for name in (f"ranking{suffix}.txt", f"analysis{suffix}.npz"):
        if (folder / name).exists():
            found[name] = (folder / name).read_bytes()
    return found


def check_parts(folder, tmp_path, data, *overrides, analyse=True, split="val", totals=(3,)):
    """Merges the parts of an evaluation, and compares them with the whole."""
    words = [*overrides, *([] if analyse else [NO_REPORT])]
    whole, config = tmp_path / "whole", of(folder, *words)
    shutil.copytree(folder, whole)
    analysis.evaluate(config, whole, data, num_devices=1, analyse=analyse)
    wanted = results_of(whole, split)
    for total in totals:
        copy = tmp_path / f"of{total}"
        shutil.copytree(folder, copy)
        for path in [*copy.glob("ranking*"), *copy.glob("analysis*")]:
            path.unlink()
        make_all((copy, config), data, total, num_devices=1)
        parts.merge(config, copy, data, num_devices=1)
        assert results_of(copy, split) == wanted, total
    assert (f"analysis{'' if split == 'val' else f'_{split}'}.npz" in wanted) == analyse
    return json.loads((whole / f"metrics{'' if split == 'val' else f'_{split}'}.json").read_text())


# Which clips a part has.


def test_ranges_are_whole_and_about_equal():
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_clips = int(rng.integers(1, 200))
        count = int(rng.integers(1, num_clips + 1))
        costs = rng.choice(BUCKETS, num_clips)
        ends = parts.bounds(costs, count)
        assert ends[0] == 0 and ends[-1] == num_clips and (np.diff(ends) > 0).all()
        if count < num_clips / 50:
            sums = np.add.reduceat(costs, ends[:-1])
            assert np.abs(sums - costs.sum() / count).max() <= 2 * max(BUCKETS)


@pytest.mark.parametrize("split", ["train", "val"])
def test_parts_hold_every_clip_once_as_the_split_does(data, split):
    names, whole = ("face", "audio"), data.split(split)
    plan = make_eval_plan(whole, names)
    wanted = rows_of(data.eval_batches(plan, rows=8))
    found = {}
    for number in range(1, 6):
        chosen = parts.choose_clips(data, split, names, number, 5)
        only = np.isin(np.arange(len(whole.clips)), chosen)
        rows = rows_of(data.eval_batches(make_eval_plan(whole, names, only=only), rows=8))
        assert sorted(rows) == chosen.tolist() and not rows.keys() & found.keys()
        found |= rows
    assert found.keys() == wanted.keys() == set(range(len(whole.clips)))
    for clip, row in wanted.items():
        for name, frames in row.items():
            for field, values in frames._asdict().items():
                np.testing.assert_array_equal(values, getattr(found[clip][name], field))


def rows_of(batches):
    """Returns clip index -> modality -> frames [T] of all real rows."""
    rows = {}
    for batch in batches:
        for row in np.flatnonzero(batch.batch_mask):
            rows[int(batch.clip_index[row])] = {
                name: type(frames)(*(field[row] for field in frames))
                for name, frames in batch.frames.items()
            }
    return rows


def test_a_part_opens_its_own_files_alone(data, monkeypatch):
    opened = []

    class Spy(padding.ShardReader):
        def __init__(self, file):
            opened.append(file.path)
            super().__init__(file)

    monkeypatch.setattr(padding, "ShardReader", Spy)
    read = []
    for number in range(1, 4):
        split = data.split("train")
        chosen = parts.choose_clips(data, "train", ("face",), number, 3)
        only = np.isin(np.arange(len(split.clips)), chosen)
        opened.clear()
        assert list(data.eval_batches(make_eval_plan(split, ("face",), only=only), rows=8))
        read.append(set(opened))
    total = set().union(*read)
    assert len(total) == 8
    assert all(len(own) <= 4 for own in read)
    assert sum(map(len, read)) <= len(total) + 2  # one file at each of two ends


def test_more_parts_than_clips_are_refused(data):
    with pytest.raises(ValueError, match=r"val has 60 clips.*\n--shard=k/60"):
        parts.choose_clips(data, "val", ("face",), 3, 61)
    assert parts.choose_clips(data, "val", ("face",), 60, 60).tolist() == [59]


# Joining.


STREAMS = (
    lambda s, rng: s,
    lambda s, rng: np.round(s),
    lambda s, rng: np.zeros_like(s),
    lambda s, rng: np.where(rng.random(s.shape) < 0.8, -np.inf, s),
    lambda s, rng: np.where(s > 1, np.inf, np.float32(1e-30) * s),
)


def test_lists_of_parts_join_to_those_of_all_clips():
    rng = np.random.default_rng(0)
    for turn in range(200):
        num_clips, num_identities, k = (int(rng.integers(1, most)) for most in (90, 6, 30))
        scores = rng.standard_normal((num_clips, num_identities), np.float32)
        scores = STREAMS[turn % len(STREAMS)](scores, rng).astype(np.float32) + 0
        pool = np.flatnonzero(rng.random(num_clips) < 0.9)
        wanted = full_sort(scores[pool], pool, k)
        owner = rng.integers(0, rng.integers(1, 8), num_clips)
        tops = []
        for part in np.unique(owner):
            ranked = np.intersect1d(np.flatnonzero(owner == part), pool)
            top = full_sort(scores[ranked], ranked, k)
            width = min(k, np.sum(owner == part))
            tops.append(top._replace(scores=top.scores[:, :width], index=top.index[:, :width]))
        found = topk.join_tops([tops[i] for i in rng.permutation(len(tops))], num_identities, k)
        np.testing.assert_array_equal(found.index, wanted.index)
        assert found.scores.tobytes() == wanted.scores.tobytes()
        assert found.index.dtype == wanted.index.dtype


def test_sums_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (500, 2, 3)).astype(np.float32) ** 9
    values[7, 0, 0], values[8], values[9, 1, 1] = np.nan, 1e9, -np.inf
    mask = rng.random(500) < 0.7
    mask[7:10] = True
    totals = []
    for rows in (500, 125, 4):
        order, total = rng.permutation(500), {}
        for at in range(0, 500, rows):
            some = order[at : at + rows]
            analysis.add_to(total, {"x": analysis.add_up(values[some], mask[some])})
        totals.append(total["x"])
    assert totals[0].dtype == np.int64
    assert all((total == totals[0]).all() for total in totals)
    counted = np.clip(np.where(np.isfinite(values), values, 0), -1024, 1024)[mask]
    wanted = counted.astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(totals[0] * analysis.UNIT, wanted, atol=500 * analysis.UNIT)


# Parts of a run.


@pytest.mark.parametrize("total", COUNTS)
def test_parts_merge_to_the_bytes_of_the_whole(parted, whole, data, total):
    folder, config = parted(total)
    found = parts.merge(config, folder, data)
    assert results_of(folder) == whole
    assert found["eval_seconds"] > 0 and found["eval_clips_per_second"] > 0


def test_a_part_that_is_there_is_not_made_again(parted, data):
    run = parted()
    path = run[0] / "parts" / "val" / "2-of-3.npz"
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    again = make(run, data, "2/3")
    assert again[1] and again[0].path == path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_what_a_killed_process_leaves_is_no_part(parted, data):
    run = folder, config = parted()
    place = folder / "parts" / "val"
    (place / "2-of-3.npz").rename(place / ".2-of-3.npz.0123abcd.partial")
    with pytest.raises(ValueError, match=r"of 3 parts: 2\n.*--mode=evaluate .*--shard=2/3"):
        parts.merge(config, folder, data)
    assert not make(run, data, "2/3")[1]
    parts.merge(config, folder, data)


def test_parts_of_another_number_are_not_joined(parted, data):
    run = folder, config = parted()
    place = folder / "parts" / "val"
    (place / "3-of-3.npz").unlink()
    make(run, data, "3/4")
    with pytest.raises(ValueError, match=r"of 3 parts: 3\n.*--shard=3/3"):
        parts.merge(config, folder, data)
    (place / "3-of-4.npz").rename(place / "3-of-3.npz")
    with pytest.raises(ValueError, match=r"part 3/3: .* is that of part 3/4 of val"):
        parts.merge(config, folder, data)
    with pytest.warns(UserWarning, match="made again: .*part 3/4 of val"):
        make(run, data, "3/3")
    parts.merge(config, folder, data)
    shutil.rmtree(place)
    with pytest.raises(ValueError, match=r"no parts of val .*\n.*--shard=k/n"):
        parts.merge(config, folder, data)


def test_parts_of_another_evaluation_are_not_joined(parted, data):
    run = folder, config = parted()
    words = ["--config.eval.members=False"]
    other = config_io.override(config, words)
    with pytest.raises(ValueError, match=r"members: True -> False\n.*=False --shard=1/3"):
        parts.merge(other, folder, data, overrides=words)
    path = folder / "parts" / "val" / "1-of-3.npz"
    original = path.read_bytes()
    assert not make((folder, other), data, "1/3")[1]
    with pytest.raises(ValueError, match=r"of 3 parts: 1; part 1/3: .*eval\.members"):
        parts.merge(config, folder, data)
    assert not make(run, data, "1/3")[1]
    for key, value, reason in (
        ("checkpoint", "0" * 64, "of the checkpoint of step"),
        ("data", {"digest": "0" * 64}, "of other data, sha256 0000"),
        ("config", {"batch_size": "x"}, "of another version"),
    ):
        rewrite(path, **{key: value})
        with pytest.raises(ValueError, match=f"part 1/3: .*{reason}"):
            parts.merge(config, folder, data)
        path.write_bytes(original)
    parts.merge(config, folder, data)


def rewrite(path, arrays=(), **entries):
    """Changes arrays and facts of a part."""
    found = dict(np.load(path))
    facts = json.loads(found["facts/json"].tobytes()) | entries
    found |= dict(arrays) | {"facts/json": np.array(json.dumps(facts).encode())}
    np.savez(path, allow_pickle=True, **found)


def test_damage_is_named_and_the_part_is_made_again(parted, data):
    run = folder, config = parted()
    path = folder / "parts" / "val" / "2-of-3.npz"
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for bad in (good[:middle], bytes([good[0] ^ 1]) + good[1:], b"", flipped):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"--shard=2/3") as caught:
            parts.merge(config, folder, data)
        assert str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3
    with pytest.warns(UserWarning, match="made again"):
        assert not make(run, data, "2/3")[1]
    parts.merge(config, folder, data)


def test_arrays_of_a_stranger_are_refused(parted, data):
    folder, config = parted()
    path = folder / "parts" / "val" / "1-of-3.npz"
    others = np.load(path.with_name("2-of-3.npz"))["clips/clip"]
    before, arrays = path.read_bytes(), dict(np.load(path))
    clip, index, scores = (arrays[name] for name in ("clips/clip", "top/index", "top/scores"))
    strange = [
        {"clips/clip": clip + 1000},
        {"clips/clip": clip - 1},
        {"clips/clip": clip[::-1]},
        {"clips/clip": np.sort(np.append(clip[1:], others[0]))},  # a clip of another part
        {"clips/best": arrays["clips/best"].astype(np.float64)},
        {"clips/right": arrays["clips/right"][:-1]},
        {"top/index": index + 40},
        {"top/scores": scores * np.nan},
        {"top/index": index[:, :-1], "top/scores": scores[:, :-1]},
        {"top/index": index[:-1], "top/scores": scores[:-1]},
        {"top/more": index},
        {"top/scores": np.array([None])},
    ]
    for changed in strange:
        rewrite(path, changed)
        with pytest.raises(
            ValueError, match=r"do not fit each other|not what it says|holds Python objects"
        ):
            parts.merge(config, folder, data)
        path.write_bytes(before)
    rewrite(path, num_clips=0)
    with pytest.raises(ValueError, match=r"num_clips"):
        parts.merge(config, folder, data)
    path.write_bytes(before)
    parts.merge(config, folder, data)


def test_a_full_disk_leaves_no_part(parted, mounted):
    facts = parts_lib.read(parted(1)[0], "val", Shard(1, 1)).facts
    place = mounted("size=1m")
    if place is None:
        pytest.skip("no file system may be mounted here")
    (place / "parts" / "val").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot write '.*/1-of-1\.npz': No space left"):
        parts_lib.write(place, facts, {"top": {"x": np.zeros(1_000_000)}})
    assert not list((place / "parts" / "val").iterdir())
    with pytest.raises(FileNotFoundError):
        parts_lib.read(place, "val", Shard(1, 1))


def test_a_check_reads_the_parts(parted, capsys):
    folder, _ = parted()
    path = folder / "parts" / "val" / "1-of-3.npz"
    path.with_name("2-of-3.npz").unlink()
    main(["--mode=check", f"--workdir={folder}"])
    assert "parts/val: 2 of 3 parts, all of them whole" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["--mode=check", f"--workdir={folder}"]) == 2
    assert re.search(r"FAULT .*1-of-3\.npz' is damaged", capsys.readouterr().out)


def test_links_are_not_followed(parted, data, tmp_path):
    run = folder, config = parted(1)
    path = folder / "parts" / "val" / "1-of-1.npz"
    for place in (path.parent, path.parent.parent):
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
        for act in (lambda: make(run, data, "1/1"), lambda: parts.merge(config, folder, data)):
            with pytest.raises(ValueError, match="is a link, not a folder"):
                act()
        place.unlink()
        (tmp_path / "elsewhere").rename(place)
    path.rename(tmp_path / "part.npz")
    path.symlink_to(tmp_path / "part.npz")
    with pytest.raises(ValueError, match=r"1-of-1\.npz' is a link"):
        parts.merge(config, folder, data)


def test_parts_without_what_a_report_shows_merge_without_one(parted, data):
    run = folder, config = parted()
    with pytest.warns(UserWarning, match=r"no report: .*eval.report=False"):
        parts.merge(of(folder), folder, data)
    assert not (folder / "analysis.npz").exists()
    made = make((folder, of(folder)), data, "1/3")
    assert not made[1] and made[0].facts.observed
    assert make(run, data, "1/3")[1]  # more than a ranking needs
    parts.merge(config, folder, data)


def test_parts_of_other_versions_are_told(parted, data):
    folder, config = parted()
    path = folder / "parts" / "val" / "2-of-3.npz"
    versions = parts_lib.read(folder, "val", Shard(2, 3)).facts.versions
    rewrite(path, versions=versions | {"jax": "0.0.1"})
    with pytest.warns(UserWarning, match=r"different versions: jax .*0\.0\.1"):
        parts.merge(config, folder, data)
    rewrite(path, versions=versions | {"device": "3 x cpu"})
    parts.merge(config, folder, data)


def test_the_commands_tell_what_is_left(nearest, tmp_path, capsys):
    folder = shutil.copytree(nearest, tmp_path / "run")
    words = [f"--workdir={folder}", NO_REPORT]
    for number, left in ((2, "1 of 2 parts are to come"), (1, "--mode=merge")):
        command = ["--mode=evaluate", *words, f"--shard={number}/2"]
        assert main(command) == 0
        said = capsys.readouterr().out
        assert left in said and f"{number}/2 of val" in said
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["finished_before"] and told["shard"] == "1/2" and 0 < told["num_clips"] < 60
    assert main(["--mode=merge", *words]) == 0
    assert "MAP@100" in capsys.readouterr().out
    assert (folder / "ranking.txt").exists()


# Systems.


SEEDS = "--config.ensemble.seeds=3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "overrides", "split", "kind"),
    [
        ("mma:iqiyi_vid", (), "val", "val"),
        ("mma:iqiyi_vid", (), "test", None),  # has no ground truth
        ("mma:iqiyi_vid", (), "train", "in_sample"),  # in the order of its records
        ("residual_dense:iqiyi_vid,face", (), "val", "val"),  # frames are examples
        ("plda:iqiyi_vid", ("--config.num_epochs=2",), "val", "val"),
        ("quality_fusion:iqiyi_vid", (SEEDS,), "val", "val"),
        ("quality_fusion:iqiyi_vid,trainval", (), "val", "out_of_fold"),
    ],
)
def test_parts_of_systems_merge_to_the_whole_with_its_analysis(
    trained, data, tmp_path, spec, overrides, split, kind
):
    name, _, words = spec.partition(":")
    folder = trained(f"configs/{name}.py:{words}", *overrides)
    totals = (1, 7) if split == "test" else (3,)
    words = f"--config.eval.split={split}"
    found = check_parts(folder, tmp_path, data, words, split=split, totals=totals)
    assert found.get("map_kind") == kind
    several = name in ("quality_fusion", "residual_dense")
    assert len(found.get("members", ())) == (3 if several else 0)
    assert (config_io.load_workdir(folder).after_fusion == "examples") == ("dense" in spec)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_net_compiled_as_commands_do(trained, data, tmp_path):
    check_parts(trained("configs/mma.py:iqiyi_vid"), tmp_path, data)


@pytest.mark.slow
def test_parts_without_the_members_of_an_ensemble(trained, data, tmp_path):
    folder = trained("configs/quality_fusion.py:iqiyi_vid", SEEDS)
    words = ("--config.eval.members=False", "--config.eval.top_classes=3")
    assert "members" not in check_parts(folder, tmp_path, data, *words, analyse=False)


@pytest.mark.slow
def test_some_parts_of_a_fold_rank_few_clips(trained, data, tmp_path):
    spec = "configs/quality_fusion.py:iqiyi_vid,trainval"
    folder = trained(spec, "--config.ensemble.only=(1,)")
    assert check_parts(folder, tmp_path, data, analyse=False, totals=(7,))["num_clips"] < 60


@pytest.mark.slow
def test_a_fallback_counts_poor_clips_as_the_whole_does(trained, data, tmp_path):
    words = ("--config.model.threshold=1e9", "--config.model.threshold_share=0")
    with pytest.warns(UserWarning, match="% of the clips of val have a face"):
        folder = trained("configs/deepmef.py:iqiyi_vid,face,head", *words)
    with pytest.warns(UserWarning, match="% of the clips of val have a face") as caught:
        check_parts(folder, tmp_path, data, analyse=False)
    told = [str(one.message) for one in caught]
    assert len(told) == 2 and len(set(told)) == 1  # the whole and the merge


# Processes.


@pytest.mark.slow
def test_processes_at_the_same_time_and_one_that_is_killed(nearest, whole, data, tmp_path):
    folder = shutil.copytree(nearest, tmp_path / "run")

    def start(text):
        words = ["--mode=evaluate", f"--workdir={folder}", f"--shard={text}", NO_REPORT]
        return subprocess.Popen(
            [sys.executable, "-m", "vidjax.main", *words], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    killed = start("3/3")
    place = folder / "parts" / "val"
    while not place.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (place / "3-of-3.npz").exists()
    started = [start(text) for text in ("1/3", "2/3", "3/3", "3/3")]
    said = [one.communicate()[0] for one in started]
    assert [one.returncode for one in started] == [0, 0, 0, 0], said
    parts.merge(of(folder, NO_REPORT), folder, data)
    assert results_of(folder) == whole
