"""From a request to the prompt's tokens: control tokens come from the chat template, never from what users type."""

import copy
import re
import uuid

from jinja2 import TemplateError

from common.serving.schemas import ApiError, ChatRequest, CompletionRequest, Request, invalid

CHARACTERS = 16  # for each token that a prompt may have; longer text is refused before it is tokenized


class Prompts:
    """Tokenizes requests; not for two threads at once."""

    def __init__(self, tokenizer, name: str, max_tokens: int):
        self._tokenizer, self._name, self._max_tokens = tokenizer, name, max_tokens
        self._literal = copy.deepcopy(tokenizer)  # the choice below is a state of the tokenizer, and others decode
        special = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len)
        special += [token for token in tokenizer.all_special_tokens if token not in special]
        self._special = "|".join(re.escape(token) for token in reversed(special)) or r"(?!)"  # the longest first

    def tokens(self, body: Request) -> list[int]:
        """Raises ApiError (400) when there are none or too many, or no chat template for the messages.

        /v1/completions takes text as it is: who builds a prompt by hand writes its control tokens too.
        """
        texts = [body.prompt] if isinstance(body, CompletionRequest) else [m.plain()["content"] for m in body.messages]
        length, limit = sum(map(len, texts)), CHARACTERS * self._max_tokens
        if length > limit:
            raise _too_long(f"The prompt has {length} characters; at most {limit} are allowed.")
        tokens = self._chat(body) if isinstance(body, ChatRequest) else self._tokenizer(body.prompt).input_ids
        if not 0 < len(tokens) <= self._max_tokens:
            message = f"The prompt has {len(tokens)} tokens; 1 to {self._max_tokens} are allowed."
            raise _too_long(message) if tokens else invalid(message)
        return tokens

    def _chat(self, body: ChatRequest) -> list[int]:
        """The template's tokens for the messages. What looks like a control token in a message is marked on its way
        through the template, and tokenized as text."""
        if not self._tokenizer.chat_template:
            raise invalid(f"Model {self._name!r} has no chat template; use /v1/completions.", "messages")
        begin, end = f"<{uuid.uuid4().hex}>", f"<{uuid.uuid4().hex}>"  # nobody can know, and thus type, these
        messages = [message.plain() for message in body.messages]
        for message in messages:
            message["content"] = re.sub(self._special, lambda m: begin + m[0] + end, message["content"])
        try:
            prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise invalid(f"The model's chat template refuses these messages: {error}", "messages") from error
        tokens = []
        for place, part in enumerate(re.split(f"{begin}({self._special}){end}", prompt)):
            if place % 2:
                tokens += self._literal(part, add_special_tokens=False, split_special_tokens=True).input_ids
            else:  # a template that drops part of a message may leave a mark
                part = part.replace(begin, "").replace(end, "")
                tokens += self._tokenizer(part, add_special_tokens=False).input_ids if part else []
        return tokens


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, "invalid_request_error", code="context_length_exceeded")
