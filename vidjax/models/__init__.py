"""Models: flax.linen modules with plain arguments, which implement `base.Identifier`."""
