"""Evaluation in parts: whatever the parts, they merge to the bytes of the whole."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.helpers import small_runs
from tests.test_topk import full_sort
from vidjax import config_io, files
from vidjax.commands import evaluate, parts
from vidjax.data import subset
from vidjax.data.clips import BUCKETS, make_eval_plan
from vidjax.data.records import padding
from vidjax.data.sources import load_dataset
from vidjax.main import main
from vidjax.run import parts as parts_lib
from vidjax.run.parts import Shard
from vidjax.steps import exact_sums
from vidjax.steps import parts as tops_lib

COUNTS = (1, 3, 7)
TIMES = ("eval_seconds", "eval_date", "eval_clips_per_second")
NO_REPORT = "--config.eval.report=False"


@pytest.fixture(scope="module")
def data(official_dir, cache_dir):
    return load_dataset("iqiyi_vid", directory=str(official_dir), cache_dir=str(cache_dir))


@pytest.fixture(scope="module")
def nearest(data, official_dir, tmp_path_factory):
    """A run that learns nothing, without its results."""
    folder = small_runs.nearest(tmp_path_factory.mktemp("runs") / "knn", data, official_dir)
    for path in [*folder.glob("ranking*"), *folder.glob("events*")]:
        path.unlink()
    return folder


@pytest.fixture
def run(nearest, tmp_path):
    """A copy of that run, and its configuration without a report."""
    folder = tmp_path / "run"
    shutil.copytree(nearest, folder)
    return folder, of(folder, NO_REPORT)


@pytest.fixture(scope="module")
def whole(nearest, data, tmp_path_factory):
    """What one process writes of that run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(nearest, folder)
    evaluate.evaluate(of(folder, NO_REPORT), folder, data, num_devices=1)
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


def check_parts(folder, tmp_path, data, *overrides, analyse=True, split="val"):
    """Merges 1, 3 and 7 parts of an evaluation, and compares each with the whole."""
    words = [*overrides, *([] if analyse else [NO_REPORT])]
    whole, config = tmp_path / "whole", of(folder, *words)
    shutil.copytree(folder, whole)
    evaluate.evaluate(config, whole, data, num_devices=1, analyse=analyse)
    wanted = results_of(whole, split)
    for total in COUNTS:
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
        ends = subset.bounds(costs, count)
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
        chosen = subset.choose(data, split, names, number, 5)
        part = subset.Part(data, split, chosen)
        own = part.split(split)
        assert own.clips == tuple(whole.clips[i] for i in chosen)
        rows = rows_of(part.eval_batches(make_eval_plan(own, names), rows=8))
        assert sorted(rows) == list(range(len(chosen)))
        found |= {int(chosen[place]): row for place, row in rows.items()}
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
        part = subset.Part(data, "train", subset.choose(data, "train", ("face",), number, 3))
        opened.clear()
        assert list(part.eval_batches(make_eval_plan(part.split("train"), ("face",)), rows=8))
        read.append(set(opened))
    total = set().union(*read)
    assert len(total) == 8
    assert all(len(own) <= 4 for own in read)
    assert sum(map(len, read)) <= len(total) + 2  # one file at each of two ends


def test_more_parts_than_clips_are_refused(data):
    with pytest.raises(ValueError, match=r"val has 60 clips.*\n--shard=k/60"):
        subset.choose(data, "val", ("face",), 3, 61)
    assert subset.choose(data, "val", ("face",), 60, 60).tolist() == [59]


@pytest.mark.parametrize("text", ["0/3", "4/3", "a/b", "1", "3/", "/3", "1/3/3", "-1/3", "1.0/3"])
def test_a_wrong_shard_is_told_with_what_it_may_be(text, capsys):
    assert main(["--mode=evaluate", "--workdir=run", f"--shard={text}"]) == 2
    said = capsys.readouterr().err
    assert "from 1 to n" in said and len(said.splitlines()) == 2
    assert re.search(r"--shard=1/\d is the first", said)


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
            chosen = np.flatnonzero(owner == part)
            ranked = np.flatnonzero(np.isin(chosen, pool))  # by the part's own numbers
            top = full_sort(scores[chosen[ranked]], ranked, k)
            tops.append(tops_lib.renumber(top, chosen))
            assert tops[-1].index.shape == (num_identities, min(k, len(chosen)))
        found = tops_lib.join_tops([tops[i] for i in rng.permutation(len(tops))], num_identities, k)
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
    for rows in (500, 64, 7):
        order, total = rng.permutation(500), {}
        for at in range(0, 500, rows):
            some = order[at : at + rows]
            exact_sums.add_to(total, {"x": exact_sums.add_up(values[some], mask[some])})
        totals.append(total["x"])
    assert totals[0].dtype == np.int64
    assert all((total == totals[0]).all() for total in totals)
    counted = np.clip(np.where(np.isfinite(values), values, 0), -1024, 1024)[mask]
    wanted = counted.astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(totals[0] * exact_sums.UNIT, wanted, atol=500 * exact_sums.UNIT)


# Parts of a run.


@pytest.mark.parametrize("total", COUNTS)
def test_parts_merge_to_the_bytes_of_the_whole(run, whole, data, total):
    folder, config = run
    for made in make_all(run, data, total):  # on eight devices
        assert not made.before
    found = parts.merge(config, folder, data)
    assert results_of(folder) == whole
    assert found["eval_seconds"] > 0 and found["eval_clips_per_second"] > 0


def test_a_part_that_is_there_is_not_made_again(run, data):
    made = make(run, data, "2/3")
    before = contents(made.part.folder)
    again = make(run, data, "2/3")
    assert again.before and again.part == made.part
    assert contents(made.part.folder) == before


def contents(folder):
    """Returns name -> (bytes, time of the last change) of the files in a folder."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_what_a_killed_process_leaves_is_no_part(run, data):
    folder, config = run
    make_all(run, data, 3)
    part = folder / "parts" / "val" / "2-of-3"
    (part / "manifest.json").unlink()
    (part / ".top.npz.123.partial").write_bytes(b"half")
    (part / "top.npz").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"of 3 parts: 2\n.*--mode=evaluate .*--shard=2/3"):
        parts.merge(config, folder, data)
    assert not make(run, data, "2/3").before
    assert {path.name for path in part.iterdir()} == {
        ".lock", "clips.npz", "top.npz", "manifest.json"
    }  # fmt: skip
    parts.merge(config, folder, data)


def test_two_processes_do_not_make_one_part(run, data):
    folder, _ = run
    part = files.make_folder(folder / "parts" / "val" / "1-of-3")
    with files.lock(part):
        with pytest.raises(ValueError, match=r"--shard: .*1-of-3' is in use by process \d+"):
            make(run, data, "1/3")
        with files.lock(folder):  # nobody else's business
            make(run, data, "2/3")
    assert not make(run, data, "1/3").before


def test_parts_of_another_number_are_not_joined(run, data):
    folder, config = run
    with pytest.raises(ValueError, match=r"no parts of val .*\n.*--shard=k/n"):
        parts.merge(config, folder, data)
    for text in ("1/3", "2/3", "3/4"):
        make(run, data, text)
    with pytest.raises(ValueError, match=r"of 3 parts: 3\n.*--shard=3/3"):
        parts.merge(config, folder, data)
    (folder / "parts" / "val" / "3-of-4").rename(folder / "parts" / "val" / "3-of-3")
    with pytest.raises(ValueError, match=r"part 3/3: .* is that of part 3/4 of val"):
        parts.merge(config, folder, data)
    with pytest.warns(UserWarning, match="made again: .*part 3/4 of val"):
        make(run, data, "3/3")
    parts.merge(config, folder, data)


def test_parts_of_another_evaluation_are_not_joined(run, data):
    folder, config = run
    make_all(run, data, 2)
    other = config_io.override(config, ["--config.eval.block_size=8"])
    words = ["--config.eval.block_size=8"]
    with pytest.raises(ValueError, match=r"eval.block_size: 16 -> 8\n.*=8 --shard=1/2"):
        parts.merge(other, folder, data, overrides=words)
    assert not make((folder, other), data, "1/2").before
    with pytest.raises(ValueError, match=r"of 2 parts: 1; part 1/2: .*block_size"):
        parts.merge(config, folder, data)
    make(run, data, "1/2")
    manifest = folder / "parts" / "val" / "2-of-2" / "manifest.json"
    original = manifest.read_text()
    for key, value, reason in (
        ("checkpoint", "0" * 64, "of the checkpoint of step"),
        ("data", {"name": "x", "dir": None, "digest": "0" * 64}, "of other data, sha256 0000"),
        ("config", {"batch_size": "x"}, "of another version"),
    ):
        rewrite(manifest, **{key: value})
        with pytest.raises(ValueError, match=f"part 2/2: .*{reason}"):
            parts.merge(config, folder, data)
        manifest.write_text(original)
    parts.merge(config, folder, data)


def rewrite(path, **entries):
    """Changes entries of a manifest, and its sha256."""
    manifest = json.loads(path.read_text()) | entries
    del manifest["sha256"]
    path.write_text(json.dumps(manifest | {"sha256": files.sha256_json(manifest)}))


@pytest.mark.parametrize("name", ["top.npz", "clips.npz", "manifest.json"])
def test_damage_is_named_and_the_part_is_made_again(run, data, name):
    folder, config = run
    make_all(run, data, 2)
    path = folder / "parts" / "val" / "2-of-2" / name
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], bytes([good[0] ^ 1]) + good[1:], None):
        path.unlink()
        if bad is not None:
            path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"--shard=2/2") as caught:
            parts.merge(config, folder, data)
        assert name == "manifest.json" or str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(run, data, "2/2")
    assert path.read_bytes() == good or name == "manifest.json"
    parts.merge(config, folder, data)


def test_arrays_of_a_stranger_are_refused(run, data):
    folder, config = run
    make_all(run, data, 2)
    part = folder / "parts" / "val" / "1-of-2"
    before = {path.name: path.read_bytes() for path in part.iterdir()}
    clips, top = (dict(np.load(part / name)) for name in ("clips.npz", "top.npz"))
    strange = [
        ("clips.npz", clips | {"clip": clips["clip"] + 1000}),
        ("clips.npz", clips | {"clip": clips["clip"] - 1}),
        ("clips.npz", clips | {"clip": clips["clip"][::-1]}),
        ("clips.npz", clips | {"clip": clips["clip"] + 20}),  # clips of the other part
        ("clips.npz", clips | {"best": clips["best"].astype(np.float64)}),
        ("clips.npz", {"clip": clips["clip"]}),
        ("top.npz", top | {"index": top["index"] + 40}),
        ("top.npz", top | {"scores": top["scores"] * np.nan}),
        ("top.npz", {name: values[:, :-1] for name, values in top.items()}),
        ("top.npz", {name: values[:-1] for name, values in top.items()}),
        ("top.npz", {**top, "more": top["index"]}),
        ("top.npz", {"scores": np.array([None])}),
    ]
    for name, arrays in strange:
        np.savez(part / name, **arrays)
        digest = files.sha256_file(part / name)
        listed = json.loads(before["manifest.json"])["files"] | {name: digest}
        rewrite(part / "manifest.json", files=listed)
        with pytest.raises(
            ValueError, match=r"do not fit each other|not what it says|holds Python objects"
        ):
            parts.merge(config, folder, data)
        for file, content in before.items():
            (part / file).write_bytes(content)
    parts.merge(config, folder, data)


def test_a_full_disk_leaves_no_part(mounted):
    place = mounted("size=1m")
    if place is None:
        pytest.skip("no file system may be mounted here")
    small, large = {"x": np.zeros(1000)}, {"x": np.zeros(1_000_000)}
    with pytest.raises(OSError, match=r"cannot write '.*/top\.npz': No space left"):
        parts_lib.write(place, {}, {"clips": small, "top": large})
    assert [path.name for path in place.iterdir()] == ["clips.npz"]
    with pytest.raises(FileNotFoundError):
        parts_lib.read(place, "val", Shard(1, 1))


def test_a_check_reads_the_parts(run, data, capsys):
    folder, _ = run
    make(run, data, "1/2")
    main(["--mode=check", f"--workdir={folder}"])
    assert "parts/val: 1 of 2 parts, sha256 agrees" in capsys.readouterr().out
    path = folder / "parts" / "val" / "1-of-2" / "top.npz"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["--mode=check", f"--workdir={folder}"]) == 2
    assert re.search(r"FAULT .*top\.npz' is damaged", capsys.readouterr().out)


def test_links_are_not_followed(run, data, tmp_path):
    folder, config = run
    make(run, data, "1/1")
    part = folder / "parts" / "val" / "1-of-1"
    for path in (part, part.parent, part.parent.parent):
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        for act in (lambda: make(run, data, "1/1"), lambda: parts.merge(config, folder, data)):
            with pytest.raises(ValueError, match="is a link, not a folder"):
                act()
        path.unlink()
        (tmp_path / "elsewhere").rename(path)
    (part / "top.npz").rename(tmp_path / "top.npz")
    (part / "top.npz").symlink_to(tmp_path / "top.npz")
    with pytest.raises(ValueError, match=r"top\.npz' is a link"):
        parts.merge(config, folder, data)


def test_parts_without_what_a_report_shows_merge_without_one(run, data):
    folder, config = run
    make_all(run, data, 2)
    with pytest.warns(UserWarning, match=r"no report: .*eval.report=False"):
        parts.merge(of(folder), folder, data)
    assert not (folder / "analysis.npz").exists()
    made = make((folder, of(folder)), data, "1/2")
    assert not made.before and made.part.manifest["observed"]
    assert make(run, data, "1/2").before  # more than a ranking needs
    parts.merge(config, folder, data)


def test_parts_of_other_versions_are_told(run, data):
    folder, config = run
    make_all(run, data, 2)
    manifest = folder / "parts" / "val" / "2-of-2" / "manifest.json"
    versions = json.loads(manifest.read_text())["versions"]
    rewrite(manifest, versions=versions | {"jax": "0.0.1"})
    with pytest.warns(UserWarning, match=r"different versions: jax .*0\.0\.1"):
        parts.merge(config, folder, data)
    rewrite(manifest, versions=versions | {"device": "3 x cpu"})
    parts.merge(config, folder, data)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("--mode=merge",), "--workdir=FOLDER"),
        (("--mode=merge", "--workdir=RUN", "--shard=1/2"), "--mode=evaluate"),
        (("--workdir=RUN", "--shard=1/2", "--config=knn"), "--mode=evaluate"),
        (("--mode=merge", "--workdir=RUN", "--runs=a,b"), "--mode=evaluate --runs=A,B"),
        (("--mode=evaluate", "--workdir=RUN", "--runs=a,b", "--shard=1/2"), "in one process"),
        (("--mode=merge", "--workdir=RUN", "--config=knn"), "--config.FIELD=VALUE"),
        (("--mode=merge", "--workdir=RUN", "--config.eval.split=tset"), "test, train, val"),
        (("--mode=merge", "--workdir=RUN"), "--workdir=RUN --shard=k/n"),
    ],
)
def test_mistakes_in_the_words(run, capsys, monkeypatch, words, remedy):
    folder, _ = run
    folder.rename(folder.parent / "RUN")
    monkeypatch.chdir(folder.parent)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert remedy in said
    assert said.startswith("vidjax: ") and len(said.splitlines()) <= 3


def test_the_commands_tell_what_is_left(run, capsys):
    folder, _ = run
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


@pytest.fixture(scope="module")
def train(data, tmp_path_factory):
    def trained(*overrides, spec="configs/mma.py:iqiyi_vid"):
        config = small_runs.shrunk(*overrides, spec=spec)
        folder = tmp_path_factory.mktemp("runs") / "run"
        small_runs.run(config, folder, data)
        return folder

    return trained


@pytest.mark.slow
def test_a_net_with_its_analysis(train, data, tmp_path):
    folder = train()
    found = check_parts(folder, tmp_path / "val", data)
    assert found["map_kind"] == "val"
    words = ("--config.eval.split=test",)  # has no ground truth
    check_parts(folder, tmp_path / "test", data, *words, split="test")
    words = ("--config.eval.split=train",)  # which it knows, in the order of its records
    assert check_parts(folder, tmp_path / "train", data, *words, split="train")["map_kind"] == (
        "in_sample"
    )


@pytest.mark.slow
@pytest.mark.optimized
def test_a_net_compiled_as_commands_do(train, data, tmp_path):
    check_parts(train(), tmp_path, data)


@pytest.mark.slow
def test_an_ensemble_with_its_members(train, data, tmp_path):
    folder = train("--config.ensemble.seeds=3", spec="configs/quality_fusion.py:iqiyi_vid")
    assert len(check_parts(folder, tmp_path / "all", data)["members"]) == 3
    words = ("--config.eval.members=False", "--config.eval.top_classes=3")
    assert "members" not in check_parts(folder, tmp_path / "one", data, *words, analyse=False)


@pytest.mark.slow
def test_frames_as_examples(train, data, tmp_path):
    folder = train(spec="configs/residual_dense.py:iqiyi_vid,face")
    assert config_io.load_workdir(folder).after_fusion == "examples"
    check_parts(folder, tmp_path, data)


@pytest.mark.slow
def test_the_closed_form(train, data, tmp_path):
    check_parts(train(spec="configs/plda.py:iqiyi_vid"), tmp_path, data)


@pytest.mark.slow
def test_clips_that_some_members_were_not_trained_on(train, data, tmp_path):
    spec = "configs/quality_fusion.py:iqiyi_vid,trainval"
    folder = train(spec=spec)
    found = check_parts(folder, tmp_path / "all", data)
    assert found["map_kind"] == "out_of_fold" and len(found["members"]) == 3
    folder = train("--config.ensemble.only=(1,)", spec=spec)
    found = check_parts(folder, tmp_path / "one", data, analyse=False)
    assert found["num_clips"] < 60  # some parts rank few clips


@pytest.mark.slow
def test_a_fallback_counts_poor_clips_as_the_whole_does(train, data, tmp_path):
    words = ("--config.model.threshold=1e9", "--config.model.threshold_share=0")
    with pytest.warns(UserWarning, match="% of the clips of val have a face"):
        folder = train(*words, spec="configs/deepmef.py:iqiyi_vid,face,head")
    with pytest.warns(UserWarning, match="% of the clips of val have a face") as caught:
        check_parts(folder, tmp_path, data, analyse=False)
    told = [str(one.message) for one in caught]
    assert len(told) == 1 + len(COUNTS) and len(set(told)) == 1  # the whole and every merge


# Processes.


@pytest.mark.slow
def test_processes_at_the_same_time_and_one_that_is_killed(run, whole, data, cache_dir):
    folder, config = run

    def start(text):
        words = ["--mode=evaluate", f"--workdir={folder}", f"--shard={text}", NO_REPORT]
        return subprocess.Popen(
            [sys.executable, "-m", "vidjax.main", *words], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    killed = start("3/3")
    lock = folder / "parts" / "val" / "3-of-3" / ".lock"
    while not lock.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (lock.parent / "manifest.json").exists()
    started = [start(text) for text in ("1/3", "2/3", "3/3", "3/3")]
    said = [one.communicate()[0] for one in started]
    codes = [one.returncode for one in started]
    # Of two for the same part, the later one is refused, or finds it finished.
    assert codes[:2] == [0, 0] and sorted(codes[2:]) in ([0, 0], [0, 2]), said
    if 2 in codes:
        assert "is in use by process" in said[codes.index(2)]
    parts.merge(config, folder, data)
    assert results_of(folder) == whole
