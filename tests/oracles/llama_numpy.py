"""The Llama forward pass straight from its equations, in float64 numpy, one token and one head at a time.

Written apart from the package: rotary embedding by complex numbers, every softmax over exactly the keys it
may see, keys and values looked up per query head.
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean() + eps) * weight


def rope(x, position, theta):
    """Pairs (x[2i], x[2i+1]) as complex numbers, times exp(i·position·theta^(-2i/d))."""
    pairs = x[0::2] + 1j * x[1::2]
    pairs = pairs * np.exp(1j * position * theta ** (-2 * np.arange(len(pairs)) / len(x)))
    out = np.empty_like(x)
    out[0::2], out[1::2] = pairs.real, pairs.imag
    return out


def attention(q, keys, values):
    """One query (head_dim,) against the keys and values (n, head_dim) it sees."""
    scores = keys @ q / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def swiglu(x, gate, up, down):
    g = gate @ x
    return down @ (g / (1 + np.exp(-g)) * (up @ x))


def forward(config, tensors, tokens, held_q=lambda q: q, held_k=lambda k: k, held_v=lambda v: v):
    """Logits (seq, vocab) of one sequence; tensors by GGUF name, dense.

    held_q, held_k, held_v: what attention through a cache makes of the query, key and value of a head.
    """
    t = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    xs = [t["token_embd.weight"][token] for token in tokens]
    share = config.n_heads // config.n_kv_heads
    for i in range(config.n_layers):

        def w(name, i=i):
            return t[f"blk.{i}.{name}.weight"]

        keys, values, out = [], [], []
        for position, x in enumerate(xs):
            h = rms_norm(x, w("attn_norm"), config.norm_eps)
            q, k, v = ((w(name) @ h).reshape(-1, config.head_dim) for name in ("attn_q", "attn_k", "attn_v"))
            keys.append([held_k(rope(head, position, config.rope_theta)) for head in k])
            values.append([held_v(head) for head in v])
            ks, vs = np.array(keys), np.array(values)
            heads = [
                attention(held_q(rope(head, position, config.rope_theta)), ks[:, j // share], vs[:, j // share])
                for j, head in enumerate(q)
            ]
            x = x + w("attn_output") @ np.concatenate(heads)
            h = rms_norm(x, w("ffn_norm"), config.norm_eps)
            out.append(x + swiglu(h, w("ffn_gate"), w("ffn_up"), w("ffn_down")))
        xs = out
    head = t["token_embd.weight" if config.tied else "output.weight"]
    return np.array([head @ rms_norm(x, t["output_norm.weight"], config.norm_eps) for x in xs])
