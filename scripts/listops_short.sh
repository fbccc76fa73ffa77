#!/usr/bin/env bash
# Makes results/listops_short.md: three models, three seeds, the defaults of conf/.
# Takes about 40 minutes on 2 CPU cores. Run it from a clean commit at the top of the checkout.
set -euo pipefail
lra train -m task=listops_short model=stu,lru,transformer seed=0,1,2 \
  output.root=results/runs resume=auto tracker=none
# A table needs the records, metrics and predictions. Checkpoints stay out of the repository.
rm -rf results/runs/.sweeps results/runs/*/*/*/checkpoints results/runs/*/*/*/run.lock
lra table results/runs --task listops_short --format markdown \
  --output results/listops_short.md > /dev/null
lra plot results/runs --task listops_short --output results/listops_short.png
