"""Makes the reports of a run from the files of its folder: `report.html`, and one per other split.

A page needs no other file, no network and no script. No data is read, and no model is run.
"""

from pathlib import Path

from vidjax import config_io, files
from vidjax.errors import UserError
from vidjax.report import html, sections
from vidjax.report.sections import RunFiles
from vidjax.run import formats, results


def write(workdir: Path) -> Path:
    """Writes a page for every analysed split; returns the path of the run's own, `report.html`.

    A page is written whole or not at all. Missing or damaged files of a run are a UserError.
    """
    run = load(workdir)
    for split in run.analysed:
        page = results.paths(workdir, split, run.split).report
        files.write_text(page, _fitting(load(workdir, split)))
    path = workdir / results.REPORT
    files.write_text(path, _fitting(run))
    return path


def render(run: RunFiles) -> str:
    """Returns the page as HTML."""
    macros = html.parts("sections.html.j2")
    shown = []
    for make, heading in sections.SECTIONS.items():
        facts, key = make(run), make.__name__
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
    """Returns `render(run)`; UserError if the files, each valid, are of different evaluations."""
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


def load(workdir: Path, other: str = "") -> RunFiles:
    """Reads the files of a run, with the results of its own split, or of the split `other`."""
    own = str(config_io.load_workdir(workdir).eval.split)  # refuses values of other types
    others = results.read_other_metrics(workdir)
    values = others[other] if other else results.read_metrics(workdir)
    identities, paths = workdir / "identities.json", results.paths(workdir, other or own, own)
    analysed = files.exists(paths.analysis)
    analysis, arrays = results.load_analysis(paths.analysis) if analysed else (None, {})
    return RunFiles(
        folder=workdir,
        config=files.read_json(workdir / "config.json", limit=files.CONFIG_BYTES),
        lines=[] if other else results.read_lines(workdir / "metrics.jsonl"),
        identities=results.load_identities(identities) if files.exists(identities) else [],
        data=results.read_data_report(workdir),
        other_metrics={} if other else others,
        split=other or own,
        analysed=tuple(
            split
            for split in (() if other else others)
            if files.exists(results.paths(workdir, split, own).analysis)
        ),
        metrics=formats.parse(paths.metrics, values, formats.Metrics, results.REMEDY),
        values=values,
        analysis=analysis or formats.Analysis(),
        arrays=arrays,
        analysed_split=analysed,
    )
