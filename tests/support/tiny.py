"""Overrides of a run that takes seconds."""

# ListOps with a few short rows, prepared once a session and read by every test that trains
TINY = [
    "task=listops_short",
    "task.sizes.train=64",
    "task.sizes.val=24",
    "task.sizes.test=21",
    "task.max_length=30",
    "debug=tiny",
]
