"""Print the heads that are planted in an organism, as an edit that switches them off.

Usage: planted_heads.py MODEL      an exported organism's folder, or organism:NAME
"""

import json
import sys
from pathlib import Path

from holdfast.organisms.catalogue import PREFIX, TRUTH, bundled

[model] = sys.argv[1:]
folder = bundled(model) if model.startswith(PREFIX) else Path(model)
heads = json.loads((folder / TRUTH).read_text("utf-8"))["planted_heads"]
print(json.dumps({"heads": heads, "factor": 0}))
