"""What makes tests faster: programs compiled in a quarter of the time, for what runs once, on little, need not run
fast; in half of it, for what runs on more; contexts for many programs; and less looking for garbage."""

import gc
import threading
from collections.abc import Callable

# Of XLA: operations written down one by one, in one module.
OPTIONS = {
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def collect_rarely() -> None:
    """Tracing and compiling make millions of small objects, few of them in circles: a tenth of the time goes to looking
    for these as often as Python does by itself."""
    gc.set_threshold(100_000, 20, 100)


def share_contexts(times: int = 64) -> None:
    """Programs are written down in MLIR contexts that served others before: making one takes a fifth of the time of a
    small program, and all together half of the memory of a run.  Not for ever, because a context keeps all constants.

    times: how many programs a context serves.
    """
    from jax._src.interpreters import mlir

    make, of_thread = getattr(mlir, "make_ir_context", None), threading.local()
    if make is None:
        return

    def shared():
        if getattr(of_thread, "left", 0) == 0:
            of_thread.context, of_thread.left = make(), times
        of_thread.left -= 1
        return of_thread.context

    mlir.make_ir_context = shared


def hasten(level: int = 0) -> Callable[[], None]:
    """From now on programs are compiled with `OPTIONS`, if JAX knows them, until the function it gives is called.

    level: of LLVM's optimizations.  0 compiles in a quarter of the time, and loops run as they are written; 1 in half
    of the time, and they run no slower than usual.
    JAX takes options for one program, in `jax.jit`, or for a process, in XLA_FLAGS; for all programs of a while there
    is only the place where it puts them together.
    """
    import jax
    from jax._src import compiler

    chosen = {"xla_backend_optimization_level": level} | OPTIONS
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=chosen)
        usual = compiler.get_compile_options
    except (jax.errors.JaxRuntimeError, AttributeError):
        return lambda: None

    def hasty(*args, **kw):
        options = usual(*args, **kw)
        options.env_option_overrides = [*options.env_option_overrides, *chosen.items()]
        return options

    def undo():
        compiler.get_compile_options = usual

    compiler.get_compile_options = hasty
    return undo
