#!/usr/bin/env bash
# The experiments of three papers under their own models, for whoever has the GPUs: the
# prober, the cliff, heads off, selection at 1.7 %, sinks over poisoned training, and the
# signal under both samplings. One table sets what was published beside what came out.
#
#   runs/published.sh [FOLDER [OPTIONS]]        default: studies/published
#
# HOLDFAST_BENCHMARKS names the folder of the public files. Two experiments want files that
# nobody may hand on, and are left out without: --file pool=PATH (40,000 rows of
# WildJailbreak, prompt and safe response) and, together, --file poisoned=PATH,
# --file sink_harmful=PATH and --file sink_refused=PATH (BeaverTails). Further options:
# --models NAME... for some models alone, and --model NAME=PATH for one on disk.
# Sizes are set in the environment (runs/published.py). A run that was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/published}
shift || true
mkdir -p "$folder"
"${PYTHON:-.venv/bin/python}" runs/published.py "$folder" "$@" >"$folder/.table"
mv "$folder/.table" "$folder/published.md"
echo "The table is $folder/published.md, its figures are in $folder/published.json"
