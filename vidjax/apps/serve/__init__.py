"""The server of `vidjax serve`: the Open Inference Protocol, and people by name in JSON.

`app` builds the ASGI application of a gallery and an optional run, and runs it until a signal.
`protocol` converts between bytes and tensors, and `served_models` computes outputs from tensors.
`batcher` collects requests that arrive together into a batch. `limits` bounds the size of
requests, checks the sender, and counts. The command is in `vidjax/cli/serve_command.py`.
"""
