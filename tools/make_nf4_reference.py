"""Makes tests/data/nf4_bitsandbytes.npz: a matrix as bitsandbytes quantizes, stores and decodes it.

    python tools/make_nf4_reference.py tests/data/nf4_bitsandbytes.npz

Needs torch and bitsandbytes, which the package and its tests do not.  Made with bitsandbytes 0.50.2 on CPU.
"""

import argparse

import numpy as np


def weights() -> np.ndarray:
    """24 rows of 11 blocks, two groups of blocks, one row of zeros; from a generator whose numbers never change."""
    x = (np.random.RandomState(0).standard_normal((24, 704)) * 0.02).astype(np.float32)
    x[5] = 0
    return x


def main():
    import bitsandbytes.functional
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    out = parser.parse_args().out

    codes, state = bitsandbytes.functional.quantize_4bit(
        torch.tensor(weights()), quant_type="nf4", compress_statistics=True
    )
    decoded = bitsandbytes.functional.dequantize_4bit(codes, state).numpy()
    stored = {"": codes, **state.as_dict(packed=True)}
    np.savez_compressed(out, decoded=decoded[::8], **{f"w.{key}": value.numpy() for key, value in stored.items()})


if __name__ == "__main__":
    main()
