"""Records on disk: with TensorFlow, which is imported where it is needed.

Beside this folder only `vidjax.export.saved_model` imports it.

`convert` writes any source of frames to the cache, by `writers` and `codec`; `manifest` and
`report` describe what was written. `dataset` reads records as `TrainingData`: by `streaming` to
train, by `padding` to evaluate. Only `codec` and `streaming` need TensorFlow.
"""
