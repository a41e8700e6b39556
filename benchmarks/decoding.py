"""How fast answers are drawn, beside `generate` of transformers and other engines.

Every engine is a process of its own that loads the model once. In each round every
engine draws all prompts once, greedily, in an order that rotates, and is divided by
Holdfast in the same round. Two loads: as many tokens for every prompt, and lengths
spread evenly from 16 to 256. Stop tokens are not looked at, so that all draw as many.
Rows that differ from `generate` are listed with the difference of the two logits where
they part. Memory is the most that was resident in the process, its model included.

    python benchmarks/decoding.py --pairs 5 --json decoding.json
    python benchmarks/decoding.py --model DIR --prompts a.jsonl b.csv --dtype bfloat16
    python benchmarks/decoding.py --older CHECKOUT --vllm-python VENV/bin/python

Without `--model` it is a random one of the shape of SmolLM2-135M. Prompts are the
first texts of columns named prompt, question, Goal or turns, as chats; without them,
random tokens behind a common opening.
"""

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OURS, THEIRS, OLDER, VLLM = "Holdfast", "generate of transformers", "older", "vLLM"
SHORTEST, LONGEST, OPENING = 16, 256, 24
COLUMNS = ("prompt", "question", "Goal", "turns")
LIMITS = {"equal": 1.6, "mixed": 2.0}

Draw = Callable[[list[int]], list[list[int]]]
"""From the number of tokens for each prompt to those tokens."""


def holdfast(options: argparse.Namespace, prompts: list[list[int]]) -> Draw:
    """Draw with this project, or with an older commit of it."""
    from dataclasses import replace

    from holdfast.models.decoding.decoder import Job
    from holdfast.models.decoding.generate import generate
    from holdfast.models.decoding.row_state import Sampling
    from holdfast.models.loading.causal import load

    adapter = load(options.model, dtype=options.dtype, device="cpu")
    module = sys.modules[Job.__module__]
    # Older commits have both in one module.
    module = module if hasattr(module, "_job") else sys.modules[generate.__module__]
    prepare = module._job

    def draw(lengths: list[int]) -> list[list[int]]:
        def job(*arguments: Any) -> Any:
            made = prepare(*arguments)
            sampling = replace(made.rules.sampling, max_answer=lengths[made.place])
            return made._replace(rules=replace(made.rules, sampling=sampling))

        module._job = job
        done = generate(
            adapter,
            [(prompt, row) for row, prompt in enumerate(prompts)],
            Sampling(temperature=0, max_thinking=0, max_answer=max(lengths)),
            batch_size=options.batch_size,
            stop_ids=[10**9],
            thinking_done=True,
        )
        rows = {each.index: each.token_ids for part in done for each in part}
        return [list(rows[i][len(prompt) :]) for i, prompt in enumerate(prompts)]

    return draw


def transformers(options: argparse.Namespace, prompts: list[list[int]]) -> Draw:
    """Draw with `generate`, batch by batch, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    kind = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=kind).eval()

    class Lengths(StoppingCriteria):
        def __init__(self, width: int, lengths: Sequence[int]) -> None:
            self.ends = width + torch.tensor(lengths)

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= self.ends

    def batch(rows: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        model.generation_config.eos_token_id = None
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(lengths),
                pad_token_id=0,
                stopping_criteria=[Lengths(width, lengths)],
            )
        return [
            row[width : width + n]
            for row, n in zip(found.tolist(), lengths, strict=True)
        ]

    def draw(lengths: list[int]) -> list[list[int]]:
        starts = range(0, len(prompts), options.batch_size)
        cuts = [slice(start, start + options.batch_size) for start in starts]
        return list(chain(*(batch(prompts[cut], lengths[cut]) for cut in cuts)))

    draw.gap = lambda ids, one, other: _gap(model, ids, one, other)  # type: ignore
    return draw


def _gap(model: Any, ids: list[int], one: int, other: int) -> float:
    """Return the difference of two logits after some tokens."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1].float()
    return float((logits[one] - logits[other]).abs())


def vllm(options: argparse.Namespace, prompts: list[list[int]]) -> Draw:
    """Draw with vLLM, which batches as it likes."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + LONGEST + 8
    model = LLM(
        model=options.model,
        dtype=options.dtype,
        max_model_len=longest,
        max_num_seqs=options.batch_size,
        enforce_eager=True,
    )

    def draw(lengths: list[int]) -> list[list[int]]:
        how = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
            for n in lengths
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = model.generate(asked, how, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in done]

    return draw


ENGINES = {OURS: holdfast, OLDER: holdfast, THEIRS: transformers, VLLM: vllm}


def work(options: argparse.Namespace) -> None:
    """Answer requests on stdin, one line of JSON each, on what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    # Whatever libraries print must not come between answers.
    os.dup2(2, 1)
    prompts = json.loads(Path(options.asked).read_text(encoding="utf-8"))
    draw = ENGINES[options.work](options, prompts)
    for line in sys.stdin:
        request = json.loads(line)
        if "gap" in request:
            answer: Any = draw.gap(*request["gap"])  # type: ignore[attr-defined]
        else:
            start, cpu = time.perf_counter(), time.process_time()
            rows = draw(request["lengths"])
            answer = {
                "seconds": time.perf_counter() - start,
                "cpu": time.process_time() - cpu,
                "rows": rows,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Worker:
    """An engine in a process of its own."""

    def __init__(self, name: str, options: argparse.Namespace, asked: Path) -> None:
        """Start it; it loads the model while others do."""
        python = options.vllm_python if name == VLLM else sys.executable
        source = options.older if name == OLDER else ROOT
        threads = str(options.threads)
        places = {"PYTHONPATH": str(Path(source) / "src")} if name != VLLM else {}
        command = [python, __file__, "--work", name, "--asked", str(asked)]
        command += ["--model", options.model, "--dtype", options.dtype]
        command += ["--batch-size", str(options.batch_size)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            env={**os.environ, **places, "OMP_NUM_THREADS": threads},
            text=True,
        )

    def ask(self, request: Any) -> Any:
        """Send a request and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("An engine ended; run with --verbose to see why.")
        return json.loads(line)


def texts(path: Path) -> list[str]:
    """Return the prompts of a file."""
    with path.open(encoding="utf-8", newline="") as file:
        lines: Any = csv.DictReader(file)
        if path.suffix != ".csv":
            lines = [json.loads(line) for line in file]
        rows = list(lines)
    column = next(name for name in COLUMNS if name in rows[0])
    found = [row[column] for row in rows]
    return [each if isinstance(each, str) else each[0] for each in found]


def questions(options: argparse.Namespace) -> list[list[int]]:
    """Return the tokens of the prompts, as many from each file."""
    if not options.prompts:
        draw = random.Random(0)
        opening = [draw.randrange(3, 49_152) for _ in range(OPENING)]
        lengths = [draw.randrange(12, 60) for _ in range(options.rows)]
        return [
            opening + [draw.randrange(3, 49_152) for _ in range(length)]
            for length in lengths
        ]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    each = -(-options.rows // len(options.prompts))
    asked = list(chain(*(texts(path)[:each] for path in options.prompts)))
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for text in asked[: options.rows]
    ]


def random_checkpoint(folder: Path) -> None:
    """Write a random model of the shape of SmolLM2-135M."""
    import torch
    import transformers
    from measure import small_tokenizer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)


def differing(
    ours: list[list[int]], theirs: list[list[int]], prompts: Any, judge: Worker
) -> list[dict[str, Any]]:
    """Return the rows that differ, where they part, and how close the choice was."""
    found = []
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            pairs = enumerate(zip(one, other, strict=True))
            at = next(place for place, (a, b) in pairs if a != b)
            tokens = [*prompts[row], *one[:at]]
            gap = judge.ask({"gap": [tokens, one[at], other[at]]})
            found.append({"row": row, "token": at, "gap": gap})
    return found


def measured(
    workers: dict[str, Worker], lengths: list[int], prompts: Any, pairs: int
) -> dict[str, Any]:
    """Run all engines in interleaved rounds, after one that is not counted."""
    from measure import summarise

    first = {name: each.ask({"lengths": lengths}) for name, each in workers.items()}
    took: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "cpu": []} for name in workers
    }
    names = list(workers)
    for turn in range(pairs):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            answer = workers[name].ask({"lengths": lengths})
            for kind, values in took[name].items():
                values.append(answer[kind])
            first[name]["peak"] = answer["peak"]
    import numpy as np

    judge, rows = workers[THEIRS], first[THEIRS]["rows"]
    return {
        name: {
            "tokens_per_second": sum(lengths) / float(np.median(took[name]["seconds"])),
            "seconds": summarise(
                np.divide(took[name]["seconds"], took[OURS]["seconds"])
            ),
            "cpu": summarise(np.divide(took[name]["cpu"], took[OURS]["cpu"])),
            "peak_mib": first[name]["peak"],
            "differing": differing(first[name]["rows"], rows, prompts, judge),
        }
        for name in names
    }


def show(load: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Print one table, and whether the limit holds."""
    print(
        f"\n{load} lengths, {options.rows} prompts, {options.dtype}, batches of "
        f"{options.batch_size}, {options.threads} threads; {options.pairs} rounds\n"
    )
    print(
        "| engine | tokens/s | time ÷ Holdfast [95 %] | CPU time ÷ Holdfast [95 %] "
        "| peak MiB | rows that differ from generate (largest gap) |\n"
        "|---|---|---|---|---|---|"
    )
    for name, line in found.items():
        ratios = " | ".join(
            f"{line[kind]['ratio']:.2f} [{line[kind]['low']:.2f}, "
            f"{line[kind]['high']:.2f}]"
            for kind in ("seconds", "cpu")
        )
        gaps = [each["gap"] for each in line["differing"]]
        print(
            f"| {name} | {line['tokens_per_second']:.0f} | {ratios} | "
            f"{line['peak_mib']:.0f} | {len(gaps)} ({max(gaps, default=0):.3g}) |"
        )
    ratio, limit = found[THEIRS]["seconds"], LIMITS[load]
    resolved = "yes" if ratio["low"] >= limit else "not resolved, run more rounds"
    holds = "no" if ratio["high"] < limit else resolved
    print(f"\nAt least {limit} times as fast as generate: {holds}.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory of a checkpoint")
    parser.add_argument("--prompts", type=Path, nargs="*", help="CSV or JSON lines")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64, help="of equal lengths")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--loads", nargs="*", choices=tuple(LIMITS), default=LIMITS)
    parser.add_argument("--older", help="checkout of an older commit")
    parser.add_argument("--vllm-python", help="interpreter that has vLLM")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--asked", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.work:
        work(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model is None:
            random_checkpoint(folder)
            options.model = str(folder)
        prompts = questions(options)
        options.rows = len(prompts)
        asked = folder / "asked.json"
        asked.write_text(json.dumps(prompts), encoding="utf-8")
        names = [OURS, THEIRS]
        names += [OLDER] if options.older else []
        names += [VLLM] if options.vllm_python else []
        workers = {each: Worker(each, options, asked) for each in names}
        spread = [
            SHORTEST + round(i * (LONGEST - SHORTEST) / max(1, len(prompts) - 1))
            for i in range(len(prompts))
        ]
        random.Random(1).shuffle(spread)
        loads = {"equal": [options.tokens] * len(prompts), "mixed": spread}
        result = {}
        for load in options.loads:
            result[load] = measured(workers, loads[load], prompts, options.pairs)
            show(load, result[load], options)
        for worker in workers.values():
            worker.process.terminate()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
