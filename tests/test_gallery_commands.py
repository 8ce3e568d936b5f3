"""`python -m vidjax.gallery`: what a user types and sees, mistakes, files of answers, Qdrant."""

import csv
import json
import shutil

import numpy as np
import pytest

import vidjax
from tests.helpers import made_galleries, small_runs
from vidjax import ranking
from vidjax.data.load import load_dataset
from vidjax.gallery import answers as answers_lib
from vidjax.gallery import commands, qdrant
from vidjax.gallery.people import People
from vidjax.run import workdir as workdir_lib

WIDTH = 24


@pytest.fixture(scope="module")
def data(official_dir, cache_dir):
    return load_dataset("iqiyi_vid", directory=official_dir, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data, official_dir):
    return small_runs.nearest(tmp_path_factory.mktemp("runs") / "knn", data, official_dir)


@pytest.fixture(scope="module")
def made(tmp_path_factory, run, data):
    """A gallery that no test changes."""
    return vidjax.Gallery.create(tmp_path_factory.mktemp("galleries") / "g", run, data)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.people.folder, tmp_path / "g")


@pytest.fixture
def say(capsys):
    """Runs a command and returns what it printed."""

    def run(*words, code=0):
        capsys.readouterr()
        found = commands.main([str(word) for word in words])
        said = capsys.readouterr()
        assert found == code, said.err
        if code:
            assert 1 <= len(said.err.strip().splitlines()) <= 3
            assert "Traceback" not in said.err and not said.out
        return said.err if code else said.out

    return run


def write_clips(folder, people, seed=0):
    """Writes a folder of `.npz` files, two clips of each of some people."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for person in people:
        centre = np.random.default_rng(made_galleries.hash_of(person)).normal(size=WIDTH)
        for turn in range(2):
            face = 3 * (centre + 0.5 * rng.normal(size=(3, WIDTH)))
            np.savez(folder / f"{person} {turn}.npz", face=face.astype(np.float16))


def test_a_person_comes_and_goes(say, folder, tmp_path):
    write_clips(tmp_path / "ada", ["Ada"])
    write_clips(tmp_path / "new", ["Ada", "Grace"], seed=1)
    before = made_galleries.contents(folder)
    listed = say("list", folder)
    assert "people      12" in listed and "Ada" not in listed

    said = say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity=Ada")
    assert "enrolled    2 clips, 0 were there" in said and "people      13" in said
    assert json.loads(say("list", folder, "--json"))["identities"]["Ada"] == 2
    again = say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity=Ada")
    assert "enrolled    0 clips, 2 were there" in again and "version     2" in again

    other = tmp_path / "other"  # of the same name, with other frames
    write_clips(other, ["Ada"], seed=2)
    said = say("enrol", folder, f"--input={other}", "--identity=Ada", code=2)
    assert "clip 'Ada 0' is enrolled with another vector" in said
    said = say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity=Eve", code=2)
    assert "clip 'Ada 0' is enrolled as 'Ada', not 'Eve'" in said and "--clip=" in said

    said = say("remove", folder, "--identity=Ada")
    assert "removed     2 clips" in said and "people      12" in said
    assert made_galleries.contents(folder) == before


def test_clips_without_a_usable_frame_are_named(say, folder, tmp_path):
    write_clips(tmp_path / "ada", ["Ada"])
    for name in ("dead", "gone"):
        np.savez(tmp_path / "ada" / f"{name}.npz", face=np.zeros((0, WIDTH), np.float16))
    with pytest.warns(UserWarning, match="2 clips without a usable frame .*: dead, gone"):
        said = say("enrol", folder, f"--input={tmp_path / 'ada'}", "--identity=Ada")
    assert "enrolled    2 clips" in said
    rows = say("identify", folder, f"--input={tmp_path / 'ada'}").splitlines()
    assert [row.split()[1:] for row in rows if row.split()[0] == "dead"] == [
        ["unknown", "no", "usable", "frame"]
    ]


def test_identify_prints_a_table_and_writes_files(say, folder, tmp_path, made, data):
    wanted = made.identify(data, k=3, fpir=0.1, split="val")
    said = say("identify", folder, "--split=val", "--fpir=0.1")
    table, _, summary = said.partition("\nidentify\n")
    rows = {line.split()[0]: line.split()[1] for line in table.splitlines()[1:]}
    assert rows == {clip: answer.identity or "unknown" for clip, answer in wanted.items()}
    named = sum(answer.identity is not None for answer in wanted.values())
    assert f"named       {named}" in summary and "people      12" in summary
    threshold = made.threshold(0.1)
    assert f"strangers   {threshold.num_strangers}, of whom {threshold.num_alarms}" in summary
    assert "95 % confidence" in summary

    words = ("identify", folder, "--split=val", "--fpir=0.1", "--k=3")
    for ending in answers_lib.FORMATS:
        say(*words, f"--out={tmp_path / 'a'}{ending}")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["clip"] for line in lines] == list(wanted)
    for line, answer in zip(lines, wanted.values(), strict=True):
        assert line["identity"] == answer.identity and line["probability"] == answer.probability
        assert [(one["identity"], one["probability"]) for one in line["best"]] == [*answer.best]
        assert line["score"] == (answer.score if answer.best else None)
    with (tmp_path / "a.tsv").open(newline="") as file:
        cells = list(csv.DictReader(file, dialect="excel-tab"))
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for cell, row, (clip, answer) in zip(cells, table, wanted.items(), strict=True):
        assert cell["clip"] == row["clip"] == clip
        assert cell["identity"] == (answer.identity or "") and row["identity"] == answer.identity
        assert float(cell["score"]) == row["score"] == answer.score
        if answer.best:
            assert cell["best_2"] == row["best_2"] == answer.best[1][0]
            assert float(cell["probability_2"]) == row["probability_2"] == answer.best[1][1]
    said = say(*words, f"--out={tmp_path / 'a.tsv'}", code=2)
    assert "exists and is not overwritten" in said
    content = json.loads(say(*words, "--json"))
    assert content["named"] == named and content["answers"] == lines
    assert content["threshold"]["num_identities"] == 12


def test_rank_writes_a_submission(say, folder, tmp_path, made, data):
    wanted = made.rank(data, split="val")
    for ending in (".txt", ".tsv", ".jsonl"):
        say("rank", folder, "--split=val", f"--out={tmp_path / 'r'}{ending}")
    found = ranking.load_ranking(tmp_path / "r.txt")
    assert list(found) == list(wanted)
    assert found == {
        name: [f"{clip}.mp4" for clip, _ in clips] for name, clips in wanted.items()
    } or found == {name: [clip for clip, _ in clips] for name, clips in wanted.items()}
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {line["identity"]: [one["clip"] for one in line["clips"]] for line in lines} == {
        name: [clip for clip, _ in clips] for name, clips in wanted.items()
    }
    assert "exists" in say("rank", folder, "--split=val", f"--out={tmp_path / 'r.txt'}", code=2)


def test_clips_of_another_dataset(say, folder, tmp_path):
    """Own files with labels; people whom the run has never seen."""
    write_clips(tmp_path / "own" / "train", ["Ada", "Grace", "nobody"])
    rows = [f"{name} {turn},{name}\n" for name in ("Ada", "Grace") for turn in range(2)]
    (tmp_path / "own" / "labels.csv").write_text("clip,identity\n" + "".join(rows))
    clips = ("--config.data.name=arrays", f"--config.data.dir={tmp_path / 'own'}", "--split=train")
    said = say("enrol", folder, *clips)
    assert "enrolled    4 clips" in said and "people      14" in said
    found = {line.split()[0] for line in say("identify", folder, *clips).splitlines()}
    assert found >= {"Ada", "Grace", "nobody"}
    strangers = len(People(folder).strangers)
    said = say("enrol", folder, *clips, "--strangers")
    assert f"strangers   {strangers + 2}" in said
    said = say("enrol", folder, "--config.data.dir=/absent", "--split=train", code=2)
    assert "/absent" in said


@pytest.mark.slow
def test_create_and_refit(say, run, tmp_path, made):
    said = say("create", tmp_path / "g", f"--run={run}")
    assert made_galleries.contents(tmp_path / "g") == made_galleries.contents(made.people.folder)
    assert "people      12" in said and "version     1" in said
    assert "holds a gallery" in say("create", tmp_path / "g", f"--run={run}", code=2)
    assert "version     2" in say("refit", tmp_path / "g")
    said = say(
        "create", tmp_path / "empty", f"--run={run}", "--empty", "--strangers=train", "--json"
    )
    content = json.loads(said)
    assert content["people"] == content["clips"] == content["strangers"] == 0


def test_threshold(say, folder, made):
    found = made.threshold(0.25)
    said = say("threshold", folder, "--fpir=0.25")
    for words in ("threshold", "people      12", f"strangers   {found.num_strangers}"):
        assert words in said
    assert json.loads(say("threshold", folder, "--fpir=0.25", "--json")) == found._asdict()
    said = say("threshold", folder, "--fpir=0.001", code=2)
    assert "needs 1,000 clips of strangers or more" in said and "--strangers" in said
    assert "not a number" in say("threshold", folder, "--fpir=one", code=2)


MISTAKES = {
    "": "name a command: create, enrol",
    "idenify G": "did you mean 'identify'?",
    "identify": "identify needs the folder of a gallery",
    "identify G": "identify needs clips: --split=S",
    "identify G --split=val --input=x": "identify needs clips",
    "identify G --split=val --out=a.doc": "--out=a.doc: end the name in .jsonl, .tsv, .parquet",
    "identify G --split=val --identity=x": "identify does not read --identity; enrol, remove do",
    "identify G --split=val --fpri=0.1": "did you mean '--fpir'?",
    "identify G --split=val --config.model.name=x": "fields of config.data alone",
    "identify G --split=vla": "vla",
    "identify G --split=val --fpir=0": "above 0 and below 1",
    "identify G --split=val --k=0": "name 1 identity or more",
    "identify G --input=/absent": "/absent",
    "identify G --split=val --run=/absent": "/absent",
    "enrol G --input=x": "needs --identity=NAME",
    "enrol G --split=test": "no clip has a label",
    "rank G --split=val": "rank needs --out=FILE",
    "remove G": "one of --identity=NAME and --clip=NAME",
    "remove G --identity=a --clip=b": "one of --identity=NAME and --clip=NAME",
    "remove G --identity=13": "no identity '13' is enrolled",
    "remove G --clip=x --config.data.dir=y": "reads no clips",
    "list /absent": "'/absent' holds no gallery",
    "threshold G": "threshold needs --fpir=R",
    "create G --run=/absent": "/absent",
    "create G": "create needs --run=W",
    "export G --qdrant=:memory:": "export needs --collection=NAME",
    "list G --strangers": "list does not read --strangers",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_told_in_three_lines(say, folder, words):
    before = made_galleries.contents(folder)
    given = [str(folder) if word == "G" else word for word in words.split()]
    assert MISTAKES[words] in say(*given, code=2)
    assert made_galleries.contents(folder) == before


@pytest.mark.slow
def test_the_command_as_a_process(vidjax_command, folder):
    done = vidjax_command("list", folder, module="vidjax.gallery")
    assert done.returncode == 0 and "people      12" in done.stdout and not done.stderr
    with workdir_lib.lock(folder, "gallery"):
        done = vidjax_command("remove", folder, "--identity=1", module="vidjax.gallery")
    assert done.returncode == 2 and "is in use by process" in done.stderr
    victim = min(folder.glob("clips-*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    done = vidjax_command("list", folder, module="vidjax.gallery")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) <= 3
    assert victim.name in done.stderr and "Traceback" not in done.stderr
    done = vidjax_command("--help", module="vidjax.gallery")
    assert done.returncode == 0 and all(name in done.stdout for name in commands.COMMANDS)


# ---- Qdrant


@pytest.mark.parametrize("place", [":memory:", "folder"])
def test_export_to_qdrant(say, tmp_path, monkeypatch, place):
    client_lib = pytest.importorskip("qdrant_client")
    made_galleries.small_files(monkeypatch)
    people = made_galleries.make(tmp_path / "g")
    where = place if place == ":memory:" else str(tmp_path / "q")
    enrolled = {n: c for n, c in people.clips.items() if c.identity is not None}
    said = say("export", people.folder, f"--qdrant={where}", "--collection=people")
    assert f"exported    {len(enrolled)} clips to people" in said
    if place == ":memory:":
        return
    said = say("export", people.folder, f"--qdrant={where}", "--collection=people", code=2)
    assert "has a collection 'people'" in said
    client = client_lib.QdrantClient(path=where)
    try:
        assert client.count("people").count == len(enrolled)
        (point,) = client.retrieve(
            "people", [qdrant.point_id("clip 30")], with_vectors=True, with_payload=True
        )
        assert point.payload == {"clip": "clip 30", "identity": "person 3"}
        names = sorted(enrolled)
        found = people.coordinates.whiten(
            people.coordinates.split(np.stack([enrolled[name].vector for name in names]))
        )
        for number, part in enumerate(people.front.parts):
            unit = found[number] / np.linalg.norm(found[number], axis=1, keepdims=True)
            row = names.index("clip 30")
            has = not np.isnan(unit[row, 0])
            assert (part.name in point.vector) == has
            if has:
                np.testing.assert_allclose(point.vector[part.name], unit[row], atol=1e-6)
                hits = client.query_points(
                    "people", unit[row].tolist(), using=part.name, limit=5
                ).points
                cosines = np.nan_to_num(unit @ unit[row], nan=-2)
                best = [names[n] for n in np.argsort(-cosines, kind="stable")[:5]]
                assert [hit.payload["clip"] for hit in hits] == best
    finally:
        client.close()


def test_a_server_that_does_not_answer(say, folder):
    pytest.importorskip("qdrant_client")
    said = say("export", folder, "--qdrant=http://127.0.0.1:1", "--collection=c", code=2)
    assert said.startswith("vidjax: Qdrant at 'http://127.0.0.1:1'")


def test_without_the_client(say, folder, monkeypatch):
    monkeypatch.setattr(qdrant.importlib.util, "find_spec", lambda name: None)
    said = say("export", folder, "--qdrant=:memory:", "--collection=c", code=2)
    assert "pip install 'vidjax[qdrant]'" in said
