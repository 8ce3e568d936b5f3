"""Models, which implement `base.Identifier`: flax.linen networks, and PLDA in closed form.

`build_system` builds the model, loss, optimiser and fusions of a configuration. The attribute
`dtype` of a model is the dtype of the factors in matrix products. Parameters, sums, softmax, logits
and cosine heads are float32 or wider.
"""
