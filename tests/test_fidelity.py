"""The table of the publications' statements names what exists."""

import pkgutil
import re
from pathlib import Path

from vidjax.runs import config as config_lib
from vidjax.runs import config_io

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "configs/fidelity.md").read_text()
# The options of models and fusions are fields or arguments somewhere in vidjax/.
OPTIONS = {
    name
    for part in ("models", "core")
    for path in (ROOT / "vidjax" / part).glob("*.py")
    for name in re.findall(r"(\w+): [\w\[\], .|\"]+ = ", path.read_text())
}
FIELDS = {f"config.{name}" for name, _ in config_lib.fields(config_lib.default())}


def exists(name):
    """Returns whether what a name in backticks stands for is there."""
    if match := re.match(r"(?:--config=configs/)?(\w+\.py.*)", name):
        return bool(config_io.load_file(f"{ROOT}/configs/{match[1]}"))
    if match := re.match(r"(?:--)?(config\.[\w.]+)", name):
        group, option = match[1].rsplit(".", 1)
        own = re.match(r"config\.(model|fusion)", group) and option in OPTIONS
        return match[1] in FIELDS or bool(own)
    if "/" in name:
        return (ROOT / name).exists()
    return pkgutil.resolve_name(f"vidjax.{name}") is not None


def test_fidelity_page_names_only_existing_fields_files_and_functions():
    names = {name for name in re.findall(r"`([^`]+)`", PAGE) if re.search(r"[./]", name)}
    assert names and not [name for name in sorted(names) if not exists(name)]
