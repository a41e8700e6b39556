"""What is damaged, and how it is looked at: one surface for each kind of file.

A surface has valid files, draws changes of them, and runs a case through the command
line.
"""

import io
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_PROXY"] = "127.0.0.1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tiny models and a server that speaks like a judge are those of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "judges"))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "models"))

from fuzz_changes import Change, Files, apply, as_header, as_json, as_table, changes
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import tiny_models
import tiny_thinker
from chat_server import Reply, serving
from holdfast.cli.app import run
from holdfast.study import Study

KINDS: Final = {0: "accepted", 1: "fails the gate"} | {
    status: f"refused ({status})" for status in (2, 3, 4, 5)
}


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str


class Hang(BaseException):
    """A case takes longer than any file should."""


class Fault(Exception):
    """A case did not end as it should."""

    def __init__(self, key: str, said: str) -> None:
        super().__init__(said)
        self.key = key


def command(*words: str | Path) -> Ended:
    """Run a command as a shell would, and refuse every end that is not documented."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors)
        for errors in ("strict", "backslashreplace")
    )
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = run(list(map(str, words)))
            out.flush()
    except (Exception, Hang) as error:
        own = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "holdfast" in Path(frame.filename).parts
        ]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        key = f"{type(error).__name__} in {place}"
        raise Fault(key, "".join(traceback.format_exception(error))[-1500:]) from error
    said = [err.seek(0), err.read()][1], [out.seek(0), out.read()][1]
    last = said[0].strip().split("\n")[-1]
    if status not in KINDS or "Traceback" in said[0]:
        raise Fault(f"status {status}", said[0][-1500:])
    if status > 1 and not last.startswith("holdfast: "):
        raise Fault("a complaint of several lines", said[0][-1500:])
    return Ended(status, said[1])


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Stop a case that takes more than so many seconds of the processor."""

    def stop(_: int, __: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s of the processor")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def figures(block: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Yield every figure of a report with its path."""
    if isinstance(block, dict) and {"value", "n"} <= set(block):
        yield path, block
    elif isinstance(block, dict | list):
        keys = block if isinstance(block, dict) else range(len(block))
        for key in keys:
            yield from figures(block[key], (*path, key))


def check_rates(block: Any, judged: Callable[[tuple[Any, ...]], bool]) -> None:
    """Refuse a rate over rows of which none was judged, by our own count of them."""
    for path, figure in figures(block):
        if "unparsed" in path or figure["value"] is None:
            continue
        if figure.get("unjudged", 0) >= max(1, figure["n"]) or not judged(path):
            raise Fault("a rate without a judged row", f"{path}: {figure}")


class World(NamedTuple):
    """Valid things that cases are made from."""

    folder: Path
    thinker: Path

    @classmethod
    def write(cls, folder: Path, thinker: Path | None = None) -> "World":
        """Write models, adapters and a study; a model that was taught may be given."""
        shards, adapter = folder / "shards", folder / "adapter"
        # The two say in different ways how many layers there are.
        for kind, place in (("qwen3", shards), ("llama", folder / "model")):
            model = tiny_models.tiny_model(kind, num_hidden_layers=2)
            size = {"max_shard_size": "40KB"} if place is shards else {}
            model.save_pretrained(place, **size)
            tiny_models.tiny_tokenizer().save_pretrained(place)
        model.name_or_path = "base"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
            get_peft_model(model, lora).save_pretrained(adapter)
        shutil.copytree(folder / "model", adapter / "base")
        if thinker is None:
            thinker, tokenizer = folder / "thinker", tiny_thinker.tokenizer()
            tiny_thinker.teach(tokenizer).save_pretrained(thinker)
            tokenizer.save_pretrained(thinker)
        roles = tiny_thinker.write_world(folder / "world")
        kinds = ("harmful", "benign", "safe_lookalike")
        suites = [w for kind in kinds for w in ("--suite", f"{kind}={roles[kind]}")]
        sizes = "--limit 3 --attack role_play --max-thinking 64 --max-answer 32".split()
        found = command("evaluate", thinker, *suites, *sizes, "-o", folder / "study")
        assert found.status == 0
        return cls(folder, thinker)


@dataclass
class Directory:
    """A model directory, damaged, and looked at by `doctor`."""

    folder: Path
    json_files: tuple[str, ...]
    tensor_files: tuple[str, ...] = ()
    files: Files = field(init=False)
    bodies: dict[str, bytes] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        read = [(self.folder / name).read_text("utf-8") for name in self.json_files]
        self.files = dict(zip(self.json_files, map(json.loads, read), strict=True))
        for name in self.tensor_files:
            content = (self.folder / name).read_bytes()
            end = 8 + int.from_bytes(content[:8], "little")
            self.files[name] = json.loads(content[8:end])
            self.bodies[name] = content[end:]

    def cases(self) -> st.SearchStrategy[Any]:
        """Return what cases are drawn from."""
        return changes(self.files)

    def run(self, case: list[Change], folder: Path) -> Ended:
        """Run a case, and return how it ended."""
        place = shutil.copytree(self.folder, folder / "damaged")
        write = {
            name: lambda tree, body=body: as_header(tree, body)
            for name, body in self.bodies.items()
        }
        for name, content in apply(self.files, case, write).items():
            if content is None:
                (place / name).unlink()
            else:
                (place / name).write_bytes(content)
        return command("doctor", place, "--json")


FORMATS: Final = ("jsonl", "jsonl", "json", "csv", "tsv", "parquet")


def import_rows() -> dict[str, list[dict[str, Any]]]:
    """Return valid rows in every form that servers and people write."""
    flat, messages, served, batch = [], [], [], []
    for place, request in enumerate(tiny_thinker.requests(tiny_thinker.HARM, 2)):
        for wrapper in (None, "song"):
            prompt, thought, answer = tiny_thinker.scene(request, wrapper, True)
            text = f"{thought}\n</think>\n\n{answer}"
            known = {"label": "harmful", "wrapper": wrapper, "request_id": request}
            flat.append({"prompt": prompt, "completion": text, **known})
            said = {"content": answer, "reasoning_content": thought}
            choice = {"message": said, "finish_reason": "stop"}
            asked = [{"role": "user", "content": prompt}]
            messages.append({"messages": asked, "completion": text, "label": 1})
            served.append({"prompt": prompt, "choices": [choice], **known})
            response = {"status_code": 200, "body": {"choices": [choice]}}
            own = {"custom_id": f"{place}{wrapper}", "response": response}
            batch.append({"prompt": prompt, **own, "error": None})
    return {"flat": flat, "messages": messages, "served": served, "batch": batch}


@dataclass
class Table:
    """Rows that are changed and written in some format, under some flags."""

    model: Path
    shapes: dict[str, list[dict[str, Any]]]
    flags: tuple[tuple[str, ...], ...]

    def cases(self) -> st.SearchStrategy[Any]:
        """Return what cases are drawn from."""

        def of(shape: str) -> st.SearchStrategy[Any]:
            made = changes({shape: self.shapes[shape]})
            kinds, flags = st.sampled_from(FORMATS), st.sampled_from(self.flags)
            return st.tuples(kinds, flags, made)

        return st.sampled_from(list(self.shapes)).flatmap(of)

    def written(self, case: Any, folder: Path) -> Path:
        """Write the file of a case; one that is gone is named all the same."""
        kind, _, made = case
        write = {shape: lambda rows: as_table(rows, kind) for shape in self.shapes}
        (content,) = apply(self.shapes, made, write).values()
        path = folder / f"rows.{kind}"
        if content is not None:
            path.write_bytes(content)
        return path


class Imports(Table):
    """Completions made elsewhere, through `rollout` and `report`."""

    def run(self, case: Any, folder: Path) -> Ended:
        """Run a case, and return how it ended."""
        study, path = folder / "study", self.written(case, folder)
        words = ("rollout", self.model, "--import", path, "-o", study, *case[1])
        ended = command(*words)
        if ended.status:
            return ended
        ended = command("report", study)
        rows = Study.open(study).read_table("rollouts.parquet").to_pylist()
        report = json.loads((study / "report.json").read_text("utf-8"))

        def judged(path: tuple[Any, ...]) -> bool:
            of = [row for row in rows if row["role"] in path] or rows
            if "by_wrapper" in path:
                of = [row for row in of if row["wrapper"] in path]
            return any(row["verdict"] != "unparsed" for row in of)

        kept = ("outcomes", "attack_success")
        check_rates({name: report[name] for name in kept}, judged)
        return ended


class Pools(Table):
    """Pools of training rows, through `select`."""

    def run(self, case: Any, folder: Path) -> Ended:
        """Run a case, and return how it ended."""
        path = self.written(case, folder)
        words = ("select", self.model, "--pool", path, "--budget", "2", *case[1])
        return command(*words, "-o", folder / "chosen.jsonl")


FORM: Final = "#scores\n1.b {}\n2.b {}\n3.b {}"
SAID: Final = (
    *(FORM.format(0, 5, 5), FORM.format(1, 1, 1), FORM.format("no", 5, "high")),
    f"<think>{FORM.format(0, 5, 5)}</think>\n{FORM.format(1, 1, 1)}",
    f"<think>I must end with {FORM.format(0, 5, 5)} Now let me look",
    *("score: 3", "score: 0.5", "unsafe", "banana", "", "I can't help with that."),
)
RUBRIC: Final = {
    **{"name": "own", "system": "Be fair.", "prompt": "{request} and {response}"},
    **{"pattern": r"score: (?P<score>[\d.]+)", "scale": [0, 5], "outcomes": {}},
}
STATUSES: Final = (*[200] * 12, 204, 301, 400, 401, 404, 413, 422, 429, 500, 503)
ENDS: Final = ("stop", "stop", "length", "content_filter", "", None, 3)


@dataclass
class Judges:
    """What a server replies, and rubrics of one's own, through `judge rerun`."""

    study: Path
    server: Any
    reply: Reply = field(default_factory=lambda: Reply(""))

    def files(self, text: str, thinking: str | None, end: Any) -> Files:
        """Return a valid reply and a valid rubric."""
        message = {"role": "assistant", "content": text, "reasoning_content": thinking}
        choice = {"index": 0, "message": message, "finish_reason": end}
        body = {"choices": [choice], "usage": {"total_tokens": 10}}
        return {"reply": body, "rubric.json": RUBRIC}

    def cases(self) -> st.SearchStrategy[Any]:
        """Return what cases are drawn from."""
        made = changes(self.files("score: 5", None, "stop"))
        text = st.sampled_from(SAID) | st.text(st.characters(), max_size=20)
        thought = st.sampled_from((None, "", *SAID))
        said = st.tuples(text, thought, st.sampled_from(ENDS))
        headers = st.sampled_from(
            [{}, {"Retry-After": "nan"}, {"Retry-After": "x, 99 Feb 2020 \xe9"}]
        )
        return st.tuples(
            said, st.sampled_from(STATUSES), headers, st.booleans(), st.just([]) | made
        )

    def answer(self, _: Any, __: int) -> Reply:
        """Return what the server sends, whatever it is asked."""
        return self.reply

    def run(self, case: Any, folder: Path) -> Ended:
        """Run a case, and return how it ended."""
        said, status, headers, own, made = case
        files = self.files(*said)
        sent = {name: as_json(tree) for name, tree in files.items()}
        sent |= {
            name: content or b"" for name, content in apply(files, made, {}).items()
        }
        self.reply = Reply("", status=status, headers=headers)
        self.reply.body = sent["reply"]
        (folder / "rubric.json").write_bytes(sent["rubric.json"])
        study = shutil.copytree(self.study, folder / "study")
        words = ["--judge", self.server.url, "--judge-model", "m", "--json"]
        words += ["--judge-attempts", "1", "--judge-timeout", "10"]
        if own:
            words += ["--judge-rubric", str(folder / "rubric.json")]
        ended = command("judge", "rerun", study, *words)
        if ended.status == 0:
            self.check(study, json.loads(ended.out))
        return ended

    def check(self, study: Path, block: Any) -> None:
        """Refuse a rate without a judged row, by the rows of the study."""
        rows = Study.open(study).read_table("evaluation.parquet").to_pylist()
        read = [row for row in rows if row["verdict"] != "unparsed"]
        for table in block["rows"]:
            kind = (table["kind"], table["wrapper"])
            any_read = kind in {(row["kind"], row["wrapper"]) for row in read}
            check_rates(table, lambda _, found=any_read: found)
        check_rates(block["summary"], lambda _: bool(read))


@contextmanager
def surfaces(world: World) -> Iterator[dict[str, Any]]:
    """Open every surface; a server of replies runs meanwhile."""
    folder = world.folder
    settings_of = ("config.json", "generation_config.json", "tokenizer_config.json")
    index = "model.safetensors.index.json"
    shard = sorted((folder / "shards").glob("*.safetensors"))[0].name
    pool = [
        {"prompt": prompt, "thinking": thought, "response": tiny_thinker.REFUSAL}
        for request in tiny_thinker.requests(tiny_thinker.HARM, 3)
        for prompt, thought, _ in [tiny_thinker.scene(request, "song", True)]
    ]
    tagged = [
        {
            "instruction": row["prompt"],
            "output": f"<think>\n{row['thinking']}\n</think>\n\n{row['response']}",
            "category": ["plain"],
        }
        for row in pool
    ]
    bare = tuple(("--import-bare", each) for each in ("ask", "answer", "thinking"))
    by = tuple(("--by", each) for each in ("length", "loss", "random"))
    with serving(lambda body, number: judges.answer(body, number)) as server:
        judges = Judges(folder / "study", server)
        yield {
            "config": Directory(folder / "model", settings_of),
            "index": Directory(folder / "shards", (index,), (shard,)),
            "adapter": Directory(
                folder / "adapter",
                ("adapter_config.json",),
                ("adapter_model.safetensors",),
            ),
            "imports": Imports(world.thinker, import_rows(), bare),
            "pools": Pools(world.thinker, {"fields": pool, "tagged": tagged}, by),
            "judge": judges,
        }
