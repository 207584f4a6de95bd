#!/usr/bin/env bash
# A whole run on one machine, shared by all of its GPUs. Without GPUs by PROCESSES processes (1 if not given).
#   bash runs/one_node.sh pythia-410m /data/runs/410m [settings of the recipe, such as --train.tokens 100_000_000]
# Killed or preempted: the same line again goes on. What is downloaded and tokenised lies in the run folder, so the next start is quick.
set -euo pipefail
RECIPE=${1:?name a recipe, or a YAML file: slm_begin recipes}
OUT=${2:?name the run folder}
shift 2
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
PROCESSES=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + PROCESSES - 1) / PROCESSES ))}     # torchrun would take one thread for each process

python -m slm_begin plan --recipe "$RECIPE" "$@"
launch() { if [ "$PROCESSES" -gt 1 ]; then torchrun --standalone --nproc_per_node "$PROCESSES" -m slm_begin "$@"; else python -m slm_begin "$@"; fi; }
launch run --recipe "$RECIPE" --out "$OUT" "$@"
