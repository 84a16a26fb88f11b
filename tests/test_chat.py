"""Chat templates: written out by hand, against transformers where it is installed, and what a template may not do."""

import dataclasses
import json

import pytest
from conftest import fails
from test_evaluate import byte_tokenizer, random_model

from qjax import QjaxError
from qjax.io import chat
from qjax.io.chat import render
from qjax.io.vocabulary import TokenType

# In the manner of ChatML, with what such programs do: trimmed blocks, a loop left early, a filter, a refusal.
CHATML = """\
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant") %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {{- bos_token if loop.first }}<|im_start|>{{ message["role"] }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
OTHERS = {
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "trim": "   {% if true %}\n  a\n   {% endif %}\n  {{ messages[-1].content.split('e') }}\n",
    "tests": "{{ tools is none }} {{ documents is not defined }} {{ 3 * 'ab' }} {{ 7 % 4 }} {{ 2 ** 5 }}",
}
MESSAGES = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "Wie heißt du, ‘Fuchs’?\n"},
    {"role": "assistant", "content": "Ben <b>"},
    {"role": "user", "content": "Else?"},
]


def test_written_out_by_hand():
    expected = (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWie heißt du, ‘Fuchs’?<|im_end|>\n"
        "<|im_start|>assistant\nBen <b><|im_end|>\n"
        "<|im_start|>user\nElse?<|im_end|>\n"
    )
    assert render(CHATML, MESSAGES, add_generation_prompt=False, bos_token="<s>") == expected
    assert render(CHATML, MESSAGES, bos_token="<s>") == expected + "<|im_start|>assistant\n"


@pytest.mark.parametrize("template", [CHATML, *OTHERS.values()])
@pytest.mark.parametrize("begin", [True, False])
def test_as_transformers_writes_it(template, begin):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (theirs,), _ = utils.render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=begin, tools=None, documents=None, bos_token="<s>"
    )
    assert render(template, MESSAGES, add_generation_prompt=begin, bos_token="<s>") == theirs


def test_json_keeps_letters_as_they_are():
    assert json.loads(render("{{ messages | tojson }}", MESSAGES)) == MESSAGES
    assert "‘Fuchs’" in render("{{ messages | tojson }}", MESSAGES)
    assert "<b>" in render("{{ messages | tojson }}", MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|__class__"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 'x' * 10000000000 }}", "repeated too often"),
        ("{{ 10000000000 * messages }}", "repeated too often"),
        ("{{ 9 ** 9 ** 9 }}", "power"),
        ("{% for i in range(10000000) %}x{% endfor %}", "[Rr]ange too big"),
        ("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "more than 16,777,216 characters"),
        ("{{ raise_exception('roles have to alternate') }}", "^chat template: roles have to alternate$"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "chat template: Expected an expression"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
    ],
)
def test_what_a_template_may_not_do(template, message):
    with pytest.raises(QjaxError, match=message):
        render(template, MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [([], "there are no messages"), ([MESSAGES[0], {"role": "user"}], "message 1 has role; expected role and content")],
)
def test_messages_that_are_none(messages, message):
    with pytest.raises(QjaxError, match=message):
        render(CHATML, messages)


@pytest.mark.parametrize("written", [True, False])
def test_the_prompt_begins_with_bos_once(written):
    """Whether the template writes it or not."""
    extra = ("<s>", "<|im_start|>", "<|im_end|>")
    types = [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 3
    tokenizer = byte_tokenizer(extra, bos_token_id=256, add_bos_token=True, token_type=types)
    tokenizer.chat_template = CHATML if written else CHATML.replace("bos_token if loop.first", "''")
    ids = chat.prompt(tokenizer, MESSAGES)
    assert ids[0] == 256
    assert ids.count(256) == 1
    assert ids.count(257) == 5
    assert tokenizer.decode(ids) == "<s>" + render(CHATML, MESSAGES, bos_token="")


def test_a_model_answers():
    model = random_model()
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    answer = model.chat([{"role": "user", "content": "Once upon"}], max_tokens=5)
    assert answer == model.generate("Once upon", max_tokens=5)
    model.tokenizer.chat_template = None
    with pytest.raises(QjaxError, match="no chat template.*generate"):
        model.chat([{"role": "user", "content": "Once upon"}])


def test_on_the_command_line(run, tmp_path):
    model = random_model()
    metadata = model.tokenizer.to_gguf() | {key: value for key, (_, value) in model.config.to_gguf().items()}
    plain, path = tmp_path / "plain.gguf", tmp_path / "chat.gguf"
    dataclasses.replace(model, metadata=metadata).save(plain)
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    dataclasses.replace(model, metadata=metadata | {"tokenizer.chat_template": template}).save(path)
    code, answer, _ = run("generate", path, "-p", "x", "-sys", "y", "--chat", "-n", 4)
    assert code == 0
    assert answer == run("generate", plain, "-p", "s:y;u:x;", "-n", 4)[1].removeprefix("s:y;u:x;")
    assert json.loads(run("generate", path, "-p", "x", "--chat", "-n", 4, "--json")[1])["prompt"] == "u:x;"
    fails(run("generate", path, "-p", "x", "-sys", "y"), "needs --chat")
    fails(run("generate", plain, "-p", "x", "--chat"), "no chat template")
