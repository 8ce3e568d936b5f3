"""Child processes that read files of strangers have no rights but to read these files."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.helpers import attempts
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


def read_media(folder, name):
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


KINDS = {
    "pickle": read_pickle,
    "parquet": read_table,
    "net to convert": convert_net,
    "net to check": check_net,
    "film": lambda folder: read_media(folder, "film.mp4"),
    "photo": lambda folder: read_media(folder, "photo.jpg"),
    "still": read_still,
}
# Landlock 3 of older kernels does not limit signals: only the filter of calls does. The kernel
# refuses some calls of root without capabilities that it allows to an ordinary user.
OTHERS = {
    "photo, Landlock 3": {"landlock": 3},
    "photo, nobody": {"nobody": True},
    "photo, nobody, Landlock 3": {"nobody": True, "landlock": 3},
}


@pytest.fixture(scope="module", params=[*KINDS, *OTHERS])
def tried(request):
    """Attempt -> why it was refused, from a child process of each kind."""
    given = OTHERS.get(request.param, {})
    if given.get("nobody") and os.getuid():
        pytest.skip("only root can become nobody: this user is an ordinary user")
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
            with pytest.raises(UserError, match="ATTEMPTS") as caught:
                KINDS[request.param.partition(",")[0]](folder)
    text = str(caught.value)
    found = json.JSONDecoder().raw_decode(text[text.index("ATTEMPTS") + len("ATTEMPTS") :])[0]
    assert found["user"] == user and found["reads"] == 1
    return found


@pytest.mark.parametrize("attempt", [*attempts.LANDLOCK, *attempts.FILTER])
def test_child_that_reads_a_file_of_a_stranger_cannot(tried, attempt):
    gaps = " ".join(confinement.list_gaps())
    if attempt in attempts.LANDLOCK and "other files" in gaps:
        pytest.skip("this system has no Landlock")
    if attempt in attempts.FILTER and "connections" in gaps:
        pytest.skip("this system has no filters of calls")
    assert tried[attempt]


def test_child_takes_the_rights_of_root_from_its_only_thread(tried):
    assert tried["threads"] == "1"
    assert int(tried["rights of root"], 16) & ~confinement.KEPT_CAPABILITIES == 0


def test_child_cannot_raise_its_limits(tried):
    assert tried["raised"] == []
