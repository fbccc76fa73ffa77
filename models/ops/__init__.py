"""The mathematics of the models: plain functions without parameters."""
