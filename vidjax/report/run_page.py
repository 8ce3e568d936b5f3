"""The reports of a run: files of its folder in, `report.html` out, and one page per other split.

The page needs no other file, no network and no script; no data is read, and no model is run.
"""

from collections.abc import Callable
from pathlib import Path

from vidjax import config_io, files
from vidjax.errors import UserError
from vidjax.report import html, sections
from vidjax.report.sections import RunFiles
from vidjax.run import formats, results

# Identifier, which names a macro of `sections.html.j2`, heading, and function of `RunFiles` to what
# the macro shows; None leaves the section out.
SECTIONS: tuple[tuple[str, str, Callable[[RunFiles], sections.Facts | None]], ...] = (
    ("summary", "Summary", sections.summary),
    ("names", "Clips and names", sections.names),
    ("reading", "How to read it", sections.reading),
    ("learning", "Learning curves", sections.learning),
    ("identities", "Identities", sections.identities),
    ("mistakes", "Mistakes and lists", sections.mistakes),
    ("strata", "Kinds of clips", sections.strata),
    ("open_set", "Distractors and calibration", sections.open_set),
    ("attention", "Attention between modalities", sections.attention),
    ("frames", "Frames", sections.frames),
    ("robustness", "Robustness", sections.robustness),
    ("ensemble", "Ensemble", sections.ensemble),
    ("data", "Data", sections.data),
    ("configuration", "Configuration", sections.configuration),
)


def write(workdir: Path) -> Path:
    """Writes the pages of all analysed splits; returns that on the split that training evaluates.

    A page is written whole or not at all. Missing or damaged files of a run are a UserError.
    """
    run = load(workdir)
    for split in run.analysed:
        page = _fitting(of_split(run, split))
        files.write_text(results.paths(workdir, split, run.split).report, page)
    path = workdir / results.REPORT
    files.write_text(path, _fitting(run))
    return path


def render(run: RunFiles) -> str:
    """Returns the page as HTML."""
    macros = html.parts("sections.html.j2")
    shown = []
    for key, heading, make in SECTIONS:
        facts = make(run)
        if facts is not None:
            shown.append((key, heading, getattr(macros, key)(run, facts)))
    return html.page(
        sections.title(run),
        shown,
        lead=sections.lead(run),
        nav=True,
        footer="vidjax made this page from the files of the run. It contains names of clips and "
        "identities, and no features.",
    )


def _fitting(run: RunFiles) -> str:
    """Returns the page; every file is valid, but they may not belong to the same evaluation."""
    try:
        return render(run)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"'{run.folder}': its results do not fit each other ({reason})\n"
            "--mode=evaluate of this folder writes them again"
        ) from error


def load(workdir: Path) -> RunFiles:
    """Reads the files of a run."""
    split = str(config_io.load_workdir(workdir).eval.split)  # refuses values of other types
    identities = workdir / "identities.json"
    others = results.read_other_metrics(workdir)
    run = RunFiles(
        folder=workdir,
        config=files.read_json(workdir / "config.json", limit=files.CONFIG_BYTES),
        lines=results.read_lines(workdir / "metrics.jsonl"),
        identities=results.load_identities(identities) if files.exists(identities) else [],
        data=results.read_data_report(workdir),
        other_metrics=others,
        split=split,
        analysed=tuple(
            other for other in others if files.exists(results.paths(workdir, other, split).analysis)
        ),
    )
    return _with_results(run, results.read_metrics(workdir), split)


def of_split(run: RunFiles, split: str) -> RunFiles:
    """Returns the files of a run with the results and the analysis of another split."""
    other = run._replace(lines=[], other_metrics={}, split=split, analysed=())
    return _with_results(other, run.other_metrics[split], run.split)


def _with_results(run: RunFiles, values: dict, own_split: str) -> RunFiles:
    paths = results.paths(run.folder, run.split, own_split)
    metrics = formats.parse(paths.metrics, values, formats.Metrics, results.REMEDY)
    run = run._replace(values=values, metrics=metrics)
    if not files.exists(paths.analysis):
        return run
    analysis, arrays = results.load_analysis(paths.analysis)
    return run._replace(analysed_split=True, analysis=analysis, arrays=arrays)
