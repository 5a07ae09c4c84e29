"""The dataset of each step of ZeroVL's debiased sampling, against the original's draws."""

import re

import golden_files
import pytest

from xmodal_jax.data import order


@pytest.fixture(scope="module")
def golden():
  return golden_files.arrays("zerovl", "outputs.npz")


def meaning(name: str) -> str:
  """An array's description, which alone has seed, probabilities and sizes."""
  return golden_files.manifest("zerovl")["arrays"][f"outputs/{name}"]["meaning"]


def recorded_draw() -> tuple[int, list[float]]:
  """The seed, and the probability of each dataset."""
  text = meaning("rng/debias_choice")
  found = re.search(r"default_rng\((\d+)\)\.choice\((\d+), p=\[(.*?)\]\)", text)
  assert found, text
  numbers = found[3].replace("np.float64(", "").replace(")", "").split(",")
  proportions = [float(number) for number in numbers]
  assert len(proportions) == int(found[2]), text
  return int(found[1]), proportions


def test_the_draws(golden):
  seed, proportions = recorded_draw()
  want = golden["rng/debias_choice"]
  draws = order.Draws(proportions, seed)
  got = [draws(step) for step in range(len(want))]
  assert [source for source, _ in got] == want.tolist()
  assert [earlier for _, earlier in got] == [
    (want[:step] == source).sum() for step, source in enumerate(want)
  ]


def test_the_batches_of_the_trajectory(golden):
  seed, _ = recorded_draw()
  text, want = meaning("traj_debias/loss"), golden["traj_debias/order"]
  sizes = [int(n) for n in re.search(r"sizes \[([\d, ]+)\]", text)[1].split(",")]
  loaders = [
    [int(n) for n in re.findall(r"\d+", part)]
    for part in re.findall(r"loader \d+ yields (?:batches )?([\d, ]+)", text)
  ]
  assert len(loaders) == len(sizes) == len(set(map(str, loaders))), text
  # The recorded loaders are lists of batches; their lengths do not follow from the sizes.
  draws = order.Draws(sizes, seed)
  for step, (source, batch) in enumerate(want.tolist()):
    got, earlier = draws(step)
    assert (got, loaders[got][earlier % len(loaders[got])]) == (source, batch)
