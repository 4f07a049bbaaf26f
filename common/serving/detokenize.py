"""Text from tokens as they come, so that the pieces of a stream join to exactly the text of the whole."""

import re

BYTE = re.compile("<0x[0-9A-F]{2}>")


class Detokenizer:
    """Turns a growing list of tokens into pieces of text, and ends the text before a stop string.

    Of several stop strings, the one that is complete first counts: whoever reads along cannot know of a later one.
    Held back until more is known: bytes of an unfinished character, and an ending that may begin a stop string.
    Of tokens such as `<0xE7>`, in which some tokenizers spell rare characters, the whole run: one that fits no
    character makes every one of the run unreadable.
    """

    def __init__(self, tokenizer, stop: list[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.sent = 0
        self.stopped = False  # a stop string was found: the text ends before it

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, tokens: list[int], last: bool) -> str:
        """The new piece of text for all `tokens` so far; with `last`, everything that was held back too."""
        text = self.text(tokens if last else self._settled(tokens))
        if not last:
            text = text.rstrip("\ufffd")  # may be the beginning of a character
        found = [(place + len(stop), place) for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, safe = True, min(found)[1]
        else:
            safe = len(text) if last else len(text) - self._begun(text)
        piece = text[self.sent : safe]
        self.sent = max(self.sent, safe)
        return piece

    def _settled(self, tokens: list[int]) -> list[int]:
        """Without the run of byte tokens at the end."""
        end = len(tokens)
        while end and BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(tokens[end - 1]) or ""):
            end -= 1
        return tokens[:end]

    def _begun(self, text: str) -> int:
        """Characters at the end that may begin a stop string."""
        return max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
