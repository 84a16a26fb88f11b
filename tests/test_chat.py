"""Chat templates: written out by hand, against transformers where it is installed, and what a template may not do."""

import dataclasses
import json
import time
import tracemalloc

import pytest
from conftest import fails
from test_evaluate import byte_tokenizer, random_model

from qjax import QjaxError
from qjax.io import chat, sandbox
from qjax.io.chat import render
from qjax.io.vocabulary import TokenType

pytestmark = pytest.mark.in_haste

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
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loops": "{% for m in messages[1:] recursive %}{{ loop.length }}{{ loop.last }}{{ loop.revindex }}"
    "{{ loop([{'content': 'x'}]) if m.content != 'x' }}{{ loop.previtem is defined }}{% else %}none{% endfor %}",
    "texts": "{{ '%5.1f|%s' % (1.25, 'a') }}{{ '{0:>4}{a}'.format(1, a='b') }}{{ '%d' | format(3) }}{{ 'a' ~ 1 }}"
    "{{ 'a,b'.split(',') | join('-') }}{{ messages | map(attribute='role') | join('; ') }}{{ 'a' | indent(2, true) }}"
    "{{ messages | join(', ', attribute='content') }}{{ ' x '.strip() }}{{ 'x--'.rstrip('-') }}"
    "{{ 'b a' | replace(' ', 1) }}",
    "lists": "{{ [1, 2] + [3] }}{{ (1, 'a') }}{{ {'a': [1]} }}{{ messages[0] }}{{ [3, 1] | sort }}{{ [1, 2] | sum }}"
    "{{ messages | groupby('role') | length }}{{ 'ab' | list }}{{ 'abc'[::-1] }}{{ dict(a=1).items() | list }}",
    "marked": "{{ ('<'|safe|trim) + '<' }}{{ ('<{}>'|safe).format('<') }}{{ ('%s'|safe) % '<' }}{{ '&'|e ~ '<' }}",
    "macros": "{% macro f(x, y=2) %}{{ x }}{{ y }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}"
    "{{ f(1) }}{{ f(1, 2, 3, z=4) }}{% call f('a') %}b{% endcall %}{% set z %}{{ f(0) }}!{% endset %}{{ z }}",
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
        ("{{ raise_exception('roles have to alternate') }}", "^chat template: roles have to alternate$"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "chat template: Expected an expression"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% for m in messages %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
    ],
)
def test_what_a_template_may_not_do(template, message):
    with pytest.raises(QjaxError, match=message):
        render(template, MESSAGES)


def grown(made, start="[1]", n=60):
    """A template that makes ``ns.x`` of itself so many times, and writes it."""
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range({n}) %}}{made}{{% endfor %}}{{{{ ns.x }}}}"


# Which of the two bounds is met first depends on the processor.
MANY, LONG, WIDE = "makes more than|runs too long", "a list of more than|runs too long", "a field is too wide"
# By what they would take: much at one stroke, much little by little, no end, a list that holds itself twice.
ATTACKS = {
    "{{ 'x' * 10 ** 10 }}": MANY,
    "{{ 10 ** 10 * messages }}": MANY,
    "{{ 'x' | center(10 ** 10) }}": "No filter named 'center'",
    "{{ 'x'.center(10 ** 10) }}": "str.center is not for templates",
    "{{ (1).to_bytes(10 ** 10, 'big') }}": "int.to_bytes is not",
    "{{ [] | slice(10 ** 10) | list }}": "No filter named 'slice'",
    "{{ lipsum(n=10 ** 9) }}": "'lipsum' is undefined",
    "{{ '%1000000000d' | format(1) }}": WIDE,
    "{{ '%(a).1000000000f' % {'a': 1.5} }}": WIDE,
    "{{ '%*d' % (10 ** 9, 1) }}": WIDE,
    "{{ '{:>1000000000}'.format(1) }}": WIDE,
    "{{ '{:>{w}}'.format(1, w=10 ** 9) }}": WIDE,
    "{{ ('{0}' * 9999).format('x' * 99999) }}": MANY,
    "{{ ('%(a)s' * 9999) % {'a': 'x' * 99999} }}": MANY,
    "{{ ('x' * 99999).replace('', 'y' * 99999) }}": MANY,
    "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}": MANY,
    "{{ range(99999) | join('x' * 99999) }}": MANY,
    "{{ ('x' * 99999).join(['a'] * 9999) }}": MANY,
    "{{ 'a\nb' | indent(10 ** 10) }}": MANY,
    "{{ [1, [2]] | tojson(indent=10 ** 10) }}": "an indent is too wide",
    "{{ ('a' * 99999) | trim('b' * 99999) }}": "characters to strip",
    "{{ [[1], [2]] | sum(start=[]) }}": "only numbers are added up",
    "{{ ('字' * 4000000) | list }}": MANY,
    "{{ ('字' * 4000000) | sort }}": MANY,
    "{{ ('字 ' * 1000000).split() }}": MANY,
    "{{ ('字\n' * 1000000).splitlines() }}": MANY,
    "{{ strftime_now('%Y' * 99999) }}": "a form of more than 256 characters",
    "{{ 9 ** 9 ** 9 }}": "a power is too large",
    "{{ ('f' * 9999) | int(base=16) // 7 }}": "a number is too large",
    grown("{% set ns.x = ns.x * ns.x %}", "9"): "a number is too large",
    "{% for i in range(10 ** 9) %}{% endfor %}": "[Rr]ange too big",
    "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}": MANY,
    "{% set y = 'x' * 999999 %}{{ " + "~".join(["y"] * 99) + " }}": MANY,
    grown("{% set ns.x = ns.x ~ ns.x %}"): MANY,
    grown("{% set ns.x = ns.x + ns.x %}"): MANY,
    grown("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"): MANY,
    grown("{% set ns.x = ns.x + [y[i:]] %}", n=9999).replace("{%", "{% set y = 'x' * 999999 %}{%", 1): MANY,
    grown("{% set ns.x = [ns.x, ns.x] %}"): LONG,
    grown("{% set ns.x = {'a': ns.x, 'b': ns.x} %}"): LONG,
    grown("{% set ns.x = namespace(a=ns.x, b=ns.x) %}"): LONG,
    grown("{% set ns.x = (ns.x,) %}", n=99999) + "{{ {ns.x: 1} }}": "one too deep",
    grown("{% set ns.x = ns %}"): "one too deep",
    "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ f(60, 1) }}": LONG,
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": f"recursion|{LONG}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}": LONG,
    "{% set r = range(99999) %}{% for i in r %}{% for j in r if j < 0 %}{% endfor %}{% endfor %}": LONG,
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 50 }}{% endfor %}": LONG,
    "{% set a = range(9999) | list %}{{ range(99999) | select('in', a + ['x']) | reject('in', a) | list }}": LONG,
    "x" * 99999: "it has 99,999 characters, more than 65,536",
    "{{x}}" * 8192: "it has 8,193 expressions and statements, more than 8,192",
}


@pytest.mark.parametrize("template", ATTACKS, ids=[f"{i}-{text[:40]}" for i, text in enumerate(ATTACKS)])
def test_what_would_take_too_much(monkeypatch, template):
    """Less than a second, and less than 64 MB; the time is shorter here, for there are many."""
    monkeypatch.setattr(sandbox, "_TIME_S", 0.1)

    def attack():
        with pytest.raises(QjaxError, match=ATTACKS[template]):
            render(template, MESSAGES)

    begun = time.thread_time()
    attack()
    assert time.thread_time() - begun < 1
    tracemalloc.start()
    try:
        attack()
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()


def test_a_long_conversation_takes_more():
    """What is refused of short ones: twenty times what may be made of a greeting."""
    long = [{"role": "user", "content": "word " * 200}] * 2000
    double = "{% for m in messages %}{{ m.content.replace('w', 'W') ~ m.content | upper }}{% endfor %}"
    assert len(render(double, long)) == 2 * 2000 * 1000
    with pytest.raises(QjaxError, match="makes more than"):
        render("{{ 'x' * 4000000 }}", MESSAGES)
    assert len(render("{{ 'x' * 4000000 }}", long)) == 4000000


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
