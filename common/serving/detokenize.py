"""Text from tokens as they come, so that the pieces of a stream join to exactly the text of the whole."""


class Detokenizer:
    """Turns a growing list of tokens into pieces of text, and finds stop strings.

    Held back until more is known: bytes of an unfinished character, and an ending that may begin a stop string.
    """

    def __init__(self, tokenizer, stop: list[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.sent = 0
        self.stopped = False  # a stop string was found: the text ends before it

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, tokens: list[int], last: bool) -> str:
        """The new piece of text for all `tokens` so far; with `last`, everything that was held back too."""
        text = self.text(tokens)
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped, safe = True, min(found)
        else:
            safe = len(text) if last else len(text) - self._uncertain(text)
        piece = text[self.sent : safe]
        self.sent = max(self.sent, safe)
        return piece

    def _uncertain(self, text: str) -> int:
        """Characters at the end that later tokens may change or that may belong to a stop string."""
        if text.endswith("\ufffd"):
            return len(text) - len(text.rstrip("\ufffd"))
        starts = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(starts, default=0)
