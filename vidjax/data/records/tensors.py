"""The one place that imports TensorFlow and sets it up: for TFDS, and for SavedModel."""

import os
from typing import Any

# TensorFlow reads both variables when it is imported. oneDNN would announce itself on stderr.
# Errors arrive as exceptions, not in the log.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Its Keras, which nothing here uses, would write a file into the home folder.
_keras_home = os.environ.get("KERAS_HOME")
os.environ["KERAS_HOME"] = os.devnull
try:
    import tensorflow
finally:
    del os.environ["KERAS_HOME"]
    if _keras_home is not None:
        os.environ["KERAS_HOME"] = _keras_home

# TensorFlow ships no types, and the stubs of type checkers cover half of it.
tf: Any = tensorflow

# The accelerator belongs to JAX: TensorFlow would take all of its memory.
tf.config.set_visible_devices([], "GPU")
