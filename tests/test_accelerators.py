"""Programs for several devices, and for accelerators that this machine lacks."""

import importlib.util
import json
import shutil

import pytest

from tests.benchmarks import accelerators, common
from tests.helpers.cases import quick_first
from vidjax.core import devices

# In a streamed batch, a device has only its clips, so joined clips need the clips of all devices.
# The state of `knn` is the training clips, and every device has the whole state.
GATHERS = {("noise_classes", "streamed"), ("knn", "streamed"), ("knn", "resident")}
COMPILERS = "libtpu", "jax_cuda13_plugin"


def assert_only_reduces(system, program, row):
    allowed = {"all-reduce"} | ({"all-gather"} if (system, program) in GATHERS else set())
    assert row["collectives"].keys() <= allowed, (system, program)


@pytest.mark.parametrize("program", quick_first(accelerators.TRAINING))
def test_devices_join_clips_without_sorting_them_together(program):
    """Two members train together. With a sort over all devices, XLA exchanges more arrays."""
    words = "batch_size=16", "ensemble.folds=2", "model.layers=()"
    plan = common.make_plan("noise_classes.py:iqiyi_vid", *words, num_clips=40, num_clusters=3)
    programs = accelerators.make_programs(plan, devices.make_mesh(8), 2)
    function, arguments = programs[program]
    row = accelerators.count_traffic(function.lower(*arguments).compile().as_text())
    assert_only_reduces("noise_classes", program, row)
    assert row["collectives"]["all-reduce"] and not row["float64"] and not row["transfers"]


@pytest.mark.nightly
@pytest.mark.parametrize("device", accelerators.REQUIRED)
@pytest.mark.parametrize("system", accelerators.SYSTEMS)
def test_programs_compile_and_fit_into_accelerators(system, device, tmp_path):
    """Only programs whose text or compiler differs from `accelerators.json` are compiled."""
    if missing := [name for name in COMPILERS if not importlib.util.find_spec(name)]:
        pytest.skip(f"no {missing[0]}: pip install 'jax[tpu]' 'jax-cuda13-plugin[with-cuda]'")
    if accelerators.RESULTS.exists():
        shutil.copy(accelerators.RESULTS, tmp_path / "rows.json")
    # A new process, because the tests compile without optimisation.
    words = [f"--systems={system}", f"--devices={device}", f"--out={tmp_path / 'rows.json'}"]
    common.run_python("-m", "tests.benchmarks.accelerators", *words)
    rows = json.loads((tmp_path / "rows.json").read_text())
    for program in accelerators.PROGRAMS:
        row = rows[f"{system}, {device}, {program}"]
        assert not row["float64"] and not row["transfers"], program
        assert_only_reduces(system, program, row)
        chosen = accelerators.PROGRAM_OF_MODE[row["auto"]]
        if program == chosen or program not in accelerators.TRAINING:
            assert accelerators.fits(row, accelerators.DEVICES[device]), program
