"""Model state on the disk: checkpoints, and the formats of other libraries."""
