"""From videos to features: nets that the user brings as files, without a network or training.

`cards` describes the file of a net, `models` runs it in ONNX Runtime, and `convert` makes nets and
cards of packages that the user has downloaded.
"""
