#!/usr/bin/env bash
# Train on nodes of a Slurm cluster: sbatch --nodes 2 examples/cluster/slurm.sh --config conf/32b-h100-80g.yaml --model DIR ...
# A task of Slurm is a rank. A run that ends with 75 was stopped (time limit, preemption) or lost a machine: it goes into the
# queue again, and on from its last checkpoint. This repository, its environment and the folders of the flags are to be
# seen from every node. OUT is the run's folder.
#SBATCH --job-name fft
#SBATCH --ntasks-per-node 8
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 8
#SBATCH --time 24:00:00
#SBATCH --signal TERM@180
#SBATCH --requeue
#SBATCH --open-mode append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

code=0
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -m fft.train "$@"
' fft --checkpoint "${OUT:-runs/slurm-$SLURM_JOB_ID}" --save_steps 200 --resume auto "$@" || code=$?
[ "$code" != 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
