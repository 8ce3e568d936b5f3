"""Models, which implement `base.Identifier`: flax.linen networks, and PLDA in closed form.

`system` builds the model, loss, optimiser and fusions of a configuration. Parameters, sums, softmax
and cosine heads are float32 or wider in every layer. `dtype` is the dtype of matrix products.
"""
