"""The input pipeline on the host, beside torch's DataLoader on the same records."""

import argparse
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from benchmarks.runner import Form, Forms, Workload


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--split", default="train")
  parser.add_argument("--size", type=int, default=224, help="side of the images")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--batches", type=int, default=20, help="batches per timed run")


def batches(args: argparse.Namespace, size: int) -> Iterator[Mapping[str, np.ndarray]]:
  """Batches of the dataset without end: read, decode, resize, crop, tokenize. No device."""
  from xmodal_jax.data import image, pipeline, records, text

  return pipeline.train_batches(
    records.open_split(args.data_dir, args.split),
    batch_size=args.batch,
    image_transform=image.clip_transform(size),
    tokenizer=text.make_tokenizer("clip_bpe"),
    text_length=77,
    seed=0,
    step=0,
    threads=args.threads,
  )


class Images:
  """Map-style dataset for a DataLoader: each image of a split with its first caption.

  Items are normalised pixels float32 [3, S, S] and ids int64 [77], as torch tensors.
  """

  def __init__(self, args: argparse.Namespace, size: int):
    from xmodal_jax.data import image, records, text

    self.split = records.open_split(args.data_dir, args.split)
    self.transform, self.tokenize = image.clip_transform(size), text.make_tokenizer("clip_bpe")

  def __len__(self) -> int:
    return len(self.split)

  def __getitem__(self, i: int) -> tuple[Any, Any]:
    import torch

    from xmodal_jax.data import image
    from xmodal_jax.models import clip

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (clip.MEAN, clip.STD))
    found = self.split.read(i)
    pixels = torch.tensor(image.load(found.image, self.transform)).permute(2, 0, 1)
    ids, _ = self.tokenize(found.captions[:1], 77)
    return (pixels.float() / 255 - mean) / std, torch.from_numpy(ids[0]).long()


def torch_batches(args: argparse.Namespace, size: int, pin_memory: bool = False) -> Iterator[Any]:
  """The same without end, from as many worker processes as our side has threads."""
  import torch

  images = Images(args, size)
  # A batch may be larger than the dataset.
  sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=2**40)
  loader = torch.utils.data.DataLoader(
    images,
    args.batch,
    sampler=sampler,
    num_workers=args.threads,
    pin_memory=pin_memory,
    drop_last=True,
  )
  return iter(loader)


def _consume(stream: Iterator[Any], args: argparse.Namespace) -> Form:
  def run():
    for _ in itertools.islice(stream, args.batches):
      pass

  return run, {"examples": args.batch * args.batches}


def ours(args: argparse.Namespace) -> Forms:
  return {"data": lambda: _consume(batches(args, args.size), args)}


def with_torch(args: argparse.Namespace) -> Forms:
  return {"DataLoader": lambda: _consume(torch_batches(args, args.size), args)}


DATA = Workload(
  help="host examples/s of the input pipeline",
  arguments=arguments,
  ours=ours,
  against={"torch": with_torch},
)
