"""Markers: references written as short signed strings, for graphs that pass text."""

import re
from typing import NamedTuple, Self
from urllib.parse import quote_plus, unquote_plus

from ..errors import InvalidRequest, TamperedReference
from ..state import LatentRef
from .identity import ID, MAX_PARENTS, Signer

# Together they bound what a text can grow by: markers are short, and anybody can forge some.
MAX_MARKERS = MAX_PARENTS  # of one text: more memories are read by no request
MAX_LEFT = 1000  # characters that are left in a marker's place

OPENING = "[latent"
# Whitespace in a marker says nothing: text gets wrapped on its way.
_BRACKETS = re.compile(r"\[latent\s([^\[\]]{1,5000})\]")
_PROOF = re.compile(rf"({ID})\.([0-9a-f]{{8}})\.([0-9a-f]{{32}})")
_REMAINS = re.compile(
    r"\[latent\s[^\[\]]{1,5000}?\s[0-9]{1,9}\s+steps\s+l\s*a\s*t\s*_"  # the head, as far as the id
    r"|\[latent[^\S\n]+\S+[^\S\n]+[0-9]{1,9}(?:[^\S\n]+(?:s|st|ste|step|steps(?:[^\S\n]+(?:l|la|lat))?))?"  # less of it
    r"[^\S\n]*(?:\.{3}|…)?(?=\n|\Z)"
    r"|\blat_[0-9a-f]{8,32}\.[0-9a-f]|[0-9a-f]\.[0-9a-f]{8}\.[0-9a-f]{32}\]",  # the tail
    re.IGNORECASE,
)


class Marker(NamedTuple):
    """A reference as it stands in a text, such as `[latent planner 20 steps lat_3f9a...]`."""

    agent: str
    steps: int
    id: str
    model: str
    """The first 8 digits of the model's fingerprint."""
    mac: str
    """The first 32 digits of an HMAC-SHA256 over the rest."""

    @classmethod
    def of(cls, ref: LatentRef, signer: Signer) -> "Marker":
        """The marker of a reference."""
        marker = cls(ref["agent"], ref["steps"], ref["id"], ref["model"][:8], "")
        return marker._replace(mac=signer.sign(marker._signed)[:32])

    def __str__(self) -> str:
        """ASCII without quotes or backslashes: JSON, f-strings and templates leave it as it is."""
        return f"[latent {quote_plus(self.agent)} {self.steps} steps {self.id}.{self.model}.{self.mac}]"

    @classmethod
    def read(cls, text: str) -> Self | None:
        """The marker that stands in brackets after "latent", if that is one."""
        words = text.split()
        at = len(words) - 1 - words[::-1].index("steps") if "steps" in words else 0
        proof = _PROOF.fullmatch("".join(words[at + 1 :]))
        if at < 2 or proof is None or not re.fullmatch("[0-9]{1,9}", words[at - 1]):
            return None
        marker = cls(unquote_plus("".join(words[: at - 1])), int(words[at - 1]), *proof.groups())
        # One spelling only: "03 steps" or "%c3" for "%C3" mean the same, but nobody wrote them.
        return marker if "".join(str(marker)[len("[latent") : -1].split()) == "".join(words) else None

    def genuine(self, signer: Signer) -> bool:
        """Whether the signature is the signer's."""
        return signer.matches(self._signed, self.mac)

    @property
    def _signed(self) -> dict[str, str | int]:
        return {"marker": self.id, "agent": self.agent, "steps": self.steps, "model": self.model}


def take_markers(text: str, left: str = "") -> tuple[str, list[Marker]]:
    """Takes all markers out of a text.

    Args:
        text: Any text.
        left: What is left in a marker's place; at most `MAX_LEFT` characters.

    Returns:
        The text without them, and the markers in order.

    Raises:
        InvalidRequest: If `left` is longer, or there are more than `MAX_MARKERS` markers.
        TamperedReference: If remains of a marker are in it: a cut or edited one must not pass for text. (One that was
            cut before its number of steps cannot be told from words in brackets, and does.)
    """
    if len(left) > MAX_LEFT:
        raise InvalidRequest(f"At most {MAX_LEFT} characters can be left in a marker's place, not {len(left)}.")
    if not any(sign in text for sign in "[_]"):  # to search for remains takes long, and these have one of them each
        return text, []
    markers: list[Marker] = []
    between: list[str] = []
    end = 0
    for brackets in _BRACKETS.finditer(text):
        if marker := Marker.read(brackets[1]):
            if len(markers) == MAX_MARKERS:
                raise InvalidRequest(f"The text has more than {MAX_MARKERS} markers; take them out of parts of it.")
            markers.append(marker)
            between.append(text[end : brackets.start()])
            end = brackets.end()
    between.append(text[end:])
    for piece in between:
        if remains := _REMAINS.search(piece):
            raise TamperedReference(
                f"A marker was cut or edited on its way: {remains[0][:80]!r}. "
                "Pass it on whole, or switch its edge to text."
            )
    return left.join(between), markers
