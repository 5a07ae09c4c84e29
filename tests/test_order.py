"""The sample order: a permutation for every size, as a function of (seed, epoch, position)."""

import time

import numpy as np
import pytest

from xmodal_jax.data import order


@pytest.mark.parametrize(
  "n", [*range(1, 40), 97, 100, 101, 255, 256, 257, 1023, 1024, 7919, 65536, 99991]
)
def test_is_a_permutation(n):
  for epoch in (0, 1):
    got = order.permute(np.arange(n), n, seed=3, epoch=epoch)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(np.sort(got), np.arange(n))


def test_any_part_in_any_shape_equals_the_whole():
  n = 1000
  whole = order.permute(np.arange(n), n, seed=1, epoch=2)
  np.testing.assert_array_equal(order.permute(np.arange(300, 340), n, 1, 2), whole[300:340])
  np.testing.assert_array_equal(
    order.permute([[7, 5], [5, 999]], n, 1, 2), whole[[[7, 5], [5, 999]]]
  )
  assert order.permute(17, n, 1, 2) == whole[17]


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (2**32, 0), (0, 2**32), (-1, 0)])
def test_differs_over_seeds_and_epochs(other):
  n = 1000
  one, two = order.permute(np.arange(n), n, 0, 0), order.permute(np.arange(n), n, *other)
  # Two independent permutations agree at one position on average; 12 or more: p < 1e-9.
  assert (one == two).sum() < 12
  # A shift or a reflection of the first would also differ everywhere.
  assert max(np.bincount((one - two) % n).max(), np.bincount((one + two) % n).max()) < 15


def test_the_order_never_changes_between_versions():
  """A run started with an older version resumes with the same data."""
  assert order.permute(np.arange(10), 10, 0, 0).tolist() == [3, 1, 4, 5, 9, 2, 0, 6, 8, 7]
  assert order.permute([0, 1, 2], 566_435, 17, 3).tolist() == [380217, 160534, 21612]


@pytest.mark.parametrize("n", [3, 4, 5, 10, 16, 60])
def test_positions_are_uniform(n):
  """Chi-square of (position, value) over many epochs; sd sqrt(2 dof), bound at 5 sd."""
  epochs = 2000
  values = np.stack([order.permute(np.arange(n), n, 11, e) for e in range(epochs)])  # [E, n]
  counts = np.zeros((n, n))
  np.add.at(counts, (np.broadcast_to(np.arange(n), values.shape), values), 1)
  chi2, dof = ((counts - epochs / n) ** 2 / (epochs / n)).sum(), (n - 1) ** 2
  assert abs(chi2 - dof) < 5 * np.sqrt(2 * dof)
  # Differences of neighbours are uniform over the n - 1 possible ones.
  steps = np.bincount(((values[:, 1:] - values[:, :-1]) % n).ravel(), minlength=n)[1:]
  mean = epochs * (n - 1) / (n - 1)
  chi2, dof = ((steps - mean) ** 2 / mean).sum(), n - 2
  assert chi2 - dof < 5 * np.sqrt(2 * dof) + 5


def test_cost_does_not_depend_on_n():
  n, at = 10**8, np.arange(10**8 - 512, 10**8)
  order.permute(at, n, 0, 0)
  start = time.perf_counter()
  got = order.permute(at, n, 0, 5)
  # A shuffle of 1e8 takes seconds and 800 MB; this takes under a millisecond.
  assert time.perf_counter() - start < 0.5
  assert len(np.unique(got)) == 512 and got.min() >= 0 and got.max() < n


@pytest.mark.parametrize(("positions", "n"), [([5], 5), ([-1], 5), ([0], 0)])
def test_rejects_what_is_outside(positions, n):
  with pytest.raises(ValueError):
    order.permute(positions, n, 0, 0)


def test_all_captions_of_an_epoch_once():
  counts = np.array([5, 1, 0, 3, 5], np.int32)
  offsets, n = order.caption_offsets(counts), order.samples_per_epoch(counts, "all")
  assert n == 14
  record, caption = order.locate(order.permute(np.arange(n), n, 0, 0), offsets, "all", 0, 0)
  pairs = sorted(zip(record.tolist(), caption.tolist(), strict=True))
  assert pairs == [(r, c) for r, k in enumerate(counts) for c in range(k)]


def test_one_caption_of_each_record():
  counts = np.array([5, 1, 3] * 300, np.int32)
  offsets, n = order.caption_offsets(counts), order.samples_per_epoch(counts, "one")
  assert n == 900
  drawn = []
  for epoch in range(20):
    record, caption = order.locate(np.arange(n), offsets, "one", 4, epoch)
    np.testing.assert_array_equal(record, np.arange(n))
    assert ((caption >= 0) & (caption < counts)).all()
    drawn.append(caption)
  five = np.bincount(np.stack(drawn)[:, ::3].ravel(), minlength=5)  # 6,000 draws
  assert ((five - 1200) ** 2 / 1200).sum() < 25  # chi-square, 4 degrees of freedom: p < 1e-4
  # A record's caption does not depend on the other records in the call.
  assert order.locate([7], offsets, "one", 4, 19)[1][0] == drawn[19][7]
  with pytest.raises(ValueError, match=r"\[1\]"):
    order.samples_per_epoch(np.array([2, 0]), "one")
  with pytest.raises(ValueError, match="two"):
    order.samples_per_epoch(counts, "two")


def test_only_whole_batches():
  assert order.steps_per_epoch(100, 32) == 3
  with pytest.raises(ValueError, match="larger"):
    order.steps_per_epoch(31, 32)


def test_replacements_are_repeatable_and_spread():
  draw = lambda p, a, e: order.replacement(p, a, 1000, 3, e)
  all_of_them = [draw(p, a, e) for p in range(20) for a in range(5) for e in range(5)]
  assert all_of_them == [draw(p, a, e) for p in range(20) for a in range(5) for e in range(5)]
  assert len(set(all_of_them)) > 330  # 500 draws of 1,000 hit 393 on average
  assert min(all_of_them) >= 0 and max(all_of_them) < 1000


def test_augmentation_numbers():
  draw = lambda p, s, e: order.generator(p, s, e).random()
  assert draw(3, 0, 1) == draw(3, 0, 1)
  assert len({draw(p, s, e) for p in range(5) for s in range(5) for e in range(5)}) == 125


def test_each_data_set_has_its_own_order():
  assert order.source_seed(17, 0) == 17
  seeds = [order.source_seed(s, i) for s in (17, 18) for i in range(4)]
  assert len(set(seeds)) == 8 and order.source_seed(17, 3) == seeds[3]
  first, second = (order.permute(np.arange(1000), 1000, s, 0) for s in seeds[:2])
  assert (first == second).sum() < 12


def test_draws_are_numpys_from_any_step():
  sizes = [5, 3, 2, 30]
  n = 2 * order.Draws.BLOCK + 1000
  want = np.random.default_rng(9).choice(4, n, p=np.array(sizes) / 40)
  draws = order.Draws(sizes, 9)
  edges = [b * order.Draws.BLOCK + i for b in (1, 2) for i in (-1, 0, 1)]
  for step in [n - 1, 0, 1, 2, *edges, n - 1]:  # also backwards
    source = want[step]
    assert draws(step) == (source, (want[:step] == source).sum())
  assert order.Draws(sizes, 9)(edges[3]) == draws(edges[3])


def test_a_late_draw_costs_little():
  draws = order.Draws([70, 30, 11], 3)
  start = time.process_time()
  source, earlier = draws(10**6)
  assert time.process_time() - start < 0.1
  share = [70, 30, 11][source] / 111
  assert abs(earlier - 1e6 * share) < 5 * np.sqrt(1e6 * share * (1 - share))


def test_shuffle_and_one_data_set_are_the_plain_order():
  plain = [(0, *divmod(step, 9)) for step in range(40)]
  shuffle = order.Mixture("shuffle", [50, 26, 19], 10, 1)
  assert shuffle.sizes == [95] and shuffle.steps_per_epoch == 9
  assert [shuffle(step) for step in range(40)] == plain
  for mix in ("sequential", "debias"):
    alone = order.Mixture(mix, [95], 10, 1)
    assert alone.steps_per_epoch == 9 and [alone(step) for step in range(40)] == plain


def test_sequential_takes_one_data_set_after_another():
  mixture = order.Mixture("sequential", [25, 10, 39], 10, 1)
  assert mixture.steps_per_epoch == 2 + 1 + 3
  epoch = lambda e: [(0, e, 0), (0, e, 1), (1, e, 0), (2, e, 0), (2, e, 1), (2, e, 2)]
  assert [mixture(step) for step in range(12)] == epoch(0) + epoch(1)


def test_debias_goes_through_every_data_set_at_its_own_pace():
  sizes, batch = [25, 10, 39], 10
  mixture = order.Mixture("debias", sizes, batch, 5)
  assert mixture.steps_per_epoch == 6
  places = [mixture(step) for step in range(300)]
  for source, size in enumerate(sizes):
    mine = [p[1:] for p in places if p[0] == source]
    assert mine == [divmod(i, size // batch) for i in range(len(mine))] and mine[-1][0] > 5
  again = order.Mixture("debias", sizes, batch, 5)
  assert [again(step) for step in (299, 7, 130)] == [places[step] for step in (299, 7, 130)]
  other = order.Mixture("debias", sizes, batch, 6)
  assert [other(step) for step in range(300)] != places


def test_a_mixture_without_a_batch():
  for mix in ("sequential", "debias"):
    with pytest.raises(ValueError, match=r"dataset tiny has 9 samples, .* batch of 10"):
      order.Mixture(mix, [50, 9], 10, 0, ["large", "tiny"])
    with pytest.raises(ValueError, match="larger"):
      order.Mixture(mix, [9], 10, 0, ["tiny"])
  order.Mixture("shuffle", [50, 9], 10, 0, ["large", "tiny"])
  with pytest.raises(ValueError, match=r"data\.mix is 'mixed'; there are shuffle"):
    order.Mixture("mixed", [50, 9], 10, 0)
