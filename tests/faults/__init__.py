"""Real faults: signals, damaged files, full disks, hostile pickles."""
