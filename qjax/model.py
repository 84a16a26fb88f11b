"""Model and load(): where files, forward pass, metrics and methods meet."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float32, Int

from qjax.errors import QjaxError, located
from qjax.formats import Format
from qjax.io import chat, checkpoint_write, gguf, hub
from qjax.io.gguf import Metadata
from qjax.io.imatrix import Imatrix
from qjax.io.tokenizer import Tokenizer
from qjax.methods import importance, pipeline, recipes, rtn
from qjax.methods.activations import Activations
from qjax.methods.recipes import Recipe
from qjax.models import cache, generate, parts, placement, transformer
from qjax.models.cache import CacheTypes
from qjax.models.config import Config
from qjax.models.generate import Chunk, FinishReason, Sampling
from qjax.models.layer import FACTS
from qjax.models.placement import Place
from qjax.models.transformer import Params
from qjax.ops.kernels.columns import Columns
from qjax.progress import progress
from qjax.source import open_source
from qjax.tensor import QTensor, describe_size


@dataclass(frozen=True)
class Generation:
    """A text that was made: ``text`` continues ``prompt``.

    finish_reason: "stop" (the model ended it), "length" (max_tokens are made) or "context" (no room is left).
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason

    def __str__(self) -> str:
        return self.prompt + self.text


@dataclass(frozen=True, repr=False, eq=False)
class Model:
    """A language model ready to run; make one with `load`.

    params: weights in GGUF layout, Array or QTensor leaves, or Columns (see `load`).  dtype: of the factors of the
        matrix products.
    cache_k, cache_v: how keys and values are held, in text that is made and in text that is measured: "f32", "f16",
        "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0" or "iq4_nl".  Default: f16 where text is made; where it is
        measured there is no cache, and nothing is rounded.
    int8_activations: whether on a CPU, one token at a time, activations are rounded to int8, as llama.cpp does it, for
        the formats that `qjax.ops.kernels.columns` lays out anew.  Up to ten times as fast.
    place: puts the tensors of models made of this one where those of this one are.
    activations: how the inputs of matrix products are rounded, in text that is made and measured (see `Activations`);
        `save` leaves it out.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer
    name: str = "model"
    metadata: Metadata = dataclasses.field(default_factory=Metadata)
    dtype: DTypeLike = jnp.float32
    cache_k: str | None = None
    cache_v: str | None = None
    place: Place = placement.anywhere
    int8_activations: bool = True
    activations: Activations | None = None

    @functools.cached_property
    def running(self) -> Params:
        """The params, their inputs rounded if `activations` says so."""
        return self.activations.attach(self.params, self.config) if self.activations else self.params

    @functools.cached_property
    def one_row(self) -> Params:
        """`running` as text is generated with it; made at first use and kept beside the others, unless the params are
        laid out so already (see `load`) or `activations` says how to round."""
        as_measured = self.activations or not self.int8_activations
        return self.running if as_measured else transformer.for_one_row(self.params)

    def cache_types(self, default: str) -> CacheTypes:
        """cache_k and cache_v, with the rotation that llama.cpp gives the quantized ones; see `qjax.models.cache`.

        default: the type where none is named.  llama.cpp's environment variable LLAMA_ATTN_ROT_DISABLE counts here too.
        Raises QjaxError for an unknown type, and for one whose blocks do not divide the head size.
        """
        return _cache_types(self.config, self.cache_k or default, self.cache_v or default)

    @functools.cached_property
    def tensors(self) -> Mapping[str, Array | QTensor]:
        """Every tensor by GGUF name, in the order of a file."""
        return transformer.unstack(self.params, self.config)

    @property
    def n_weights(self) -> int:
        return sum(t.size for t in self._leaves())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self._leaves())

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.nbytes / self.n_weights

    @property
    def placement(self) -> str:
        """What lies where, if on several devices; matrices that could not be cut are named."""
        return parts.describe(self.params)

    def _leaves(self) -> list[Array | QTensor | Columns]:
        # The head of a tied model that lies on several devices is a copy, no other tensor.
        params = self.params._replace(output=None) if self.config.tied else self.params
        runs = tuple({name: leaf for name, leaf in run.items() if name not in FACTS} for run in params.runs)
        params = params._replace(runs=runs)
        return jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, (QTensor, Columns)))

    def logits(
        self, tokens: Int[Array | np.ndarray, "*batch seq"] | Sequence[int] | Sequence[Sequence[int]]
    ) -> Float32[Array, "*batch seq vocab"]:
        """Logits of the token after each position.  ``tokens``: ids, one text or a batch of equally long ones.

        Keys and values stay in float32, whatever the cache types.  Raises QjaxError if an id is not in the vocabulary.
        """
        ids = np.asarray(tokens, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab:
            raise QjaxError(f"tokens: ids from {ids.min()} to {ids.max()}, expected 0 to {self.config.vocab - 1}")
        batch = ids.reshape(-1, ids.shape[-1])
        out = parts.forward(self.config, self.running, batch, dtype=self.dtype)
        return out.reshape(*ids.shape, -1)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int = 0,
        n_ctx: int | None = None,
        parse_special: bool = False,
    ) -> Iterator[tuple[str, Chunk]]:
        """Continues ``prompt``, yielding text as it is made, with the tokens behind it.

        temperature: 0 takes the most likely token each time; above it tokens are drawn, after cuts by top_k, top_p
        and min_p in llama.cpp's order.  n_ctx: room for prompt and text, default the model's.  parse_special: whether
        <|...|> in the prompt are special tokens.  Raises QjaxError for an empty or too long prompt.
        """
        ids = self.encode(prompt, parse_special) if isinstance(prompt, str) else list(prompt)
        decoder = self.tokenizer.stream(unparse_special=False)
        for chunk in generate.stream(
            self.config,
            self.running,
            ids,
            max_tokens=max_tokens,
            stop_ids=sorted(self.tokenizer.eog_ids),
            sampling=Sampling(temperature, top_k if temperature else 1, top_p, min_p),
            seed=seed,
            n_ctx=n_ctx,
            dtype=self.dtype,
            types=self.cache_types("f16"),
            one_row=self.one_row,
        ):
            yield decoder.push(chunk.tokens) + (decoder.end() if chunk.finish_reason else ""), chunk

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continues ``prompt``; the options are those of `stream`."""
        pieces, tokens, finish_reason = [], [], "length"
        for text, chunk in self.stream(prompt, **options):
            pieces.append(text)
            tokens += chunk.tokens
            finish_reason = chunk.finish_reason or finish_reason
        shown = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
        return Generation(shown, "".join(pieces), tuple(tokens), finish_reason)

    def chat(self, messages: Sequence[chat.Message], **options: Any) -> Generation:
        """The model's answer in a conversation, [{"role": "user", "content": "Hello"}, ...], which its chat template
        writes; the options are those of `stream`.

        Raises QjaxError for a model without a template, and with what the template says against the messages.
        """
        return self.generate(chat.prompt(self.tokenizer, messages), **options)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Token ids of a prompt, BOS first where the model wants one."""
        return self.tokenizer.encode(text, add_special=True, parse_special=parse_special)

    def quantize(
        self,
        recipe: "str | Format | Mapping[str, str | Format] | Recipe",
        *,
        method: str = "rtn",
        calibrate: "str | Sequence[int] | Int[np.ndarray, ' n'] | None" = None,
        n_ctx: int = 512,
        chunks: int | None = None,
        imatrix: "str | os.PathLike[str] | Imatrix | None" = None,
        rounding: str | None = None,
        allow_requantize: bool = False,
        allow_nonfinite: bool = False,
    ) -> "Model":
        """The model with its matrices quantized, by default by round-to-nearest.

        recipe: a file type as llama-quantize names it ("Q4_K_M": a mixture), a Format (every matrix alike),
        {regular expression on tensor names: format}, or what `recipes.recipe` makes.
        method: a name of `qjax.methods.pipeline.METHODS`, or several joined by "+", as in "rotate+gptq".
        calibrate: text, or token ids, that methods look at, cut into windows of ``n_ctx`` tokens, at most ``chunks``.
            It also serves as the importance matrix of what ``imatrix`` leaves out.
        imatrix: how much each input column matters, as `qjax imatrix` measures it.
        rounding: replaces the final rounding step.

        Raises QjaxError naming the tensor if a row does not divide into a Format's blocks (a file type falls back to
        another format, as llama-quantize does), if its format needs an imatrix and there is none or one of another
        size, if weights are NaN or infinite (unless ``allow_nonfinite``), or if they are quantized already (unless
        ``allow_requantize``: errors add up); for an unknown method, and for missing or too short calibration text.
        """
        recipe, weighed, chain = recipes.recipe(recipe), importance.select(imatrix), pipeline.chain(method)
        options = rtn.Options(weighed, rounding, allow_requantize, allow_nonfinite)
        windows = None if calibrate is None else pipeline.windows(self.config, self.tokenizer, calibrate, n_ctx, chunks)
        made = pipeline.quantize(self.config, self.tensors, recipe, chain, windows, options)
        return dataclasses.replace(
            self,
            config=made.config,
            params=placement.stack(made.tensors.items(), made.config, self.place),
            name=f"{self.name}:{recipe.name}" + (f"+{chain.name}" if chain.name != "rtn" else ""),
            metadata=rtn.metadata(self.metadata, recipe, weighed),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a GGUF file (``path`` ends in .gguf) or a safetensors folder, whole or not at all.

        Raises QjaxError for formats that the container has no place for.
        """
        path = Path(path)
        if path.suffix == ".gguf":
            gguf.write(path, self.metadata, self._as_file())
        else:
            checkpoint_write.write_folder(path, self.config, self.tensors, self.tokenizer)

    def _as_file(self) -> dict[str, Array | QTensor]:
        """The tensors as a GGUF file has them: vectors in float32."""
        return pipeline.quantize(self.config, self.tensors, recipes.COPY, pipeline.chain("rtn"), None).tensors

    def __repr__(self) -> str:
        c, where = self.config, self.placement and f"; {self.placement}"
        return (
            f"Model({self.name}: {c.architecture}, {c.n_layers} layers of {c.d_model}, vocabulary {c.vocab}, "
            f"{self.n_weights / 1e6:.1f} M weights, {self.bpw:.2f} bpw, {describe_size(self.nbytes)}{where})"
        )


def load(
    name: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    n_gpu_layers: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    cache_k: str | None = None,
    cache_v: str | None = None,
    only_generate: bool = False,
    lora: str | os.PathLike[str] | None = None,
) -> Model:
    """A model by name: a GGUF (or older GGML) file, a safetensors folder, a Hub id, or a built-in name ("tiny").

    dtype: of the factors of the matrix products, float32 or bfloat16; sums are float32 always.  Default: float32, and
        int8 activations while text is generated (see `Model`).
    n_gpu_layers: so many layers on the accelerator, counted from the end, the head first, and the others on the CPU,
        as llama.cpp's -ngl; all if there are not so many, or for a negative number.
    mesh: devices that share the work: matrices are cut along its axis "model", batches along its axis "data".
        Without either everything lies on JAX's default device.
    cache_k, cache_v: how keys and values are held, by llama.cpp's names, in any case; see `Model`.
    only_generate: where a CPU has all layers, hold each matrix only as text is made with it, laid out as it is loaded,
        which takes half the memory; without effect if dtype is given.  Scales are rounded to 11 bits; what needs exact
        weights (logits, perplexity, quantize, save) then raises QjaxError.
    lora: an adapter, GGUF file or PEFT folder, added to the weights, which are then float32 where it changes them.

    Raises QjaxError if there is no such model, its file is damaged or of an unknown architecture, JAX has no
    accelerator for n_gpu_layers, or cache types are unknown or do not fit the model.
    """
    enable_compilation_cache()
    source = open_source(name, lora=lora)
    _cache_types(source.config, cache_k or "f16", cache_v or "f16")
    with located(source.path):
        tokenizer = Tokenizer.from_gguf(source.metadata)
    if tokenizer.vocab_size > source.config.vocab:
        raise QjaxError(
            f"{source.path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only "
            f"{source.config.vocab} rows. They belong to different models."
        )
    place = placement.choose(source.config, n_gpu_layers, mesh)
    if only_generate and dtype is None and place is placement.anywhere:
        place = placement.to_generate(source.config)
    # The largest first: what it takes on the way to its place comes while memory is empty.
    by_size = sorted(source.tensors.items(), key=lambda item: -item[1].format.nbytes(item[1].shape))
    stored = progress(by_size, desc=f"loading {source.name}", unit="tensor")
    with located(source.path):
        params = placement.stack(((name, tensor.load()) for name, tensor in stored), source.config, place)
    return Model(
        source.config,
        params,
        tokenizer,
        source.name,
        source.metadata,
        dtype or jnp.float32,
        cache_k,
        cache_v,
        place,
        int8_activations=dtype is None,
    )


def _cache_types(config: Config, k: str, v: str) -> CacheTypes:
    # As C's atoi reads it.
    disabled = re.match(r"\s*[+-]?0*[1-9]", os.environ.get("LLAMA_ATTN_ROT_DISABLE", ""))
    return cache.cache_types(config, k, v, rotate=not disabled)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where to keep them already.

    The environment variable QJAX_COMPILATION_CACHE names the folder, or is "off"; default: in `hub.cache_folder`.
    """
    chosen = os.environ.get("QJAX_COMPILATION_CACHE", "")
    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if configured or chosen.lower() == "off":
        return
    jax.config.update("jax_compilation_cache_dir", chosen or str(hub.cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
