"""Records on disk, as tf.data and TFDS read them; tf.data streams batches of them.

`convert` writes any source of frames to the cache, with what `codec` tells TFDS; `manifest` and
`report` describe what was written. `dataset` reads records as `TrainingData`, by `reader`: in
batches of training by `streaming`. Only `streaming` needs TensorFlow, which no other folder
imports.
"""
