"""Makes tests/data/gptq_awq.npz: linear layers as AutoGPTQ and AutoAWQ pack and decode them.

    python tools/make_gptq_reference.py tests/data/gptq_awq.npz

Needs torch, transformers, accelerate, auto_gptq and awq (autoawq), of these two only the files: neither has to be able
to start.  Made with auto_gptq 0.7.1 and autoawq 0.2.9 on CPU.
"""

import argparse
import importlib
import importlib.util
import sys
import types

import numpy as np

D_OUT, D_IN, GROUP = 32, 96, 32

# Name: method, bits, groups (-1: one), and whether columns are in groups at random (desc_act).
CASES = {
    "gptq2": ("gptq", 2, GROUP, False),
    "gptq3": ("gptq", 3, GROUP, False),
    "gptq4": ("gptq", 4, GROUP, False),
    "gptq8": ("gptq", 8, GROUP, False),
    "gptq4 row": ("gptq", 4, -1, False),
    "gptq4 desc_act": ("gptq", 4, GROUP, True),
    "gptq3 desc_act": ("gptq", 3, GROUP, True),
    "awq4": ("awq", 4, GROUP, False),
    "awq4 row": ("awq", 4, -1, False),
}


def package(name: str, *inside: str) -> None:
    """Makes the modules of a package and of those inside it importable without running their __init__."""
    folder = importlib.util.find_spec(name).submodule_search_locations[0]
    for path in ("", *inside):
        module = types.ModuleType(".".join(filter(None, (name, *path.split("/")))))
        module.__path__ = [f"{folder}/{path}"]
        sys.modules[module.__name__] = module


def case(method: str, bits: int, group: int, desc_act: bool) -> dict[str, np.ndarray]:
    import torch

    rng, size = np.random.RandomState(0), D_IN if group == -1 else group
    groups = np.arange(D_IN) // size
    if desc_act:
        groups = rng.permutation(groups)
    codes = rng.randint(0, 2**bits, (D_OUT, D_IN))
    # AutoGPTQ stores a zero point of 0 wrongly.
    zeros = torch.tensor(rng.randint(method == "gptq", 2**bits, (D_OUT, D_IN // size)), dtype=torch.float32)
    scales = torch.tensor(rng.uniform(0.001, 0.1, (D_OUT, D_IN // size)), dtype=torch.float16)
    linear = torch.nn.Linear(D_IN, D_OUT, bias=False)
    linear.weight.data = (torch.tensor(codes) - zeros[:, groups]) * scales[:, groups].float()
    if method == "gptq":
        qlinear = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
        layer = qlinear.QuantLinear(bits, group, D_IN, D_OUT, bias=False)
        layer.pack(linear, scales.float(), zeros, torch.tensor(groups, dtype=torch.int32))
        names = ("qweight", "qzeros", "scales", "g_idx")
    else:
        gemm = importlib.import_module("awq.modules.linear.gemm")
        gemm.get_best_device = lambda: "cpu"
        layer = gemm.WQLinear_GEMM.from_linear(linear, bits, size, scales=scales.T.float(), zeros=zeros.T)
        names = ("qweight", "qzeros", "scales")
    layer.scales = layer.scales.half()
    # A product with the identity has the weights.
    decoded = layer(torch.eye(D_IN, dtype=torch.float16)).reshape(D_IN, D_OUT).T
    return {name: getattr(layer, name).numpy() for name in names} | {"decoded": decoded.numpy()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    out = parser.parse_args().out
    package("auto_gptq", "nn_modules", "nn_modules/qlinear")
    package("awq", "modules", "modules/linear", "utils")
    stored = {f"{name}/{key}": value for name, row in CASES.items() for key, value in case(*row).items()}
    np.savez_compressed(out, **stored)


if __name__ == "__main__":
    main()
