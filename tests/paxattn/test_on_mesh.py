"""What a mesh of one device can show: calls are bound by name, and a packed model is cut like the one inside."""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest

import paxattn as pax
from paxattn.typing import struct
from tests.toys import Chain, prompts, tokens_of

IDS, LENGTH = prompts((3, 1))
EXPECTED = [Chain(jnp.int32(7)).answer(IDS[r, :n], 4) for r, n in enumerate((3, 1))]


@functools.cache
def mesh():
    return pax.make_mesh()


@struct
class Cuttable(Chain):
    """Says where it is cut."""

    def specs(self, axis, devices):
        raise ValueError(f"cut over {axis} into {devices}")

    def local(self, axis):
        return self


@pytest.mark.parametrize("named", [1, 3])
def test_a_call_on_a_mesh_is_the_programs_own(named):
    """However many of its arguments have names."""
    given = {"model": Chain(jnp.int32(7)), "prompt_ids": IDS, "prompt_length": LENGTH}
    last = dict(list(given.items())[3 - named :])
    generate = pax.on_mesh(pax.generate, mesh())
    assert tokens_of(generate(*list(given.values())[: 3 - named], **last, max_new_tokens=4)) == EXPECTED
    assert inspect.signature(generate) == inspect.signature(pax.generate)


def test_requests_have_a_name_too():
    serve = functools.partial(pax.on_mesh(pax.serve, mesh()), Chain(jnp.int32(7)), max_num_seqs=2, max_model_len=8)
    found = jax.eval_shape(lambda r: serve(requests=r), pax.Requests.create(IDS, LENGTH, max_new_tokens=4))
    assert found.token_ids.shape == (2, 8)


@pytest.mark.parametrize("pack", [lambda model: model, pax.pack], ids=["model", "packed"])
def test_a_packed_model_is_cut_like_its_own(pack):
    with pytest.raises(ValueError, match="cut over model into 1"):
        pax.on_mesh(pax.generate, mesh())(pack(Cuttable(jnp.int32(7))), IDS, LENGTH, max_new_tokens=4)
