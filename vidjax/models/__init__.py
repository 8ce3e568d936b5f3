"""Models, which implement `base.Identifier`: flax.linen networks, and PLDA in closed form.

`system` builds the model, loss, optimiser and fusions of a configuration.
"""
