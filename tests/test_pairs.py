"""Random sequences of actions: what was said stays with pictures and people, whatever they do.

A person is a token, and her name is an attribute: see `tests.helpers.told_people`. It runs without
nets, films or photos: see `tests.helpers.made_media`.
"""

import pytest

pytest.importorskip("onnx", reason="needs the extra [video]")
pytest.importorskip("starlette", reason="needs the extra [serve]")

from tests.helpers import made_media, told_walk
from tests.helpers.told_home import Home

# Sequences that ended wrong in the first run of this test, one or more for each kind of fault.
FAILED = (67, 73, 76, 78, 95, 116, 125, 140, 148, 160, 184, 186)
QUICK = (*range(50 - len(FAILED)), *FAILED)
NIGHTLY, BLOCK = 2000, 50  # numbers of sequences, in all and in a test


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Results of a first call of `vidjax who`, as they are in `start` of the same folder."""
    folder = tmp_path_factory.mktemp("home")
    home = Home(folder, made_media.write_models(folder / "models"))
    with pytest.MonkeyPatch.context() as patch:
        made_media.read_here(patch)
        told_walk.begin(home)
        home.keep()
        yield home


def walk(home, seed):
    """Returns "" if a sequence of actions ends well, or else what is wrong after which actions."""
    home.restore()
    steps = told_walk.Walk(home, seed)
    try:
        steps.run()
    except Exception as error:
        script = "\n".join(f"  {n}. {text}" for n, text in enumerate(steps.script, 1))
        return f"seed {seed}: {type(error).__name__}: {error}\n{script}\n"
    return ""


@pytest.mark.parametrize("seed", QUICK)
def test_everything_stays_as_it_was_said(home, seed):
    if wrong := walk(home, seed):
        pytest.fail(wrong, pytrace=False)


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(0, NIGHTLY, BLOCK))
def test_everything_stays_as_it_was_said_in_many_sequences(home, first):
    wrong = [x for seed in range(first, first + BLOCK) if (x := walk(home, seed))]
    if wrong:
        about = f"{len(wrong)} of {BLOCK} sequences end wrong, such as"
        pytest.fail("\n".join([about, *wrong[:3]]), pytrace=False)
