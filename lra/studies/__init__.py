"""Studies: many runs with one question. `lra reproduce` makes the paper's figures."""
