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
from vidjax.apps.video import net_checks, net_families, pipeline, still
from vidjax.data import parquet
from vidjax.data.untrusted import sandbox
from vidjax.utils import confinement
from vidjax.utils.errors import UserError

# Kind of a file -> its name, and the optional package that reads it.
KINDS = {
    "pickle": ("face_val.pickle", "numpy"), "table": ("clips.parquet", "pyarrow"),
    "net to convert": ("net.onnx", "onnx"), "net to check": ("", "onnxruntime"),
    "film": ("film.mp4", "onnxruntime"), "photo": ("photo.jpg", "onnxruntime"),
    "still": ("film.mp4", "onnxruntime"),
}  # fmt: skip


def read(kind, folder):
    """Reads a file of a stranger in a child process."""
    name, package = KINDS[kind]
    path, models = folder / (name or "unused"), folder / "models"
    pytest.importorskip(package, reason="needs an extra")
    path.write_bytes(b"content")
    if package == "onnxruntime":
        from tests.helpers import drawn_people

        drawn_people.write_models(models)
    match kind:
        case "pickle":
            sandbox.unpack(path, "face", folder / "out")
        case "table":
            parquet.read(path)
        case "net to convert":
            net_families.convert("own", [path], models)
        case "net to check":
            net_checks.list_checks(models)["embed.json"]()
        case "still":
            still.read_still(path, 0.0)
        case _:
            (outcome,) = pipeline.extract_files([path], folder / "out", models, tagged=True)
            raise UserError(outcome.error)


USER = {"nobody": not os.getuid()}  # if this user is root, the child becomes nobody
# Landlock 3 of older kernels does not limit signals: only the filter of calls does. The kernel
# refuses some calls of root without capabilities that it allows to an ordinary user.
CASES = [
    ("pickle", {}), ("table", {}), ("net to convert", {}), ("net to check", {}),
    ("photo", {**USER, "landlock": 3}), ("film", {}), ("still", {}), ("photo", USER),
    ("photo", {"landlock": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given"), quick_first(CASES, 5))
def test_child_that_reads_a_file_of_a_stranger_has_no_other_rights(kind, given):
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
            text = refused(lambda: read(kind, folder), "ATTEMPTS")
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
    numbers = {*confinement.FORBIDDEN.values(), *confinement.UNKNOWN.values()}
    assert all(x == y for x, y in numbers if max(x or 0, y or 0) >= 424)  # since Linux 5.1
