#!/usr/bin/env bash
# The step-wise signal of a model that writes left to right and of one that fills in masks,
# the detectors on both, and the same weights under several samplers. Each line reads files of
# a study and writes files of a study; any may be rerun alone, and what is done is skipped.
#
#   runs/dynamics.sh [FOLDER [PART...]]      default: studies/dynamics cliff diffuser samplings
#
# The part `replicated` grows the second organism anew, in half an hour, and asks it again.
#
# 4,200 benign requests, so that more than 1,000 set the thresholds and more than 1,000 test
# them once the anchors have theirs. BENIGN=600 HARMFUL=200 MIN=100 FEW=40 is a trial of minutes.
# The parts need each other's files at the end alone: two may run side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/dynamics}
shift || true
holdfast=${HOLDFAST:-.venv/bin/holdfast}
python=${PYTHON:-.venv/bin/python}
diffuser=${DIFFUSER:-organism:diffuser}
records=${RECORDS:-docs/records/dynamics}
prompts=$folder/prompts
mkdir -p "$folder" "$records"

[ -e "$prompts" ] || "$python" runs/dynamics_prompts.py "$prompts" "${BENIGN:-4200}" "${HARMFUL:-600}" "${FEW:-80}"

rollout() { # MODEL STUDY PROMPTS [OPTIONS]
  local model=$1 study=$2 from=$3
  shift 3
  "$holdfast" rollout "$model" -o "$study" "$@" \
    --benign "$from/benign.csv" --benign-wrapped "$from/benign_wrapped.csv" \
    --harmful "$from/harmful.csv" --wrapped "$from/wrapped.csv"
}

detectors() { # STUDY: signal -> guard/detectors, guard/evaluation.json, report.html
  "$holdfast" guard fit "$1" --min-calibration "${MIN:-1000}"
  "$holdfast" guard evaluate "$1"
  "$holdfast" report "$1"
}

cliff() { # Left to right: T = 32 tokens of the answer.
  rollout organism:cliff "$folder/cliff" "$prompts"
  "$holdfast" probe "$folder/cliff" # rollouts -> probes/, a rival of the signal
  "$holdfast" signal "$folder/cliff"
  detectors "$folder/cliff"
  "$python" runs/dynamics_record.py "$folder/cliff" "$records/cliff.json"
}

diffuser() { # Filling in masks: T = 32 passes, one token a pass; two a pass break sentences.
  rollout "$diffuser" "$folder/diffuser" "$prompts" --denoising-steps 32
  # It refuses more harmless requests than the other; fewer for the anchors leaves 1,000.
  "$holdfast" signal "$folder/diffuser" --anchor-requests 200
  detectors "$folder/diffuser"
  "$python" runs/dynamics_record.py "$folder/diffuser" "$records/diffuser.json"
}

sampled() { # NAME [OPTIONS]: the same few requests, in every wrapper, by another sampler
  local name=$1
  shift
  rollout "$diffuser" "$folder/sampled-$name" "$prompts/few" "$@"
}

orders() {
  sampled left_to_right --block-length 1
  sampled low_confidence --denoising-steps 32
  sampled random --denoising-steps 32 --remasking random
  sampled entropy --denoising-steps 32 --remasking entropy
}

samplings() { # One token a pass, so that samplers differ in their order alone.
  orders
  sampled margin --denoising-steps 32 --remasking margin
  sampled threshold --threshold 0.9
  for name in left_to_right low_confidence random; do
    # A step is a share of the response: the same for both samplers, each with its anchors.
    "$holdfast" signal "$folder/sampled-$name" --steps 16 --time fraction
  done
  for name in left_to_right low_confidence; do "$holdfast" report "$folder/sampled-$name"; done
  "$holdfast" compare "$folder/sampled-left_to_right" "$folder/sampled-low_confidence" \
    -o "$folder/samplings.html" # the same weights side by side
  "$python" runs/samplings.py "$records/samplings.json" "$folder"/sampled-*
}

replicated() { # The organism from another seed, on which nothing was chosen; grown first.
  local seed=${SEED:-3}
  local folder=$folder/seed-$seed
  local diffuser=$folder/diffuser-$seed
  [ -e "$diffuser" ] || "$holdfast" organism train diffuser --seed "$seed" -o "$diffuser"
  orders
  "$python" runs/samplings.py "$records/samplings-$seed.json" "$folder"/sampled-*
}

for part in ${*:-cliff diffuser samplings}; do "$part"; done
table=${TABLE:-docs/dynamics-table.md}
"$python" runs/dynamics_table.py "$records" "${table%-table.md}.svg" >"$table"
