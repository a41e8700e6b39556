#!/usr/bin/env bash
# Does it matter which rows mend a model? One organism with a planted cliff, one pool,
# every selector at equal rows and equal optimiser steps. The contrasts were written
# down in docs/repair.md before any run. Every step writes a file and is skipped when
# that file is there, so the run may be stopped and started at any time.
#
#   runs/repair.sh [FOLDER]           default: studies/repair
#
# ROWS, TEST, STEPS, SEEDS, BUDGETS, SELECTORS and AUDIT_LIMIT make it smaller.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/repair}
holdfast=${HOLDFAST:-.venv/bin/holdfast}
python=${PYTHON:-.venv/bin/python}
model=${MODEL:-organism:cliff}
rows=${ROWS:-20000} test=${TEST:-1000} steps=${STEPS:-300}
seeds=${SEEDS:-0 1 2 3 4}
budgets=${BUDGETS:-0.5% 1% 2% 5%}
selectors=${SELECTORS:-cliff final random-flagged judge rules random length loss}
limit=${AUDIT_LIMIT:-120}
records=$folder/records
mkdir -p "$records"

[ -e "$folder/test.jsonl" ] || "$python" runs/repair_material.py "$folder" "$rows" "$test"

audit() { # MODEL NAME
  [ -e "$folder/audit-$2/report.json" ] ||
    "$holdfast" audit "$1" --no-heads --limit "$limit" -o "$folder/audit-$2" >"$folder/audit-$2.log"
}

train() { # DATA OUT SEED
  "$holdfast" finetune "$model" --data "$1" --benign "$folder/benign.jsonl" --benign-ratio 1 \
    --method full --learning-rate 3e-4 --loss template --steps "$steps" --train-batch 8 \
    --no-gradient-checkpointing --seed "$3" -o "$2" >>"$folder/train.log"
}

cell() { # SELECTOR BUDGET SEED DATA [SELECTION]
  local name=$1-${2%\%}-$3
  [ -e "$records/$name.json" ] && return
  train "$4" "$folder/models/$name" "$3"
  "$python" runs/repair_evaluate.py "$folder/models/$name" "$folder/test.jsonl" \
    "$records/$name.json" "$1@$2" "$3" "${5:-}" "$folder/models/$name/holdfast_finetune.json"
}

# Nothing and everything are run once.
audit "$model" base
[ -e "$records/none-0-0.json" ] || "$python" runs/repair_evaluate.py \
  "$model" "$folder/test.jsonl" "$records/none-0-0.json" none@0% 0
all=$folder/chosen/all.jsonl
[ -e "$all" ] || "$holdfast" select "$model" --pool "$folder/pool.jsonl" --by random --budget 100% \
  --similar 0 --direction "$folder/audit-base" --scores "$folder/scores" -o "$all"
cell all 100% 0 "$all" "${all%.jsonl}.selection.json"

# The primary budget and selectors come first, so that they are there first.
for budget in 1% $budgets; do
  for selector in $selectors; do
    for seed in $seeds; do
      chosen=$folder/chosen/$selector-${budget%\%}-$seed.jsonl
      [ -e "${chosen%.jsonl}.selection.json" ] || "$holdfast" select "$model" \
        --pool "$folder/pool.jsonl" --by "$selector" --budget "$budget" --seed "$seed" \
        --direction "$folder/audit-base" --scores "$folder/scores" --max-answer 64 \
        -o "$chosen" >>"$folder/select.log"
      cell "$selector" "$budget" "$seed" "$chosen" "${chosen%.jsonl}.selection.json"
    done
  done
done
[ -e "$folder/models/cliff-1-0" ] && audit "$folder/models/cliff-1-0" cliff-1-0

"$python" runs/repair_table.py "$records" "$folder/repair.svg" >"$folder/repair.md"
echo "The table lies in $folder/repair.md, the figure in $folder/repair.svg"
