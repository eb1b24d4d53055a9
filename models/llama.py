"""Llama over packed tokens and a plan: Llama 2 to 3.2, SmolLM2, TinyLlama, Mistral.

    tokens [T] -> embed -> L x ( norm -> qkv -> rope -> attend(pages) -> out -> + -> norm -> gate, up -> down -> + )
                                                                          -> norm -> hidden [T, E] -> logits

Layers are unrolled and each holds arrays of its own: a scan over stacked weights copies them. Weights lie
[in, out]; the query heads of a KV head and its key and value are one matrix [E, K, G + 2, D], gate and up are
one [E, 2, F]: two matmuls where the checkpoint has five. On a mesh each device has some heads, columns of the MLP and
tokens of the vocabulary, as `models.sharding` says, and `axis` names where the parts add up.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import paxattn as pax
from models import sharding
from models.config import LlamaConfig
from models.layers import add_norm, gated, lookup, product, rms_norm, rope_angles, total
from paxattn.decoding.vocabulary import Scores, Slice

Init = Callable[[str, tuple[int, ...]], jax.Array]
"""Gives the array of a parameter by name and shape: random numbers, a checkpoint's tensor, or just a shape."""


class Layer(nnx.Module):
    """Attention and MLP with their norms; parameters are named as they are shaped."""

    def __init__(self, config: LlamaConfig, init: Init, axis: str | None = None):
        embed, heads, kv_heads, dim = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, mlp = heads // kv_heads + 2, config.intermediate_size
        self.config, self.axis = config, axis
        self.attention_norm = nnx.Param(init("attention_norm", (embed,)))
        self.qkv = nnx.Param(init("qkv", (embed, kv_heads, width, dim)))
        self.out = nnx.Param(init("out", (heads * dim, embed)))
        self.mlp_norm = nnx.Param(init("mlp_norm", (embed,)))
        self.gate_up = nnx.Param(init("gate_up", (embed, 2, mlp)))
        self.down = nnx.Param(init("down", (mlp, embed)))
        if config.attention_bias:
            self.qkv_bias = nnx.Param(init("qkv_bias", (kv_heads, width, dim)))
            self.out_bias = nnx.Param(init("out_bias", (embed,)))
        if config.mlp_bias:
            self.gate_up_bias = nnx.Param(init("gate_up_bias", (2, mlp)))
            self.down_bias = nnx.Param(init("down_bias", (embed,)))

    def __call__(self, x: jax.Array, normed: jax.Array, following: jax.Array, angles, plan: pax.Plan, kv: pax.KV):
        """X [T, E] and its norm -> both after the layer, by the `following` norm's weight, and its pools."""
        eps, name = self.config.rms_norm_eps, plan.attention
        attended, kv = self._attention(normed, angles, plan, kv)
        x, normed = add_norm(x, attended, self.mlp_norm[...], eps, attention=name)
        return *add_norm(x, self._mlp(normed, name), following, eps, attention=name), kv

    def _attention(self, x, angles, plan, kv):
        config = self.config
        qkv = product(x, self.qkv[...], attention=plan.attention)
        if config.attention_bias:
            qkv = qkv + self.qkv_bias[...]
        q = qkv[:, :, :-2].reshape(x.shape[0], config.num_attention_heads, config.head_dim)
        k, v = qkv[:, :, -2], qkv[:, :, -1]
        out, kv = pax.attend(q, k, v, kv, plan, angles=angles, sliding_window=config.sliding_window)
        out = product(out.reshape(x.shape[0], -1), self.out[...], attention=plan.attention)
        out = total(out, self.axis)
        return (out + self.out_bias[...] if config.attention_bias else out), kv

    def _mlp(self, x, name):
        bias = self.gate_up_bias[...] if self.config.mlp_bias else None
        wide = gated(x, self.gate_up[...], bias, attention=name)
        out = total(product(wide, self.down[...], attention=name), self.axis)
        return out + self.down_bias[...] if self.config.mlp_bias else out


@jax.jit
def _run(layer: Layer, *given) -> tuple[jax.Array, jax.Array, pax.KV]:
    """One layer, traced once for all of a model's; XLA puts each call's body in its place."""
    return layer(*given)


class Llama(nnx.Module):
    """A decoder that fulfils `paxattn.Model`.

    Args:
      config: sizes and switches.
      init: called once for each parameter with its dotted name ("layers.3.qkv") and shape.
      axis: of the mesh over which this device has a part of each layer; `config` is then that part's.
    """

    def __init__(self, config: LlamaConfig, init: Init, axis: str | None = None):
        self.config, self.axis = config, axis
        self.embed = nnx.Param(init("embed", (config.vocab_size, config.hidden_size)))
        self.layers = nnx.List(
            Layer(config, lambda name, shape, i=i: init(f"layers.{i}.{name}", shape), axis)
            for i in range(config.num_hidden_layers)
        )
        self.norm = nnx.Param(init("norm", (config.hidden_size,)))
        if not config.tie_word_embeddings:
            self.head = nnx.Param(init("head", (config.hidden_size, config.vocab_size)))

    def parameters(self) -> dict[str, jax.Array]:
        """Every parameter under the name that `init` was asked for."""
        flat = nnx.to_flat_state(nnx.state(self, nnx.Param))
        return {".".join(map(str, path)): param[...] for path, param in flat}

    def first(self, layers: int) -> "Llama":
        """The first layers under the same norm and head, sharing every array: a drafter for the whole."""
        if not 1 <= layers <= self.config.num_hidden_layers:
            raise ValueError(f"the model has {self.config.num_hidden_layers} layers; {layers} cannot be its first.")
        params = self.parameters()
        config = dataclasses.replace(self.config, num_hidden_layers=layers)
        return Llama(config, lambda name, shape: params[name])

    def specs(self, axis: str, devices: int) -> "Llama":
        """This tree with a `PartitionSpec` for each array, to be cut over `devices`."""
        sharding.part(self.config, devices)
        return jax.tree.map_with_path(lambda path, _: sharding.spec(jax.tree_util.keystr(path), axis), self)

    def local(self, axis: str) -> "Llama":
        """On a device of a mesh, where `self` holds its part of the arrays: the model of this device."""
        params = self.parameters()
        config = sharding.part(self.config, jax.lax.axis_size(axis))
        return Llama(config, lambda name, shape: params[name], axis)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def cache_spec(self) -> pax.CacheSpec:
        """The cache has the parameters' dtype."""
        config = self.config
        return pax.CacheSpec(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, self.embed.dtype)

    def __call__(
        self, tokens: jax.Array, plan: pax.Plan, layers: tuple[pax.KV, ...]
    ) -> tuple[jax.Array, tuple[pax.KV, ...]]:
        """Tokens int32 [T] -> hidden [T, E], normed, and the pools with the tokens' keys and values."""
        x = lookup(self.embed[...], tokens, self.axis)
        norms = iter([*(layer.attention_norm[...] for layer in self.layers), self.norm[...]])
        normed = rms_norm(x, next(norms), self.config.rms_norm_eps)
        angles = rope_angles(self.config, plan.position)
        pools = []
        for layer, kv in zip(self.layers, layers, strict=True):
            x, normed, kv = _run(layer, x, normed, next(norms), angles, plan, kv)
            pools.append(kv)
        return normed, tuple(pools)

    def logits(self, hidden: jax.Array) -> Scores:
        """Hidden [n, E] -> float32 [n, V], or on a mesh this device's slice of it."""
        form, head = ("ne,ve->nv", self.embed) if self.config.tie_word_embeddings else ("ne,ev->nv", self.head)
        scores = jnp.einsum(form, hidden, head[...], preferred_element_type=jnp.float32)
        return scores if self.axis is None else Slice(scores, self.axis)


def shard(model: Llama, mesh: Mesh) -> Llama:
    """The model on the devices of a mesh, cut over its "model" axis and whole along "data": see `models.sharding`.

    Raises:
      models.sharding.MeshError: it cannot be cut into that many equal parts.
    """
    params, config = model.parameters(), sharding.fit(model.config, mesh.shape["model"])
    times = config.num_key_value_heads // model.config.num_key_value_heads
    return Llama(config, lambda name, shape: sharding.put(name, params[name], mesh, times))


def random_llama(config: LlamaConfig, key: jax.Array, dtype: str = "float32", mesh: Mesh | None = None) -> Llama:
    """A Llama of random weights, for benchmarks and tests: norms 1, the rest normal / sqrt(fan in).

    On a mesh each device makes its own part.
    """

    def make(key: jax.Array) -> Llama:
        def init(name: str, shape: tuple[int, ...]) -> jax.Array:
            nonlocal key
            if name.endswith("norm"):
                return jnp.ones(shape, dtype)
            key, mine = jax.random.split(key)
            return (jax.random.normal(mine, shape, jnp.float32) * shape[0] ** -0.5).astype(dtype)

        return Llama(config, init)

    if mesh is None:
        return make(key)
    config = sharding.fit(config, mesh.shape["model"])
    specs = jax.eval_shape(make, key).specs("model", mesh.shape["model"])
    return jax.jit(make, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))(key)
