"""What the command line can do: one file per `--mode`, and what two of them share."""
