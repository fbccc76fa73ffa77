#!/usr/bin/env bash
# Makes results/listops_short.md: each model at its default settings, untuned; three seeds.
# Run it from a clean commit at the top of the checkout; a run takes 2 to 20 minutes on 2 CPU cores.
set -euo pipefail
lra train -m task=listops_short model=ar_stu,stu,lru,s5,transformer seed=0,1,2 \
  output.root=results/runs resume=auto tracker=none
# A table needs the records, metrics and predictions. Checkpoints stay out of the repository.
rm -rf results/runs/.sweeps results/runs/*/*/*/checkpoints results/runs/*/*/*/run.lock
lra table results/runs --task listops_short --format markdown \
  --output results/listops_short.md > /dev/null
lra plot results/runs --task listops_short --output results/listops_short.png
