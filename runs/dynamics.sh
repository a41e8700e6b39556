#!/usr/bin/env bash
# The step-wise signal of a model that writes left to right, and the detectors on it. Each
# line reads files of the study and writes files of the study; any may be rerun alone.
#
#   runs/dynamics.sh [MODEL] [STUDY]
#
# 4,200 benign requests, so that more than 1,000 set the thresholds and more than 1,000 test
# them once the anchors have theirs. BENIGN=600 HARMFUL=200 MIN=100 is a trial of minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-organism:cliff}
study=${2:-studies/dynamics}
holdfast=${HOLDFAST:-.venv/bin/holdfast}
python=${PYTHON:-.venv/bin/python}
prompts=$study-prompts

[ -e "$prompts" ] || "$python" runs/dynamics_prompts.py "$prompts" "${BENIGN:-4200}" "${HARMFUL:-600}"
"$holdfast" rollout "$model" -o "$study" \
  --benign "$prompts/benign.csv" --benign-wrapped "$prompts/benign_wrapped.csv" \
  --harmful "$prompts/harmful.csv" --wrapped "$prompts/wrapped.csv"
"$holdfast" probe "$study"                  # rollouts  -> probes/, a rival of the signal
"$holdfast" signal "$study"                 # rollouts  -> anchors/, signal.safetensors
"$holdfast" guard fit "$study" --min-calibration "${MIN:-1000}"   # signal -> guard/detectors
"$holdfast" guard evaluate "$study"         # detectors -> guard/evaluation.json
"$holdfast" report "$study"                 # all of it -> report.json, report.html
