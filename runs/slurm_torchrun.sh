#!/usr/bin/env bash
# A part of a run, or all of it, on several nodes of a SLURM cluster with torchrun (DDP: each GPU holds the whole student).
#   sbatch --nodes 4 runs/slurm_torchrun.sh run --recipe pythia-410m --out /shared/runs/410m
#   sbatch --nodes 1 runs/slurm_torchrun.sh pretrain --resume --out /shared/runs/410m --only evolved
# The run folder must lie on a file system that all nodes see. Before the time limit, and when it is preempted, SLURM sends SIGTERM: the training saves,
# the job is put into the queue again, and goes on from there.
#SBATCH --job-name=slm_begin
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail
: "${SLURM_JOB_ID:?this is a job for sbatch; on one machine: runs/one_node.sh}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$head:${PORT:-29500}" -m slm_begin "$@" &
step=$!
again() { kill -TERM "$step"; wait "$step" || true; scontrol requeue "$SLURM_JOB_ID"; }
trap again TERM
wait "$step"
