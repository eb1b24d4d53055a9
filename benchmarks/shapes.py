"""Shapes of the models that the GPU benchmarks build with random weights."""

from models import LlamaConfig


def _llama(layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64 if width <= 2048 else 128,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )


CONFIGS = {
    "8B": _llama(32, 4096, 14336, 32, 8, 128256, tied=False),  # Llama-3-8B
    "1B": _llama(16, 2048, 8192, 32, 8, 128256, tied=True),  # Llama-3.2-1B
    "135M": _llama(30, 576, 1536, 9, 3, 49152, tied=True),  # SmolLM2-135M
}
