"""Export and import: other runtimes give the same outputs, and a failed export leaves no files."""

import importlib.util
import json
import runpy
import shlex
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vidjax
from tests.helpers import clip_files, docs, made_galleries, small_runs
from tests.helpers.cases import nightly_after_first
from tests.helpers.seen import refused
from vidjax.core import fusion
from vidjax.evaluation import predict
from vidjax.evaluation.export import formats, function, weights
from vidjax.evaluation.export.formats import FORMATS

# Configurations and their overrides. Of the eleven nets of `views`, two are enough.
SYSTEMS = {
    "knn": "configs/knn.py:iqiyi_vid,face",
    "mma": "configs/mma.py:iqiyi_vid",
    "plda": " ".join(["configs/plda.py:iqiyi_vid", *small_runs.CLOSED_FORM]),
    "quality_fusion": "configs/quality_fusion.py:iqiyi_vid,folds",
    "deepmef": "configs/deepmef.py:iqiyi_vid,face,head",
    "residual_dense": "configs/residual_dense.py:iqiyi_vid,face,head",
    "noise_classes": "configs/noise_classes.py:iqiyi_vid",
    "cosine": "configs/cosine.py:iqiyi_vid",
    "views": "configs/deepmef.py:iqiyi_vid,published,views --config.ensemble.only=(0,4)",
    "voting": "configs/quality_fusion.py:iqiyi_vid,voting,face,audio",  # a voice for each face
}
PAGE = "vidjax/evaluation/export/README.md"
TINY = np.array([0.0, 1e-9, -1e-9, 3e-5, 0.5, 20.0, -0.9, 1e10], np.float32)
FLOATS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
WHOLE = np.array([[3, 1, 3, 2], [0, 0, 5, 5]], np.int32)


@pytest.fixture
def export(command, tmp_path):
    """Returns a function that runs `vidjax export`; it returns the printed JSON, or the error."""

    def run(source, name, to="out", code=0):
        done = command("export", source, f"--to={tmp_path / to}", f"--format={name}", "--json")
        assert done.code == code, done.err
        assert not code or not (tmp_path / to).exists()
        return done.err if code else json.loads(done.out.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def nearest(nearest_run):
    return predict.restore_run(nearest_run, num_devices=1)


@pytest.fixture(scope="module")
def made(trained, nearest_run):
    return lambda name: nearest_run if name == "knn" else trained(*SYSTEMS[name].split())


@pytest.mark.slow
@nightly_after_first("name", SYSTEMS)
def test_every_system_is_exported_to_every_format_or_refused(name, made, tmp_path, export):
    for chosen in FORMATS:
        if not all(map(importlib.util.find_spec, FORMATS[chosen].packages)):
            continue  # the packages of the format are not installed
        assert export(made(name), chosen, to=chosen)["difference"] <= function.TOLERANCE
        for file in (FORMATS[chosen].file, weights.WEIGHTS):
            assert (tmp_path / chosen / file).exists()
    assert not list(tmp_path.glob("*.partial"))


def test_onnx_file_takes_any_number_of_clips_and_frames(nearest, tmp_path, export, monkeypatch):
    onnx, onnxruntime = map(pytest.importorskip, ("onnx", "onnxruntime"))
    facts, path = export(nearest.workdir, "onnx"), tmp_path / "out" / "model.onnx"
    assert facts["inputs"]["face_features"] == {"shape": ["B", "T_face", 24], "dtype": "float32"}
    assert [x.op_type for x in onnx.load(path).graph.node].count("Loop") == 1  # cuts long clips
    session = onnxruntime.InferenceSession(path)
    for lengths in ((23, 5, 9), (700, 3)):  # a run uses the best 512 of 700 frames
        monkeypatch.setattr(function, "LENGTHS", lengths)  # numbers of frames, one per clip
        clips = function.make_random_clips(nearest)
        assert len(clips.inputs["face_mask"]) == len(lengths)  # no clip of unequal modalities
        given = {argument.name: clips.inputs[argument.name] for argument in session.get_inputs()}
        answers = dict(zip(formats.OUTPUTS, session.run(list(formats.OUTPUTS), given), strict=True))
        assert function.difference(answers, clips.expected) <= function.TOLERANCE


def test_difference_of_outputs_is_large_if_only_one_is_not_finite():
    expected = {"scores": np.array([[1.0, -np.inf]], np.float32)}
    assert function.difference(expected, expected) == 0
    for other in ([np.nan, -np.inf], [np.inf, -np.inf], [1.00002, -np.inf], [1, np.nan], [1, 1]):
        assert function.difference({"scores": [other]}, expected) > function.TOLERANCE  # 1e-5


@pytest.mark.parametrize("logs", [True, False])
def test_exported_scores_are_the_mean_of_the_members(monkeypatch, logs):
    """The scores of a member are its parameters here. Column 0, a stranger, is left out."""
    monkeypatch.setattr(function.eval_step, "eval_step", lambda system, params, *_: params)
    system = SimpleNamespace(scores_are_logs=logs, top_classes=0)
    run: Any = SimpleNamespace(model=SimpleNamespace(system=system), identities=("a", "b"))
    scores = -np.random.default_rng(0).uniform(1, 9, (3, 4, 3)).astype(np.float32)  # [E, B, K]
    members: Any = [(x, {}, None) for x in scores]
    batch: Any = None
    found = jax.jit(lambda: function._compute_scores(run, members, batch))()
    wanted = np.log(np.exp(scores).mean(axis=0)) if logs else scores.mean(axis=0)
    np.testing.assert_allclose(found, wanted[:, 1:], rtol=1e-5)


def test_format_that_a_user_adds_is_written_and_compared_with_the_run(
    nearest_run, tmp_path, export, monkeypatch
):
    def write(run, inputs, folder):
        (folder / "mine.bin").write_text(" ".join(inputs))
        compute = jax.jit(function.make_function(run))

        def predict(given):  # with padding, because each size would be a program
            rows, length = given["face_mask"].shape
            pads = [(0, 4 - rows), (0, 11 - length), (0, 0)]
            padded = {name: np.pad(x, pads[: x.ndim]) for name, x in given.items()}
            return {name: 3e-6 + np.asarray(x)[:rows] for name, x in compute(padded).items()}

        return predict

    monkeypatch.setitem(FORMATS, "mine", formats.Format("mine.bin", write, (), ""))
    facts = export(nearest_run, "mine")
    assert 1e-6 < facts["difference"] < function.TOLERANCE
    assert facts["inputs"].keys() == {*(tmp_path / "out" / "mine.bin").read_text().split()}


def test_failed_export_leaves_no_folder(nearest_run, tmp_path, export, monkeypatch):
    for changed, value, name, words in (
        (f"{function.__name__}.LARGEST", 1000, "stablehlo", "choose --format=safetensors"),  # bytes
        ("importlib.util.find_spec", lambda name: None, "onnx", "pip install 'vidjax[onnx]'"),
        (f"{function.__name__}.difference", lambda *_: 2e-5, "safetensors", "vidjax by 2.0e-05"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(changed, value)
            assert words in export(nearest_run, name, code=2)
        assert not list(tmp_path.iterdir())


def test_import_refuses_damaged_or_missing_weights(nearest_run, tmp_path, command):
    file, again = tmp_path / "out" / weights.WEIGHTS, tmp_path / "again"
    file.parent.mkdir()
    weights.write(nearest_run, file.parent, "latest")
    good, name = load_file(file), "model_state/memory/vectors"
    for damage, words in (
        (lambda: save_file({**good, name: good[name][:, :-1].copy()}, file), "not fit config.json"),
        (lambda: save_file({n: x for n, x in good.items() if n != name}, file), "is missing, but"),
        (lambda: save_file({**good, "more": good[name]}, file), "the array more is not used"),
        (lambda: file.write_bytes(b"\xff" * 100), "is damaged"),
        (file.unlink, "does not contain weights.safetensors\nname a folder that vidjax export"),
    ):
        damage()
        assert command("import", file.parent, f"--to={again}").refused(words) and not again.exists()
    weights.write(nearest_run, file.parent, "latest")
    for name in weights.COPIED_FILES:
        cut = file.with_name(name)
        content = cut.read_bytes()
        cut.write_bytes(content[: len(content) // 2])
        done = command("import", file.parent, f"--to={again}")
        assert done.refused(f"{cut}'", "is damaged", "\nexport the run again"), name
        cut.write_bytes(content)


def test_exported_weights_and_identities_are_of_the_checkpoint_and_not_of_the_copy(
    nearest_run, nearest, tmp_path, command
):
    run, out, imported = (tmp_path / name for name in ("run", "out", "imported"))
    shutil.copytree(nearest_run, run)
    (run / "identities.json").write_text('["Eve"]')
    out.mkdir()
    weights.write(run, out, "latest")
    assert command("import", out, f"--to={imported}").code == 0
    small_runs.assert_equal_weights(nearest_run, imported)
    again = predict.restore_run(imported, num_devices=1)
    for fact in ("step", "identities", "threshold"):
        assert getattr(again, fact) == getattr(nearest, fact)
    assert (out / "identities.json").read_bytes() == (nearest_run / "identities.json").read_bytes()
    (out / "identities.json").unlink()
    weights.read(out, tmp_path / "again")
    for name in ("identities.json", "members.npz"):
        assert (tmp_path / "again" / name).read_bytes() == (nearest_run / name).read_bytes()


def test_wrong_uses_of_a_run_name_remedies(nearest_run, official_dir, tmp_path, command):
    run, empty, new = nearest_run, tmp_path / "empty", tmp_path / "deep" / "new"
    empty.mkdir()
    people = made_galleries.make(tmp_path / "people").folder
    clips = {"a b": {"face": np.ones((2, 24), np.float32)}}
    clip_files.write_npz(tmp_path / "my own", {"test": clips, "train": clips})
    for words, remedy in {
        f"rank --workdir={run} --out=o.tsv --input={official_dir}": "--config.eval.split=test\n",
        f"rank --workdir={run} --out=o.tsv --input='{tmp_path}/my own'": f"='{tmp_path}/my own/te",
        f"gallery list {run}": f"vidjax gallery create NEW_FOLDER --run={run}",
        f"export {run} --to={new}": "export needs --format",
        f"export {run} --to={run} --format=onnx": "name a new folder",
        f"export {empty} --to={new} --format=onnx": "no run in",
        f"export {run} --to={new} --format=onnx --checkpoint=x": "'latest', 'best'",
        f"export {people} --to={new} --format=safetensors": "no run in",
        f"import {empty} --to={new}": "does not contain config.json",
        f"import {run} --to={new}": "does not contain checkpoint.json",
    }.items():
        assert command(*shlex.split(words)).refused(remedy), words
        assert not new.parent.exists()


def test_modalities_with_similar_names_may_differ_in_length(nearest, tmp_path):
    run = replace(nearest, modalities={"a-b": 8, "a_b": 8})
    # Symbols stand for the numbers of frames. A symbol, and a name in TensorFlow, allows no `-`.
    symbols = {name: str(spec.shape[1]) for name, spec in function.input_shapes(run).items()}
    assert symbols["a-b_mask"] != symbols["a_b_mask"]
    refused(lambda: formats.tensorflow(run, {}, tmp_path), "'a-b'\nchoose --format=stablehlo")


@pytest.mark.nightly
def test_export_leaves_no_program_in_the_cache(nearest_run, tmp_path, python):
    """Exported programs (`jit_call`) contain all weights. Nothing would delete them later."""
    words = ["export", str(nearest_run), f"--to={tmp_path / 'out'}", "--format=stablehlo"]
    program = f"from vidjax.cli.program import main; assert main({words}) == 0"
    python(program, VIDJAX_CACHE=str(tmp_path / "cache"))
    programs = [path.name for path in (tmp_path / "cache").rglob("*-cache")]
    assert programs and not [name for name in programs if name.startswith("jit_call")]


def loop(x):
    """Sums the first 1, 3, 0, 2 and 3 rows of the five columns."""

    def column(values, last):
        return jax.lax.fori_loop(0, last, lambda t, total: total + values[t], jnp.float32(0))

    return jax.vmap(column, in_axes=(1, 0))(x, jnp.array([1, 3, 0, 2, 3]))


OPERATIONS = {
    "log1p": (jnp.log1p, TINY), "expm1": (jnp.expm1, np.minimum(TINY, 50)),
    "log_sigmoid": (lambda x: jax.nn.log_sigmoid(x[1:]), np.arange(-101, 101, dtype=np.float32)),
    "softmax": (lambda x: jax.nn.softmax(x, axis=-1), FLOATS),
    "descending": (lambda x: jnp.argsort(x, axis=1, stable=True, descending=True), WHOLE),
    "ties": (lambda x: jnp.argsort(x, axis=1, stable=True), np.tile(WHOLE, (1, 10))),
    "shuffle": (lambda x: fusion.shuffle(None, x > 2), np.tile(WHOLE, (1, 9))),
    "sort of bools": (lambda x: jnp.argsort(x > 2, axis=1, stable=True), WHOLE),
    "along an axis": (lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1), FLOATS),
    "columns": (lambda x: jnp.take(x, jnp.array([4, 1]), axis=1, mode="clip"), FLOATS),
    "beyond the end": (lambda x: jax.lax.dynamic_slice(x, (x[0, 0].astype(int) + 9, 0), (2, 5)),
                       FLOATS),
    "replace": (lambda x: x.at[:, 2].set(7.0), FLOATS),
    "segments": (lambda x: jax.ops.segment_max(x, jnp.array([1, 9, 1]), num_segments=3), FLOATS),
    "batched product": (lambda x: jnp.einsum("btd,bsd->bts", x[:, None], x[:, None]), FLOATS),
    "uint32": (lambda x: (x.astype(jnp.uint32) * jnp.uint32(2654435769) >> 1).astype(int), WHOLE),
    "choices": (lambda x: jnp.select([x < 1, x < 3], [x, 2 * x], -x), WHOLE),
    "bools": (lambda x: jnp.where(x > 2, x > 0, x == 0), WHOLE), "loops of vmap": (loop, FLOATS),
    "draws": (lambda x: x + jax.random.uniform(jax.random.key(3), (3, 5)), FLOATS),
    "best": (lambda x: jax.lax.top_k(x, 2)[0], FLOATS),
    "lgamma": (jax.lax.lgamma, FLOATS),  # is not supported
}  # fmt: skip


def as_onnx(*names):
    """Returns a file of ONNX that computes some OPERATIONS, and name of operation -> its input."""
    pytest.importorskip("onnxruntime")
    from vidjax.evaluation.export import onnx_graph

    batch, inputs, shapes = jax.export.symbolic_shape("B"), {}, {}
    for name in names:
        x = inputs[name] = OPERATIONS[name][1]
        shape = batch + x.shape[1:] if name == "log_sigmoid" else x.shape
        shapes[name] = jax.ShapeDtypeStruct(shape, x.dtype)

    def compute(given):
        return {f"{name} y": OPERATIONS[name][0](x) for name, x in given.items()}

    model = onnx_graph.to_model(compute, shapes, [f"{name} y" for name in names])
    return model.SerializeToString(), inputs


def compute(inputs):
    return jax.jit(lambda given: [OPERATIONS[name][0](given[name]) for name in inputs])(inputs)


def test_onnx_operations_equal_jax_operations_or_are_refused():
    graph, inputs = as_onnx(*OPERATIONS.keys() - {"lgamma"})
    outputs = pytest.importorskip("onnxruntime").InferenceSession(graph).run(None, inputs)
    for name, output, wanted in zip(inputs, outputs, compute(inputs), strict=True):
        np.testing.assert_allclose(output, wanted, rtol=2e-6, atol=1e-30, err_msg=name)
    refused(lambda: as_onnx("lgamma"), "does not support an operation of this model: 'lgamma'")


@pytest.fixture(scope="session")
def core():
    """OpenVINO sets the stack of signal handlers in the main thread."""
    # If another thread freed OpenVINO, the next signal would abort the process.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openvino_telemetry", None)  # it forks, and opens connections
        return pytest.importorskip("openvino").Core()


@pytest.mark.slow
def test_openvino_operations_equal_jax_operations(core):
    """OpenVINO computes int64 as int32. Its TopK returns equal values in any order."""
    graph, inputs = as_onnx(*OPERATIONS.keys() - {"lgamma", "log_sigmoid", "uint32"})
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    outputs = core.compile_model(core.read_model(graph, b""), "CPU", precise)(inputs).values()
    for name, output, wanted in zip(inputs, outputs, compute(inputs), strict=True):
        np.testing.assert_allclose(output, wanted, rtol=2e-6, atol=1e-30, err_msg=name)


def test_lines_of_the_page_give_the_vectors_and_scores_of_a_run(nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(nearest.workdir, "runs/mma")
    clips = made_galleries.random_clips(nearest, 3, 1)
    clip_files.write_npz(tmp_path / "features", {"val": clips})
    exec(docs.snippet(PAGE, "arrays"), own := {"vidjax": vidjax})  # noqa: S102
    assert own["vectors"].shape[0] == 2 == len(own["scores"])
    np.testing.assert_allclose(own["vectors"], nearest.embed(clips), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(own["scores"], nearest.scores(clips), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@nightly_after_first("name", FORMATS)
def test_snippets_of_the_page_give_the_scores_of_the_run(name, made, tmp_path, export, monkeypatch):
    for package in FORMATS[name].packages:
        pytest.importorskip(package, reason="the extra is not installed")
    export(made("plda"), name, to="exported")
    blocks = [docs.snippet(PAGE, block) for block in ("inputs", name)]
    (tmp_path / "snippet.py").write_text("\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    variables = runpy.run_path(str(tmp_path / "snippet.py"))
    if name == "safetensors":
        # The shape has one member, and the width 24 of a face twice.
        assert variables["sizes"]["model_state/sums/face/scatter"] == (1, 24, 24)
        return
    run = predict.restore_run(made("plda"), num_devices=1)
    fields = [field for field in function.FIELDS if field != "mask"]
    inputs = variables["inputs"]  # of three clips
    clips = {
        str(n): {m: {field: inputs[f"{m}_{field}"][n] for field in fields} for m in run.modalities}
        for n in range(3)
    }
    scores = {"scores": np.asarray(variables["outputs"]["scores"])}
    assert function.difference(scores, {"scores": run.scores(clips)}) <= function.TOLERANCE
