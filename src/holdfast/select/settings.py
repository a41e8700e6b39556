"""The settings of `holdfast select`; this module loads no tensors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from holdfast.errors import SettingsError
from holdfast.flags import Prompting, Sampling, Texts
from holdfast.ranges import require_numbers
from holdfast.rollout.settings import parse_columns

By = Literal[
    "cliff",
    "final",
    "judge",
    "rules",
    "random",
    "random-flagged",
    "length",
    "loss",
]
NEEDS_PROBE = ("cliff", "final")
NEEDS_ANSWER = ("judge", "rules", "random-flagged")


@dataclass(frozen=True)
class SelectSettings:
    """Which rows of a pool are chosen, and by what."""

    pool: Annotated[str, Prompting]
    """The pool: a Parquet, JSONL, CSV or JSON file, or a folder of Parquet or JSONL
    files. Rows have a prompt and a safe response, and a thinking in a field of its
    own or in tags inside the response."""

    by: By = "cliff"
    """What makes a row worth training on: cliff (plateau minus final score), final
    (low final score), judge (the model's own answer is flagged), rules (it is no
    refusal by written rules), random, random-flagged (at random among those that the
    judge flags), length (long rows), loss (unlikely safe answers)."""

    budget: str = "1.7%"
    """How many rows: a number, or a share of the pool, rounded up."""

    direction: str | None = None
    """The probe that scores rows: a study, or a file of its folder probes. It must
    have been fitted on this very model."""

    thinking_of: Literal["own", "model"] = "own"
    """Whose thinking: own (of the row), or model (drawn anew by the model)."""

    flagged_only: bool = False
    """Choose among rows whose answer the judge flags, whatever the score."""

    quota: Literal["none", "equal", "proportional"] = "none"
    """How the budget is divided among the categories of the pool."""

    similar: float = 0.8
    """Similarity of prompts (Jaccard, word triples) from which the worse row is passed
    over; 0 passes over none, 1 exact copies alone."""

    plateau: Literal["median", "maximum"] = "median"
    """The plateau of one row; the maximum is the published rule."""

    min_thinking: int = 20
    """Thinking shorter than this many tokens has no plateau."""

    column: Annotated[Texts, Prompting] = ()
    """FIELD=NAME for a field under another name: prompt, response, thinking or
    category. May be repeated."""

    scores: str | None = None
    """Folder of the scores, which other selections from this pool may share. Default:
    beside the output."""

    shard: str | None = None
    """i/n: score only every n-th shard, beginning with the i-th, and choose nothing;
    for one process an accelerator. Processes without it share the shards."""

    shard_rows: int = 2000
    """Rows a shard, which is what an interruption costs at most."""

    workers: int = 0
    """Processes that score rows, each with a model of its own, spread by Ray; with
    --device cuda each has a GPU. 0 scores in this process."""

    ray: str | None = None
    """Address of a running Ray cluster whose machines all see model, pool and scores
    in the same place, or auto. Default: Ray is started on this machine alone."""

    states: str | None = None
    """URL of a vLLM that extracts the hidden states of this very model; rows are scored
    by those. Serve it as docs/scale.md says."""

    states_folder: str | None = None
    """Folder that it writes states to, as it is seen from here."""

    system_prompt: Annotated[str | None, Prompting] = None
    """System prompt of every conversation."""

    temperature: Annotated[float | None, Sampling] = None
    """Sampling temperature where the model draws. Default: its own, else greedy."""

    max_thinking: Annotated[int, Sampling] = 2048
    """Tokens of thinking after which it is closed by force, where the model draws."""

    max_answer: Annotated[int, Sampling] = 256
    """Tokens of answer after which it is cut, where the model draws."""

    seed: Annotated[int, Sampling] = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        counts = dict.fromkeys(("shard_rows", "min_thinking", "max_answer"), 1)
        require_numbers(self, **counts, max_thinking=0, temperature=0, workers=0)
        if not 0 <= self.similar <= 1:
            found = str(self.similar)
            raise SettingsError("--similar from 0 to 1", found, "Choose another.")
        self._require_readers()
        self.part()
        self.columns()
        self.rows_of(100)

    def _require_readers(self) -> None:
        """Refuse readers that contradict each other."""
        if self.ray is not None and not self.workers:
            raise SettingsError("--workers beside --ray", "none", "Say how many.")
        if (self.states is None) != (self.states_folder is None):
            found = "one of them"
            what = "--states URL and --states-folder FOLDER together"
            raise SettingsError(what, found, "Give both, or neither.")
        if self.states is not None and (self.workers or self.by == "loss"):
            raise SettingsError(
                "--states for what a probe reads, in this process",
                f"--workers {self.workers} and --by {self.by}",
                "Leave out --states, or --workers and --by loss.",
            )

    def rows_of(self, n_rows: int) -> int:
        """Return the budget in rows of a pool.

        Args:
            n_rows: Rows of the pool.

        Raises:
            SettingsError: If it is no number and no share.
        """
        text = self.budget.strip()
        try:
            if text.endswith("%"):
                share = float(text[:-1])
                if 0 < share <= 100:
                    # Rounded first, so that 10 % of 30 rows is not 3.0000000000000004.
                    return max(1, -int(-round(share * n_rows / 100, 6) // 1))
            elif int(text) >= 1:
                return int(text)
        except ValueError:
            pass
        raise SettingsError(
            "--budget as a number of rows or a share of the pool above 0",
            repr(self.budget),
            "Write 700 or 1.7%.",
        )

    def part(self) -> tuple[int, int]:
        """Return which part of how many, counted from 0.

        Raises:
            SettingsError: If it is not one of so many parts.
        """
        if self.shard is None:
            return 0, 1
        first, _, second = self.shard.partition("/")
        if first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second):
            return int(first) - 1, int(second)
        what = "--shard i/n with i from 1 to n"
        raise SettingsError(what, self.shard, "Choose another.")

    def columns(self) -> dict[str, str]:
        """Return the column of each field that has one.

        Raises:
            SettingsError: If an entry is not FIELD=NAME, or a field is named twice.
        """
        return parse_columns(self.column)

    @property
    def needs_answer(self) -> bool:
        """Whether the model has to answer the prompts."""
        return (
            self.by in NEEDS_ANSWER or self.flagged_only or self.thinking_of == "model"
        )
