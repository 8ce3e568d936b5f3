"""What runs on the devices: state, training step, evaluation step, top-k, feeds. Pure."""
