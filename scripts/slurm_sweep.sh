#!/usr/bin/env bash
# Example: trains the full-size ListOps baselines on a SLURM cluster, five seeds each, one GPU per run.
# Submitit submits one job per run and waits for all. With resume=auto, a job that was preempted
# or a sweep that is started again continues from the last checkpoints.
# Adapt the settings to the cluster, then:
#   pip install -e '.[cuda,sweep]' && scripts/slurm_sweep.sh
set -euo pipefail
export LRA_DATA=${LRA_DATA:-$PWD/data}   # must be on a file system that all nodes share
lra data prepare listops
for experiment in stu ar_stu lru transformer; do
  lra train -m experiment=listops/$experiment seed=0,1,2,3,4 resume=auto \
    hydra/launcher=submitit_slurm hydra.launcher.timeout_min=1440 hydra.launcher.gpus_per_node=1 \
    hydra.launcher.cpus_per_task=4 hydra.launcher.mem_gb=32
done
lra table
