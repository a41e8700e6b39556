#!/usr/bin/env bash
# Does it matter which rows mend a model? One organism with a planted cliff, one pool,
# every selector at equal rows and equal optimiser steps. The contrasts were written
# down in docs/repair.md before any run. Every step writes a file and is skipped when
# that file is there, so the run may be stopped and started at any time.
#
#   runs/repair.sh [FOLDER]           default: studies/repair
#
# Start it twice, one process a core, to share the work: each takes what no other holds,
# and the last to end writes the table. What it runs is in runs/repair_plan.py.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/repair}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"
export OMP_NUM_THREADS=1

"$python" runs/repair_cells.py "$folder" >>"$folder/lane-$$.log"
"$python" runs/repair_table.py "$folder" >"$folder/.table-$$"
mv "$folder/.table-$$" "$folder/repair.md"
echo "The table lies in $folder/repair.md, the figure in $folder/repair.svg"
