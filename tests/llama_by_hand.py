"""A Llama written out by hand in float64, with no tensor library: what the stock classes are held against."""

import numpy as np
import torch

from ropewalk.model.attention import Documents


def llama_by_hand(weights, tokens, inv_freq, still, heads=4, kv_heads=2, head_dim=16, scaling=1.0, factor=None):
    """Logits float64 (tokens, vocabulary): queries and keys turned pair by pair, except in the layers ``still``.

    ``factor`` of a position multiplies its queries.
    """
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def norm(x, name):
        return w[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def turned(row, position):
        out, half = row.copy(), head_dim // 2
        for pair in range(half):
            angle = position * inv_freq[pair]
            c, s = scaling * np.cos(angle), scaling * np.sin(angle)
            out[pair] = c * row[pair] - s * row[pair + half]
            out[pair + half] = s * row[pair] + c * row[pair + half]
        return out

    x = w["model.embed_tokens.weight"][tokens]
    count = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("model.layers."))
    for layer in range(count):
        own = f"model.layers.{layer}."
        y = norm(x, f"{own}input_layernorm.weight")
        q, k, v = ((y @ w[f"{own}self_attn.{n}_proj.weight"].T).reshape(len(x), -1, head_dim) for n in "qkv")
        if layer not in still:
            q, k = (np.array([[turned(head, p) for head in token] for p, token in enumerate(z)]) for z in (q, k))
        if factor is not None:
            q = q * np.array([factor(p) for p in range(len(x))])[:, None, None]
        mixed = np.zeros_like(q)
        for head in range(heads):
            group = head // (heads // kv_heads)
            for p in range(len(x)):
                logits = k[: p + 1, group] @ q[p, head] / np.sqrt(head_dim)
                weight = np.exp(logits - logits.max())
                mixed[p, head] = weight @ v[: p + 1, group] / weight.sum()
        x = x + mixed.reshape(len(x), -1) @ w[f"{own}self_attn.o_proj.weight"].T
        y = norm(x, f"{own}post_attention_layernorm.weight")
        gate, up = (y @ w[f"{own}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{own}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def assert_documents_apart(model, tokens, **by_hand):
    """A packed row of three documents through a trainer's model gives each document's own logits, by hand."""
    bounds = torch.tensor([0, 9, 10, len(tokens)])
    documents = Documents.from_cu_seqlens(bounds, torch.device("cpu"))
    places = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])
    with torch.no_grad():
        ids = torch.from_numpy(tokens)[None]
        logits = model(input_ids=ids, position_ids=places[None], documents=documents).logits[0].numpy()
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        expected = llama_by_hand(model.state_dict(), tokens[start:end], **by_hand)
        np.testing.assert_allclose(logits[start:end], expected, atol=3e-5 * expected.std())
