"""Extreme numbers and misspelt names in data are errors or warnings that name the remedy."""

import itertools
import json
import time

import numpy as np
import pytest

from tests.helpers import small_runs
from tests.helpers.cases import quick_first
from tests.helpers.clip_files import WIDTHS, write_labels, write_npz
from tests.helpers.limits import slowness
from tests.helpers.seen import refused
from vidjax.core.metrics import ClipScores
from vidjax.data import arrays, iqiyi_vid, sources
from vidjax.data.checks import find_misspelt, find_unusable
from vidjax.data.clips import Modality, Split, select_modalities
from vidjax.evaluation import scores
from vidjax.runs import config as config_lib, config_io
from vidjax.runs.checkpoint import CheckpointError
from vidjax.training import plan
from vidjax.utils import errors, exit_codes

DIM = 4


def make_clips(change=lambda x: x, count=6, widths=None):
    """Returns split -> clip -> modality -> two frames of one of nine people, after `change`."""
    rng, clips = np.random.default_rng(0), {"train": {}, "val": {}}
    people = [rng.normal(size=(9, width)) for width in (widths or {"face": DIM}).values()]
    for split, n in itertools.product(clips, range(count)):
        parts = [change(x[n % 9] + rng.normal(size=(2, x.shape[1]))) for x in people]
        clips[split][f"{split}{n}"] = dict(zip(widths or ("face",), parts, strict=True))
    return clips


def labels_of(clips):
    """Returns clip -> person. The clips of the ninth person have no label."""
    numbered = [pair for split in clips.values() for pair in enumerate(split)]
    return {name: f"p{n % 9 + 1}" for n, name in numbered if n % 9 < 8}


def load(folder, clips):
    return sources.load(clips, labels_of(clips), cache_dir=folder)


def make_config(*words):
    """Returns the configuration of a cosine classifier with overrides FIELD=VALUE."""
    config = config_lib.default()
    config.model.name = "cosine"
    return config_io.override(config, [f"--config.{word}" for word in words])


def test_features_of_zero_or_beyond_float32_are_an_error_with_a_remedy(tmp_path):
    for change, message in (
        (np.zeros_like, r"face: all features of train are 0\n.*config\.modalities"),
        (lambda x: x * 1e30, r"face: .* overflow float32\ndivide them"),
        (lambda x: x * 1e-20, r"face: .* become 0 in float32\nmultiply them"),
        (lambda x: x.astype(np.float64) * 1e300, "all 24 frames"),  # 12 clips of two frames
    ):
        with pytest.raises(ValueError, match=message):
            plan.make_plan(make_config(), load(tmp_path, make_clips(change)))


@pytest.mark.filterwarnings("ignore")
def test_check_refuses_a_modality_of_only_nan(tmp_path, command):
    clips = make_clips(widths={"face": DIM, "head": DIM})
    for modalities in clips["train"].values():
        modalities["head"][:] = np.nan
    folder = write_npz(tmp_path / "own", clips)
    write_labels(folder / "labels.csv", labels_of(clips))
    data = ("--config.data.name=arrays", f"--config.data.dir={folder}")
    done = command("check", "--config=knn:head", *data)
    assert done.code == 2 and "head: all 12 frames of train contain a NaN" in done.out
    assert "config.modalities" in done.out
    assert command("check", "--config=knn:face", *data).code == 0


def test_splits_of_zero_features_or_without_frames_give_a_warning_or_error(tmp_path):
    clips = make_clips() | {"val": make_clips(np.zeros_like)["val"]}
    with pytest.warns(UserWarning, match="all features of val are 0"):
        plan.make_plan(make_config(), load(tmp_path, clips))
    nothing = {"face": {"file": "face_train", "frames_seen": 0, "frames": 0}}
    report = {"splits": {"train": {"modalities": nothing}}}
    assert "no clip of train has a frame" in next(find_unusable(report, ["train"], ["face"]))


def test_clips_with_nan_scores_are_counted_and_ranked_last():
    """Of the clips a, b, c and d, clip d is not evaluated, so its NaN does not count."""
    ones, evaluated = np.ones(4, np.int32), np.arange(4) < 3
    split = Split("val", tuple("abcd"), ones, True, np.array([4]), 0, {"face": ones})

    def without_nan(*best):
        """Replaces NaN in `best`, the scores of the clips; returns the new scores, and counts."""
        clips = ClipScores(evaluated, np.array(best, np.float32), np.ones(4, bool))
        return scores._replace_nan(split, clips)

    with pytest.warns(UserWarning, match="1 of 3 clips .* such as b\n.*divide"):
        clips, counts = without_nan(0.5, np.nan, 0.25, np.nan)
    assert counts == {"num_nan_clips": 1} and not clips.right[1]
    assert clips.best[:3].tolist() == [0.5, -np.inf, 0.25]
    assert without_nan(0.0, 0.0, 0.0, np.nan)[1] == {}
    refused(lambda: without_nan(np.nan, np.nan, np.nan, 0.0), "3 of 3 clips ", "divide")


def test_infinite_values_in_a_configuration_are_refused():
    for word in ("noise.relabel_every_epochs=inf", "optim.learning_rate=inf", "data.balance=inf"):
        assert word.partition("=")[0] in next(config_lib.problems(make_config(word)))
    assert not list(config_lib.problems(make_config("checkpoint_every_seconds=inf")))  # allowed
    refused(lambda: make_config(f"batch_size=1{400 * '0'}"), "64 bits")  # 10 ** 400


def test_batch_larger_than_the_data_gets_a_hint_or_an_error(tmp_path):
    data = load(tmp_path, make_clips())  # 6 training clips

    def note(size, *words):
        """Returns the hint for a batch size, or "None"."""
        config = make_config(f"batch_size={size}", *words)
        return str(plan.describe_repeated_clips(config, plan.make_plan(config, data)))

    assert note(6) == note(6, "data.whole_epochs=True") == "None"
    assert "--config.batch_size=6" in note(7)
    assert note(7, "model.name=plda", "num_epochs=2") == "None"  # more steps do not change PLDA
    hint = note(7, "data.whole_epochs=True")
    assert "a step uses all clips" in hint
    assert "--config.batch_size=3" in hint  # two steps of an epoch
    refused(lambda: note(100_000_000), "batch_size=100000000", "\nuse --config.batch_size=6")


def test_error_of_short_memory_names_fields_that_may_change_in_a_resumed_run():
    text = exit_codes.describe_error(MemoryError())
    flags = [word for word in text.replace(";", "").split() if word.startswith("--config.")]
    named = {word.partition("=")[0].removeprefix("--config.") for word in flags}
    assert {"data.mode", "eval.block_size"} <= named and "new run" in text
    assert named - {*config_lib.MAY_CHANGE} == {"batch_size", "data.max_frames"}  # need a new run


def test_people_without_training_clips_give_a_warning(tmp_path):
    split = load(tmp_path, make_clips()).split("val")
    people = np.flatnonzero(split.positives) + 1
    plan.warn_of_untrained_people(split, people[: -(-len(people) // 2)])  # half: no warning
    with pytest.warns(errors.VidjaxWarning, match=f"^{len(people)} of {len(people)} people of val"):
        plan.warn_of_untrained_people(split, np.zeros(3, np.int32))


def test_misspelt_labels_fields_and_modalities_get_a_suggestion(tmp_path):
    (tmp_path / "train").mkdir()
    np.savez(tmp_path / "train" / "a.npz", face=np.ones((2, DIM)), face_qualty=np.ones(2))
    (tmp_path / "shots.csv").touch()  # the name is not similar to labels.csv
    folder = arrays.FeatureFolder(tmp_path)
    assert not folder.read_labels({"train": ["a"]})
    (tmp_path / "label.csv").write_text("clip,identity\na,1\n")
    refused(lambda: folder.read(tmp_path / "scratch"), "rename it to 'face_quality'")
    refused(lambda: folder.read_labels({"train": ["a"]}), "rename it to labels.csv")
    known = {"head": Modality(DIM, "float16")}
    refused(lambda: select_modalities(("heda",), known), "no modality 'heda': did you mean 'head'")
    # `find_misspelt` gets split -> modality -> numbers of frames of the clips.
    some, none = np.array([1, 2]), np.array([0, 0])
    (problem,) = find_misspelt({"train": {"fase": some, "head": some}, "val": {"face": some}})
    assert "'fase'" in problem and "'face'" in problem
    # In one split, no clip has both modalities, so `fase` may be a misspelt `face`.
    assert [*find_misspelt({"train": {"fase": none, "face": some}})]
    # Names that differ only in a number are not misspelt.
    assert not [*find_misspelt({"train": {"face1": some, "face2": some}, "val": {"face1": some}})]


def test_pickle_of_150000_empty_clips_is_refused_quickly(tmp_path, read_here):
    # The opcodes of {name: [], ...}: U and the length of a name, then ] for an empty list.
    clips = b"".join(b"U" + bytes([len(b"%x" % i)]) + b"%x]" % i for i in range(150_000))
    (tmp_path / "face_train.pickle").write_bytes(b"\x80\x02}(" + clips + b"u.")
    files, began = iqiyi_vid.OfficialFiles(tmp_path), time.process_time()
    refused(lambda: files.read(tmp_path / "out"), "150000 of 150000 clips are empty")
    assert time.process_time() - began < 5 * slowness()


SYSTEMS = (
    "knn.py:iqiyi_vid", "quality_fusion.py:iqiyi_vid", "mma.py:iqiyi_vid", "cosine.py:iqiyi_vid",
    "plda.py:iqiyi_vid,face,head,audio", "residual_dense.py:iqiyi_vid,one,face,head",
    "noise_classes.py:iqiyi_vid", "deepmef.py:iqiyi_vid,face,head",
)  # fmt: skip
# Name -> change of the features, and whether training refuses them (None: some systems refuse).
ODD = {
    "equal": (lambda x: 0 * x + 0.5, False), "huge": (lambda x: x * 1e30, True),
    "tiny": (lambda x: x * 1e-20, None), "missing": (lambda x: x[:0], True),
    "some 1e300": (lambda x: np.concatenate([0 * x[:1] + 1e300, x[1:]]), False),
    "one clip": (lambda x: x, None),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore", "error::RuntimeWarning")
@pytest.mark.parametrize("system", quick_first(SYSTEMS, mark=pytest.mark.nightly))
def test_training_on_extreme_features_is_finite_or_one_error(tmp_path, system):
    words = ("--config.num_epochs=2", "--config.batch_size=12", "--config.eval.report=False")
    config = small_runs.shrunk(*words, spec=f"configs/{system}")
    for name, (odd, refuses) in ODD.items():
        clips = make_clips(odd, 1 if name == "one clip" else 36, WIDTHS)
        try:
            results = small_runs.run(config, tmp_path / name, load(tmp_path / "cache", clips))
        except (ValueError, CheckpointError) as error:
            assert refuses is not False and 1 <= len(str(error).splitlines()) <= 3, (name, error)
            continue
        assert refuses is not True, name
        json.dumps(results, allow_nan=False)
        written = (tmp_path / name / "metrics.jsonl").read_text()
        assert "NaN" not in written and "Infinity" not in written
