#!/usr/bin/env bash
# The table of results/listops_short.md: three models, three seeds, the defaults of conf/. About 40 minutes on 2 CPU cores.
# From a clean commit, at the top of the checkout:  scripts/listops_short.sh
set -euo pipefail
lra train -m task=listops_short model=stu,lru,transformer seed=0,1,2 output.root=results/runs resume=auto tracker=none
# what a table needs is the record, the metrics and the predictions; checkpoints stay out of the repository
rm -rf results/runs/.sweeps results/runs/*/*/*/checkpoints results/runs/*/*/*/run.lock
lra table results/runs --task listops_short --format markdown --output results/listops_short.md > /dev/null
lra plot results/runs --task listops_short --output results/listops_short.png
