"""TEAM: token embeddings alignment, retrieval in two stages (Xie et al., 2022)."""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xmodal_jax.losses import contrastive, hard_negatives
from xmodal_jax.losses.pairwise import exchange
from xmodal_jax.models import base, layers
from xmodal_jax.models import clip as clip_lib
from xmodal_jax.models.layers import token_matching
from xmodal_jax.models.towers import bert, swin, vit

Array = jax.Array

TEMPERATURE = 2.66  # log of the initial scales, which are bounded by MAX_SCALE
MAX_SCALE = 100.0

# Image towers by `image.kind`. DeiT's tokens are normalised, CLIP's are the raw residual stream.
_TOWERS = {
  "deit": dict(act="gelu", eps=1e-6, ln_pre=False, patch_bias=True),
  "clip": dict(act="quick_gelu", eps=1e-5, ln_pre=True, patch_bias=False),
}


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


# The released models: image tower, vocabulary, width of embeddings, blocks, width of tokens scored.
PRESETS = {
  "vit_b16": _preset("deit", 256, 16, 768, 12, 30522, 512, 6, 512),
  "clip_l14": _preset("clip", 224, 14, 1024, 24, 30522, 768, 6, 512),
  "chinese_l14": _preset("clip", 224, 14, 1024, 24, 21128, 768, 1, 768),
}


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict.

  With what is not in a file: how each loop over layers is compiled (see layers.scan), dropout, and
  the objective.
  """
  if name not in PRESETS:
    raise ValueError(f"team has no variant {name!r}; there are {', '.join(PRESETS)}")
  c = copy.deepcopy(PRESETS[name])
  c["image"] |= dict(remat="nothing_saveable", unroll=1)
  c["text"] |= dict(remat="", unroll=1, dropout=0.1, attention_dropout=0.1)
  c["matching"] |= dict(remat="", unroll=1, dropout=0.1)
  return c | dict(same_image="exclude", negatives=1, layerwise=True)


class TEAM(base.System):
  """Cosine of pooled embeddings, then alignment of all tokens for the best candidates.

  batch: image [B, S, S, 3], text_ids int [B, L], text_mask bool [B, L], image_id int [B].
  Features: embed float32 [B, E], unit rows; tokens [B, P, D] of a picture, [B, L, D] of a text with
  mask bool [B, L].
  same_image: see losses.contrastive.infonce. negatives: sampled for each picture and each text.
  layerwise: the matching loss is a sum over the blocks; False: of the last block.
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
    if same_image not in contrastive.SAME_IMAGE:
      choices = ", ".join(contrastive.SAME_IMAGE)
      raise ValueError(f"model.same_image is {same_image!r}; there are {choices}")
    self.same_image, self.count, self.layerwise = same_image, negatives, layerwise
    kw = dict(dtype=dtype, rngs=rngs)
    image = dict(image)
    self.kind = image.pop("kind")
    self.image_proj, dim = nnx.data(None), image.get("width")
    if self.kind == "swin":
      tower = swin.Swin(**image, **kw)
      dim = image["embed"] * 2 ** (len(image["depths"]) - 1)
      self.image_proj = nnx.data(layers.linear(dim, embed, ("embed", None), use_bias=False, **kw))
    elif self.kind in _TOWERS:
      tower = vit.ViT(embed=embed, **image, **_TOWERS[self.kind], **kw)
    else:
      kinds = ", ".join((*_TOWERS, "swin"))
      raise ValueError(f"model.image.kind is {self.kind!r}; team has {kinds}")
    # A tower stands under its kind, because files of another kind have other names for its parts.
    self.image = nnx.Dict({self.kind: tower})
    self.text = bert.Bert(**text, **kw)
    width = text["width"]
    if not project_text and width != dim:
      raise ValueError(
        f"model.text.width is {width} and that of image tokens {dim}: set model.project_text, so "
        "that the tokens of both have one width"
      )
    self.text_proj = layers.linear(width, embed, ("embed", None), use_bias=False, **kw)
    self.text_tokens = nnx.data(
      layers.linear(width, dim, ("embed", None), **kw) if project_text else None
    )
    self.matching = token_matching.TokenMatching(dim=dim, **matching, **kw)
    self.logit_scale = nnx.Param(jnp.float32(TEMPERATURE), axes=())
    self.logit_scale_team = nnx.Param(jnp.float32(TEMPERATURE), axes=())

  def probe_features(self, batch):
    tower = self.image[self.kind]
    x = tower(self.pixels(batch["image"]))
    x = x[-1].mean(1) if self.image_proj is not None else tower.ln_post(x[:, 0])
    return x.astype(jnp.float32)

  def encode_image(self, batch, key=None):
    tower = self.image[self.kind]
    if self.image_proj is not None:  # the last stage has no class token: the mean stands for it
      x = tower(self.pixels(batch["image"]), key)[-1]
      embed = self.image_proj(x.mean(1))
      return {"embed": base.l2_normalize(embed, eps=1e-12), "tokens": x}
    x = tower(self.pixels(batch["image"]))
    normalised = self.kind == "deit"
    return {
      "embed": base.l2_normalize(tower.pool(x), eps=1e-12),
      "tokens": tower.ln_post(x) if normalised else x,
    }

  def encode_text(self, batch, key=None):
    mask = batch["text_mask"]
    x = self.text(batch["text_ids"], mask, key)
    embed = self.text_proj(x[:, 0])
    if self.text_tokens is not None:
      x = self.text_tokens(layers.flatten_leading(x)).reshape(*x.shape[:2], -1)
    return {"embed": base.l2_normalize(embed, eps=1e-12), "tokens": x, "mask": mask}

  def score(self, images, texts):
    """Cosine [I, T]: the temperature does not change an order."""
    return jnp.dot(images["embed"], texts["embed"].T, precision="highest")

  def rerank(self, images, texts):
    """The scores after all blocks, summed: in [-K, K] for K blocks."""
    return self.matching(images["tokens"], texts["tokens"], texts["mask"]).sum(-1)

  def token_attention(self, images, texts):
    """The last block's; agreement is the cosine of a token with what it retrieved."""
    traced = self.matching.trace(images["tokens"], texts["tokens"][:, None], texts["mask"][:, None])
    return {k: traced[k][-1, :, 0] for k in ("attention", "relevance", "agreement")}

  def scales(self) -> tuple[Array, Array]:
    """The two temperatures in use. The bound acts after exp, so that its gradient is 0 beyond."""
    bounded = lambda p: jnp.minimum(jnp.exp(p[...]), MAX_SCALE)
    return bounded(self.logit_scale), bounded(self.logit_scale_team)

  def same(self, batch) -> Array:
    """int [B], equal for rows that are no negatives of each other: unless kept, of one picture."""
    ids = batch["image_id"]
    return jnp.arange(len(ids)) if self.same_image == "keep" else ids

  def negatives(
    self, images, texts, batch, key
  ) -> tuple[hard_negatives.Negatives, hard_negatives.Negatives]:
    """Sampled pictures for each text, and texts for each picture."""
    keys, pair = jax.random.split(key), (images["embed"], texts["embed"])
    scale, same = self.scales()[0], self.same(batch)
    return hard_negatives.sample_both(*pair, scale, same, self.count, keys, self.ring)

  def match(
    self,
    images,
    texts,
    wrong_images: hard_negatives.Negatives,
    wrong_texts: hard_negatives.Negatives,
    key,
  ) -> tuple[Array, Array]:
    """Scores after each of K blocks: true pairs [B, K], and all sampled ones [B, 2n, K], those with
    a wrong picture first."""
    k_own, k_wrong = (None, None) if key is None else jax.random.split(key)
    tokens_of, text, mask = images["tokens"], texts["tokens"], texts["mask"]
    take = lambda x, index: exchange.take_rows(x, index, self.batch_sharding)
    join = lambda own, other: jnp.concatenate([own[:, None], other], axis=1)  # [b, 1 + n, ...]

    def own_picture(part, key):
      """Each picture with its text and the wrong ones: [b, 1 + n, K]."""
      wrong_text, wrong_mask = part["wrong"]
      captions = join(part["text"], wrong_text), join(part["mask"], wrong_mask)
      return self.matching(part["image"], *captions, key)

    def wrong_pictures(part, key):
      """Each text with the wrong pictures: [b, n, K]."""
      b, n = part["wrong"].shape[:2]
      each = lambda x: jnp.repeat(x, n, axis=0)[:, None]  # [b n, 1, ...]
      pictures = part["wrong"].reshape(b * n, *part["wrong"].shape[2:])
      return self.matching(pictures, each(part["text"]), each(part["mask"]), key).reshape(b, n, -1)

    # Fetched before the batch is cut into parts: a part would ask the whole ring once more when it
    # is computed again for its gradient, and the rows are few next to what the blocks keep.
    rows = dict(text=text, mask=mask)
    wrong = take(text, wrong_texts.index), take(mask, wrong_texts.index)
    own = self.chunked(own_picture, rows | dict(image=tokens_of, wrong=wrong), k_own)
    wrong = take(tokens_of, wrong_images.index)  # [B, n, P, D]
    other = self.chunked(wrong_pictures, rows | dict(wrong=wrong), k_wrong)
    return own[:, 0], jnp.concatenate([other, own[:, 1:]], axis=1)

  def objective(self, images, texts, batch, key):
    k_sample, k_drop = jax.random.split(key)
    scale, scale_team = self.scales()
    contrast, metrics = contrastive.infonce(
      images["embed"], texts["embed"], scale, batch["image_id"], self.same_image, self.ring
    )
    chosen = self.negatives(images, texts, batch, k_sample)
    right, wrong = self.match(images, texts, *chosen, k_drop)
    found = jnp.concatenate([c.found for c in chosen], axis=1)
    each = hard_negatives.matching_loss(right, wrong, found, scale_team)  # [K]
    match = each.sum() if self.layerwise else each[-1]
    best_wrong = jnp.where(found, wrong[..., -1], -jnp.inf).max(1)
    metrics |= {
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
