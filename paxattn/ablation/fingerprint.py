"""What tells one subject of a sweep from another, so that no row of a file is taken for another model's.

lengths   every number
model     structure (static fields and configs in it), cache spec, config, and of each array shape, dtype, two sums
"""

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxattn.checksum import checksum
from paxattn.decoding.packed import Packed


def fingerprint(subject: Any, config: Any = None) -> str:
    """16 hex digits that follow all of a model or of lengths, and the config that a model was made of.

    One pass over the parameters where they lie; 64 bits of each leave the device. A packed model is the model.
    """
    if not hasattr(subject, "cache_spec"):
        lengths = np.asarray(subject)
        told = f"{type(subject).__name__}{lengths.shape}{lengths.dtype}".encode() + lengths.tobytes()
        return hashlib.sha256(told).hexdigest()[:16]
    model = subject.whole if isinstance(subject, Packed) else subject
    leaves, tree = jax.tree.flatten(model)
    sums = jax.device_get([checksum(leaf) for leaf in leaves])
    told = [type(model).__qualname__, str(tree), repr(model.cache_spec), repr(model.vocab_size)]
    told += [repr(config), repr(getattr(model, "config", None))]
    told += [f"{jnp.shape(leaf)} {jnp.result_type(leaf)} {two}" for leaf, two in zip(leaves, sums, strict=True)]
    nowhere = re.sub(r" at 0x[0-9a-f]+", "", "\n".join(told))  # a function is where it was put this time
    return hashlib.sha256(nowhere.encode()).hexdigest()[:16]
