#!/usr/bin/env bash
# The same with accelerate and FSDP2, for students whose weights and optimizer do not fit one GPU (see the table of memory in `slm_begin plan`).
# What is gathered when (each layer of the model), and that products are in bf16, is set by slm_begin; for torchrun, ACCELERATE_USE_FSDP=true says the same.
#   sbatch --nodes 2 runs/slurm_accelerate.sh pretrain --recipe pythia-2.8b --out /shared/runs/2.8b --only evolved-kd
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
gpus=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# $SLURM_NODEID is another one on each node, so it is read there
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * gpus)) --main_process_ip "$head" --main_process_port "${PORT:-29500}" \
    --mixed_precision bf16 --dynamo_backend no --use_fsdp --fsdp_version 2 \
    -m slm_begin "$@" &
step=$!
again() { kill -TERM "$step"; wait "$step" || true; scontrol requeue "$SLURM_JOB_ID"; }
trap again TERM
wait "$step"
