"""The mathematics of the models as plain functions, without parameters, each held to a slow loop by its tests."""
