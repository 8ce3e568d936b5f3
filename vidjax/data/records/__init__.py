"""Records on disk, as TFDS reads them; batches of them are streamed by tf.data.

`convert` writes any source of frames to the cache, by `writers` and `codec`; `manifest` and
`report` describe what was written. `dataset` reads records as `TrainingData`: by `streaming` to
train, by `padding` to evaluate. Only `streaming` and `tensors` need TensorFlow,
which no other folder imports.
"""
