"""The architectures: one mixer a file, one backbone around them. Nothing here imports from `lra/`."""
