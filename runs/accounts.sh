#!/usr/bin/env bash
# When was it decided? Asks it of organisms that hold one planted case of each account, and
# of one whose probe is not used and one with a gate. Every step writes a file and is skipped
# when that file is there, so the run may be stopped and started at any time.
#
#   runs/accounts.sh [FOLDER [SEED...]]      default: studies/organisms 0 3 4 5
#
# Rules were set on seed 0; the table in docs/accounts-table.md is claimed on seeds 3 to 5.
# Organisms are those of runs/organisms.sh, in the same folder. With seeds named, nothing but
# those seeds is done, so that two runs can share the work; NAMES picks organisms.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/organisms}
shift || true
holdfast=${HOLDFAST:-.venv/bin/holdfast}
python=${PYTHON:-.venv/bin/python}
records=docs/records/accounts
mkdir -p "$folder" "$records"

# Enough rows for an interval of a tenth to either side, and controls beside them.
rows=(--complied-rows 80 --refused-rows 30 --benign-rows 30)

for seed in ${*:-0 3 4 5}; do
  for name in ${NAMES:-cliff early settled drift gate decoy}; do
    model=$folder/$name-$seed study=$folder/accounts-$name-$seed
    record=$records/$name-$seed.json
    [ -e "$record" ] && continue
    [ -e "$model" ] || "$holdfast" organism train "$name" --seed "$seed" -o "$model"
    "$holdfast" rollout "$model" -o "$study" --limit 150 >"$study.log"
    "$holdfast" probe "$study" >>"$study.log"
    case $name in
      cliff)
        # Heads that are switched off are those of the ranking.
        "$holdfast" heads "$study" >>"$study.log"
        "$holdfast" decide "$study" "${rows[@]}" --use --use-prompts 48 --swap all >>"$study.log"
        ;;
      decoy) "$holdfast" decide "$study" "${rows[@]}" --use --use-prompts 48 >>"$study.log" ;;
      *) "$holdfast" decide "$study" "${rows[@]}" >>"$study.log" ;;
    esac
    if [ "$name" = gate ]; then
      "$holdfast" heads "$study" --by interchange >>"$study.log"
      gate=$("$python" -c 'import json, sys
print("%d:%d" % tuple(json.load(open(sys.argv[1]))["gate_head"]))' "$model/truth.json")
      "$holdfast" ablate "$study" --ablated-heads "$gate" --scopes everywhere \
        --ablation-prompts 300 >>"$study.log"
    fi
    "$holdfast" report "$study" >>"$study.log"
    "$python" runs/accounts_record.py "$model" "$study" "$record"
  done
done
[ $# -gt 0 ] && exit

"$python" runs/accounts_table.py "$records" >docs/accounts-table.md
echo "The table lies in docs/accounts-table.md"
