"""CLIP's PyTorch keys: the rule table, and the model section of a config from the shapes."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xmodal_jax.convert import ConversionError, Ignore, Rule, conv, linear, same, split


def _pair(torch: str, ours: str, first: int = 0) -> list[Rule]:
  """LayerNorm."""
  return [
    Rule(f"{torch}.weight", f"{ours}/scale", first=first),
    Rule(f"{torch}.bias", f"{ours}/bias", first=first),
  ]


def _batch_norm(torch: str, ours: str, first: int = 0) -> list[Rule]:
  names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
  return [Rule(f"{torch}.{a}", f"{ours}/{b}", first=first) for a, b in names.items()]


def _dense(torch: str, ours: str) -> list[Rule]:
  return [
    Rule(f"{torch}.weight", f"{ours}/kernel", linear),
    Rule(f"{torch}.bias", f"{ours}/bias"),
  ]


def _blocks(torch: str, ours: str) -> list[Rule]:
  """A stack of residual attention blocks; the rows of in_proj are all q, then all k, then all v."""
  block, qkv = f"{torch}.resblocks.{{layer}}", [f"{ours}/blocks/{x}" for x in "qkv"]
  return [
    Rule(f"{block}.attn.in_proj_weight", tuple(f"{x}/kernel" for x in qkv), split(3, linear)),
    Rule(f"{block}.attn.in_proj_bias", tuple(f"{x}/bias" for x in qkv), split(3)),
    *_dense(f"{block}.attn.out_proj", f"{ours}/blocks/out"),
    *_pair(f"{block}.ln_1", f"{ours}/blocks/ln_1"),
    *_pair(f"{block}.ln_2", f"{ours}/blocks/ln_2"),
    *_dense(f"{block}.mlp.c_fc", f"{ours}/blocks/wi"),
    *_dense(f"{block}.mlp.c_proj", f"{ours}/blocks/wo"),
  ]


def _bottleneck(torch: str, ours: str, first: int = 0) -> list[Rule]:
  rules = []
  for i in "123":
    rules.append(Rule(f"{torch}.conv{i}.weight", f"{ours}/conv{i}/kernel", conv, first=first))
    rules += _batch_norm(f"{torch}.bn{i}", f"{ours}/bn{i}", first)
  return rules


_TEXT = [
  Rule("logit_scale", "logit_scale"),
  Rule("token_embedding.weight", "text/token/embedding"),
  Rule("positional_embedding", "text/pos"),
  Rule("text_projection", "text/proj/kernel", same),  # already [in, out]
  *_pair("ln_final", "text/ln_final"),
  *_blocks("transformer", "text"),
]

_VIT = [
  Rule("visual.conv1.weight", "image/patch/kernel", conv),
  Rule("visual.class_embedding", "image/cls"),
  Rule("visual.positional_embedding", "image/pos"),
  Rule("visual.proj", "image/proj/kernel", same),
  *_pair("visual.ln_pre", "image/ln_pre"),
  *_pair("visual.ln_post", "image/ln_post"),
  *_blocks("visual.transformer", "image"),
]

_RESNET = [
  *_bottleneck("visual", "image/stem"),
  *_bottleneck("visual.layer{s}.0", "image/stage{s}/first"),
  Rule("visual.layer{s}.0.downsample.0.weight", "image/stage{s}/first/down_conv/kernel", conv),
  *_batch_norm("visual.layer{s}.0.downsample.1", "image/stage{s}/first/down_bn"),
  *_bottleneck("visual.layer{s}.{layer}", "image/stage{s}/rest", first=1),
  Rule("visual.attnpool.positional_embedding", "image/pool/pos"),
  *(r for x in "qkvc" for r in _dense(f"visual.attnpool.{x}_proj", f"image/pool/{x}")),
]

_IGNORED = [
  Ignore("input_resolution"),
  Ignore("context_length"),
  Ignore("vocab_size"),
  Ignore("*.num_batches_tracked"),
  Ignore("*attn_mask", keep=False),  # causal, made by the model
]

RULES: Sequence[Rule | Ignore] = [*_TEXT, *_VIT, *_RESNET, *_IGNORED]

# Other files that end up here, by a key that only they have.
_OTHERS = (
  (r"image_model\.(vit|vision_transformer)\.|cross_model\.|team_block_list\.", "TEAM"),
  (r"vit_model\.layers\.|cross_modal_(text|image)_transform", "HAT"),
  (r"img_txt_enc\.", "TGDT (or TERAN)"),
  (r"image_encoder\.model\.|text_encoder\.model\.", "ZeroVL"),
  (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position", "Swin Transformer"),
  (r"(bert\.)?(embeddings\.word_embeddings|encoder\.layer\.\d+\.attention)", "BERT"),
  (r"(text|vision)_model\.(encoder|embeddings)\.", "Hugging Face CLIP, with other names"),
  (r"blocks\.\d+\.attn\.qkv", "timm vision transformer"),
  (r"layer1\.0\.conv1\.weight", "torchvision ResNet"),
)


def infer_config(
  shapes: Mapping[str, Sequence[int]], scalars: Mapping[str, int] | None = None
) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (spec of CLIP, 7.3).

  scalars: input_resolution, context_length, vocab_size of a TorchScript archive, which must agree.
  ConversionError names what the file seems to be where it is no CLIP.
  """
  _refuse_others(shapes)
  embed = shapes["text_projection"][1]
  width = shapes["ln_final.weight"][0]
  if "visual.proj" in shapes:
    dim, _, patch, _ = shapes["visual.conv1.weight"]
    depth = len(_distinct(r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_weight", shapes))
    size = patch * _side(shapes["visual.positional_embedding"][0], "visual.positional_embedding")
    image = dict(kind="vit", size=size, patch=patch, width=dim, depth=depth, heads=dim // 64)
  else:
    depths = tuple(len(_distinct(rf"visual\.layer{s}\.(\d+)\..*", shapes)) for s in (1, 2, 3, 4))
    name = "visual.attnpool.positional_embedding"
    size = 32 * _side(shapes[name][0], name)
    dim = shapes["visual.layer1.0.conv1.weight"][0]
    image = dict(kind="resnet", size=size, width=dim, depths=depths)
  text = dict(
    vocab=shapes["token_embedding.weight"][0],
    context=shapes["positional_embedding"][0],
    width=width,
    depth=len(_distinct(r"transformer\.resblocks\.(\d+)\..*", shapes)),
    heads=width // 64,
  )
  found = dict(input_resolution=size, context_length=text["context"], vocab_size=text["vocab"])
  for name, value in (scalars or {}).items():
    if found[name] != value:
      raise ConversionError(misshapen=[f"{name} is {value}, the weights say {found[name]}"])
  return dict(system="clip", embed=embed, image=image, text=text)


def _refuse_others(shapes: Mapping[str, Sequence[int]]) -> None:
  ranks = {
    "positional_embedding": 2, "text_projection": 2, "token_embedding.weight": 2,
    "ln_final.weight": 1, "visual.conv1.weight": 4, "transformer.resblocks.0.ln_1.weight": 1,
  }  # fmt: skip
  if "visual.proj" in shapes:
    ranks |= {"visual.positional_embedding": 2, "visual.proj": 2}
  else:
    ranks |= {"visual.attnpool.positional_embedding": 2, "visual.layer1.0.conv1.weight": 4}
  wrong = [k for k, rank in ranks.items() if len(shapes.get(k, ())) != rank]
  if wrong:
    seems = [what for pattern, what in _OTHERS if any(re.match(pattern, k) for k in shapes)]
    what = f"it seems to be of {seems[0]}" if seems else f"first keys: {', '.join([*shapes][:3])}"
    raise ConversionError(missing=[f"not a CLIP state dict ({what}); no {', '.join(wrong)}"])


def _distinct(pattern: str, names: Mapping[str, Any]) -> set[str]:
  return {m[1] for name in names if (m := re.fullmatch(pattern, name))}


def _side(rows: int, name: str) -> int:
  """Side of the square grid of a position table that also has a row for one more token."""
  side = math.isqrt(max(rows - 1, 0))
  if side * side != rows - 1 or not side:
    raise ConversionError(misshapen=[f"{name}: {rows} rows are no square and one more"])
  return side
