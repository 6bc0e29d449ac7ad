"""Arrays that break a signature are refused in tests; elsewhere nothing checks them, and programs are the same."""

import contextlib
import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from mlx_pretrain.data.batches import decoder_batch
from mlx_pretrain.models.attention import dot_product_attention
from mlx_pretrain.models.encoder import Encoder, EncoderConfig
from mlx_pretrain.models.tree_attention import TreeMask, tree_attention
from mlx_pretrain.training.losses import cross_entropy

TOKENS = jnp.ones((2, 8), jnp.int32)
ENCODER = EncoderConfig(vocab_size=32, embed_dim=16, n_layers=1, n_heads=2, mlp_dim=24, max_length=12)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones((2, 8, *shape), dtype)


BROKEN = {
    "tokens of floats": lambda: decoder_batch(ones()),
    "too few weights": lambda: cross_entropy(ones(16), jnp.ones((16, 32)), TOKENS, jnp.ones((2, 7))),
    "a kernel transposed": lambda: cross_entropy(ones(16), jnp.ones((32, 16)), TOKENS, ones()),
    "heads of two sizes": lambda: dot_product_attention(ones(4, 16), ones(2, 16), ones(2, 12)),
    "queries of integers": lambda: dot_product_attention(*(ones(4, 16, dtype=jnp.int32),) * 3),
    "trees": lambda: tree_attention(ones(4, 16), ones(2, 8), ones(2, 8), TreeMask(TOKENS, jnp.int32(0))),
    "a module": lambda: Encoder(ENCODER).init(jax.random.key(0), TOKENS, TOKENS[:, :7]),
    "a compiled function": lambda: jax.jit(cross_entropy)(ones(16), jnp.ones((16, 32)), TOKENS[:, :7], ones()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_arrays_that_break_a_signature_are_refused(name):
    with pytest.raises(TypeCheckError):
        BROKEN[name]()


# Prints a training program before it is compiled.
PROGRAM = """
import sys
import flax.linen as nn
import jax
import jax.numpy as jnp
from mlx_pretrain.data.batches import decoder_batch
from mlx_pretrain.models.decoder import Decoder, DecoderConfig
from mlx_pretrain.training.losses import cross_entropy

config = DecoderConfig(vocab_size=96, embed_dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=48,
                       max_length=64, remat="dots")

def loss(params, tokens):
    batch = decoder_batch(tokens)
    hidden, _ = Decoder(config).apply({"params": params}, batch.inputs, batch.positions, batch.segment_ids)
    return cross_entropy(hidden, params["output"]["kernel"], batch.targets, batch.weights)[0]

params = nn.unbox(jax.eval_shape(config.init, jax.random.key(0)))
print("beartype" in sys.modules)
print(jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((2, 16), jnp.int32)).as_text(debug_info=False))
"""


def test_elsewhere_nothing_is_checked_and_programs_are_the_same():
    with contextlib.redirect_stdout(io.StringIO()) as checked:
        exec(PROGRAM, {})
    unchecked = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    assert checked.getvalue().startswith("True\n") and unchecked.startswith("False\n")
    assert checked.getvalue().removeprefix("True") == unchecked.removeprefix("False")
