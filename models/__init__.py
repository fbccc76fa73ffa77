"""The architectures: one mixer per module, and the backbone. Independent of `lra`."""
