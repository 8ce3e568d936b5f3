"""The networks: flax.linen modules with plain arguments."""
