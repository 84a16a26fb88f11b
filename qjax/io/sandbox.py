"""Runs a stranger's Jinja program: without files, imports, what Python keeps behind its objects, and within bounds.

Jinja's sandbox keeps a program from the machine, but lets it take any time and memory.  Here a program may make so many
characters in all, and take so much of the processor's time.  Both are looked at wherever it loops, calls, or puts
together; the filters and methods that could do more at one stroke ask first.  Those that chat templates have no
use for are not there: what is left is about what llama.cpp reads (common/jinja/value.cpp).
"""

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import soft_str

# Characters, and seconds of the processor; and how many more for each character that was given.
_CHARACTERS, _MORE_CHARACTERS = 2**22, 64
_TIME_S, _MORE_TIME_S = 0.5, 2e-6
# A program is compiled before it runs; those of models have up to 20,000 characters and 1,500 nodes.
_MAX_TEMPLATE, _MAX_NODES = 2**16, 2**13
# What an item of a list counts, in characters; how deep lists may lie in lists.
_ITEM, _MAX_DEPTH = 16, 100
_MAX_POWER, _MAX_BITS, _MAX_INDENT, _MAX_SHORT = 64, 1024, 64, 256

_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe",
    "select", "selectattr", "sort", "string", "title", "unique", "upper", "urlencode",
)  # fmt: skip
_METHODS = (
    "capitalize", "casefold", "copy", "count", "endswith", "find", "fromkeys", "get", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "items", "keys",
    "lower", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "startswith", "swapcase",
    "title", "upper", "values",
)  # fmt: skip
_LISTS = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_BUILT_IN = (str, bytes, int, float, dict, type, *_LISTS)
# str.splitlines
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
# What makes a field after % wide: three digits, or an argument.
_WIDE = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\*|\d{3})")


class _Generation(Extension):
    """{% generation %} marks what a model is trained on; its content is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Metered(NodeTransformer):
    """Puts a filter that a template cannot spell where a program loops or makes something without a call."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "<each>")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno, environment=node.environment), "<join>")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "<made>") if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "<made>") if node.ctx == "load" else node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "<made>")

    visit_Dict = visit_List


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def run(template: str, variables: Mapping[str, Any], functions: Mapping[str, Callable]) -> str:
    """What the program ``template`` writes, given these variables, whose size decides how much it may do.

    Raises jinja2's SecurityError if it is too long, reaches for what it may not, or does too much; its mistakes may
    raise anything.
    """
    if len(template) > _MAX_TEMPLATE:
        raise SecurityError(f"it has {len(template):,} characters, more than {_MAX_TEMPLATE:,}")
    environment = _Environment(len(template), variables)
    environment.globals |= functions
    program = environment.from_string(template)
    environment.start()
    return program.render(variables)


class _Environment(ImmutableSandboxedEnvironment):
    """For one run of one program."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, size: int, variables: Mapping[str, Any]):
        extensions = [loopcontrols, _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._write)
        self._known: dict[int, int] = {}
        self._size = size + sum(map(self._learn, variables.values()))
        self._most = self._left = _CHARACTERS + _MORE_CHARACTERS * self._size
        self._until = math.inf
        own: dict[str, Callable] = {"trim": functools.partial(self._strip, "strip"), "format": self._format_all}
        own |= {"replace": self._replace_all, "join": self._join_all, "list": self._list, "sum": self._sum}
        own |= {"indent": self._indent, "tojson": self._to_json}
        for name in ("sort", "groupby"):
            function = self.filters[name]
            own[name] = functools.update_wrapper(functools.partial(self._listed, function), function)
        self.filters = {name: self._guarded(f) for name, f in ({n: self.filters[n] for n in _FILTERS} | own).items()}
        self.filters |= {"<each>": self._each, "<join>": self._join_all, "<made>": self._made}
        self.tests = {name: self._guarded(test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self._methods: dict[str, Callable] = {"replace": self._replace, "join": self._join}
        for name in ("strip", "lstrip", "rstrip"):
            self._methods[name] = functools.partial(self._strip, name)
        for name in ("split", "rsplit", "splitlines"):
            self._methods[name] = functools.partial(self._split, name)

    def start(self) -> None:
        """The time begins."""
        self._until = time.thread_time() + _TIME_S + _MORE_TIME_S * self._size

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        if (n := sum(1 for _ in parsed.find_all(nodes.Node))) > _MAX_NODES:
            raise SecurityError(f"it has {n:,} expressions and statements, more than {_MAX_NODES:,}")
        return _Metered().visit(parsed)

    # What it costs.

    def _learn(self, x: Any) -> int:
        """The weight of what was given, which does not change, so that it is known from then on."""
        parts = [*x, *x.values()] if isinstance(x, dict) else x if isinstance(x, _LISTS) else None
        if parts is None:
            return len(x) if isinstance(x, (str, bytes)) else _ITEM
        self._known[id(x)] = sum(map(self._learn, parts)) + _ITEM * (len(parts) + 1)
        return self._known[id(x)]

    def _weigh(self, x: Any) -> int:
        """Characters and items in it, each as often as it would be written.

        Also looks at the clock: whatever runs on and on comes by here.
        """
        if time.thread_time() > self._until:
            raise SecurityError("it runs too long")
        total, left = 0, [(x, 0)]
        while left:
            x, depth = left.pop()
            if isinstance(x, (str, bytes)):
                total += len(x)
                continue
            if id(x) in self._known:
                total += self._known[id(x)]
                continue
            total += _ITEM
            if isinstance(x, Namespace):
                x = x._Namespace__attrs  # pyright: ignore
            if isinstance(x, dict):
                x = (*x, *x.values())
            if isinstance(x, _LISTS):
                total += _ITEM * len(x)
                left += [(part, depth + 1) for part in x]
            if total > self._most or depth > _MAX_DEPTH:
                raise SecurityError(f"it makes a list of more than {self._most:,} characters, or one too deep")
        return total

    def _spend(self, n: int) -> None:
        self._left -= n
        if self._left < 0:
            raise SecurityError(f"it makes more than {self._most:,} characters")

    def _made(self, x: Any) -> Any:
        """``x``, which is new."""
        self._weigh(x)
        if isinstance(x, (str, bytes)):
            self._spend(len(x))
        elif isinstance(x, (dict, *_LISTS)):
            self._spend(_ITEM * len(x))
        return x

    def _guarded(self, function: Callable) -> Callable:
        return functools.update_wrapper(functools.partial(self._watch, function), function)

    def _watch(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        self._weigh((args, kwargs))
        return self._made(function(*args, **kwargs))

    # Where the compiled program passes.

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The compiled program adds what is known where it calls.
        named = {name: x for name, x in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        weight = __self._weigh((args, named))
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str) and name == "format":
            __self._braces(owner, weight)
        elif isinstance(owner, str) and name in __self._methods:
            __obj = functools.partial(__self._methods[name], owner)
        elif isinstance(owner, _BUILT_IN) and name not in _METHODS:
            raise SecurityError(f"{type(owner).__name__}.{name} is not for templates")
        return __self._made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        weights = self._weigh(left), self._weigh(right)
        numbers = [x for x in (left, right) if isinstance(x, (int, float))]
        if operator == "*" and len(numbers) == 1:
            self._spend(int(sum(weights) * max(0, numbers[0])))
        if operator == "%" and isinstance(left, (str, bytes)):
            self._percents(str(left), weights[1])
        if operator == "**" and any(abs(x) > _MAX_POWER for x in numbers):
            raise SecurityError("a power is too large")
        if any(isinstance(x, int) and x.bit_length() > _MAX_BITS for x in numbers):
            raise SecurityError("a number is too large")
        return self._made(super().call_binop(context, operator, left, right))

    def concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        self._spend(sum(map(len, pieces)))
        return "".join(pieces)

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._weigh("")
            self._spend(_ITEM)
            yield item

    def _write(self, x: Any) -> str:
        if not isinstance(x, str):
            self._weigh(x)
            x = str(x)
        self._spend(len(x))
        return x

    # Filters and methods that make much of little; what they would make is known before.

    def _strip(self, name: str, text: Any, chars: str | None = None) -> str:
        if chars and len(chars) > _MAX_SHORT:
            raise SecurityError(f"more than {_MAX_SHORT} characters to strip")
        return getattr(soft_str(text), name)(chars)

    def _split(self, name: str, text: str, *args: Any, **kwargs: Any) -> list[str]:
        separator = kwargs.get("sep", args[0] if args else None)
        if name == "splitlines":
            n = sum(map(text.count, _LINE_ENDS))
        else:
            n = text.count(separator) if separator else len(text) // 2
        self._spend(_ITEM * n)
        return getattr(text, name)(*args, **kwargs)

    def _replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        self._spend(len(text) + text.count(old) * len(new))
        return text.replace(old, new, count)

    def _replace_all(self, x: Any, old: Any, new: Any, count: int | None = None) -> str:
        return self._replace(str(x), str(old), str(new), -1 if count is None else count)

    def _join(self, separator: str, items: Iterable[str]) -> str:
        items = list(items)
        self._spend(sum(map(len, items)) + len(separator) * len(items))
        return separator.join(items)

    def _join_all(self, items: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            items = map(make_attrgetter(self, attribute), items)
        return self._join(str(d), [self._write(item) for item in items])

    def _list(self, items: Iterable[Any]) -> list[Any]:
        self._spend(_ITEM * len(items) if isinstance(items, str) else 0)
        return list(items)

    def _listed(self, function: Callable, environment: Any, items: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        """For filters that put their items into a list."""
        return function(environment, self._list(items), *args, **kwargs)

    def _sum(self, items: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
        if not isinstance(start, (int, float)):
            raise SecurityError("only numbers are added up")
        return sum(items if attribute is None else map(make_attrgetter(self, attribute), items), start)

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        lines = sum(map(text.count, _LINE_ENDS)) + 1
        self._spend(len(text) + lines * (len(width) if isinstance(width, str) else max(0, width)))
        return do_indent(text, width, first, blank)

    def _percents(self, text: str, weight: int) -> None:
        """A text with fields, in each of which something that weighs so much may be written."""
        if _WIDE.search(text):
            raise SecurityError("a field is too wide")
        self._spend(len(text) + text.count("%") * (weight + _MAX_SHORT))

    def _braces(self, text: str, weight: int) -> None:
        """The same in another spelling."""
        specs = [spec or "" for _, field, spec, _ in Formatter().parse(text) if field is not None]
        if any("{" in spec or re.search(r"\d{3}", spec) for spec in specs):
            raise SecurityError("a field is too wide")
        self._spend(len(text) + len(specs) * (weight + _MAX_SHORT))

    def _format_all(self, text: Any, *args: Any, **kwargs: Any) -> str:
        self._percents(str(text), self._weigh((args, kwargs)))
        return soft_str(text) % (kwargs or args)

    def _to_json(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """As transformers has it, not Jinja's, which escapes what HTML does not take."""
        if max(indent if isinstance(indent, int) else len(indent or ""), self._weigh(separators)) > _MAX_INDENT:
            raise SecurityError("an indent is too wide")
        options = {"ensure_ascii": ensure_ascii, "separators": separators, "sort_keys": sort_keys}
        if indent is None:
            return json.dumps(x, **options)
        pieces = []
        for piece in json.JSONEncoder(indent=indent, **options).iterencode(x):
            self._spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)
