"""Text from tokens as they come, and where it stops."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character
CHARACTER = 4  # tokens that a character can take, one for each of its bytes


class TextStream:
    """Decodes token after token, holding back what may still change or turn out to be a stop string.

    Attributes:
        stopped: Whether a stop string was met; the text ends before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), quiet: bool = False) -> None:
        """Starts an empty text.

        Args:
            tokenizer: Whose tokens will come; its special tokens are left out of the text.
            stop: Strings that end the text.
            quiet: Whether nobody reads along. Then `end` returns the whole text, which is decoded but once where no
                stop string has to be looked for.
        """
        self.tokenizer, self.stop, self.stopped, self._quiet = tokenizer, tuple(stop), False, quiet
        self._said = ""  # what became certain quietly
        self._ids: list[int] = []
        self._read = 0  # tokens whose text is final
        self._context = 0  # where decoding starts, a little earlier: some tokenizers treat a first token differently
        self._held = ""

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that has become certain."""
        if self.stopped:
            return ""
        self._ids.append(token)
        if not self._quiet:
            return self._certain()
        self._said += self._certain() if self.stop else ""
        return ""

    def end(self) -> str:
        """Returns what was held back, once no more tokens come."""
        said, self._said = self._said, ""
        if self.stopped:
            return said
        rest = self._decode(self._context, len(self._ids))[len(self._decode(self._context, self._read)) :]
        self._context = self._read = len(self._ids)
        text = self._release(rest)
        held, self._held = self._held, ""
        return said + text + ("" if self.stopped else held)

    def _certain(self) -> str:
        before = self._decode(self._context, self._read)
        now = self._decode(self._context, len(self._ids))
        certain = len(self._ids)
        if now.endswith(UNFINISHED):
            # Maybe a character in the making, maybe a text of such signs: what is further back than a character is long
            # does not change any more.
            certain -= CHARACTER
            if certain - self._read < CHARACTER:
                return ""
            whole, now = now, self._decode(self._context, certain)
            if not whole.startswith(now):
                return ""
        self._context, self._read = self._read, certain
        return self._release(now[len(before) :])

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that is the beginning of a stop string.
        # Only as long as the text is: there may be many stop strings, and this is done for every token.
        lengths = ((stop, n) for stop in self.stop for n in range(min(len(stop), len(text) + 1)))
        hold = max((n for stop, n in lengths if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]
