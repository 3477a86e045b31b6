"""Models on disk, on the hub and in memory: what lies in a folder, and what transformers does not promise."""
