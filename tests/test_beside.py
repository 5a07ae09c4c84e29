"""Jsons beside a file of weights, read for what its keys do not say."""

import json

import pytest

from xmodal_jax.errors import UserError
from xmodal_jax.interop import beside

OPEN_CLIP = {
  "embed_dim": 16,
  "vision_cfg": {"width": 64, "layers": 2, "head_width": 32},
  "text_cfg": {"width": 64, "layers": 2, "heads": 2},
  "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
HUGGING_FACE = {
  "model_type": "clip",
  "vision_config": {"hidden_act": "gelu", "num_attention_heads": 2},
  "text_config": {"hidden_act": "gelu", "num_attention_heads": 4},
}


def described(tmp_path, content) -> beside.Description:
  (tmp_path / "config.json").write_text(json.dumps(content))
  return beside.describe(tmp_path / "model.pt", beside.parse_clip, {})


def test_a_whole_json(tmp_path):
  facts = described(tmp_path, OPEN_CLIP).facts
  assert facts["model.act"] == "gelu" and facts["model.image.heads"] == 2
  facts = described(tmp_path, HUGGING_FACE).facts
  assert facts["model.act"] == "gelu" and facts["model.text.heads"] == 4


@pytest.mark.parametrize("content", [OPEN_CLIP, HUGGING_FACE], ids=["open_clip", "hugging_face"])
@pytest.mark.parametrize("value", [None, "a", -1, 0, 1.5, [], {}, [1, "b"], True])
def test_values_of_other_types(content, value, tmp_path):
  """A description, which says that the json cannot be read if so, or a refusal."""
  paths = [(key,) for key in content]
  paths += [
    (key, inner) for key, part in content.items() if isinstance(part, dict) for inner in part
  ]
  for path in paths:
    changed = json.loads(json.dumps(content))
    node = changed
    for key in path[:-1]:
      node = node[key]
    node[path[-1]] = value
    try:
      found = described(tmp_path, changed)
    except UserError as e:
      assert "config.json" in str(e)
    else:
      assert not (found.problem and found.facts)
