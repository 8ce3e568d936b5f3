"""The server of `vidjax serve`: a JSON API for a gallery, and the Open Inference Protocol.

`app` makes the ASGI application of a gallery and an optional run, and runs it until a signal.
`protocol` converts bytes to tensors and back. `served_models` computes outputs from tensors.
`batcher` collects requests that arrive together into a batch. `limits` limits the size of requests,
checks who has sent them, and counts them. The command is in `vidjax/cli/serve_command.py`.
"""
