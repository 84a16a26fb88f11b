"""Chat templates: the Jinja program in a model's file that writes a conversation as the model was taught to read it.

A template is a stranger's program, so it runs in a sandbox (qjax.io.sandbox).  What it may call is what transformers
gives it too, as far as templates use it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from qjax.errors import QjaxError
from qjax.io.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""{"role": "user", "content": "Hello"}, as everywhere; more keys if the template knows them"""

_MAX_FORM, _MAX_MESSAGE = 256, 500


def render(template: str, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
    """The conversation as text; by default with the words that begin the model's answer.

    variables: what else the template may ask for: bos_token, eos_token, tools, ...
    Raises QjaxError for messages without role and content, and with what the template says against them.
    """
    from qjax.io import sandbox

    for i, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            found = ", ".join(map(str, message)) or "nothing"
            raise QjaxError(f"chat: message {i} has {found}; expected role and content")
    if not messages:
        raise QjaxError("chat: there are no messages")
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    # Whatever comes of it is the template's doing: a mistake in it, one over these messages, or too much.
    try:
        return sandbox.run(template, given | variables, {"raise_exception": _refuse, "strftime_now": _now})
    except Exception as error:
        said = " ".join(str(error).split())[:_MAX_MESSAGE]
        raise QjaxError(f"chat template: {said or type(error).__name__}") from error


def _refuse(message: str) -> None:
    raise ValueError(message)


def _now(form: str) -> str:
    """The present time, written in a form of strftime."""
    if len(form) > _MAX_FORM:
        raise ValueError(f"a form of more than {_MAX_FORM} characters for the time")
    return datetime.now().strftime(form)


def prompt(tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> list[int]:
    """Token ids of a conversation, up to where the model answers; what is spelled like a special token is one.

    Raises QjaxError as `render` does, and for a model without a chat template.
    """
    if tokenizer.chat_template is None:
        raise QjaxError(
            "chat: this model has no chat template (tokenizer.chat_template); it continues texts, with generate"
        )
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    special: dict[str, Any] = {name: "" if id is None else tokenizer.tokens[id] for name, id in named.items()}
    text = render(tokenizer.chat_template, messages, **special | variables)
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    # Some templates write BOS themselves.
    begins = tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]
    return [tokenizer.bos_id, *ids] if begins and tokenizer.bos_id is not None else ids
