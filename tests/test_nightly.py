"""The commands of vidjax/apps/gallery/NIGHTLY.md and the program of RECIPES.md run."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import gallery as made
from tests.helpers import clip_files, docs, limits, made_nets
from tests.helpers.limits import ROOT
from vidjax.apps.cards import BackEnd
from vidjax.apps.gallery import answers as answers_lib, backend as backend_lib
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip

NIGHTLY, RECIPES = (ROOT / "vidjax/apps/gallery" / f"{x}.md" for x in ("NIGHTLY", "RECIPES"))
BLOCKS = dict(re.findall(r"<!-- nightly: (\w+) -->\n```sh\n(.*?)```", NIGHTLY.read_text(), re.S))
DAYS = ("2026-01-01", "2026-01-02")
SHOWN = ["Ada Lovelace"], ["3"], ["3", "Ada Lovelace", "Eve"]
KNOWN = [str(number) for number in range(12)]  # people of the training data
PEOPLE = (*KNOWN, "Ada Lovelace", "Eve")
WIDTH = 16
CENTRES = dict(zip(PEOPLE, np.random.default_rng(0).normal(size=(14, WIDTH)), strict=True))


def clips_of(names, seed):
    """Makes three clips of each person; returns clip -> features, and clip -> person."""
    draw = np.random.default_rng(seed)
    people = {f"{seed}_{place}_{n}": name for place, name in enumerate(names) for n in range(3)}
    noise = 0.9 * draw.normal(size=(len(people), 3, WIDTH))
    faces = (3 * np.stack([[CENTRES[x]] for x in people.values()]) + noise).astype(np.float32)
    return {clip: {"face": face} for clip, face in zip(people, faces, strict=True)}, people


@pytest.mark.nightly
def test_commands_of_the_nightly_page_run_over_two_days(tmp_path):
    assert [*BLOCKS] == ["day", "named", "forget", "month", "prune"]
    (train, labels), (val, more) = (clips_of(KNOWN, seed) for seed in (1, 2))
    clip_files.write_npz(tmp_path / "features", {"train": train, "val": val})
    clip_files.write_labels(tmp_path / "features" / "labels.csv", labels | more)
    # Each day has clips of 3 people, and photos of Ada and of "12". The photos of "12" show the
    # person who has the name "3" in the training data, so this person has two names.
    for turn, day in enumerate(DAYS):
        ada, twelve, clips = (clips_of(names, 10 * n + turn)[0] for n, names in enumerate(SHOWN, 1))
        clip_files.write_npz(tmp_path / "photos" / day, {"Ada Lovelace": ada, "12": twelve})
        clip_files.write_npz(tmp_path / "clips", {day: clips})
    env = {"VIDJAX_CACHE": f"{tmp_path}-cache", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}

    def run(name, day, code=0):
        """Runs a block of the page, or another command, as on a day."""
        text = f'set -eu; cd "{tmp_path}"; day={day}\nvidjax() {{ "$PYTHON" -m vidjax "$@"; }}\n'
        done = limits.run(["/bin/sh", "-c", text + BLOCKS.get(name, name)], **env)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    # The first gallery is trained and created by the commands of a new month.
    train_command, create_command, *_ = BLOCKS["month"].splitlines()
    month = f"{train_command}\n{create_command}"
    run(month.replace("people-$day", "people").replace("$day", "first"), DAYS[0])
    # On the first day, Eve is unknown, and a user names her.
    for day, groups, name_of_eve in ((DAYS[0], {"unknown 1"}, ""), (DAYS[1], set(), "Eve")):
        run("day", day)
        unknown = tmp_path / "unknown" / f"{day}.tsv"
        found = answers_lib.read_groups(unknown, unknown=True)
        # A clip of the person with two names may be unknown: both names are equally probable.
        assert {name for clip, name in found.items() if clip.split("_")[1] != "0"} == groups
        answers = (tmp_path / "answers" / f"{day}.tsv").read_text().splitlines()
        named = [line.split("\t")[1] for line in answers[1:]]
        assert named[3:] == ["Ada Lovelace"] * 3 + [name_of_eve] * 3  # after three clips of "3"
        if day == DAYS[0]:
            unknown.write_text(unknown.read_text().replace("unknown 1", "Eve"))
            run("named", day)
    # `forget` prints a line that deletes files of vidjax, and lists other places.
    printed = run("forget", DAYS[1], code=1).splitlines()
    (delete,) = (line for line in printed if line.startswith("  rm "))
    assert all(f"answers/{day}.tsv" in delete for day in DAYS) and "Eve" not in delete
    run(delete, DAYS[1])
    words = 'vidjax forget --identity="Ada Lovelace" --json .'
    left = [Path(x["path"]) for x in json.loads(run(words, DAYS[1], code=1))["places"]]
    assert left
    for path in left:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    # Without --delete, `forget` fails if a gallery, cache or run still contains the name.
    for name in ('vidjax forget --identity="Ada Lovelace" .', "month", "prune"):
        run(name, DAYS[1])
    assert "Eve" not in Gallery(tmp_path / f"people-{DAYS[1]}")  # she has no photo
    assert "12" in Gallery(tmp_path / f"people-{DAYS[1]}")  # this person has photos


@pytest.mark.slow
def test_program_that_copies_people_to_qdrant_finds_the_person_of_the_gallery(
    monkeypatch, tmp_path
):
    pytest.importorskip("qdrant_client")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QDRANT", ":memory:")
    rng, card = np.random.default_rng(0), made_nets.back_end((0.8, 0.075), (0.0, 0.125), width=64)
    centres = rng.standard_normal((3000, 64), np.float32)
    stored = enumerate(made.near(centres, rng))
    clips = {f"clip_{n}": StoredClip(f"person_{n}", row) for n, row in stored}
    backend = backend_lib.make_card_backend({"face": BackEnd(**card)})
    people = Gallery.of_clips(tmp_path / "people", made.CARDS, backend, clips)
    shown = made.near(centres[:6], rng)
    Path("copy_people.py").write_text(docs.snippet(str(RECIPES), "recipe: qdrant"))
    client = runpy.run_path("copy_people.py")["client"]
    for one, photo in zip(people.index.nearest([shown], 1), shown, strict=True):
        (white,) = people.backend.whiten([photo[None]])
        (best,) = client.query_points("people", white[0].tolist(), using="face", limit=1).points
        assert best.payload["identity"] == one.best[0][0]
