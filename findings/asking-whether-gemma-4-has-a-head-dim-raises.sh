#!/usr/bin/env bash
# transformers 5.23.0: `hasattr` and `getattr` with a default raise on the configuration of Gemma 4.
#
# `getattr(config, "head_dim", None) or hidden_size // heads` is how width is read across families.
# Expected: a value, or the default.
# Seen: head_dim differs by layer there, and the attribute raises a RuntimeError, which `hasattr` and `getattr` do not
# catch: only an AttributeError means "not there". The same name in config.json is a plain number.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import transformers

config = transformers.Gemma4TextConfig(num_hidden_layers=6)
raised = []
for name, ask in (
    ("hasattr", lambda: hasattr(config, "head_dim")),
    ("getattr with a default", lambda: getattr(config, "head_dim", None)),
):
    try:
        print(name, "->", ask())
    except RuntimeError as error:
        raised.append(name)
        print(f"{name} raises {type(error).__name__}, an AttributeError: {isinstance(error, AttributeError)}")
print("in config.json:", config.to_dict()["head_dim"])
assert len(raised) == 2 and isinstance(config.to_dict()["head_dim"], int), "changed"
PY
