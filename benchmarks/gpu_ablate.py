"""Block size on a GPU, Llama 3 8B shapes: kernel time, tokens/s, compile time, memory, waste; tokens compared.

pax.ablate(random_llama(8B, bf16), block_size=[8, 16, 32, 64, 128, 256])     programs compile side by side first;
                                                                             a line, and the file, after each row

python benchmarks/gpu_ablate.py --save         python benchmarks/gpu_ablate.py --tiny
"""

import argparse
from pathlib import Path

import jax
import record

import models
import paxattn as pax
from models.shapes import CONFIGS
from paxattn.ablation.plot import plot

METHOD = """`pax.ablate` of random weights in bfloat16, greedy, random prompts: one run in small pieces looks at the
page table while rows are running (wasted); then timed runs, host clock around blocking calls, medians. kernel_us: one
attention call of one layer at full length over random pages, from programs of 16 calls. compile_s: the programs of a
run, while those of the others compile beside it. peak_bytes: arguments, results and temporaries of the decoding
program, weights included. same_tokens: equal to the first row's; in bfloat16 nearly equal candidates may change
places."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8B", choices=CONFIGS)
    parser.add_argument("--block-size", default="8,16,32,64,128,256")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=6, help="programs compiled at once")
    record.add_options(parser, "ablate.json, and docs/figures", tiny="tiny shapes, to see on a CPU that this runs")
    options = parser.parse_args()
    if options.tiny:
        options.shapes, options.block_size, options.rows, options.context, options.new = "tiny", "8,16", 2, 32, 8
    config = CONFIGS[options.shapes]
    make = jax.jit(lambda key: models.random_llama(config, key, "bfloat16"))
    model = jax.block_until_ready(make(jax.random.key(0)))
    seen = []

    def watch(row: dict) -> None:
        seen.append({"shapes": options.shapes} | row)
        print(
            f"block {row['block_size']:4}  {row['ms_per_step']:7.3f} ms a step  "
            f"{row['decode_tokens_per_s']:8,.0f} tok/s  prefill "
            f"{row['prefill_tokens_per_s']:9,.0f} tok/s  kernel {row['kernel_us']:7.1f} us  "
            f"compile {row['compile_s']:5.1f} s  {row['peak_bytes'] / 1e9:5.1f} GB  "
            f"wasted {row['wasted']:.1%}  same tokens {row['same_tokens']}",
            flush=True,
        )
        if options.save:
            print(record.write("ablate", seen, method=METHOD), flush=True)

    pax.ablate(
        model,
        block_size=[int(size) for size in options.block_size.split(",")],
        rows=options.rows,
        context=options.context,
        max_new_tokens=options.new,
        max_num_batched_tokens=min(8192, options.rows * options.context),
        query_heads=config.num_attention_heads,
        repeats=options.repeats,
        threads=options.threads,
        exact=False,
        watch=watch,
    )
    if options.save:
        figure = Path(__file__).parents[1] / "docs" / "figures" / "gpu_ablate.svg"
        try:
            plot(seen, figure)
        except ImportError as error:  # the figures count; the picture can be drawn from them anywhere
            print(error)


if __name__ == "__main__":
    main()
