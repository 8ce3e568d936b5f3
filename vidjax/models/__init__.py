"""Models, which implement `base.Identifier`: flax.linen networks, and PLDA in closed form.

`build_system` builds the model, loss, optimiser and fusions of a configuration. `dtype` is the
dtype of matrix products. Parameters, sums, softmax, logits and cosine heads are float32 or wider.
"""
