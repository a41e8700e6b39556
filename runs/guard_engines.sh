#!/usr/bin/env bash
# The guard beside a real vLLM: inside it (eager and compiled), and in front of it. Makes
# a small study of `organism:cliff` and a bundle; goes on where it was stopped.
#
#   runs/guard_engines.sh [FOLDER]     default: studies/guard-engines
#
# PYTHON is an interpreter that has vLLM and Holdfast (`make engines` makes one).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/guard-engines}
python=${PYTHON:-.venv-engines/bin/python}
study=$folder/study records=docs/records/guard

"$python" -m holdfast rollout organism:cliff -o "$study" --limit "${REQUESTS:-800}"
"$python" -m holdfast probe "$study"
[ -e "$folder/bundle" ] || "$python" -m holdfast guard bundle "$study" -o "$folder/bundle" \
  --rates 0.01 --min-calibration 100 --window 8 --support 5
"$python" runs/guard_in_vllm.py "$study" "$folder/bundle" "$records/vllm.json"
"$python" runs/guard_in_vllm.py "$study" "$folder/bundle" "$records/vllm-compiled.json" --compiled
"$python" runs/guard_upstream.py "$study" "$folder/bundle" "$records/upstream.json"
