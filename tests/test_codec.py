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
    rng, clips_of = np.random.default_rng(0), {}
    for number, (name, kind) in enumerate(MODALITIES.items()):
        lengths = rng.permutation([0, 1, 2, 300, *rng.integers(0, 40, 16)]).tolist()
        clips = {f"c{i:02d}": random_clip(rng, n, *kind) for i, n in enumerate(lengths)}
        if name != "face":
            clips = {
                clip: x._replace(quality=0 * x.quality, detection=np.ones_like(x.detection))
                for clip, x in clips.items()
                if int(clip[1:]) % (2 + number)
            }
        clips_of[name] = clips
    return clips_of


@pytest.fixture(scope="module")
def records(clips, tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name, frames in clips.items():
        write_pickle(source, name, "train", frames)
    converted = prepare(source, tmp_path_factory.mktemp("cache"))
    assert converted.modalities == MODALITIES and len(converted.splits["train"].shards) == 8
    return converted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:label:DeprecationWarning")  # of protobuf, in TFDS
def test_tfds_and_our_reader_return_the_clips_that_were_written(clips, records):
    from vidjax.data.records.codec import tfds

    facts, in_order = records.splits["train"], tfds.ReadConfig(interleave_cycle_length=1)
    builder = tfds.builder_from_directory(records.splits["train"].shards[0].path.parent)
    examples = list(tfds.as_numpy(builder.as_dataset(split="train", read_config=in_order)))
    assert facts.clips == tuple(sorted(clips["face"]))
    assert [e["clip_index"] for e in examples] == facts.order.tolist()
    assert [e["clip"].decode() for e in examples] == [facts.clips[i] for i in facts.order]
    reader, places = Reader(records, ["train"]), np.random.default_rng(0).permutation(len(examples))
    messages = reader.read(places)
    assert reader.clip_index.tolist() == facts.order.tolist()
    for name, modality in MODALITIES.items():
        nothing = random_clip(np.random.default_rng(0), 0, *modality)
        for field, arrays in reader.frames(name, places, messages).items():
            for place, array in zip(places, arrays, strict=True):
                wanted = examples[place]["frames"][name][field]
                assert array.dtype == wanted.dtype
                np.testing.assert_array_equal(array, wanted)
        for example in examples:
            assert set(example) == {"clip", "clip_index", "frames"}  # no label
            clip = clips[name].get(example["clip"].decode(), nothing)
            assert len(clip.features) == facts.lengths[name][example["clip_index"]]
            for field in STORED:
                packed = example["frames"][name][field]
                assert packed.dtype == getattr(clip, field).dtype
                np.testing.assert_array_equal(packed, getattr(clip, field))


def test_records_whose_sizes_do_not_match_the_lengths_are_refused(records):
    split = records.splits["train"]
    lengths = {**split.lengths, "face": split.lengths["face"] + 1}
    other = records._replace(splits={"train": split._replace(lengths=lengths)})
    with pytest.raises(UserError, match=r"do not match the lengths(.|\n)*delete this folder"):
        Reader(other, ["train"])


@pytest.mark.nightly
def test_run_with_data_in_memory_imports_no_tensorflow(tmp_path, official_dir, python):
    """It converts, trains and reports. If records are in the cache, TFDS is not imported."""
    words = ["--config=configs/knn.py:iqiyi_vid,face", f"--config.data.dir={official_dir}"]
    code = (
        "import sys\nfrom vidjax.cli.program import main\nunread, *words = sys.argv[1:]\n"
        "assert main(words) == 0\nassert not {'tensorflow', unread} & {*sys.modules}"
    )
    for unread in ("tensorflow", "tensorflow_datasets"):
        workdir = f"--workdir={tmp_path / unread}"
        python(code, unread, *words, workdir, VIDJAX_CACHE=str(tmp_path / "cache"))
