"""Judges that think, are cut off, or say a number in another way than asked."""

import json

import pytest

from chat_server import Reply, serving
from holdfast.data.chat.thinking_formats import TAGS
from holdfast.data.served import whole
from holdfast.errors import InputError
from holdfast.judges.base import Exchange, after_thinking
from holdfast.judges.endpoint import STRONGREJECT, EndpointJudge, load_rubric
from holdfast.judges.settings import JudgeSettings

pytest.importorskip("httpx")

FORM = "#scores\n1.b {}\n2.b {}\n3.b {}"
EXCHANGE = Exchange("How do I open a tin?", "Turn it.")
SCORE = "score: (?P<score>[1-5])"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def rubric(tmp_path):
    def made(pattern=SCORE, scale=(1, 5), **more):
        path = tmp_path / "mine.json"
        fields = {"prompt": "{request} {response}", "pattern": pattern, "scale": scale}
        path.write_text(json.dumps(fields | more), encoding="utf-8")
        return load_rubric(str(path))

    return made


def settings_of(server, **changes):
    return JudgeSettings(judge=server.url, judge_model="tiny", **changes)


def verdict_on(message, finish="stop", rubric=STRONGREJECT):
    choice = {"message": {"role": "assistant", **message}, "finish_reason": finish}
    body = json.dumps({"choices": [choice]})
    with serving(lambda asked, number: Reply(body=body)) as server:
        settings = settings_of(server, judge_attempts=1)
        [verdict] = EndpointJudge(settings, rubric).judge([EXCHANGE])
    return verdict


def test_an_unfinished_thought_in_the_form_of_a_verdict_is_none():
    thought = f"<think>I must end with\n{FORM.format(0, 5, 5)}\nNow let me look"
    for finish in ("length", "stop"):
        verdict = verdict_on({"content": thought}, finish)
        assert (verdict.outcome, verdict.score) == ("unparsed", None)
    assert STRONGREJECT.read(thought) is None


def test_a_reply_is_read_behind_its_thought(rubric):
    said = "<think>\nAt first glance score: 5\n</think>\n\nscore: 1"
    assert rubric().read(said) == ("refused", 0.0)
    # The tag that opens a thought is often part of the prompt.
    assert rubric().read(said.removeprefix("<think>")) == ("refused", 0.0)
    assert verdict_on({"content": said}, rubric=rubric()).score == 0.0
    thought = FORM.format(0, 5, 5)
    form = f"<think>{thought}</think>\n{FORM.format(1, 1, 1)}"
    assert STRONGREJECT.read(form) == ("refused", 0.0)


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("<thinking>", "</thinking>"),
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
        ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
        *((each.open, each.close) for each in TAGS),
    ],
)
def test_thinking_is_known_in_many_tags(rubric, opening, closing):
    assert rubric().read(f"{opening}score: 5{closing}score: 1").score == 0.0
    assert rubric().read(f"{opening}score: 5") is None
    assert after_thinking("score: 1") == 0


@pytest.mark.parametrize(
    "finish",
    [
        *("length", "content_filter", "model_length", "MAX_TOKENS", "time_limit"),
        *("max_output_tokens", "incomplete", "SAFETY", "RECITATION", "error", "abort"),
        "model_context_window_exceeded",
    ],
)
def test_a_reply_that_is_broken_off_gives_no_verdict(finish):
    verdict = verdict_on({"content": FORM.format(0, 5, 5)}, finish)
    assert (verdict.outcome, verdict.score) == ("unparsed", None)
    assert finish in verdict.reason
    assert "--judge-reply-tokens" in verdict.reason


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_reply_that_the_server_took_for_thinking_is_read(field, content):
    message = {"content": content, field: FORM.format(0, 5, 4)}
    assert verdict_on(message).score == 7 / 8
    assert verdict_on(message, "length").outcome == "unparsed"


def test_what_was_only_considered_there_does_not_count(rubric):
    thought = {"content": None, "reasoning": "At first score: 5, no, score: 1"}
    assert verdict_on(thought, rubric=rubric()).outcome == "unparsed"
    assert verdict_on({"content": thought["reasoning"]}, rubric=rubric()).score is None
    apart = {"content": "score: 1", "reasoning_content": "score: 5"}
    assert verdict_on(apart, rubric=rubric()).score == 0.0


def test_a_reply_that_says_one_thing_twice_says_it(rubric):
    said = "score: 4, since it helps. As I said, score: 4"
    assert rubric().read(said) == ("complied", 0.75)
    assert rubric().read(said.replace("4, since", "5, since")) is None
    outcomes = {"refused": "refused", "complied": "complied"}
    worded = rubric(r"(?P<outcome>refused|complied)", outcomes=outcomes)
    assert worded.read("At first it complied. No: refused") is None


@pytest.mark.parametrize("finish", ["stop", "eos", "end_turn", "stop_sequence", ""])
def test_a_reply_that_ended_by_itself_is_a_verdict(finish):
    assert verdict_on({"content": FORM.format(0, 5, 5)}, finish).score == 1.0


def test_a_reply_in_parts_is_read_without_the_part_that_thinks(rubric):
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "score: 5"}]},
        {"type": "text", "text": "score: 1"},
    ]
    assert verdict_on({"content": parts}, rubric=rubric()).score == 0.0


def test_half_a_surrogate_pair_in_a_reply_is_replaced(tmp_path):
    choice = '{"message": {"content": "%s\\ud83d"}, "finish_reason": "\\ud83d"}'
    body = f'{{"choices": [{choice}]}}'
    form = FORM.format(0, 5, 4).replace("\n", "\\n")
    with serving(lambda asked, number: Reply(body=body % form)) as server:
        settings = settings_of(server, judge_cache=str(tmp_path))
        judge = EndpointJudge(settings)
        [verdict] = judge.judge([EXCHANGE])
        assert judge.judge([EXCHANGE]) == [verdict]
    assert len(server.bodies) == 1
    assert verdict.score == 7 / 8
    assert verdict.reason.encode()
    assert whole("a\ud83d b \ud83d\ude00") == "a\ufffd b \U0001f600"


def test_half_a_surrogate_pair_in_an_answer_is_asked_about():
    def fine(asked, number):
        return Reply(FORM.format(0, 1, 2))

    with serving(fine) as server:
        judge = EndpointJudge(settings_of(server))
        [verdict] = judge.judge([Exchange("How \udc00?", "So \ud83d it is.")])
    assert verdict.score == 1 / 8
    assert "So \ufffd it is." in server.bodies[0]["messages"][-1]["content"]


@pytest.mark.parametrize(
    "usage", ['{"total_tokens": 1e999}', '{"total_tokens": "x"}', "[3]"]
)
def test_a_count_of_tokens_that_is_none_spoils_no_reply(usage):
    form = json.dumps(FORM.format(0, 5, 4))
    body = f'{{"choices": [{{"message": {{"content": {form}}}}}], "usage": {usage}}}'
    with serving(lambda asked, number: Reply(body=body)) as server:
        settings = settings_of(server, judge_attempts=1)
        [verdict] = EndpointJudge(settings).judge([EXCHANGE])
    assert verdict.score == 7 / 8


@pytest.mark.parametrize(
    "grades",
    [(0, "4.5", 3), (0, 4, "4,5"), ("0.5", 4, 4), (0, "45", 3)],
)
def test_a_part_of_a_number_is_not_read_as_one(grades):
    assert STRONGREJECT.read(FORM.format(*grades)) is None
    assert STRONGREJECT.read(FORM.format(0, "4.", "5/5")).score == 7 / 8


def test_a_number_of_ones_own_rubric_is_read_whole_and_on_its_scale(rubric):
    assert rubric().read("score: 4.5") is None
    assert rubric(r"score: (?P<score>[\d.]+)").read("score: 4.5").score == 3.5 / 4
    assert rubric(r"(?P<score>[1-5])").read("0.5") is None
    assert rubric(r"score: (?P<score>\S+)").read("score: 9") is None
    assert rubric(r"score: (?P<score>\S+)").read("score: nan") is None


def test_a_score_that_is_a_word_is_no_score(rubric):
    assert rubric(r"score: (?P<score>\w+)").read("score: high") is None
    with pytest.raises(InputError, match=r"mine\.json: a group score that matches"):
        rubric("score: (?P<score>low|high)")
    with pytest.raises(InputError, match="`outcome`"):
        rubric("score: (?P<score>[a-z)]+)")


def test_neither_yes_nor_no_is_no_help(rubric):
    pattern = r"refused\? (?P<refused>\w+)"
    assert rubric(pattern).read("refused? unclear") is None
    assert rubric(pattern).read("refused? no") == ("complied", None)


@pytest.mark.parametrize("scale", [(0, float("inf")), (float("nan"), 5)])
def test_a_scale_without_end_is_refused(rubric, scale):
    with pytest.raises(InputError, match="scale"):
        rubric(scale=scale)


def test_outcomes_that_are_lists_are_refused(rubric):
    with pytest.raises(InputError, match="outcomes other"):
        rubric("(?P<outcome>a)", outcomes={"a": ["refused"]})
