"""A small ListOps task."""

from lra.tasks.listops import ListOps

PROTOCOL = {"inputs": "s4", "name": "strict"}
SIZES = {"train": 60, "val": 20, "test": 30}
LIMITS = {"max_depth": 6, "max_args": 6, "min_length": 21, "max_length": 128}


def listops(protocol=PROTOCOL, data_root="unused", **changes):
    arguments = {
        "name": "listops_short",
        "source": "generated",
        "sizes": SIZES,
        "data_seed": 0,
    } | LIMITS
    return ListOps(protocol=protocol, data_root=data_root, **(arguments | changes))
