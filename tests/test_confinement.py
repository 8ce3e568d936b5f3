"""Child processes that read files of strangers have no rights but to read these files."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.helpers import attempts
from tests.helpers.cases import quick_first
from tests.helpers.seen import refused
from vidjax.utils import confinement
from vidjax.utils.errors import UserError


def read_pickle(folder):
    from vidjax.data.untrusted import sandbox

    (folder / "face_val.pickle").write_bytes(b"pickle")
    sandbox.unpack(folder / "face_val.pickle", "face", folder / "out")


def read_table(folder):
    pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    from vidjax.data import parquet

    (folder / "clips.parquet").write_bytes(b"parquet")
    parquet.read(folder / "clips.parquet")


def convert_net(folder):
    pytest.importorskip("onnx", reason="needs the extra [convert]")
    from vidjax.apps.video import net_families

    (folder / "net.onnx").write_bytes(b"net")
    net_families.convert("own", [folder / "net.onnx"], folder / "models")


def check_net(folder):
    pytest.importorskip("onnxruntime", reason="needs the extra [video]")
    from tests.helpers import drawn_people
    from vidjax.apps.video import net_checks

    net_checks.list_checks(drawn_people.write_models(folder / "models"))["embed.json"]()


def read_media(folder, name="photo.jpg"):
    pytest.importorskip("onnxruntime", reason="needs the extra [video]")
    from tests.helpers import drawn_people
    from vidjax.apps.video import pipeline

    (folder / name).write_bytes(b"media")
    models = drawn_people.write_models(folder / "models")
    outcomes = pipeline.extract_folders({folder / "out": [folder / name]}, models, tagged=True)
    raise UserError(outcomes[folder / "out"][0].error)


def read_still(folder):
    pytest.importorskip("onnxruntime", reason="needs the extra [video]")
    from vidjax.apps.video import still

    (folder / "film.mp4").write_bytes(b"media")
    still.read_still(folder / "film.mp4", 0.0)


USER = {"nobody": not os.getuid()}  # if this user is root, the child becomes nobody
# Landlock 3 of older kernels does not limit signals: only the filter of calls does. The kernel
# refuses some calls of root without capabilities that it allows to an ordinary user.
KINDS = {
    "pickle": (read_pickle, {}),
    "parquet": (read_table, {}),
    "net to convert": (convert_net, {}),
    "net to check": (check_net, {}),
    "photo, ordinary user, Landlock 3": (read_media, {**USER, "landlock": 3}),
    "film": (lambda folder: read_media(folder, "film.mp4"), {}),
    "still": (read_still, {}),
    "photo, ordinary user": (read_media, USER),
    "photo, Landlock 3": (read_media, {"landlock": 3}),
}


@pytest.mark.parametrize(
    ("read", "given"), quick_first([pytest.param(*x, id=name) for name, x in KINDS.items()], 5)
)
def test_child_that_reads_a_file_of_a_stranger_has_no_other_rights(read, given):
    user, group = [attempts.NOBODY] * 2 if given.get("nobody") else (os.getuid(), os.getgid())
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        lines = ["from tests.helpers import attempts", f"attempts.install(**{given})"]
        (folder / "sitecustomize.py").write_text("\n".join(lines))
        for secret in (folder / "other/secret.txt", folder / "models/private/key"):
            secret.parent.mkdir(parents=True)
            secret.write_text("secret")
        patch.syspath_prepend(folder)
        patch.setenv("VIDJAX_TEST_FOLDER", name)
        command = [shutil.which("cat") or "cat"]  # it waits for the end of its input
        with subprocess.Popen(command, stdin=subprocess.PIPE, user=user, group=group) as victim:
            patch.setenv("VIDJAX_TEST_VICTIM", str(victim.pid))
            text = refused(lambda: read(folder), "ATTEMPTS")
    tried = json.JSONDecoder().raw_decode(text[text.index("ATTEMPTS") + len("ATTEMPTS") :])[0]
    assert tried["user"] == user and tried["reads"] == 1
    gaps, tests = " ".join(confinement.list_gaps()), []
    if "other files" not in gaps:  # this system has Landlock
        tests += attempts.LANDLOCK
    if "connections" not in gaps:  # this system has filters of calls
        tests += attempts.FILTER
    assert [x for x in tests if not tried[x]] == [] == tried["raised"]
    assert tried["threads"] == "1", "rights are taken from the only thread"
    assert int(tried["rights of root"], 16) & ~confinement.KEPT_CAPABILITIES == 0
