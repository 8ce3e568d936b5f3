"""vidjax identifies people in video from frame features, in JAX.

    import vidjax

    data = vidjax.load_data(clips, labels="features/labels.csv")
    config = vidjax.load_config("mma:face", "--config.data.name=arrays")
    vidjax.train(config, "runs/memory", data)
    vidjax.evaluate("runs/memory", split="test").map
    vidjax.compare(["runs/memory", "runs/other"]).to_dict()
    run = vidjax.restore("runs/memory")
    people = vidjax.Gallery.create("people", run)

`clips` is split -> clip -> modality -> array, see `load_data`. `import vidjax` is fast, because JAX
and TensorFlow are imported only when a function that needs them is called. Galleries from
`Gallery.of_models` need neither JAX nor TensorFlow.
"""

import os
import sys

if sys.platform != "linux":
    raise ImportError(
        "vidjax needs Linux: on Windows, install vidjax in WSL (wsl --install), "
        "and on macOS in a virtual machine or a container with Linux"
    )

# By default, ONNX Runtime writes a number that identifies the machine to the home folder, and sends
# the number to its makers. ONNX Runtime reads this variable when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m vidjax` looks for modules in the current folder first. This folder may contain
    # files of a stranger: a `json.py` there would be run. So the folder is searched last.
    sys.path.append(sys.path.pop(0))

from typing import TYPE_CHECKING

from vidjax.utils.version import VERSION as __version__  # noqa: F401

if TYPE_CHECKING:
    from vidjax.apps.bulk import Embed, Rank, join_rankings, list_tables
    from vidjax.apps.gallery.answers import Identify
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.apps.serve.app import make_app
    from vidjax.apps.server_limits import Limits
    from vidjax.apps.video.who import name_people
    from vidjax.runs.results import load_analysis
    from vidjax.training.public import compare, evaluate, load_config, load_data, restore, train

__all__ = [
    "Embed", "Gallery", "Identify", "Limits", "Rank", "compare", "evaluate", "join_rankings",
    "list_tables", "load_analysis", "load_config", "load_data", "make_app", "name_people",
    "restore", "train",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Returns the public function or class `name`, whose module is imported only now (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'vidjax' has no attribute '{name}'")
    match name:  # a module is imported only for its own names: each needs other packages
        case "Embed" | "Rank" | "join_rankings" | "list_tables":
            from vidjax.apps import bulk as module
        case "Identify":
            from vidjax.apps.gallery import answers as module
        case "Gallery":
            from vidjax.apps.gallery import gallery as module
        case "make_app":
            from vidjax.apps.serve import app as module
        case "Limits":
            from vidjax.apps import server_limits as module
        case "name_people":
            from vidjax.apps.video import who as module
        case "load_analysis":
            from vidjax.runs import results as module
        case _:
            from vidjax.training import public as module
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
