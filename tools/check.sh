#!/usr/bin/env bash
# The checks CI runs, in the order that finds a mistake soonest. Needs no network, GPU or Quarto, and leaves the working tree as it was.
# `tools/check.sh fast` stops after lint, clean + export and the quick part of pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
fast=${1:-}
export NO_MKDOCS_2_WARNING=1 HF_HUB_DISABLE_TELEMETRY=1 MPLBACKEND=${MPLBACKEND:-agg} PYTHONUNBUFFERED=1
lib=slm_begin
export OMP_NUM_THREADS=1                     # two processes work side by side
step() { printf '\n== %s\n' "$*"; }

step "ruff"
ruff check

# Clean and export run in a copy: a hand edit of a module, or an uncleaned notebook, is shown and never overwritten.
step "nbdev_clean and nbdev_export change nothing"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
tar cf - --exclude=assets --exclude=__pycache__ --exclude=.ipynb_checkpoints nbs "$lib" settings.ini pyproject.toml | tar xf - -C "$copy"
(cd "$copy" && nbdev_clean && nbdev_export)
for p in nbs "$lib" pyproject.toml; do
    diff -r -x assets -x __pycache__ -x .ipynb_checkpoints "$p" "$copy/$p" >"$copy/diff" || {
        head -c 4000 "$copy/diff"
        echo
        echo "The notebooks are not clean, or do not match the modules. Run \`nbdev_clean && nbdev_export\`;"
        echo "if you edited a module by hand, run \`nbdev_update\` first, or that edit is lost."
        exit 1; }
done

if [ "$fast" = fast ]; then
    step "pytest, without slow tests"
    exec python -m pytest -n 2 --dist loadfile -m "not slow"
fi

step "the notebooks run"
nbdev_test --n_workers 2 --timing

step "pytest"
python -m pytest -n 2 --dist loadfile

step "README.md is what nbs/index.ipynb says"
python tools/nb2md.py readme --check

step "the documentation builds"
python tools/nb2md.py site
mkdocs build --strict -f _site_src/mkdocs.yml   # not -q: that hides the warnings --strict counts
