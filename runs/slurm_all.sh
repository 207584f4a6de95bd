#!/usr/bin/env bash
# A whole run as a chain of jobs, each of the size that suits it: the search, the teacher's opinions, the arms side by side, the report.
#   bash runs/slurm_all.sh pythia-410m /shared/runs/410m [settings of the recipe]
# NODES is for the opinions and for each arm (1 if not given), ARMS are the recipe's, JOB is runs/slurm_torchrun.sh or runs/slurm_accelerate.sh.
set -euo pipefail
RECIPE=${1:?name a recipe, or a YAML file: slm_begin recipes}
OUT=${2:?name the run folder, on a file system that all nodes see}
shift 2
here=$(dirname "$0")
JOB=${JOB:-$here/slurm_torchrun.sh}
submit() { sbatch --parsable "$@"; }

python -m slm_begin plan --recipe "$RECIPE" "$@"
search=$(submit --nodes 1 "$here/slurm_torchrun.sh" search --recipe "$RECIPE" --out "$OUT" "$@")
cache=$(submit --nodes "${NODES:-1}" --dependency "afterok:$search" "$here/slurm_torchrun.sh" cache-teacher --resume --out "$OUT")
arms=()
for arm in ${ARMS:-random one-shot evolved evolved-kd}; do
    arms+=("$(submit --nodes "${NODES:-1}" --dependency "afterok:$cache" "$JOB" pretrain --resume --out "$OUT" --only "$arm")")
done
report=$(submit --nodes 1 --dependency "afterok:$(IFS=:; echo "${arms[*]}")" "$here/slurm_torchrun.sh" run --resume --out "$OUT")
echo "search $search, cache $cache, arms ${arms[*]}, report $report"
