#!/usr/bin/env bash
# Makes results/precondition/: the STU of equation (4) with and without preconditioned matrices, on
# rows of 136 and of 2,048 tokens, one seed. About an hour on 2 CPU cores, less on fast ones. Run it
# from a clean commit at the top of the checkout, after scripts/listops_short.sh.
set -euo pipefail
lra train -m task=listops_short model=stu model.precondition=0,0.25 optim.lr=4e-3 \
  output.root=results/precondition resume=auto tracker=none
lra train -m task=listops model=stu model.precondition=0,0.25,0.5 optim.lr=4e-3 \
  backbone.depth=2 backbone.width=32 trainer.batch_size=8 trainer.steps=600 trainer.eval_every=100 \
  trainer.eval_examples=500 trainer.train_eval_examples=100 trainer.eval_batch_size=16 \
  output.root=results/precondition resume=auto tracker=none
rm -rf results/precondition/.sweeps results/precondition/*/*/*/checkpoints \
  results/precondition/*/*/*/run.lock
python scripts/plot_precondition.py
