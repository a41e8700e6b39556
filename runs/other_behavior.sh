#!/usr/bin/env bash
# Does selecting by a direction carry beyond safety? A small model is asked for one word,
# thinks that it will give one word, and inside some wrappers answers at length. Rows are
# chosen by a probe of "will answer in one word", and trained on. Every step writes a file
# and is skipped when that file is there, so the run may be stopped and started again.
#
#   runs/other_behavior.sh [FOLDER]           default: studies/other-behavior
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/other-behavior}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"
export OMP_NUM_THREADS=1

"$python" runs/other_behavior.py "$folder" >>"$folder/run.log"
"$python" runs/other_table.py "$folder" >"$folder/.table"
mv "$folder/.table" "$folder/table.md"
echo "The tables lie in $folder/table.md"
