"""Writes tests/golden/tiny_llama/beams.json: what Hugging Face's beam search finds where eos tokens end beams early.

Needs torch and transformers, so it runs in an environment of its own: `python benchmarks/hf_beams.py`. Prompts go one
by one, without padding. Sequences are cut after their first eos token; transformers pads them.
"""

import itertools
import json
from pathlib import Path

import torch
import transformers

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "tiny_llama"
A, B, C = [14, 311, 238, 87], [250, 231, 192], [102, 48]  # tokens that the beams like
CASES = [  # eos, beams, early_stopping, length_penalty
    *((A, 4, early, 1.0) for early in (False, True, "never")), (A, 4, False, -1.0),
    (B, 3, "never", 2.0), (B, 3, False, 2.0), (B, 3, True, 0.0), (B, 3, False, 0.0),
    (C, 2, False, 1.0), (C, 2, "never", -1.0),
]  # fmt: skip


def sequences(model, prompt: list[int], options: dict) -> list[dict]:
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        num_return_sequences=options["num_beams"], pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        **options,
    )  # fmt: skip
    found = []
    for row, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
        kept = len(list(itertools.takewhile(lambda token: token not in options["eos_token_id"], row)))
        found.append({"token_ids": row[: kept + 1], "score": score})
    return found


def main() -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    prompts = json.loads((FOLDER / "expected.json").read_text())["prompts"]
    cases = []
    for eos, beams, early, penalty in CASES:
        options = {"eos_token_id": eos, "num_beams": beams, "early_stopping": early, "length_penalty": penalty}
        options["max_new_tokens"] = 12
        cases.append({**options, "sequences": [sequences(model, prompt, options) for prompt in prompts]})
    generator = f"transformers {transformers.__version__}, torch {torch.__version__} CPU"
    lines = ",\n".join(json.dumps(case) for case in cases)
    (FOLDER / "beams.json").write_text(f'{{"generator": "{generator}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
