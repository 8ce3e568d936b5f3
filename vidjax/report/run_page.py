"""The report of a run: files of its folder in, `report.html` out.

The page needs no other file, no network and no script. It shows what training and evaluation have
written; no data is read, and no model is run.
"""

from pathlib import Path

from vidjax.report import analysis_sections, html, run_sections
from vidjax.report.run_files import RunFiles, fitting, load
from vidjax.run import results
from vidjax.run import workdir as workdir_lib

# (identifier, heading, function that yields the section as parts of HTML)
SECTIONS = (
    ("summary", "Summary", run_sections.summary),
    ("learning", "Learning curves", run_sections.learning_curves),
    ("identities", "Identities", analysis_sections.identities),
    ("strata", "Kinds of clips", analysis_sections.strata),
    ("open_set", "Distractors and calibration", analysis_sections.open_set),
    ("attention", "Attention between modalities", analysis_sections.attention),
    ("frames", "Frames", analysis_sections.frames),
    ("robustness", "Robustness", analysis_sections.robustness),
    ("ensemble", "Ensemble", run_sections.ensemble),
    ("data", "Data", run_sections.data),
    ("configuration", "Configuration", run_sections.configuration),
)


def write(workdir: Path) -> Path:
    """Writes `report.html` of the run in a folder, whole or not at all.

    Returns:
      The path of the report.

    Raises:
      ValueError: there is no run, or one of its files is damaged.
    """
    path = workdir / results.REPORT
    workdir_lib.write_text(path, fitting(render, load(workdir)))
    return path


def render(run: RunFiles) -> str:
    """Returns the page as HTML."""
    sections = [(key, title, "".join(make(run))) for key, title, make in SECTIONS]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    name, model = run.folder.name, _model(run)
    return html.page(
        html.text(name if name == model else f"{name}: {model}"),
        sections,
        nav=f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n',
        footer="vidjax made this page from the files of the run. It contains names of clips and\n"
        "identities, and no features.",
    )


def _model(run: RunFiles) -> str:
    """Returns the name of the run's model, or the number of runs that it blends."""
    runs = run.config.get("join", {}).get("runs", ())
    if runs:
        return f"blend of {len(runs)} runs"
    return str(run.config.get("model", {}).get("name", "no model"))
