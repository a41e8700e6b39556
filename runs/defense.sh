#!/usr/bin/env bash
# Does a defense of fine-tuning hold? One organism with a grown attention sink, harmful
# rows among a customer's, every defense with as much tuning as any other. What is
# compared was written down in docs/defense-experiment.md before the run. Every step
# writes a file and is skipped when that file is there, so it may be stopped and started.
#
#   runs/defense.sh [FOLDER]           default: studies/defense
#
# Start it twice, one process a core, to share the work: each takes what no other holds,
# and the last to end writes the tables. What it runs is in runs/defense_plan.py.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/defense}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"
export OMP_NUM_THREADS=1

"$python" runs/defense_cells.py "$folder" >>"$folder/lane-$$.log"
"$python" runs/defense_table.py "$folder" >"$folder/.table-$$"
mv "$folder/.table-$$" "$folder/defense.md"
echo "The tables lie in $folder/defense.md, the figures beside it"
