"""Networks, checkpoints and the command line, on top of paxattn.

lm = models.load("smollm2-135m")       a name, a directory, a .gguf file, a hub id
lm.generate(["..."])                   text in, text out, through a paged cache
lm.model                               a Llama that fulfils paxattn.Model
"""

from models.batch import Output, Run, Scored
from models.config import ConfigError, LlamaConfig
from models.llama import Llama, random_llama, shard
from models.lm import LM
from models.load import load
from models.weights import CheckpointError

__all__ = [
    "LM",
    "CheckpointError",
    "ConfigError",
    "Llama",
    "LlamaConfig",
    "Output",
    "Run",
    "Scored",
    "load",
    "random_llama",
    "shard",
]
