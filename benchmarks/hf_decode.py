"""Hugging Face transformers as a peer that answers line by line, in a Python that has torch (and no JAX).

    {"way": "generate", "prompt": [[17, 4, ...]], "new": 64}   ->   {"seconds": 2.9, "tokens": [[...]]}

One request is one timed greedy decode, in one of three ways. `generate` is the library's own loop with its
defaults. `loop` calls the model by hand with a DynamicCache, which leaves out the generation machinery.
`compiled` is that loop with a StaticCache and the step under torch.compile. The first line says who answers.
"""

import argparse
import json
import os
import sys
import time

import torch
import transformers

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def load(gguf: str | None) -> transformers.LlamaForCausalLM:
    """The model in float32 with SDPA: weights of the file, or random ones of SmolLM2-135M's shapes."""
    options = {"attn_implementation": "sdpa", "dtype": torch.float32}
    if gguf:
        folder, name = os.path.split(os.path.abspath(gguf))
        return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **options).eval()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMOLLM2_135M)
    return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


def generate(model, ids, new):
    """The library's own greedy loop; with no end token it runs to the last step."""
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]


def loop(model, ids, new):
    """The shortest greedy loop around the model, logits of the last position only."""
    cache, out = transformers.DynamicCache(config=model.config), []
    for _ in range(new):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        out.append(ids)
    return torch.cat(out, 1)


class Compiled:
    """The loop with a compiled step and a cache of fixed size, kept so that nothing is traced twice."""

    def __init__(self, length: int = 256):
        self.length, self.step, self.caches = length, None, {}

    def __call__(self, model, ids, new):
        """Prefill as is, then every step through the compiled model."""
        rows, start = ids.shape
        assert start + new <= self.length, f"the cache holds {self.length} tokens"
        if self.step is None:
            self.step = torch.compile(model, dynamic=False)
        if rows not in self.caches:
            self.caches[rows] = transformers.StaticCache(config=model.config, max_cache_len=self.length)
        cache, position, out = self.caches[rows], torch.arange(start).expand(rows, -1), []
        cache.reset()
        for index in range(new):
            run = self.step if index else model
            keep = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            ids = run(ids, position_ids=position, **keep).logits[:, -1].argmax(-1, keepdim=True).clone()
            position = torch.full((rows, 1), start + index)
            out.append(ids)
        return torch.cat(out, 1)


WAYS = {"generate": generate, "loop": loop, "compiled": Compiled()}


@torch.no_grad()
def answer(model, way: str, prompt: list[list[int]], new: int) -> dict:
    """One timed decode: seconds, and the tokens that were made."""
    ids = torch.tensor(prompt)
    start = time.perf_counter()
    tokens = WAYS[way](model, ids, new)
    seconds = time.perf_counter() - start
    assert tokens.shape == (len(prompt), new), tokens.shape
    return {"seconds": seconds, "tokens": tokens.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", help="weights to read; random ones of the same shapes without")
    arguments = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not stand between the answers
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    model = load(arguments.gguf)
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"torch_threads": str(torch.get_num_threads()), "peer_python": sys.version.split()[0]}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
