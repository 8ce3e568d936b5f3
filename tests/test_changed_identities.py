"""Identities that a program has changed get a warning, wherever a table names people."""

import numpy as np
import pytest

from tests.helpers.seen import refused
from vidjax.apps.gallery import answers as answers_lib
from vidjax.data import labels
from vidjax.data.checks import warn_of_changed
from vidjax.evaluation import ranking
from vidjax.utils.errors import VidjaxWarning

# Identities of a table, and words of the warning.
TABLES = (
    ("1.23E+11 1,23E+11 1.2e-05 7 Ada", "a number in scientific notation (3 identities)"),
    ("1e5 123", "'1e5' looks like a number in scientific notation: "),
    ("100.0 100 1.5", "'100.0' looks like a whole number with decimals: "),
    ("100.0 100,0 7.0", "a whole number with decimals (3 identities)"),
    # A person may be called Null.
    ("nan None N/A NA <NA> #N/A NaT NULL - #NV #N/D Null 7", "missing value (12 identities)"),
    ("Mar-01 1-Mar 2024-03-01\u00a000:00:00 2024-03-01", "a date or a time (4 identities)"),
    ("TRUE", "a truth value"),
    ("#REF! #NAME? #### #DIV/0! #BEZUG! #¡REF! #NOMBRE?", "error of a spreadsheet (7 identities)"),
    ("1,234 12", "separators of thousands"),
    ("123456789012346000 12", "rounded to 15 digits"),
    ("1234567890123450 1234567890123460", "rounded to 15 digits (2 identities)"),
    ("'007", "after an apostrophe"),
    ("007 7 Ada", "'007' looks like a number that lost zeros"),
    ("Ada\u2009L Ada\u00a0L Bob", "with other blanks in other lines: "),
    ("Ada\u202fL Ada\u00a0\u00a0L Bob", "with other blanks in other lines (2 identities)"),
    ("b'Ada' ['Ada'] ('Bob',)", "text of a Python object (3 identities)"),
)
# Ordinary names and codes: codes of the same length, and a long number that ends in 0 by chance.
ORDINARY = (
    "1 2 10 100", "007 008", "Ada Nan Na Nat 't\u00a0Hooft Nan\u00a0Goldin Smith,\u00a0J.",
    "1e E10 2e4a 10E 12e4 e5 1e5a", "1e5 1a5", "1e5 c07", "3.5 7", "1.0 1.1 2.0", "10.0 1.5 2.0",
    "Jan-01 Ada-01 Ad-1", "1.2.10 3-1 12:30", "1234567890123450", "#12 #Ada [Ada] (Bob)",
    "Ada\u2009L Bob\u00a0L",
    "123456789012346000 123456789012346001", "123456789012346000 1234567890123456",
)  # fmt: skip


def places_of(identities):
    people = [name.replace("\u00a0", " ") for name in identities.split(" ")]
    return {name: f"labels.csv: line {line}" for line, name in enumerate(people, 2)}


@pytest.mark.parametrize(("identities", "words"), TABLES, ids=[table for table, _ in TABLES])
def test_changed_identities_get_one_line_and_other_names_none(identities, words):
    for names in ORDINARY:
        warn_of_changed(places_of(names))  # in tests, warnings are errors
    with pytest.warns(VidjaxWarning) as caught:
        warn_of_changed(places_of(identities))
    (text,) = [str(warning.message) for warning in caught]
    assert words in text and text.startswith("labels.csv: line ") and "\n" not in text
    assert "write identities as text" in text


CHANGED = ["1.23E+11", "nan", "Ada", "Null", "Zoe\u0308"]  # the last name is NFD


def write(folder, name, lines):
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder / name


def test_every_table_that_names_people_warns_once_and_keeps_the_names(tmp_path):
    clips = [f"c{number}" for number in range(len(CHANGED))]
    pairs = dict(zip(clips, CHANGED, strict=True))
    known = {"train": clips}
    csv = write(tmp_path, "l.csv", ["clip,identity", *map(",".join, pairs.items())])
    tsv = write(tmp_path, "l.tsv", ["clip\tidentity", *map("\t".join, pairs.items())])
    plain = write(tmp_path, "plain.tsv", map("\t".join, pairs.items()))
    direct = write(tmp_path, "train_gt.txt", [f"{clip}.mp4 {who}" for clip, who in pairs.items()])
    inverted = write(tmp_path, "val_gt.txt", [f"{who} {clip}.mp4" for clip, who in pairs.items()])
    for read, place in (
        (lambda: labels.load_label_table(csv, known)["train"], f"{csv}: line "),
        (lambda: labels.load_label_table(tsv, known)["train"], f"{tsv}: line "),
        (lambda: labels.load_label_table(direct, known)["train"], f"{direct}: line "),
        (lambda: labels.load_ground_truth(inverted), f"{inverted}: line "),
        (lambda: labels.load_label_table(pairs, known)["train"], "labels"),
        (lambda: answers_lib.read_groups(csv), f"{csv}: line "),
        (lambda: answers_lib.read_groups(plain), f"{plain}: line "),
        (lambda: {x[0]: who for who, x in ranking.read_ground_truth(direct).items()}, f"{direct}"),
    ):
        with pytest.warns(VidjaxWarning, match="'1.23E[+]11' looks like a number in sci") as caught:
            read_pairs = {clip.removesuffix(".mp4"): who for clip, who in read().items()}
        (text,) = [str(warning.message) for warning in caught]
        assert read_pairs == {**pairs, clips[-1]: "Zo\u00eb"} and text.startswith(place), text
        assert "'nan' looks like a word for a missing value (2 identities)" in text


def test_numbers_and_missing_values_of_pandas_and_parquet_are_read_as_such(tmp_path, read_here):
    """A column of pandas with a missing value contains floats."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    clips, wanted = ["a", "b", "c.mp4", "d"], {"a": "100", "b": "7", "c": "100"}
    numbers = [100.0, 7.0, 100.0, float("nan")]
    columns = (
        pyarrow.array(numbers), pyarrow.array([100.0, 7.0, 100.0, None]),
        pyarrow.array(numbers, pyarrow.float32()), pyarrow.array([100, 7, 100, None]),
        pyarrow.array(["100", "7", "100", None]),
        pyarrow.array(["100", "7", "100", None]).dictionary_encode(),
    )  # fmt: skip
    known = {"train": ["a", "b", "c", "d"]}
    for number, column in enumerate(columns):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"clip": clips, "identity": column}), path)
        with pytest.warns(VidjaxWarning) as caught:
            assert labels.load_label_table(path, known) == {"train": wanted}
        texts = [str(warning.message) for warning in caught]
        assert sum("identity is empty" in text for text in texts) == 1
        assert sum("its identity 100.0 is read as 100" in text for text in texts) == (number < 3)
    for kind in (float, np.float32):
        given = {clip: kind(number) for clip, number in zip(clips, numbers, strict=True)}
        with pytest.warns(VidjaxWarning) as caught:
            assert labels.load_label_table(given, known) == {"train": wanted}
        texts = [str(warning.message) for warning in caught]
        assert "identity 100.0 is read as 100 (such clips: 3)" in texts[1]
    # Larger floats have lost digits.
    for large in (2.0**60, np.float32(123456789)):
        with pytest.warns(VidjaxWarning, match="scientific notation"):
            labels.load_label_table({"a": large}, known)
    refused(lambda: labels.load_label_table({"a": b"Ada"}, known), "bytes", "decode()")
    path = tmp_path / "none.parquet"
    parquet.write_table(pyarrow.table({"clip": clips}), path)
    refused(lambda: labels.load_label_table(path, known), "columns clip and identity", "only clip")
