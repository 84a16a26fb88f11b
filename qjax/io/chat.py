"""Chat templates: the Jinja program in a model's file that writes a conversation as the model was taught to read it.

A template is a stranger's program.  It runs in Jinja's sandbox, without files, imports or what Python keeps behind its
objects; a text is not repeated, nor written, beyond any use.  What it may call is what transformers gives it too.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from qjax.errors import QjaxError
from qjax.io.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""{"role": "user", "content": "Hello"}, as everywhere; more keys if the template knows them"""

_MAX_CHARACTERS, _MAX_POWER = 2**24, 64
# What comes of templates that were not made for such messages.
_MISTAKES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def render(template: str, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
    """The conversation as text; by default with the words that begin the model's answer.

    variables: what else the template may ask for: bos_token, eos_token, tools, ...
    Raises QjaxError for messages without role and content, and with what the template says against them.
    """
    from jinja2 import TemplateError

    for i, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            found = ", ".join(map(str, message)) or "nothing"
            raise QjaxError(f"chat: message {i} has {found}; expected role and content")
    if not messages:
        raise QjaxError("chat: there are no messages")
    given = {"tools": None, "documents": None} | variables
    pieces, n = [], 0
    try:
        made = _environment().from_string(template)
        for piece in made.generate(messages=messages, add_generation_prompt=add_generation_prompt, **given):
            pieces.append(piece)
            n += len(piece)
            if n > _MAX_CHARACTERS:
                raise QjaxError(f"chat template: it writes more than {_MAX_CHARACTERS:,} characters")
    except (TemplateError, *_MISTAKES) as error:
        raise QjaxError(f"chat template: {error}") from error
    return "".join(pieces)


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


def _environment() -> Any:
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = [x for x in (left, right) if isinstance(x, (int, float))]
            if operator == "*" and len(numbers) == 1:
                others = [x for x in (left, right) if hasattr(x, "__len__")]
                if others and len(others[0]) * numbers[0] > _MAX_CHARACTERS:
                    raise SecurityError("a text is repeated too often")
            if operator == "**" and any(abs(x) > _MAX_POWER for x in numbers):
                raise SecurityError("a power is too large")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment
