"""Small models of every family with weights that need no file: drawn by name from NumPy.

MODELS is what parity, golden logits and exporting are tested with. A line: family (the name of
its classes in `transformers`), what its config says, and what stretches RoPE.
"""

import numpy as np

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
SIX_TWO = SMALL | {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3}
# SmolLM2-135M's heads: three queries to a key, and nothing a power of two.
NINE_THREE = SMALL | {
    "hidden_size": 36,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
}
TIED = {"tie_word_embeddings": True}
# One pair of a head of 10 is kept, one lies between, three are slowed down.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 0.6,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 2.5}
MODELS = {
    "llama untied, heads wider than the model": ("Llama", SMALL | {"head_dim": 10}, None),
    "llama tied, theta": ("Llama", SIX_TWO | TIED | {"rope_theta": 1e5}, None),
    "llama, every head its own": ("Llama", SMALL | {"num_key_value_heads": 3}, None),
    "llama3 scaling": ("Llama", SMALL | {"head_dim": 10}, LLAMA3),
    "llama3 scaling, tied": ("Llama", SIX_TWO | TIED | {"head_dim": 10}, LLAMA3),
    "linear scaling": ("Llama", SMALL, LINEAR),
    "smollm2": ("Llama", NINE_THREE | TIED, None),
    "qwen2 untied": ("Qwen2", SMALL, None),
    "qwen2 tied": ("Qwen2", SIX_TWO | TIED, None),
    "qwen2 linear scaling": ("Qwen2", SMALL, LINEAR),
    "qwen3 untied": ("Qwen3", SMALL | {"head_dim": 16}, None),
    "qwen3 tied": ("Qwen3", NINE_THREE | TIED | {"head_dim": 6}, None),
}


def drawn(shapes):
    """Name -> shape to name -> float32; every tensor drawn, so that none is trivial.

    RandomState, because NumPy keeps its stream for good.
    """
    random = np.random.RandomState(0)
    out = {}
    for name in sorted(shapes):
        if "norm" in name:
            x = random.uniform(0.5, 1.5, shapes[name])
        else:
            x = 0.2 * random.standard_normal(shapes[name])
        out[name] = x.astype(np.float32)
    return out


def random_tokens(rows, length):
    """int64 [rows, length]"""
    return np.random.RandomState(1).randint(0, SMALL["vocab_size"], (rows, length))


def torch_model(name):
    """The model of that name in `transformers`, float32."""
    import torch
    import transformers

    family, settings, scaling = MODELS[name]
    settings = dict(settings)
    rope = (scaling or {"rope_type": "default"}) | {
        "rope_theta": settings.pop("rope_theta", 1e4)
    }
    config = getattr(transformers, f"{family}Config")(**settings, rope_parameters=rope)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    parameters = dict(model.named_parameters())
    values = drawn({n: tuple(p.shape) for n, p in parameters.items()})
    with torch.no_grad():
        for n, parameter in parameters.items():
            parameter.copy_(torch.tensor(values[n]))
    return model


def torch_logits(model, tokens):
    """tokens [B,T] -> float32 [B,T,V]"""
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()
