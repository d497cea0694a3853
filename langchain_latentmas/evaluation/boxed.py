"""What a text puts into a box, as models do with their final answer."""

import re

BOXES = 10  # that are looked at, from the end; a model that goes round in circles opens thousands


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces in it balanced; None where there is none."""
    begins = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    for begin in begins[: -BOXES - 1 : -1]:
        depth = 1
        for at in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[begin:at].strip()
    return None
