"""Records: TFDS, batches and the reader without TensorFlow show what was written."""

import numpy as np
import pytest

from tests.helpers.clip_files import random_clip, write_pickle
from tests.helpers.datasets import prepare
from vidjax.data.clips import Modality
from vidjax.data.frame_fields import STORED
from vidjax.data.records.record_reader import Reader
from vidjax.utils.errors import UserError

MODALITIES = {
    "double": Modality(3, "float64"),
    "face": Modality(6, "float16"),
    "single": Modality(70, "float32"),
    "whole": Modality(5, "int8"),
}


@pytest.fixture(scope="module")
def clips():
    """Modality -> clip -> frames, 0 to 300 of them; all but faces lack some clips, and scores."""
    rng, found = np.random.default_rng(0), {}
    for number, (name, kind) in enumerate(MODALITIES.items()):
        lengths = rng.permutation([0, 1, 2, 300, *rng.integers(0, 40, 36)]).tolist()
        some = {f"c{i:02d}": random_clip(rng, n, *kind) for i, n in enumerate(lengths)}
        if name != "face":
            some = {
                clip: one._replace(quality=0 * one.quality, detection=np.ones_like(one.detection))
                for clip, one in some.items()
                if int(clip[1:]) % (2 + number)
            }
        found[name] = some
    return found


@pytest.fixture(scope="module")
def records(clips, tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name, some in clips.items():
        write_pickle(source, name, "train", some)
    found = prepare(source, tmp_path_factory.mktemp("cache"))
    assert found.modalities == MODALITIES and len(found.splits["train"].shards) == 8
    return found


def raw(records):
    """Returns the records of all shards as TensorFlow reads them."""
    from vidjax.data.records.streaming import tf

    paths = [str(shard.path) for shard in records.splits["train"].shards]
    return [bytes(record.numpy()) for record in tf.data.TFRecordDataset(paths)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:label:DeprecationWarning")  # of protobuf, in TFDS
def test_tfds_shows_what_was_packed(clips, records):
    from vidjax.data.records.codec import tfds

    facts, in_order = records.splits["train"], tfds.ReadConfig(interleave_cycle_length=1)
    builder = tfds.builder_from_directory(records.splits["train"].shards[0].path.parent)
    shown = list(tfds.as_numpy(builder.as_dataset(split="train", read_config=in_order)))
    assert facts.clips == tuple(sorted(clips["face"]))
    assert [e["clip_index"] for e in shown] == facts.order.tolist()
    assert [e["clip"].decode() for e in shown] == [facts.clips[i] for i in facts.order]
    messages = raw(records)
    assert len(messages) == len(shown)
    for name, modality in MODALITIES.items():
        nothing = random_clip(np.random.default_rng(0), 0, *modality)
        for example in shown:
            assert set(example) == {"clip", "clip_index", "frames"}  # no label
            clip = clips[name].get(example["clip"].decode(), nothing)
            assert len(clip.features) == facts.lengths[name][example["clip_index"]]
            for field in STORED:
                packed = example["frames"][name][field]
                assert packed.dtype == getattr(clip, field).dtype
                np.testing.assert_array_equal(packed, getattr(clip, field))


def test_every_value_without_tensorflow_is_that_of_the_message(records):
    from vidjax.data.records.streaming import tf

    messages, reader = raw(records), Reader(records, ["train"])
    places = np.random.default_rng(0).permutation(len(messages))
    read = reader.read(places)
    assert read == [messages[place] for place in places]
    rows = [tf.train.Example.FromString(message).features.feature for message in read]
    clip_index = [values["clip_index"].int64_list.value[0] for values in rows]
    assert reader.clip_index[places].tolist() == clip_index
    for name, modality in records.modalities.items():
        length = reader.lengths[name][places]
        whole = reader.frames(name, places, read)
        assert {one.dtype for one in whole["features"]} == {np.dtype(modality.dtype)}
        for field, arrays in whole.items():
            for row, array in enumerate(arrays):
                assert len(array) == length[row]
                (wanted,) = rows[row][f"frames/{name}/{field}"].bytes_list.value
                assert array.tobytes() == wanted


def test_sizes_that_do_not_follow_from_the_lengths_are_refused(records):
    split = records.splits["train"]
    lengths = {**split.lengths, "face": split.lengths["face"] + 1}
    other = records._replace(splits={"train": split._replace(lengths=lengths)})
    with pytest.raises(UserError, match=r"do not match the lengths(.|\n)*delete this folder"):
        Reader(other, ["train"])


@pytest.mark.slow
def test_a_run_that_fits_the_memory_needs_no_tensorflow(tmp_path, official_dir, python):
    """Conversion, training and report; on records that are there no TFDS either."""
    words = ["--config=configs/knn.py:iqiyi_vid,face", f"--config.data.dir={official_dir}"]
    code = (
        "import sys\nfrom vidjax.cli.program import main\nunread, *words = sys.argv[1:]\n"
        "assert main(words) == 0\nassert not {*unread.split(',')} & {*sys.modules}"
    )
    for folder, unread in (("1", "tensorflow"), ("2", "tensorflow,tensorflow_datasets")):
        workdir = f"--workdir={tmp_path / folder}"
        python(code, unread, *words, workdir, VIDJAX_CACHE=str(tmp_path / "cache"))
    assert (tmp_path / "1/ranking.txt").read_bytes() == (tmp_path / "2/ranking.txt").read_bytes()
