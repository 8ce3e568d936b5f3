"""Models, which implement `base.Identifier`: flax.linen networks, and PLDA in closed form.

`build_system` builds the model, loss, optimiser and fusions of a configuration. The attribute
`dtype` of a model, such as bfloat16, is the dtype in which matrices are multiplied. Parameters,
sums, softmax, logits and cosine heads are float32 or wider.
"""
