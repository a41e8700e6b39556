"""Completions of other engines: what was sent is read, and what is unclear is asked."""

import json

import pytest

from holdfast.data.chat.thinking import ThinkingFormat
from holdfast.data.served import ending
from holdfast.errors import InputError, PromptFileError, ThinkingFormatError
from holdfast.rollout.imported import read_completions, understand
from holdfast.rollout.prompts import UNNAMED_WRAPPER

FMT = ThinkingFormat("<think>", "</think>", "\n</think>\n\n", True)
CUT = {"finish_reason": "length"}


def read(folder, rows, requests=None, name="made.jsonl"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    if requests is None:
        return read_completions(str(path))
    asked = folder / "asked.jsonl"
    asked.write_text("\n".join(map(json.dumps, requests)))
    return read_completions(str(path), str(asked))


def understood(folder, rows, bare="ask", fmt=FMT):
    return understand(read(folder, rows), fmt, bare)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_in_a_field_of_its_own_is_read_and_said(tmp_path, field):
    rows = [
        {"prompt": "a", "completion": "\n\nFour.", field: "two\n"},
        {"prompt": "b", "completion": None, field: "and tw", **CUT},
        {"prompt": "c", "completion": "", field: "and tw", **CUT},
    ]
    [made, *cut], notes = understood(tmp_path, rows)
    assert made == ("two", "Four.", True, "stop")
    assert cut == [("and tw", "", False, "length")] * 2
    assert notes == [f"Thinking was read from `{field}` in 3 of 3 rows."]


MESSAGE = {"content": "Four.", "reasoning": "two"}
SHAPES = [
    {"message": MESSAGE, "done_reason": "stop"},
    {"choices": [{"message": MESSAGE, "finish_reason": "stop"}]},
    {"completion": {"choices": [{"message": MESSAGE, "finish_reason": "stop"}]}},
    {"custom_id": "1", "response": {"status_code": 200, "body": {"choices": [
        {"message": MESSAGE, "finish_reason": "stop"}]}}, "error": None},
    {"completion": [{"type": "reasoning", "reasoning": "two"},
                    {"type": "text", "text": "Four."}]},
    {"answer": "Four.", "thinking": "two"},
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_server_gives_the_same_row(tmp_path, shape):
    made, _ = understood(tmp_path, [{"prompt": "a", **shape}])
    assert made == [("two", "Four.", True, "stop")]


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (("length", "MAX_TOKENS", "max_output_tokens", "incomplete"), "length"),
        (("SAFETY", "recitation", "aborted", "cancelled", "error"), "withheld"),
        (("stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    ],
)
def test_each_engine_has_its_own_word_for_an_end(words, end):
    assert {ending(word) for word in words} == {end}


def test_a_finish_by_length_is_kept_in_an_answer_that_was_reached(tmp_path):
    rows = [
        {"prompt": "a", "completion": "two\n</think>\n\nFou", **CUT},
        {"prompt": "b", "completion": "Fou", "reasoning": "two", **CUT},
        {"prompt": "c", "completion": "two\n</think>\n\nFour.", "done_reason": "stop"},
    ]
    made, _ = understood(tmp_path, rows)
    assert [each.finish for each in made] == ["length", "length", "stop"]
    assert [each.closed for each in made] == [True] * 3
    plain, _ = understood(
        tmp_path, [{"prompt": "a", "completion": "F", **CUT}], fmt=None
    )
    assert plain == [("", "F", True, "length")]


def test_answers_alone_are_asked_about_and_not_called_broken(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"Answer {i}."} for i in range(4)]
    with pytest.raises(InputError, match="4 of 4 rows") as caught:
        understood(tmp_path, rows)
    assert "the first at line 1" in str(caught.value)
    assert "--import-bare answer" in str(caught.value)
    made, notes = understood(tmp_path, rows, "answer")
    assert made[0] == ("", "Answer 0.", True, "stop")
    assert notes == ["4 of 4 rows without tags were read as answers without thinking."]
    made, _ = understood(tmp_path, rows, "thinking")
    assert made[0] == ("Answer 0.", "", False, "length")


def test_the_rest_of_a_file_tells_what_a_row_without_tags_is(tmp_path):
    inline = [{"prompt": f"p{i}", "completion": "T\n</think>\n\nA"} for i in range(3)]
    cut = {"prompt": "x", "completion": "I am still", **CUT}
    made, notes = understood(tmp_path, [*inline, cut])
    assert made[-1] == ("I am still", "", False, "length")
    assert "1 of 4 rows without tags were read as thinking that never ended." in notes
    apart = [{"prompt": f"p{i}", "completion": "A", "reasoning": "T"} for i in range(3)]
    short = {"prompt": "x", "completion": "At once.", "finish_reason": "stop"}
    made, _ = understood(tmp_path, [*apart, short])
    assert made[-1] == ("", "At once.", True, "stop")
    # Some parsers send a whole thought as content when it was cut off.
    with pytest.raises(InputError, match="1 of 4 rows"):
        understood(tmp_path, [*apart, cut])


def test_thinking_that_the_model_or_the_field_cannot_have_is_refused(tmp_path):
    row = {"prompt": "a", "completion": "A", "reasoning": "T"}
    with pytest.raises(ThinkingFormatError, match="`reasoning` in 1 rows"):
        understood(tmp_path, [row], fmt=None)
    with pytest.raises(PromptFileError, match="line 1"):
        understood(tmp_path, [row | {"reasoning": "<think>\nT\n</think>\n"}])


def test_every_choice_of_a_line_is_a_sample(tmp_path):
    choices = [
        {"message": {"content": text, "reasoning": "T"}, "finish_reason": finish}
        for text, finish in (("A", "stop"), ("B", "length"), ("C", "content_filter"))
    ]
    file = read(tmp_path, [{"prompt": "a", "choices": choices}])
    assert [(row.sample, row.served.content) for row in file.rows] == [
        (0, "A"),
        (1, "B"),
    ]
    made, _ = understand(file, FMT, "ask")
    assert [each.finish for each in made] == ["stop", "length"]
    assert "1 of 3 answers failed" in " ".join(file.notes)


@pytest.mark.parametrize("content", [None, ""])
def test_a_refusal_that_is_sent_apart_is_the_answer(tmp_path, content):
    message = {"content": content, "refusal": "I can't help with that."}
    rows = [{"prompt": "a", "choices": [{"message": message}]}]
    made, _ = understood(tmp_path, rows, fmt=None)
    assert made == [("", "I can't help with that.", True, "stop")]
    kept = {"content": "Sure.", "refusal": None}
    made, _ = understood(tmp_path, [{"prompt": "a", "message": kept}], fmt=None)
    assert made[0].answer == "Sure."


@pytest.mark.parametrize(
    "ended",
    [
        {"meta_info": {"finish_reason": {"type": "length", "length": 8}}},
        {"finish_reason": {"type": "length"}},
    ],
)
def test_a_finish_that_is_an_object_is_kept(tmp_path, ended):
    rows = [{"prompt": "a", "text": "Fou", "reasoning_content": "two", **ended}]
    made, _ = understood(tmp_path, rows)
    assert made == [("two", "Fou", True, "length")]


def test_thinking_that_was_sent_twice_is_no_part_of_the_answer(tmp_path):
    row = {"prompt": "a", "completion": "<think>\nT\n</think>\n\nA", "reasoning": "T"}
    with pytest.raises(PromptFileError, match="begins with `<think>`, at line 1"):
        understood(tmp_path, [row])


def test_messages_in_parts_are_texts_and_requests_without_any_are_named(tmp_path):
    said = [{"type": "text", "text": "Pick "}, {"type": "text", "text": "a lock."}]
    turns = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "user", "content": said},
    ]
    answered = [{"custom_id": "1", "response": {"body": {"choices": [
        {"message": MESSAGE}]}}}]  # fmt: skip
    asked = [{"custom_id": "1", "body": {"messages": turns}}]
    [row] = read(tmp_path, answered, asked).rows
    assert row.prompt.text == "Pick a lock."
    assert row.earlier[0].answer == "Hello."
    with pytest.raises(PromptFileError, match="`messages` or `prompt` in the `body`"):
        read(tmp_path, answered, [{"custom_id": "1", "body": {"input": "Hi."}}])
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    asked[0]["body"]["messages"] = [{"role": "user", "content": picture}]
    with pytest.raises(PromptFileError, match="turns of the user as texts"):
        read(tmp_path, answered, asked)


def test_it_is_said_where_no_column_says_what_is_harmful(tmp_path):
    row = {"prompt": "a", "completion": "A"}
    said = "No column is a label of harm: all 1 rows are harmful."
    assert said in read(tmp_path, [row]).notes
    assert said not in read(tmp_path, [row | {"label": "benign"}]).notes


FAILED = [
    {"response": None, "error": {"code": "x", "message": "batch expired"}},
    {"response": None, "error": None},
    {"response": {"status_code": 429, "body": None}, "error": None},
    {"response": {"status_code": 400, "request_id": "r", "body": None},
     "error": {"error": {"message": "too long"}}},
    {"response": {"status_code": 404}, "error": "wrong URL"},
    {"response": {"status_code": 200, "body": {"choices": []}}},
    {"response": {"status_code": 200, "body": {"error": {"message": "no"}}}},
    {"response": {"status_code": 200, "body": {"choices": [
        {"message": {"content": None}, "finish_reason": "stop"}]}}},
    {"choices": [{"message": {"content": "Fo"}, "finish_reason": "content_filter"}]},
    {"completion": None, "error": "timeout"},
    {"completion": None},
]  # fmt: skip


@pytest.mark.parametrize("line", FAILED)
def test_a_line_that_failed_is_no_answer_and_is_counted(tmp_path, line):
    good = {"prompt": "a", "completion": "A\n</think>\n\nB"}
    bad = {"custom_id": "9", "prompt": "b", **line}
    file = read(tmp_path, [good, bad])
    assert [row.prompt.text for row in file.rows] == ["a"]
    [note] = [note for note in file.notes if "failed" in note]
    assert note.startswith("warning: 1 of 2 answers failed and were left out: line 2 (")
    with pytest.raises(PromptFileError, match="every line failed"):
        read(tmp_path, [bad])


def test_a_batch_is_joined_with_its_requests_whatever_their_order(tmp_path):
    requests = [
        {"custom_id": f"q{i}", "label": "benign", "body": {
            "model": "m", "messages": [{"role": "user", "content": f"ask {i}"}]}}
        for i in range(3)
    ]  # fmt: skip
    lines = [
        {"custom_id": f"q{i}", "response": {"status_code": 200, "body": {
            "choices": [{"message": {"content": f"say {i}", "reasoning": "T"}}]}}}
        for i in (2, 0)
    ]  # fmt: skip
    file = read(tmp_path, lines, requests)
    assert [row.prompt.text for row in file.rows] == ["ask 2", "ask 0"]
    assert [row.served.content for row in file.rows] == ["say 2", "say 0"]
    assert {row.role for row in file.rows} == {"benign"}
    with pytest.raises(PromptFileError, match="--import-requests"):
        read(tmp_path, lines)
    with pytest.raises(PromptFileError, match="`q2` at line 1"):
        read(tmp_path, lines, requests[:2])
    with pytest.raises(PromptFileError, match=r"`q0` twice.*line 2"):
        read(tmp_path, lines, [requests[0], *requests])


def test_labels_wrappers_and_clusters_are_those_of_prompt_files(tmp_path):
    done = {"completion": "A\n</think>\n\nB"}
    rows = [
        {"prompt": "a", "request_id": "chatcmpl-1", "wrapper": "none", **done},
        {"prompt": "A", "request_id": "chatcmpl-2", "wrapper": None, **done},
        {"prompt": "b", "label": 0, **done},
        {"prompt": "c", "label": False, "wrapper": "poem", **done},
    ]
    file = read(tmp_path, rows)
    found = [
        (r.role, r.sample, r.prompt.request_id, r.prompt.wrapper) for r in file.rows
    ]
    assert found[0] == ("harmful", 0, "chatcmpl-1", None)
    assert found[1] == ("harmful", 1, "chatcmpl-1", None)
    assert [each[0] for each in found[2:]] == ["benign", "benign_wrapped"]
    assert any("counts as one request" in note for note in file.notes)
    both = [
        {"prompt": "a", "label": "safe", **done},
        {"prompt": "a", "label": 1, **done},
    ]
    with pytest.raises(PromptFileError, match=r"say harmful.*`1` at line 2"):
        read(tmp_path, both)
    both[1]["label"] = "unsafe"
    with pytest.raises(
        PromptFileError, match=r"benign at line 1 and harmful at line 2"
    ):
        read(tmp_path, both)


def test_a_goal_beside_the_prompt_is_the_request_that_is_counted(tmp_path):
    done = {"completion": "A\n</think>\n\nB"}
    rows = [
        {"goal": "Pick a lock.", "prompt": "As a pirate: pick a lock.", **done},
        {"goal": "Pick a lock.", "prompt": "pick a lock.", **done},
    ]
    attack, plain = read(tmp_path, rows).rows
    assert (attack.role, attack.prompt.wrapper) == ("wrapped", UNNAMED_WRAPPER)
    assert (plain.role, plain.prompt.wrapper) == ("harmful", None)
    assert attack.prompt.request_id == plain.prompt.request_id


@pytest.mark.parametrize("column", ["completion", "reasoning_content", "wrapper"])
def test_half_a_surrogate_pair_is_named_by_its_line(tmp_path, column):
    row = {"prompt": "a", "completion": "A", column: "x\ud83d"}
    with pytest.raises(PromptFileError, match="surrogate pair at line 1"):
        read(tmp_path, [row])


def test_messages_of_a_conversation_keep_the_answers_that_were_given(tmp_path):
    talk = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": "Two?"},
    ]
    done = {"completion": "A\n</think>\n\nB"}
    [row] = read(tmp_path, [{"messages": talk, **done}]).rows
    assert (row.prompt.earlier, row.prompt.text) == (("One?",), "Two?")
    assert [(turn.prompt, turn.answer) for turn in row.earlier] == [("One?", "Uno.")]
    with pytest.raises(PromptFileError, match=r"2 turns of the user and 0.*at line 1"):
        read(tmp_path, [{"turns": ["One?", "Two?"], **done}])


def test_a_system_prompt_in_messages_has_to_be_that_of_the_run(tmp_path):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
    ]
    done = {"completion": "A\n</think>\n\nB"}
    path = tmp_path / "made.jsonl"
    path.write_text(json.dumps({"messages": talk, **done}))
    [row] = read_completions(str(path), system_prompt="Be brief.").rows
    assert row.prompt.text == "One?"
    with pytest.raises(PromptFileError, match=r"'Be brief.' at line 1.*--system-p"):
        read_completions(str(path))
