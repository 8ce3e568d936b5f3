"""Mathematics on arrays: batches, fusion, losses, optimisers, metrics, members, devices."""
