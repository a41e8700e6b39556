#!/usr/bin/env bash
# A natural organism: SmolLM2 is taught by `holdfast finetune` itself to think in R1's
# form, on STAR-1 and on harmless mathematics, and audited. Does the audit read a plateau
# in real English thinking? Every step goes on where it was stopped.
#
#   runs/natural.sh [FOLDER]           default: studies/natural
#
# HOLDFAST_BENCHMARKS names the folder of the public files. WORDS is the longest row of
# STAR-1 that is taken. STEPS=20 REQUESTS=16 is a trial of minutes; the defaults take two
# idle cores about two hours.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/natural}
holdfast=${HOLDFAST:-.venv/bin/holdfast}
python=${PYTHON:-.venv/bin/python}
record=${RECORD:-docs/records/real/natural.json}
data=${HOLDFAST_BENCHMARKS:?has to name the folder of the public files}

"$python" runs/natural.py material "$folder" # package, rows -> base/, harmless.jsonl
[ -e "$folder/model" ] || "$holdfast" finetune "$folder/base" -o "$folder/model" \
  --data "$folder/star1.json" --benign "$folder/harmless.jsonl" \
  --method full --loss both --steps "${STEPS:-600}" --train-batch "${BATCH:-2}" \
  --accumulate "${ACCUMULATE:-4}" --save-every "${SAVE:-20}"
"$holdfast" audit "$folder/model" -o "$folder/study" \
  --harmful "$data/advbench/harmful_behaviors.csv" --column harmful=target \
  --second "$data/jailbreakbench/jailbreakbench.csv" --limit "${REQUESTS:-128}" \
  --max-thinking "${THINKING:-512}" --max-answer "${ANSWER:-96}" || [ $? -eq 4 ]
# 4 says that there is not enough evidence for a probe, which is a result as well.
"$python" runs/natural.py record "$folder" "$record"
echo "The record is $record"
