"""TEAM: token embeddings alignment, retrieval in two stages (Xie et al., 2022)."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xmodal_jax.errors import ConfigError, check_choice
from xmodal_jax.losses import contrastive, hard_negatives
from xmodal_jax.losses.pairwise import exchange
from xmodal_jax.models import base, layers
from xmodal_jax.models import clip as clip_lib
from xmodal_jax.models.layers import token_matching
from xmodal_jax.models.towers import bert, registry

TEMPERATURE = 2.66  # initial log of both scales
MAX_SCALE = 100.0  # bound on both scales


def _preset(kind, size, patch, width, depth, vocab, embed, blocks, token_embed) -> dict[str, Any]:
  text = dict(vocab=vocab, context=512, width=768, depth=12, heads=12, mlp=3072)
  return dict(
    system="team",
    embed=embed,
    image=dict(kind=kind, size=size, patch=patch, width=width, depth=depth, heads=width // 64),
    text=text,
    project_text=width != text["width"],
    matching=dict(depth=blocks, heads=width // 64, mlp_ratio=2, embed=token_embed),
  )


# The released models: image tower, vocabulary, width of embeddings, number of matching blocks,
# width of the space where tokens are compared.
PRESETS = {
  "vit_b16": _preset("deit", 256, 16, 768, 12, 30522, 512, 6, 512),
  "clip_l14": _preset("clip", 224, 14, 1024, 24, 30522, 768, 6, 512),
  "chinese_l14": _preset("clip", 224, 14, 1024, 24, 21128, 768, 1, 768),
}

# What a config means that lacks these keys of the model section.
DEFAULTS = {"image.act": "quick_gelu", "image.pool": "cls"}  # of kind "clip"
# Keys of the model section that do not change what is computed from a text or an image.
TRAINING = ("same_image", "negatives", "layerwise")


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict.

  Includes options that a file does not record: remat and unroll, dropout, the objective.
  """
  if name not in PRESETS:
    raise ConfigError(f"team has no variant {name!r}; there are {', '.join(PRESETS)}")
  c = copy.deepcopy(PRESETS[name])
  c["image"] |= dict(remat="nothing_saveable", unroll=1)
  c["image"] |= dict(act="quick_gelu") if c["image"]["kind"] == "clip" else {}
  c["text"] |= dict(remat="", unroll=1, dropout=0.1, attention_dropout=0.1)
  c["matching"] |= dict(remat="", unroll=1, dropout=0.1)
  return c | dict(same_image="exclude", negatives=1, layerwise=True)


class TEAM(base.System):
  """Retrieval by the cosine of embeddings, re-ranking by token matching.

  batch: image [B, S, S, 3], text_ids int [B, L], text_mask bool [B, L], image_id int [B].
  Features: embed float32 [B, E], unit vectors; tokens [B, P, D] of images, [B, L, D] of texts with
  mask bool [B, L].

  image: `kind` is a name of towers.registry. same_image: see losses.contrastive.infonce.
  negatives: number sampled for each image and for each text. layerwise: the matching loss is the
  sum over all matching blocks; False: that of the last block.
  """

  mean, std = clip_lib.MEAN, clip_lib.STD
  top_k_text = top_k_image = 16
  second_stage = ("tokens", "mask")

  def __init__(
    self,
    *,
    embed: int,
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    matching: Mapping[str, Any],
    project_text: bool,
    same_image: str = "exclude",
    negatives: int = 1,
    layerwise: bool = True,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_choice("model.same_image", same_image, contrastive.SAME_IMAGE)
    self.same_image = same_image
    self.count, self.layerwise = negatives, layerwise
    kw = dict(dtype=dtype, rngs=rngs)
    self.kind = image["kind"]
    tower = registry.build_image_tower(image, output_dim=embed, **kw)
    project = functools.partial(layers.linear, axes=("embed", None), use_bias=False, **kw)
    dim, width = tower.widths[-1], text["width"]
    self.image_proj = nnx.data(None if tower.projects else project(dim, embed))
    # The parameter prefix has the tower's kind: files of other kinds have other parameters.
    self.image = nnx.Dict({self.kind: tower})
    self.text = bert.Bert(**text, **kw)
    if not project_text and width != dim:
      raise ConfigError(
        f"model.text.width is {width} and that of image tokens {dim}: set model.project_text, so "
        "that the tokens of both have one width"
      )
    self.text_proj = project(width, embed)
    self.text_tokens = nnx.data(
      layers.linear(width, dim, ("embed", None), **kw) if project_text else None
    )
    self.matching = token_matching.TokenMatching(dim=dim, **matching, **kw)
    self.logit_scale = nnx.Param(jnp.float32(TEMPERATURE), axes=())
    self.logit_scale_team = nnx.Param(jnp.float32(TEMPERATURE), axes=())

  def probe_features(self, batch):
    tower = self.image[self.kind]
    return tower.pooled(tower(self.pixels(batch["image"]))).astype(jnp.float32)

  def encode_image(self, batch, key=None):
    tower = self.image[self.kind]
    x = tower(self.pixels(batch["image"]), key)
    project = tower.project if self.image_proj is None else self.image_proj
    embed = base.l2_normalize(project(tower.pooled(x)), eps=1e-12)
    return {"embed": embed, "tokens": tower.tokens(x)}

  def encode_text(self, batch, key=None):
    mask = batch["text_mask"]
    x = self.text(batch["text_ids"], mask, key)
    embed = self.text_proj(x[:, 0])
    if self.text_tokens is not None:
      x = layers.apply_dense(self.text_tokens, x)
    return {"embed": base.l2_normalize(embed, eps=1e-12), "tokens": x, "mask": mask}

  def score(self, images, texts):
    """Cosine [I, T]; the scale is positive and does not change the order."""
    return jnp.dot(images["embed"], texts["embed"].T, precision="highest")

  def rerank(self, images, texts):
    """The sum of the matching scores after each of K blocks, in [-K, K]."""
    return self.matching(images["tokens"], texts["tokens"], texts["mask"]).sum(-1)

  def token_attention(self, images, texts):
    """That of the last block; agreement: the cosine of a text token and its retrieved vector."""
    texts, mask = texts["tokens"][:, None], texts["mask"][:, None]
    traced = self.matching.trace(images["tokens"], texts, mask)
    return {k: traced[k][-1, :, 0] for k in ("attention", "relevance", "agreement")}

  def scales(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Scales of the contrastive and the matching logits; beyond MAX_SCALE without a gradient."""
    logs = self.logit_scale, self.logit_scale_team
    return tuple(jnp.minimum(jnp.exp(log[...]), MAX_SCALE) for log in logs)

  def groups(self, batch) -> Int[Array, " b"]:
    """Equal for rows that are not negatives of each other: rows of one image, unless these are
    kept as negatives."""
    ids = batch["image_id"]
    return jnp.arange(len(ids)) if self.same_image == "keep" else ids

  def negatives(
    self, images, texts, batch, key: PRNGKeyArray
  ) -> tuple[hard_negatives.Negatives, hard_negatives.Negatives]:
    """Sampled negative images of each text, and negative texts of each image."""
    embeds, keys = (images["embed"], texts["embed"]), jax.random.split(key)
    groups = self.groups(batch)
    return hard_negatives.sample_both(
      *embeds, self.scales()[0], groups, self.count, keys, self.ring
    )

  def match(
    self,
    images,
    texts,
    wrong_images: hard_negatives.Negatives,
    wrong_texts: hard_negatives.Negatives,
    key: PRNGKeyArray | None,
  ) -> tuple[Float[Array, "b k"], Float[Array, "b m k"]]:
    """Matching scores after each of K blocks, of the true pairs and of m = 2n sampled wrong pairs
    for each row: those with a wrong image first, then those with a wrong text."""
    k_texts, k_images = (None, None) if key is None else jax.random.split(key)
    tokens, text, mask = images["tokens"], texts["tokens"], texts["mask"]
    take = functools.partial(exchange.take_rows, batch_sharding=self.batch_sharding)
    # Negatives are fetched outside of `chunked`: inside, every chunk would fetch them again in the
    # backward pass. Their memory is small next to the activations of the blocks.
    wrong = dict(wrong_text=take(text, wrong_texts.index), wrong_mask=take(mask, wrong_texts.index))
    own = self.chunked(self._match_texts, dict(image=tokens, text=text, mask=mask) | wrong, k_texts)
    wrong = take(tokens, wrong_images.index)  # [B, n, P, D]
    other = self.chunked(
      self._match_images, dict(text=text, mask=mask, wrong_image=wrong), k_images
    )
    return own[:, 0], jnp.concatenate([other, own[:, 1:]], axis=1)

  def _match_texts(self, rows, key) -> Float[Array, "b m k"]:
    """Each image with its own text and n wrong texts, m = 1 + n."""
    text = jnp.concatenate([rows["text"][:, None], rows["wrong_text"]], axis=1)
    mask = jnp.concatenate([rows["mask"][:, None], rows["wrong_mask"]], axis=1)
    return self.matching(rows["image"], text, mask, key)

  def _match_images(self, rows, key) -> Float[Array, "b n k"]:
    """Each text with n wrong images."""
    b, n = rows["wrong_image"].shape[:2]
    images = rearrange(rows["wrong_image"], "b n p d -> (b n) p d")
    text, mask = (jnp.repeat(rows[k], n, axis=0)[:, None] for k in ("text", "mask"))
    return self.matching(images, text, mask, key).reshape(b, n, -1)

  def objective(self, images, texts, batch, key):
    k_sample, k_drop = jax.random.split(key)
    scale, scale_team = self.scales()
    contrast, metrics = contrastive.infonce(
      images["embed"], texts["embed"], scale, batch["image_id"], self.same_image, self.ring
    )
    wrong_images, wrong_texts = self.negatives(images, texts, batch, k_sample)
    right, wrong = self.match(images, texts, wrong_images, wrong_texts, k_drop)
    found = jnp.concatenate([wrong_images.found, wrong_texts.found], axis=1)
    each = hard_negatives.matching_loss(right, wrong, found, scale_team)  # [K]
    match = each.sum() if self.layerwise else each[-1]
    best_wrong = jnp.where(found, wrong[..., -1], -jnp.inf).max(1)
    metrics |= contrastive.same_image_metrics(batch) | {
      "loss_contrastive": contrast,
      "loss_matching": match,
      "accuracy_matching": (right[:, -1] > best_wrong).mean(),
      "logit_scale": scale,
      "logit_scale_team": scale_team,
    }
    return contrast + match, metrics


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> TEAM:
  """A TEAM from the model section of a config (see `preset`)."""
  config = {k: v for k, v in config.items() if k != "system"}
  return TEAM(**config, dtype=dtype, rngs=rngs)
