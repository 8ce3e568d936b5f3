"""What every folder uses: errors, files, tables, messages, and the machine."""
