"""Shapes of well-known models, for random weights: what a benchmark needs of a checkpoint.

CONFIGS["8B"]  Llama 3 8B      CONFIGS["135M"]  SmolLM2 135M
CONFIGS["1B"]  Llama 3.2 1B    CONFIGS["tiny"]  milliseconds on a CPU
"""

from models.config import LlamaConfig, Rope

_LLAMA3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}

CONFIGS = {
    "8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        head_dim=128,
        max_position_embeddings=8192,
        rope=Rope(rope_theta=500000.0),
        **_LLAMA3,
    ),
    "1B": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope=Rope("llama3", 500000.0, factor=32.0, original_max_position_embeddings=8192),
        **_LLAMA3,
    ),
    "135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope=Rope(rope_theta=100000.0),
    ),
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    ),
}
