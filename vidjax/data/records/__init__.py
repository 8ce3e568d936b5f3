"""Records on disk, as tf.data and TFDS read them, and how they are read without TensorFlow.

`convert` writes any source of frames to the cache, by `writers` and `codec`; `manifest` and
`report` describe what was written. `dataset` reads records as `TrainingData`, by `reader`: in
batches of training by `streaming`. Only `tensors` imports TensorFlow, which no other folder does.
"""
