#!/usr/bin/env bash
# An example, to be edited: the full-size ListOps baselines on a SLURM cluster, one GPU a run, five seeds each.
# Submitit sends one job a run and waits; a preempted or repeated sweep goes on where it stopped (resume=auto).
#   pip install -e '.[cuda,sweep]' && scripts/slurm_sweep.sh
set -euo pipefail
export LRA_DATA=${LRA_DATA:-$PWD/data}   # on a file system that all nodes see
lra data prepare listops
for experiment in stu ar_stu lru transformer; do
  lra train -m experiment=listops/$experiment seed=0,1,2,3,4 resume=auto \
    hydra/launcher=submitit_slurm hydra.launcher.timeout_min=1440 hydra.launcher.gpus_per_node=1 \
    hydra.launcher.cpus_per_task=4 hydra.launcher.mem_gb=32
done
lra table
