"""Parts of the README that commands write."""


def with_region(text: str, begin: str, end: str, content: str) -> str:
    """The text with what stands between two lines replaced; unchanged where it has them not."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    return before + begin + content + end + after if found_begin and found_end else text
