"""Write a model of the Qwen 3 shape with wider heads that computes the same numbers.

Engines have kernels for heads of certain widths, 32 and more on a CPU, and organisms
have heads of width 8. The new columns hold zeros. Projections are doubled as often as
norm and scale of a head ask for, powers of 2 and thus exact, and rotary pairs are moved
to where the wider head has the same frequencies.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTH = 32


def places(width: int, wide: int) -> Tensor:
    """Return where each column of a head goes, so that rotary frequencies agree."""
    half, step = torch.arange(width // 2), wide // width
    return torch.cat([half * step, half * step + wide // 2])


def widened(weights: dict[str, Tensor], width: int, wide: int) -> dict[str, Tensor]:
    """Return weights whose heads are `wide`, for scores that are the same."""
    at, made = places(width, wide), {}
    more = math.sqrt(wide / width)
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if kind in ("q_norm", "k_norm"):
            # Padded with zeros, a head has its mean square divided by the share of its
            # columns; the projection is multiplied for it, so that epsilon holds too.
            # What is left is the scale of the scores.
            new = weight.new_zeros(wide)
            new[at] = weight / more if kind == "q_norm" else weight
        elif kind in ("q_proj", "k_proj", "v_proj"):
            heads = weight.reshape(-1, width, weight.shape[-1])
            new = weight.new_zeros((len(heads), wide, weight.shape[-1]))
            new[:, at] = heads * (1 if kind == "v_proj" else more)
            new = new.reshape(-1, weight.shape[-1])
        elif kind == "o_proj":
            heads = weight.reshape(weight.shape[0], -1, width)
            new = weight.new_zeros((*heads.shape[:2], wide))
            new[..., at] = heads
            new = new.reshape(weight.shape[0], -1)
        else:
            new = weight
        made[name] = new.contiguous()
    return made


def widen(source: Path, target: Path, wide: int = WIDTH) -> None:
    """Write the model in `source` with wider heads to `target`."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "config.json"
    config = json.loads(path.read_text("utf-8"))
    assert config["model_type"] == "qwen3"
    width = config["head_dim"]
    config |= {"head_dim": wide, "architectures": ["Qwen3ForCausalLM"]}
    path.write_text(json.dumps(config, indent=2), "utf-8")
    file = target / "model.safetensors"
    made = widened(load_file(file), width, wide)
    save_file(made, file, metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    asked = parser.parse_args()
    widen(asked.source, asked.target)
