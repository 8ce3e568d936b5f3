"""vidjax identifies people in video from frame features, in JAX.

    import vidjax

    data = vidjax.load_data(clips, labels="features/labels.csv")
    config = vidjax.load_config("mma:face", "--config.data.name=arrays")
    vidjax.train(config, "runs/memory", data)
    vidjax.evaluate("runs/memory", split="test").map
    vidjax.compare(["runs/memory", "runs/other"]).to_dict()
    run = vidjax.restore("runs/memory")
    people = vidjax.Gallery.create("people", run)

`import vidjax` is fast: a function imports JAX or TensorFlow when it is first called. Galleries of
`Gallery.of_models` need neither JAX nor TensorFlow.
"""

import os
import sys

if sys.platform == "win32":
    raise ImportError("vidjax needs Linux: on Windows, install vidjax in WSL (wsl --install)")

# By default, ONNX Runtime writes a number that identifies the machine to the home folder, and sends
# the number to its makers. ONNX Runtime reads this variable when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m vidjax` looks for modules in the current folder first. This folder may contain
    # files of a stranger: a `json.py` there would be run. So the folder is searched last.
    sys.path.append(sys.path.pop(0))

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.training.public import compare, evaluate, load_config, load_data, restore, train

__version__ = "0.1.0"
__all__ = ["Gallery", "compare", "evaluate", "load_config", "load_data", "restore", "train"]


def __getattr__(name: str) -> object:
    """Imports a public name at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'vidjax' has no attribute '{name}'")
    if name == "Gallery":
        from vidjax.apps.gallery import gallery

        return gallery.Gallery
    from vidjax.training import public

    return getattr(public, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
