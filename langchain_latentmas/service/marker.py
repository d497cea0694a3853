"""Markers: references written as short signed strings, for graphs that pass text."""

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from ..errors import TamperedReference
from ..state import LatentRef
from .identity import Signer

# Whitespace may be of any kind: text gets wrapped on its way.
_MARKER = re.compile(
    r"\[latent\s+(?P<agent>[^\[\]\s][^\[\]]{0,800}?)\s+(?P<steps>\d{1,9})\s+steps\s+"
    r"(?P<id>lat_[0-9a-f]{32})\.(?P<model>[0-9a-f]{8})\.(?P<mac>[0-9a-f]{32})\]"
)
_REMAINS = re.compile(
    r"\[latent\s[^\[\]]{1,900}?\s\d{1,9}\s+steps(?:\s+lat_|\s*l?a?t?$)|\blat_[0-9a-f]{8,32}\.[0-9a-f]"
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
        return marker._replace(mac=marker._signature(signer))

    def __str__(self) -> str:
        """ASCII without quotes or backslashes: JSON, f-strings and templates leave it as it is."""
        agent = quote(self.agent, safe=" ") if self.agent.strip() == self.agent else quote(self.agent)
        return f"[latent {agent} {self.steps} steps {self.id}.{self.model}.{self.mac}]"

    def genuine(self, signer: Signer) -> bool:
        """Whether the signature is the signer's."""
        return self.mac == self._signature(signer)

    def _signature(self, signer: Signer) -> str:
        return signer.sign({"marker": self.id, "agent": self.agent, "steps": self.steps, "model": self.model})[:32]


def take_markers(text: str, left: str = "") -> tuple[str, list[Marker]]:
    """Takes all markers out of a text.

    Args:
        text: Any text.
        left: What is left in a marker's place.

    Returns:
        The text without them, and the markers in order.

    Raises:
        TamperedReference: If remains of a marker are in it: a cut or edited one must not pass for text.
    """
    markers = [
        Marker(unquote(" ".join(m["agent"].split())), int(m["steps"]), m["id"], m["model"], m["mac"])
        for m in _MARKER.finditer(text)
    ]
    rest = _MARKER.sub("\0", text)
    if remains := _REMAINS.search(rest):
        raise TamperedReference(
            f"A marker was cut or edited on its way: {remains[0][:80]!r}. Pass it on whole, or switch its edge to text."
        )
    return rest.replace("\0", left), markers
