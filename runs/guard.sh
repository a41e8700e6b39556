#!/usr/bin/env bash
# The guard, live: bundles of two organisms, what they do on rows that they have not seen, and
# what happens where they were not calibrated. What is done is skipped.
#
#   runs/guard.sh [FOLDER [PART...]]      default: studies/guard cliff diffuser
#
# The part `again` grows `cliff` anew from another seed, in some twenty minutes, and measures
# there what was chosen on the bundled one.
#
# 4,600 benign requests, each in a wrapper as well: more than 1,000 set the thresholds, and more
# than 1,000 others test them, plain and wrapped.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/guard}
shift || true
holdfast=${HOLDFAST:-.venv/bin/holdfast}
python=${PYTHON:-.venv/bin/python}
records=${RECORDS:-docs/records/guard}
mkdir -p "$folder" "$records"

rollout() { # MODEL STUDY PROMPTS [OPTIONS]
  local model=$1 study=$2 from=$3
  shift 3
  "$holdfast" rollout "$model" -o "$study" --test-fraction 0.5 "$@" \
    --benign "$from/benign.csv" --benign-wrapped "$from/benign_wrapped.csv" \
    --harmful "$from/harmful.csv" --wrapped "$from/wrapped.csv"
}

bundle() { # STUDY BUNDLE [OPTIONS]
  local study=$1 to=$2
  shift 2
  # Answers of this organism have 16 tokens, so that windows are short.
  [ -e "$to" ] || "$holdfast" guard bundle "$study" -o "$to" --rates 0.001 0.01 0.05 \
    --window 8 --support 5 "$@"
}

measure() { # MODEL NAME
  local model=$1 name=$2
  local prompts=$folder/prompts study=$folder/$name
  local edit=$folder/$name-heads.json
  [ -e "$prompts" ] || "$python" runs/dynamics_prompts.py "$prompts" 4600 600 80 1
  "$python" runs/planted_heads.py "$model" >"$edit"
  rollout "$model" "$study" "$prompts"
  "$holdfast" probe "$study"
  "$holdfast" signal "$study"
  # Steering needs a detector that fires before the answer is turned.
  [ -e "$study-steered" ] || cp -r "$study" "$study-steered"
  bundle "$study-steered" "$study-early" --acts-on thinking_mean --edit "$edit"
  "$holdfast" guard live "$study-steered" --guard "$study-early" --policies steer --limit 400
  "$python" -c 'import json, sys; told = json.load(sys.stdin); del told["detectors"]
print(json.dumps(told, indent=1))' <"$study-steered/guard/live.json" >"$records/$name-steered.json"
  bundle "$study" "$study-bundle" --edit "$edit"
  "$holdfast" guard live "$study" --guard "$study-bundle" \
    --policies stop --policies steer --policies redraw
  "$python" runs/guard_live.py "$study" "$study-bundle" "$records/$name.json"
}

cliff() {
  measure organism:cliff cliff
}

again() { # The organism from another seed, on which nothing was chosen; grown first.
  local seed=${SEED:-3}
  local model=$folder/cliff-$seed
  [ -e "$model" ] || "$holdfast" organism train cliff --seed "$seed" -o "$model"
  measure "$model" "cliff-seed-$seed"
}

diffuser() { # One token a pass; one in 31 benign requests stands in a wrapper.
  local prompts=$folder/few study=$folder/diffuser
  [ -e "$prompts" ] || "$python" runs/dynamics_prompts.py "$prompts" 620 220 80 31
  rollout organism:diffuser "$study" "$prompts" --denoising-steps 32
  "$python" runs/guard_denoised.py "$study" "$records/diffuser.json"
}

for part in ${*:-cliff diffuser}; do "$part"; done
