#!/usr/bin/env bash
# The recipes `teacher-gpu` and `study-gpu` on a machine with one GPU that has no network, lacks a few packages, and is lent for half an hour at most,
# in commands of at most ten minutes. Every step goes on where it was: the same line again. One step a line, in this order:
#   here    bash runs/study_gpu.sh pack               the novels as tokens and the packages, into runs/gpu-pack: 40 MB that git ignores (8 minutes on one core)
#   there   bash runs/study_gpu.sh unpack             with runs/gpu-pack carried along: at 64 MiB a call in one go while the repository is below 24 MB, else
#                                                     in two calls, tokens.aa and tokens.ab one after the other, and the unpacking in the second
#   there   bash runs/study_gpu.sh teacher            6 minutes; exit code 130 while it is not finished after 8
#   there   bash runs/study_gpu.sh study --only base --judge       two times 8 minutes, likewise; `--only base,long --judge` if there is time for more
#   there   bash runs/study_gpu.sh results            after each piece: what tables and figures need, into $OUT (a few MB; models stay behind)
# There, `unpack` and `teacher` fit into one call. Judging at once is right there: the models are gone when the machine is given back.
# Tried on a CPU in tiny sizes (tests/test_study.py), with other recipes: TEACHER=my-teacher.yaml STUDY=my-study.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} TEACHER=${TEACHER:-teacher-gpu} STUDY=${STUDY:-study-gpu} MINUTES=${MINUTES:-8} JOBS=${JOBS:-3}
NOVELS=${NOVELS-../shared/data/novels-train.parquet} RUNS=${RUNS:-runs} PACK=${PACK:-runs/gpu-pack} SITE=${SITE:-/tmp/site}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$SITE"
teacher=$RUNS/$(basename "$TEACHER" .yaml) study=$RUNS/$(basename "$STUDY" .yaml) step=${1:?name a step: pack, unpack, teacher, study or results}
shift

case $step in
pack)
  mkdir -p "$PACK" "$teacher"
  # without the novels that the calibration text is from, which must be new to teacher and students
  [ -z "$NOVELS" ] || "$PYTHON" - "$NOVELS" runs/novels-gpu.parquet <<'END'
import json, sys; from pyarrow import parquet
from slm_begin.data import assets
calib = {w['id'] for w in json.loads((assets() / 'novels-mini' / 'works.json').read_text(encoding='utf-8')) if w['split'] == 'calib'}
novels = parquet.read_table(sys.argv[1])
kept = novels.filter([i not in calib for i in novels['id'].to_pylist()])
print(f"{kept.num_rows} of {novels.num_rows} novels; the calibration text is from {len(calib)}")
parquet.write_table(kept, sys.argv[2], compression='zstd', row_group_size=16)
END
  "$PYTHON" - "$TEACHER" "$teacher" <<'END'
import sys; from pathlib import Path
from slm_begin.pipeline import TeacherRecipe, load_recipe, prepare_teacher
prepare_teacher(load_recipe(sys.argv[1], cls=TeacherRecipe), Path(sys.argv[2]))
END
  tar -C "$teacher" -cf - data recipe.yaml | xz -T0 -6 | split -b 20M - "$PACK/tokens."
  # what the machine lacks of our requirements, all in pure Python; without `datasets` and `ipywidgets`, which nothing there needs
  [ -n "${WHEELS-yes}" ] && "$PYTHON" -m pip download -q --no-deps --only-binary=:all: -c constraints.txt -d "$PACK" \
    fastcore jsonargparse docstring-parser typeshed-client importlib-resources
  du -sh "$PACK";;
unpack)
  ls "$PACK"/*.whl >/dev/null 2>&1 && "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$SITE" "$PACK"/*.whl
  mkdir -p "$teacher"
  cat "$PACK"/tokens.* | xz -d | tar -C "$teacher" -xf -
  "$PYTHON" -m slm_begin study --recipe "$STUDY" --out "$study" --plan;;
teacher) "$PYTHON" -m slm_begin train-teacher --recipe "$TEACHER" --out "$teacher" --minutes "$MINUTES" "$@";;
study) "$PYTHON" -m slm_begin study --recipe "$STUDY" --out "$study" --minutes "$MINUTES" --jobs "$JOBS" "$@";;
results)
  mkdir -p "${OUT:?name a folder for the results in OUT}"
  cp "$study/study.json" "$OUT/study-gpu.json"
  find "$study" "$teacher" -type f -size -4M \( -name '*.json' -o -name '*.jsonl' -o -name '*.yaml' -o -name '*.txt' -o -name '*.md' \) \
    ! -path '*/data/*' ! -path '*/cache/*' ! -path '*/texts/*' ! -name 'tokenizer*' -print0 | tar --null -czf "$OUT/study-gpu.tar.gz" -T -
  ls -l "$OUT";;
*) echo "there is no step \`$step\`: there are pack, unpack, teacher, study, results" >&2; exit 2;;
esac
