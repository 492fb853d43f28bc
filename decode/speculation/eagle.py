"""EAGLE-3: a layer that reads the target's hidden states, and drafts.

Source: Li, Wei, Zhang and Zhang 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
Training-Time Test", arXiv 2503.01840, and eagle/model/cnets.py of SafeAILab/EAGLE. Of its tree of drafts this is the
chain of the likeliest, or of those drawn with the target's noise.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ...model.checkpoint import Checkpoint, CheckpointError, read_parameter
from ...model.checkpoint.files import is_there, listing
from ...model.checkpoint.settings import read_config
from ...model.config import ModelConfig
from ...model.hf import eagle as files
from ...model.hf.tensors import with_copied_heads
from ...model.layers import gated_mlp, linear, rms_norm
from ...model.loading import Model
from ...model.params import ParamSpec, kv_replicas
from ...model.products import weight_product
from ...model.rope import rope_tables
from ...model.transformer import AttentionSpec, grouped_attention
from ...sharding.rules import named_sharding
from ..attend import CachedAttend
from ..cache import Rows
from ..sampling.draw import sample
from ..sampling.layout import SamplingPlan
from ..sampling.scores import Adjust
from .draft_model import PagedDrafter, tables_for
from .drafter import MOST_TOKENS, Drafter, Texts, check_tokens


@dataclasses.dataclass(frozen=True)
class EagleDrafter(Drafter):
    """An EAGLE-3 head, which was trained for one target.

    Its entry for a token reads that token's embedding and the target's hidden states of the token before, after a low,
    a middle and a high layer; those of its own guesses read its own output in their place.

    Args:
      directory: with config.json and safetensors, in SafeAILab's, SpecForge's or vLLM's form.
      tokens: how many to guess at once, 1 to 15.

    Raises:
      CheckpointError: files that cannot be read.
      ValueError: a number out of range.
    """

    directory: str | Path
    tokens: int = 4

    def __post_init__(self):
        check_tokens(self.tokens)
        object.__setattr__(self, "directory", Path(self.directory).expanduser().absolute())
        object.__setattr__(self, "_head", _config(self.directory))

    @property
    def configs(self) -> Sequence[ModelConfig]:
        return (self._head.decoder,)

    def bind(self, target: Model) -> tuple[Any, "_BoundEagle"]:
        head, theirs = self._head, target.config
        if (head.target_vocab_size, head.target_dim) != (theirs.vocab_size, theirs.embed_dim):
            raise ValueError(
                f"{self.directory} is for a target of vocab_size {head.target_vocab_size} and hidden_size "
                f"{head.target_dim}; {target.name} has {theirs.vocab_size} and {theirs.embed_dim}: take its own head"
            )
        head = dataclasses.replace(head, decoder=head.decoder.replace(dtype=theirs.dtype))
        layers, tables = head.layers_of(theirs.num_layers), tables_for(target, head.decoder, self.directory.name)
        params = _load(self.directory, head, target.mesh)
        if "embedding" not in params:
            if head.decoder.embed_dim != theirs.embed_dim:
                raise CheckpointError(f"{self.directory} lacks {files.EMBEDDING!r}, and the target's has another width")
            params = params | {"embedding": target.params["embedding"]}
        return params, _BoundEagle(self.tokens, head.decoder, tables, head, theirs.vocab_size, layers)

    def propose(self, *_: Any) -> Any:
        raise TypeError("an EagleDrafter drafts for a target; bind it first")


@dataclasses.dataclass(frozen=True)
class _BoundEagle(PagedDrafter):
    """A head without its parameters.

    Attributes:
      head: what it is.
      vocab_size: of the target.
      layers: as in `Drafter`.
    """

    head: files.EagleConfig
    vocab_size: int
    layers: tuple[int, ...] = ()

    def read(
        self,
        params: Any,
        pages: Any,
        tokens: Int[Array, "B T"],
        new: Int[Array, "B"],
        rows: Rows,
        following: Int[Array, "B T"] | None = None,
        features: Float[Array, "B T F"] | None = None,
    ) -> Any:
        x = self._head_input(params, features)
        return self._layer(params, pages, following, x, rows.lengths, new, rows)[1]

    def propose(
        self, params: Any, pages: Any, texts: Texts, plan: SamplingPlan, adjust: Adjust | None
    ) -> tuple[Int[Array, "B K"], Int[Array, "B"], Any]:
        last, settings = texts.rows.lengths, texts.sampling.settings
        sampling = texts.sampling.replace(settings=settings.replace(logprobs=jnp.zeros_like(settings.logprobs)))
        token = jnp.take_along_axis(texts.history, last[:, None], axis=1, mode="clip")[:, 0]
        x = self._head_input(params, texts.features[:, None])

        def step(carry: Any, ahead: Array) -> tuple[Any, Array]:
            """The token after one that stands at `last + ahead`."""
            token, x, pages, sampling = carry
            start = jnp.maximum(last - 1 + ahead, 0)
            x, pages = self._layer(params, pages, token[:, None], x, start, jnp.ones_like(last), texts.rows)
            logits = self._logits(params, x[:, 0])
            token, _, sampling = sample(logits, sampling, last + 1 + ahead, plan, None, adjust, token)
            return (token, x, pages, sampling), token

        (_, _, pages, _), guesses = lax.scan(step, (token, x, pages, sampling), jnp.arange(self.tokens))
        return guesses.T, jnp.full_like(last, self.tokens), pages

    def _head_input(self, params: Any, features: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        return linear(features, params["fc"], files.eagle_specs(self.head)["fc"])

    def _layer(
        self,
        params: Any,
        pages: Any,
        tokens: Int[Array, "B T"],
        x: Float[Array, "B T D"],
        starts: Int[Array, "B"],
        new: Int[Array, "B"],
        rows: Rows,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The output of the layer for entries that begin at `starts`, of which `new` of each row are kept."""
        config, specs = self.config, files.eagle_specs(self.head)
        norm = functools.partial(rms_norm, eps=config.norm_eps)
        T = tokens.shape[1]
        new = jnp.where(starts + new <= rows.max_lengths, new, 0)
        positions = starts[:, None] + jnp.arange(T)
        rope = rope_tables(config.layers[0].rope, positions, jnp.maximum(rows.contexts, starts + new))
        attend = CachedAttend(rows.replace(kinds=self.tables), new, positions, config, _form(T))
        spec = AttentionSpec(config.query_scale, layer=0)
        embedded = norm(params["embedding"][tokens], params["attn_norm"])
        both = jnp.concatenate([embedded, norm(x, params["hidden_norm"])], axis=-1)
        out, kept = grouped_attention(
            both, params, specs, config, norm, rope, lambda q, k, v: attend(q, k, v, spec, pages[0]), weight_product
        )
        x = x + out
        return x + gated_mlp(norm(x, params["mlp_norm"]), params, specs, config.activation), (kept,)

    def _logits(self, params: Any, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Of the target's vocabulary, of which the head has a part."""
        x = rms_norm(x, params["final_norm"], self.config.norm_eps)
        logits = linear(x, params["unembedding"], files.eagle_specs(self.head)["unembedding"], out_dtype=jnp.float32)
        if "tokens" not in params:
            return logits
        return jnp.full((len(x), self.vocab_size), -jnp.inf).at[:, params["tokens"]].set(logits)


def is_eagle(directory: str | Path) -> bool:
    """Whether a directory has the config.json of an EAGLE-3 head."""
    directory = Path(directory).expanduser()
    return is_there(directory / "config.json") and "draft_vocab_size" in read_config(directory)


def _form(tokens: int) -> str:
    return "decode" if tokens <= MOST_TOKENS + 1 else "prefill"


@functools.lru_cache(maxsize=4)
def _config(directory: Path) -> files.EagleConfig:
    return files.eagle_config(read_config(directory), str(directory / "config.json"))


@functools.lru_cache(maxsize=2)  # for every call of `generate`
def _load(directory: Path, head: files.EagleConfig, mesh: Mesh | None) -> dict[str, Array]:
    """The parameters, and the target's ids of the head's tokens as "tokens" where these are not the same."""
    checkpoint = Checkpoint(directory)
    names, wanted = files.eagle_names(checkpoint.tensors), files.eagle_tensors(head)
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    specs = files.eagle_specs(head, tensor)
    if files.EMBEDDING in names:
        wanted["embedding"] = files.embedding_pieces(head)
        specs["embedding"] = ParamSpec(wanted["embedding"][0].shape, head.decoder.dtype, (None, "embed"))
    expected = {piece.tensor: piece.shape for pieces in wanted.values() for piece in pieces}
    missing = sorted(expected.keys() - names.keys())
    others = sorted(names.keys() - expected.keys() - {files.TOKENS, *files.IGNORED})
    if missing or others:
        found = f"lacks {listing(missing)}" if missing else f"has besides {listing(others)}"
        raise CheckpointError(f"{directory} {found}; an EAGLE-3 head of one layer without biases is read")
    for name, shape in expected.items():
        info = checkpoint.tensors[names[name]]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {names[name]!r} has shape {list(info.shape)}, and config.json calls for "
                f"{list(shape)}"
            )
    copied = with_copied_heads(head.decoder, wanted, kv_replicas(head.decoder, tensor))
    params = {}
    for name, spec in specs.items():
        pieces = tuple(piece.renamed(names.__getitem__) for piece in copied[name])
        array = read_parameter(checkpoint, spec, pieces, (slice(None),) * len(spec.shape))
        params[name] = _placed(name, array, spec.axes, mesh)
    if files.TOKENS in names:
        offsets = checkpoint.read(names[files.TOKENS])  # from the head's id of each token to the target's
        ids = offsets.reshape(-1) + np.arange(offsets.size)
        V = head.target_vocab_size
        if len(ids) != head.decoder.vocab_size or ids.min() < 0 or ids.max() >= V:
            raise CheckpointError(f"{directory}: tensor {names[files.TOKENS]!r} does not name {len(ids)} of {V} tokens")
        params["tokens"] = _placed("tokens", ids.astype(np.int32), (None,), mesh)
    elif head.decoder.vocab_size != head.target_vocab_size:
        raise CheckpointError(f"{directory} lacks {files.TOKENS!r}, which says what the tokens of its vocabulary are")
    return params


def _placed(name: str, array: np.ndarray, axes: tuple[str | None, ...], mesh: Mesh | None) -> Array:
    return jax.device_put(array, None if mesh is None else named_sharding(name, array.shape, axes, mesh))
