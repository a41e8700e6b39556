"""Peak memory of an audit beside plain generation by transformers, in bfloat16.

A checkpoint of random weights in the shape of Qwen2.5-0.5B (988 MB) is written once.
Each variant is a process of its own, and its peak is the most memory that was resident
at a time, as the system counts it: plain `generate`, the audit from the command line,
and reading states and all heads through the Python API. Random weights draw junk, so
the audit ends at too few refusals (exit status 4), after it has drawn all answers.

    python benchmarks/memory.py --json memory.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 1.25
BATCH, PROMPT, THINKING, ANSWER = 8, 96, 24, 4
ROLES = ("harmful", "wrapped", "benign", "benign-wrapped", "safe-lookalike", "second")


def checkpoint(folder: Path) -> None:
    """Write the checkpoint, with a byte-level tokenizer, and the prompts."""
    import torch
    import transformers

    sys.path.append(str(ROOT / "tests"))
    from tiny_models import tiny_tokenizer

    config = transformers.Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=257,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for role in ROLES:
        text = f"What is to be said of {role} number "
        rows = [
            {"prompt": (text + f"{n} ").ljust(PROMPT - 32, "a")} for n in range(BATCH)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{role}.jsonl").write_text(lines, encoding="utf-8")


def plain(folder: Path) -> None:
    """Generate as transformers does, as many tokens as the audit draws."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16
    )
    ids = torch.randint(256, (BATCH, PROMPT))
    length = THINKING + ANSWER
    model.generate(ids, do_sample=False, min_new_tokens=length, max_new_tokens=length)


def audit(folder: Path) -> None:
    """Audit from the command line."""
    from holdfast.cli.app import main

    asked = [f"--{role}={folder / role}.jsonl" for role in ROLES]
    sizes = [f"--batch-size={BATCH}", f"--max-thinking={THINKING}"]
    sys.argv = ["holdfast", "audit", str(folder), "-o", str(folder / "study")]
    sys.argv += ["--dtype=bfloat16", f"--max-answer={ANSWER}", *sizes, *asked]
    main()


def reading(folder: Path) -> None:
    """Load, draw answers, and read states and all heads of them."""
    import torch

    from holdfast import load
    from holdfast.heads.attribution import attribute
    from holdfast.models.decoding.generate import generate
    from holdfast.models.decoding.row_state import Sampling
    from holdfast.models.hidden_states import project_states

    adapter = load(folder, dtype="bfloat16", device="cpu")
    rows = torch.randint(256, (BATCH, PROMPT)).tolist()
    sampling = Sampling(temperature=0, max_thinking=THINKING, max_answer=ANSWER)
    prompts = [(row, seed) for seed, row in enumerate(rows)]
    for _ in generate(adapter, prompts, sampling, batch_size=BATCH):
        pass
    direction = torch.randn(adapter.d_model)
    project_states(adapter, rows, direction[None], batch_size=BATCH)
    attribute(adapter, rows, [(20, PROMPT)] * BATCH, direction, batch_size=BATCH)


VARIANTS: dict[str, Callable[[Path], None]] = {
    "plain generate": plain,
    "holdfast audit": audit,
    "states and all heads, from Python": reading,
}


def peak(name: str, folder: Path) -> dict[str, Any]:
    """Run a variant in a process of its own, and return its peak and its status.

    This process stays small: a child counts what its parent held when it was born.
    """
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOLDFAST_CACHE": ""}
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    said = child.stdout.read().decode()
    _, status, used = os.wait4(child.pid, 0)
    code = child.returncode = os.waitstatus_to_exitcode(status)
    if code not in (0, 4):
        raise SystemExit(f"{name} ended with status {code}:\n{said}")
    return {"mib": used.ru_maxrss / 1024, "status": code, "said": said[-400:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.child:
        runs = VARIANTS | {"checkpoint": checkpoint}
        runs[options.child](options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if not (folder / "config.json").exists():
            peak("checkpoint", folder)
        found = {each: peak(each, folder) for each in VARIANTS}
    least = found["plain generate"]["mib"]
    print(f"Random Qwen2 of 0.5 B in bfloat16, {BATCH} rows of {PROMPT} tokens.\n")
    print("| variant | peak, MiB | ÷ plain | exit status |\n|---|---|---|---|")
    for each, line in found.items():
        line["ratio"] = line["mib"] / least
        print(
            f"| {each} | {line['mib']:.0f} | {line['ratio']:.2f} | {line['status']} |"
        )
    worst = max(line["ratio"] for line in found.values())
    print(f"\nWithin {LIMIT} ×: {'yes' if worst <= LIMIT else 'no'}.")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
