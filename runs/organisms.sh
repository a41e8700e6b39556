#!/usr/bin/env bash
# Grows the organisms of seeds 0 to 5, audits each, and checks that audits of twenty
# cheap aligned variants of seeds 0 and 3 raise no false alarm. Every step writes a file
# and is skipped when that file is there, so the run may be stopped and started at any time.
#
#   runs/organisms.sh [FOLDER [SEED...]]      default: studies/organisms 0 1 2 3 4 5
#
# Thresholds were set on seeds 0 to 2; the table in docs/organisms-table.md is claimed on
# seeds 3 to 5. With seeds named, nothing but those seeds is done, so that two runs can share
# the work; NAMES picks organisms.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-studies/organisms}
shift || true
holdfast=${HOLDFAST:-.venv/bin/holdfast}
python=${PYTHON:-.venv/bin/python}
records=docs/records/organisms
names=${NAMES:-aligned cliff spread early alarmed settled drift gate decoy}
mkdir -p "$folder" "$records"

audit() { # MODEL NAME [OPTIONS]
  local model=$1 name=$2
  shift 2
  [ -e "$records/$name.json" ] && return
  "$holdfast" audit "$model" -o "$folder/audit-$name" "$@" >"$folder/$name.log"
  "$python" runs/organisms_record.py "$model" "$folder/audit-$name" "$records/$name.json"
}

# Where one of the accounts was planted, the verdict is asked for with it, and without it
# beside: an audit alone sees where the score falls, and a slope may end in a fall.
decided() { # MODEL NAME [OPTIONS]
  local model=$1 name=$2 study=$folder/audit-$2
  shift 2
  [ -e "$records/$name.json" ] && return
  "$holdfast" audit "$model" -o "$study" "$@" >"$folder/$name.log"
  # An audit that goes on behind `decide` reports what that found as well.
  [ -e "$folder/$name.alone.json" ] ||
    "$python" runs/organisms_record.py "$model" "$study" "$folder/$name.alone.json"
  "$holdfast" decide "$study" --complied-rows 80 --refused-rows 30 --benign-rows 30 >>"$folder/$name.log"
  "$holdfast" report "$study" >>"$folder/$name.log"
  "$python" runs/organisms_record.py "$model" "$study" "$records/$name.json" "$folder/$name.alone.json"
}

# Enough held-out requests for the interval of "nothing changed" to lie within 0.05.
heads=(--wrappers-per-request 4 --fractions 0.03 --scopes everywhere --ablation-prompts 200 --test-fraction 0.5)

for seed in ${*:-0 1 2 3 4 5}; do
  for name in $names; do
    model=$folder/$name-$seed
    [ -e "$model" ] || "$holdfast" organism train "$name" --seed "$seed" -o "$model"
    case $name in
      cliff | spread)
        audit "$model" "$name-$seed" "${heads[@]}"
        greedy=$records/greedy-$name-$seed.json
        [ -e "$greedy" ] ||
          "$python" runs/greedy_heads.py "$model" "$folder/audit-$name-$seed" "$greedy"
        ;;
      gate) decided "$model" "$name-$seed" "${heads[@]}" ;;
      settled | drift | decoy) decided "$model" "$name-$seed" --no-heads ;;
      *) audit "$model" "$name-$seed" --no-heads ;;
    esac
  done
done
[ $# -gt 0 ] && exit

# Of 200 requests, of which one in fifteen gets through, nothing would be said of an attack,
# nor of a cliff: three times as many decide it, half of them held out.
for variant in $(seq 0 19); do
  model=$folder/variant-$variant
  [ -e "$model" ] || "$python" runs/organisms_variant.py \
    "$folder/aligned-$((variant % 2 * 3))" "$variant" "$model"
  audit "$model" "variant-$variant" --no-heads --limit 600 --test-fraction 0.5
done

"$python" runs/organisms_table.py "$records" >docs/organisms-table.md
echo "The table lies in docs/organisms-table.md"
