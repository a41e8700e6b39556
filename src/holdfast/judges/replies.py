"""What a judge has said at last: its reply without the thinking before it."""

import re

from holdfast.data.thinking_formats import TAGS

# Any channel but the final one is a thought; some servers leave the marks behind out.
_OPEN = re.compile(
    "|".join(
        ["<reason>", r"<\|channel\|>(?!final)"] + [re.escape(t.open) for t in TAGS]
    ),
    re.IGNORECASE,
)
_CLOSE = re.compile(
    "|".join(
        [
            "</reason>",
            *(re.escape(each.close) for each in TAGS),
            r"<\|channel\|>final(?:<\|message\|>)?",
        ]
    ),
    re.IGNORECASE,
)


def after_thinking(reply: str) -> int | None:
    """Return where a reply begins behind its thinking; None inside of unfinished one.

    What a judge considers is no verdict, though it may have the form of one. A reply
    whose thinking was opened by the prompt begins behind the tag that closes it.

    Args:
        reply: All that a judge wrote.
    """
    start = max((found.end() for found in _CLOSE.finditer(reply)), default=0)
    return None if _OPEN.search(reply, start) else start


def whole(text: str) -> str:
    """Return a text in which every half of a surrogate pair is a replacement character.

    JSON may spell one half alone, which no file and no tokenizer can hold.

    Args:
        text: Text from a server or a file.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
