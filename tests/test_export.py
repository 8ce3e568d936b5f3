"""Export and import: other runtimes answer as we do, and a failed export leaves nothing."""

import importlib
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import made_galleries, small_runs
from tests.helpers.cases import quick_first
from vidjax.apps.export import formats, function, reader, weights
from vidjax.apps.export.formats import FORMATS
from vidjax.apps.gallery import backend as backend_lib
from vidjax.apps.gallery import store
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video.cards import BackEnd
from vidjax.core import fusion
from vidjax.evaluation import predict

PAGE = Path(__file__).parent.parent / "vidjax/apps/export/README.md"
SYSTEMS = {
    "mma": "configs/mma.py:iqiyi_vid",
    "plda": "configs/plda.py:iqiyi_vid",
    "knn": "configs/knn.py:iqiyi_vid,face",
    "quality_fusion": "configs/quality_fusion.py:iqiyi_vid,folds",
    "deepmef": "configs/deepmef.py:iqiyi_vid,face,head",
    "residual_dense": "configs/residual_dense.py:iqiyi_vid,face,head",
    "noise_classes": "configs/noise_classes.py:iqiyi_vid",
    "cosine": "configs/cosine.py:iqiyi_vid",
    "views": "configs/deepmef.py:iqiyi_vid,published,views",
}
# What a format cannot hold, and says in one line. All else it holds.
CANNOT = {
    (name, "numpy"): f"--format=numpy {formats.NUMPY_SCOPE}, not '{model}'"
    for name, model in {
        "knn": "knn", "quality_fusion": "dense", "deepmef": "fallback",
        "residual_dense": "fallback", "noise_classes": "dense", "mma": "mma", "cosine": "cosine",
        "views": "deepmef",
    }.items()
}  # fmt: skip


@pytest.fixture
def export(command, tmp_path):
    """Exports by the command; returns its exit code, what it told as JSON, and its complaint."""

    def run(source, name, to="out"):
        words = (source, f"--to={tmp_path / to}", f"--format={name}", "--json")
        code, out, err = command("export", *words)
        return code, json.loads(out.splitlines()[-1]), err

    return run


def missing(name):
    """Returns the packages of a format that are not installed."""
    return [one for one in FORMATS[name].packages if not importlib.util.find_spec(one)]


def make_run(trained, name):
    # Closed forms need two passes; two of the eleven nets with views are enough.
    more = {"plda": "--config.num_epochs=2", "views": "--config.ensemble.only=(0,4)"}
    return trained(SYSTEMS[name], *([more[name]] if name in more else []))


@pytest.fixture(scope="module")
def plda_run(trained):
    return make_run(trained, "plda")


@pytest.mark.slow
@pytest.mark.parametrize("name", quick_first(SYSTEMS, 4, mark=pytest.mark.nightly))
def test_every_system_leaves_in_every_format_or_says_why_not(name, trained, tmp_path, export):
    run = make_run(trained, name)
    for chosen in FORMATS:
        if missing(chosen):
            continue
        code, told, complaint = export(run, chosen, chosen)
        if reason := CANNOT.get((name, chosen)):
            assert code == 2 and reason in complaint and not (tmp_path / chosen).exists()
            continue
        assert code == 0, complaint
        assert told["difference"] <= function.TOLERANCE
        assert (tmp_path / chosen / FORMATS[chosen].file).exists()
        assert (tmp_path / chosen / weights.WEIGHTS).exists()
    assert not list(tmp_path.glob("*.partial"))


def random_inputs(shapes, lengths):
    """Returns inputs of 9 random clips, and the same clips as a run takes them."""
    rng, inputs = np.random.default_rng(1), {}
    clips = {str(row): {} for row in range(9)}
    for part, length in lengths.items():
        width = shapes[f"{part}_features"]["shape"][-1]
        real = rng.random((9, length)) < 0.8
        own = {
            "features": rng.normal(size=(9, length, width)).astype(np.float32),
            "quality": rng.integers(0, 100, (9, length)).astype(np.float32),
            "detection": rng.uniform(0, 1, (9, length)).astype(np.float32),
        }
        inputs |= {f"{part}_{field}": value for field, value in own.items()}
        inputs[f"{part}_mask"] = real
        for row in range(9):
            clips[str(row)][part] = {field: x[row][real[row]] for field, x in own.items()}
    return inputs, clips


def kinds_of_nodes(path):
    """Returns the operators of the nodes of an ONNX file, but those in the bodies of loops."""
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.slow
def test_a_file_takes_any_number_of_clips_and_frames(nearest_run, tmp_path, export):
    onnxruntime = pytest.importorskip("onnxruntime")
    code, told, complaint = export(nearest_run, "onnx")
    assert code == 0, complaint
    assert told["difference"] <= function.TOLERANCE
    assert told["inputs"]["face_features"] == {"shape": ["B", "T_face", 24], "dtype": "float32"}
    identities = json.loads((tmp_path / "out" / "identities.json").read_text())
    assert len(identities) == told["num_identities"]
    for file, digest in told["files"].items():
        assert len(digest) == 64 and (tmp_path / "out" / file).is_file()
    assert kinds_of_nodes(tmp_path / "out" / "model.onnx").count("Loop") == 1  # of long clips
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    wanted = [one.name for one in session.get_inputs()]
    run = predict.restore(nearest_run, num_devices=1)
    for length in (23, 700):  # of more than 512 frames a run takes the best
        inputs, clips = random_inputs(told["inputs"], {"face": length})
        found = session.run(list(function.OUTPUTS), {name: inputs[name] for name in wanted})
        expected = {"scores": run.scores(clips), "embeddings": run.embed(clips)}
        answers = dict(zip(function.OUTPUTS, found, strict=True))
        assert function.difference(answers, expected) <= function.TOLERANCE


@pytest.mark.slow
def test_a_file_repeats_the_only_voice_beside_each_face_as_a_run_does(trained, tmp_path, export):
    """The check of an export has such a clip."""
    run = trained("configs/quality_fusion.py:iqiyi_vid,voting,face,audio")
    for name in ("stablehlo", "onnx"):
        code, told, complaint = export(run, name, name)
        assert code == 0, complaint
        assert told["difference"] <= function.TOLERANCE


@pytest.mark.slow
def test_an_imported_run_evaluates_equal_to_the_bit(
    plda_run, official_data, tmp_path, export, command
):
    code, _, complaint = export(plda_run, "safetensors")
    assert code == 0, complaint
    assert command("import", tmp_path / "out", f"--to={tmp_path / 'again'}").code == 0
    before, after = (
        predict.restore(folder, num_devices=1) for folder in (plda_run, tmp_path / "again")
    )
    assert after.step == before.step and after.identities == before.identities
    assert after.threshold == before.threshold
    for call in ("scores", "embed"):
        left, right = (getattr(run, call)(official_data, split="val") for run in (before, after))
        np.testing.assert_array_equal(left, right)
    small_runs.assert_equal_weights(plda_run, tmp_path / "again")


def test_a_file_that_answers_otherwise_leaves_no_folder(nearest_run, tmp_path, export, monkeypatch):
    monkeypatch.setattr(function, "difference", lambda found, expected: 2e-5)
    code, told, complaint = export(nearest_run, "safetensors")
    assert code == 2 and "outputs differ from vidjax by 2.0e-05" in complaint
    assert "differ" in told["error"]
    assert not list(tmp_path.iterdir())


def test_an_export_is_compared_on_clips_that_no_member_was_trained_on(nearest_run):
    run = predict.restore(nearest_run, num_devices=1)
    names = tuple(map(str, range(9)))
    held = np.arange(9)[None] % 2 > 0
    folds = run._replace(training_sets=run.training_sets._replace(clips=names, trained=held))
    expected = function.make_random_clips(run).expected
    np.testing.assert_array_equal(
        function.make_random_clips(folds).expected["scores"], expected["scores"]
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.00002])
def test_other_values_are_a_difference(value):
    wanted = {"scores": np.array([[1.0, -np.inf]], np.float32)}
    assert function.difference(wanted, wanted) == 0
    assert function.difference({"scores": [[value, -np.inf]]}, wanted) > function.TOLERANCE
    assert function.difference({"scores": [[1.0, value]]}, wanted) > function.TOLERANCE or (
        value == -np.inf
    )
    assert function.difference({"scores": [[1.0]]}, wanted) == np.inf


def test_a_spoilt_weight_is_noticed(nearest_run, tmp_path, command):
    out, again = tmp_path / "out", tmp_path / "again"
    out.mkdir()
    weights.write(nearest_run, out, "latest")
    good = load_file(out / weights.WEIGHTS)
    name = "model_state/memory/vectors"

    def complaint():
        done = command("import", out, f"--to={again}")
        assert done.code == 2 and not again.exists()
        return done.err

    save_file({**good, name: good[name][:, :-1].copy()}, out / weights.WEIGHTS)
    assert f"is of another model: {name}" in complaint()
    save_file({n: x for n, x in good.items() if n != name}, out / weights.WEIGHTS)
    assert "is missing, not float32[1, " in complaint()
    save_file({**good, "more": good[name]}, out / weights.WEIGHTS)
    assert "it also has more" in complaint()
    (out / weights.WEIGHTS).write_bytes(b"\xff" * 100)
    assert "is damaged" in complaint()
    (out / weights.WEIGHTS).unlink()
    assert "has no weights.safetensors: name a folder that vidjax export wrote" in complaint()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "{run}", "--to={new}", "--format=onx"], "'onnx'"),
        (["export", "{run}", "--to={new}"], "export needs --format"),
        (["export", "{run}", "--format=numpy"], "export needs --to"),
        (["export", "--to={new}", "--format=numpy"], "export needs RUN"),
        (["export", "{run}", "--to={run}", "--format=numpy"], "name a new folder"),
        (["export", "{empty}", "--to={new}", "--format=numpy"], "no run in"),
        (["export", "{run}", "--to={new}", "--format=numpy", "--checkpoint=x"], "'latest', 'best'"),
        (["export", "{run}", "--to={new}", "--format=numpy", "--k=1"], "no flag --k"),
        (["import", "{empty}", "--to={new}"], "has no config.json"),
        (["import", "{run}", "--to={new}"], "has no checkpoint.json"),
        (["import", "{run}"], "import needs --to"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(words, said, nearest_run, tmp_path, command):
    places = {"run": nearest_run, "new": tmp_path / "new", "empty": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    assert command(*(word.format(**places) for word in words)).refused(said)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["stablehlo", "onnx"])
def test_weights_that_no_program_holds_are_refused(
    name, nearest_run, tmp_path, export, monkeypatch
):
    if missing(name):
        pytest.skip("the extra is not installed")
    monkeypatch.setattr(function, "LARGEST", 1000)
    code, _, complaint = export(nearest_run, name)
    assert code == 2 and "choose safetensors" in complaint and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_saved_model_holds_weights_of_any_size(nearest_run, tmp_path, export, monkeypatch):
    """They lie beside its program."""
    monkeypatch.setattr(function, "LARGEST", 1000)
    code, _, complaint = export(nearest_run, "saved_model")
    assert code == 0, complaint
    program = tmp_path / "out" / "saved_model" / "saved_model.pb"
    vectors = load_file(tmp_path / "out" / weights.WEIGHTS)["model_state/memory/vectors"]
    assert vectors[0, 0].tobytes() not in program.read_bytes()


@pytest.mark.slow
def test_programs_of_an_export_are_not_kept(nearest_run, tmp_path, python):
    """Each holds all weights, and what nobody looks for is not deleted."""
    words = ["export", str(nearest_run), f"--to={tmp_path / 'out'}", "--format=stablehlo"]
    program = f"from vidjax.cli.program import main; assert main({words}) == 0"
    python(program, VIDJAX_CACHE=str(tmp_path / "cache"))
    kept = {path.name for path in (tmp_path / "cache").rglob("*-cache")}
    assert kept and not {name for name in kept if name.startswith("jit_call")}


def test_a_format_names_the_extra_that_it_needs(nearest_run, tmp_path, export, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, complaint = export(nearest_run, "onnx")
    assert code == 2 and "needs onnx and onnxruntime" in complaint
    assert "pip install 'vidjax[onnx]'" in complaint


def make_gallery(folder, kind):
    """Makes a gallery of a run, or one of cards, whose voices are of people off screen at times."""
    if kind == "run":
        made_galleries.make(folder)
        return
    fit: Any = {"same": (0.6, 0.2), "different": (0.0, 0.2), "pairs": (9, 9), "data": "made"}
    widths = made_galleries.WIDTHS.items()
    cards = {part: BackEnd(centre=[0.1] * width, **fit) for part, width in widths}
    origin = store.VectorOrigin(
        "models", "0" * 64, centred=False, cards=dict.fromkeys(cards, "0" * 64)
    )
    clips = made_galleries.make_clips()
    Gallery.of_clips(folder, origin, backend_lib.make_card_backend(cards), clips)


@pytest.mark.parametrize("kind", ["run", "cards"])
@pytest.mark.parametrize("name", ["numpy", "safetensors"])
def test_a_gallery_leaves_as_arrays(name, kind, tmp_path, export):
    make_gallery(tmp_path / "people", kind)
    code, told, complaint = export(tmp_path / "people", name)
    assert code == 0, complaint
    assert told["difference"] <= 1e-6 and told["parts"] == made_galleries.WIDTHS
    gallery = Gallery(tmp_path / "people")
    names = json.loads((tmp_path / "out" / "identities.json").read_text())
    assert names == list(gallery.index.names)
    path = tmp_path / "out" / FORMATS[name].file if name == "numpy" else None
    found = dict(np.load(path)) if path else load_file(tmp_path / "out" / "arrays.safetensors")
    clips = [clip.vector for clip in gallery.clips.values()]
    parts = dict(zip(told["parts"], gallery.backend.split(np.stack(clips)), strict=True))
    wanted = np.stack(list(gallery.index.search(list(parts.values()))))
    answers = reader.log_probabilities(found, parts)
    np.testing.assert_allclose(answers, wanted, rtol=1e-5, atol=1e-6)


def test_a_gallery_has_no_net(tmp_path, export):
    made_galleries.make(tmp_path / "people")
    code, _, complaint = export(tmp_path / "people", "stablehlo")
    assert code == 2 and "a gallery has none: choose safetensors or numpy" in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("members", [1, 2])
def test_the_reader_orders_clips_that_are_all_but_sure_or_hopeless(members):
    """Of two people, the first leads by so many nats."""
    leads = np.array([-900.0, -800, -40, -1, 1, 40, 41, 80, 690])
    ones, nothing = np.ones(members), np.zeros((members, 2, 2))
    linear = nothing + np.diag([1000.0, 0])
    found = {"scale": ones - np.arange(members) / 8, "temperature": ones, "unenrolled": ones,
             "stranger": -9999 * ones, "face/scale": ones, "face/limit": np.inf * ones,
             "face/known": nothing[:, 0] + 1, "face/transform": nothing + np.eye(2),
             "face/linear": linear, "face/curve": nothing}  # fmt: skip
    found |= {f"face/{name}": nothing[:, 0] for name in ("centre", "mean", "constant", "kind")}
    vectors = np.stack([leads / 1000, np.sqrt(1 - (leads / 1000) ** 2)], axis=1)
    logs = reader.log_probabilities(found, {"face": vectors})[:, 1]
    own = found["scale"][:, None] * leads  # [E, Q]
    sure = np.log1p(-np.exp(-np.logaddexp(0, abs(own))).mean(axis=0))
    other = np.logaddexp.reduce(-np.logaddexp(0, -own), axis=0) - np.log(members)
    np.testing.assert_allclose(logs, np.where(leads > 0, sure, other), rtol=1e-9)
    assert (np.diff(logs) > 0).all()


# ---- the operations of an ONNX graph

TINY = np.array([0.0, 1e-9, -1e-9, 3e-5, 0.5, 20.0, -0.9, 1e10], np.float32)
FLOATS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
WHOLE = np.array([[3, 1, 3, 2], [0, 0, 5, 5]], np.int32)


def loop(x):
    """Sums the first rows, as many as the largest entry of each of two columns says."""

    def column(values, last):
        return jax.lax.fori_loop(0, last, lambda t, total: total + values[t], jnp.float32(0))

    return jax.vmap(column, in_axes=(1, 0))(x, jnp.array([1, 3, 0, 2, 3]))


OPERATIONS = {
    "log1p": (jnp.log1p, TINY),
    "expm1": (jnp.expm1, np.minimum(TINY, 50)),
    "log_sigmoid": (jax.nn.log_sigmoid, np.linspace(-100, 100, 41, dtype=np.float32)),
    "softmax": (lambda x: jax.nn.softmax(x, axis=-1), FLOATS),
    "stable sort": (lambda x: jnp.argsort(x, axis=1, stable=True), WHOLE),
    "descending": (lambda x: jnp.argsort(x, axis=1, stable=True, descending=True), WHOLE),
    "ties": (lambda x: jnp.argsort(x, axis=1, stable=True), np.tile(WHOLE, (1, 10))),
    "shuffle": (lambda x: fusion.shuffle(None, x > 2), np.tile(WHOLE, (1, 9))),
    "sort of bools": (lambda x: jnp.argsort(x > 2, axis=1, stable=True), WHOLE),
    "rows": (lambda x: x[jnp.array([2, 0, 0])], FLOATS),
    "along an axis": (lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1), FLOATS),
    "columns": (lambda x: jnp.take(x, jnp.array([4, 1]), axis=1, mode="clip"), FLOATS),
    "beyond the end": (lambda x: jax.lax.dynamic_slice(x, (x[0, 0].astype(int) + 9, 0), (2, 5)),
                       FLOATS),
    "replace": (lambda x: x.at[:, 2].set(7.0), FLOATS),
    "segments": (lambda x: jax.ops.segment_max(x, jnp.array([1, 9, 1]), num_segments=3), FLOATS),
    "batched product": (lambda x: jnp.einsum("btd,bsd->bts", x[:, None], x[:, None]), FLOATS),
    "uint32": (lambda x: (x.astype(jnp.uint32) * jnp.uint32(2654435769) >> 1).astype(int), WHOLE),
    "choices": (lambda x: jnp.select([x < 1, x < 3], [x, 2 * x], -x), WHOLE),
    "bools": (lambda x: jnp.where(x > 2, x > 0, x == 0), WHOLE),
    "loops of vmap": (loop, FLOATS),
    "draws": (lambda x: x + jax.random.uniform(jax.random.key(3), (3, 5)), FLOATS),
    "reversed": (lambda x: x[:, ::-1], FLOATS),
    "best": (lambda x: jax.lax.top_k(x, 2)[0], FLOATS),
}  # fmt: skip


def as_onnx(compute, x):
    graph = importlib.import_module("vidjax.apps.export.onnx_graph")
    dims = jax.export.symbolic_shape("B") + x.shape[1:] if x.shape[0] > 8 else x.shape
    model = graph.to_model(
        lambda inputs: {"y": compute(inputs["x"])},
        {"x": jax.ShapeDtypeStruct(dims, x.dtype)},
        ["y"],
    )
    return model.SerializeToString()


@pytest.mark.parametrize("name", OPERATIONS)
def test_onnx_computes_what_jax_does(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    compute, x = OPERATIONS[name]
    session = onnxruntime.InferenceSession(as_onnx(compute, x))
    (found,) = session.run(["y"], {"x": x})
    np.testing.assert_allclose(found, np.asarray(compute(jnp.asarray(x))), rtol=2e-6, atol=1e-30)


@pytest.fixture
def openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # it forks, and opens connections
    return pytest.importorskip("openvino")


@pytest.mark.parametrize(
    "name", quick_first(["ties", "stable sort", "descending", "sort of bools", "shuffle"])
)
def test_openvino_orders_as_jax_does(name, openvino):
    """It computes int64 as int32, and its TopK takes equal values in any order."""
    compute, x = OPERATIONS[name]
    core = openvino.Core()
    model = core.compile_model(core.read_model(as_onnx(compute, x), b""), "CPU")
    (found,) = model({"x": x}).values()
    np.testing.assert_array_equal(found, np.asarray(compute(jnp.asarray(x))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", quick_first(["mma", "plda", "residual_dense"], mark=pytest.mark.nightly)
)
def test_openvino_answers_as_the_run_does(name, trained, tmp_path, export, openvino):
    path = make_run(trained, name)
    code, _, complaint = export(path, "onnx")
    assert code == 0, complaint
    core, run = openvino.Core(), predict.restore(path, num_devices=1)
    model = core.read_model(tmp_path / "out" / "model.onnx")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = function.make_random_clips(run)
    found = compiled({part.any_name: made.inputs[part.any_name] for part in compiled.inputs})
    answers = {part.any_name: value for part, value in found.items()}
    assert function.difference(answers, made.expected) <= 1e-4


def test_an_operation_without_a_form_is_named():
    pytest.importorskip("onnxruntime")
    graph = importlib.import_module("vidjax.apps.export.onnx_graph")
    inputs = {"x": jax.ShapeDtypeStruct((3,), np.float32)}
    with pytest.raises(ValueError, match="does not support the operation 'lgamma'"):
        graph.to_model(lambda x: {"y": jax.lax.lgamma(x["x"])}, inputs, ["y"])


# ---- the page


def snippet(name):
    """Returns the block of code of the page below `<!-- NAME -->`."""
    (found,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_snippets_of_the_page_run(name, plda_run, tmp_path, export, monkeypatch):
    if missing(name):
        pytest.skip("the extra is not installed")
    assert export(plda_run, name, "exported")[0] == 0
    (tmp_path / "snippet.py").write_text(snippet("inputs") + "\n" + snippet(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("exported", "exported.reader"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    found = runpy.run_path(str(tmp_path / "snippet.py"))
    if name == "safetensors":
        assert found["sizes"]["model_state/sums/face/scatter"] == (1, 24, 24)
        return
    inputs = {n: x for n, x in found["inputs"].items() if not n.endswith("_mask")}
    run = predict.restore(plda_run, num_devices=1)
    fields = [field for field in function.FIELDS if field != "mask"]
    clips = {
        str(row): {
            part: {field: inputs[f"{part}_{field}"][row] for field in fields}
            for part in run.modalities
        }
        for row in range(3)
    }
    scores = {"scores": np.asarray(found["outputs"]["scores"])}
    assert function.difference(scores, {"scores": run.scores(clips)}) <= function.TOLERANCE
