"""Checkpoints: Orbax, and proof of what it wrote. Nothing else in the package imports it.

A training checkpoint is `checkpoints/<step>/` with three items: `model` (params and stats), `train`
(step and optimizer state) and `meta` (json), and `metrics` where it was evaluated. A converted
directory is the item `model` alone beside a `meta.json`, so that parameters are read the same way
from both.

After Orbax has committed a step, every file of it is hashed in the background, and the manifest
(`integrity.py`) makes the step whole. Nothing of a step is handed out before its bytes were checked
against that. A damaged step becomes `<step>.damaged`, and the one before it is used.
"""

import concurrent.futures
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from xmodal_jax.checkpoints import manifest
from xmodal_jax.distributed import processes
from xmodal_jax.optim import train_state

CheckpointError = manifest.CheckpointError

# Files that Orbax plans its reading by are checked before it sees them; the others while it reads.
_PLANS = 1 << 20
_TIMEOUT = 1800.0  # seconds; also of waiting for another process to write or hash its share

Check = Callable[[int, Mapping[str, Any]], None]


class Checkpoints:
  """The checkpoints of one workdir: the latest `keep`, and the best by `metric` (higher is better).

  A reader may leave `metric` empty: the run wrote it down. With read_only nothing is moved, cleaned
  or removed: a damaged step is passed over.

  Saving is asynchronous, with its manifest; a failure surfaces at the next save, wait or close.
  Opening for writing removes what interrupted saves left behind.
  """

  def __init__(self, workdir: epath.PathLike, *, keep: int, metric: str, read_only: bool = False):
    self.steps = manifest.Steps(_absolute(workdir) / "checkpoints", read_only=read_only)
    self.keep, self.metric, self.read_only = keep, metric, read_only
    self.reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    self.pending: concurrent.futures.Future | None = None
    if read_only and self.steps.unproven:
      logging.warning(
        "the checkpoints in %s were written before there were manifests: whether they are damaged "
        "cannot be known",
        self.steps.directory,
      )
    if not read_only:
      self.writer = ocp.AsyncCheckpointer(_handler())
      self.pool = concurrent.futures.ThreadPoolExecutor(1)
      _first_does("open", self.steps.tidy)
      self.steps.unproven = False

  # Writing.

  def save(
    self,
    step: int,
    state: train_state.TrainState,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to write `state`; metrics are those of an evaluation of this very state.

    Blocks while the state is copied: on the devices where they have room for it beside the next
    steps, which takes milliseconds, otherwise to the host.
    """
    self.wait()
    folder = self.steps.folder(step)
    if _together("save", folder.exists)[0]:
      if not metrics:
        return
      # Its evaluation was interrupted and has now been done: only the metrics are new, but a
      # checkpoint is written once.
      _first_does("save", lambda: self.steps.make_room(step))
    # Orbax's barriers are collectives of the devices: those of a thread could meet the next step's
    # in another order on every process.
    on_devices = jax.process_count() == 1 and _room_for(state)
    if on_devices:  # in other memory: the next step donates its own
      state = jax.tree.map(jnp.copy, state)
    items = dict(
      model=ocp.args.StandardSave({"params": state.params, "stats": state.stats}),
      train=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
      meta=ocp.args.JsonSave(dict(meta)),
    )
    if metrics:
      items["metrics"] = ocp.args.JsonSave(dict(metrics))
    held = [ocp.args.Composite(**items)]
    if on_devices:
      self.pending = self.pool.submit(self._write, step, held)
      return
    with self._writing():
      self.writer.save(folder, args=held.pop())
    self.pending = self.pool.submit(self._finish, step)

  def _write(self, step: int, held: list[ocp.args.Composite]) -> None:
    """In the background: Orbax's copy to the host; with what `held` has the copy on the devices
    goes."""
    self.writer.save(self.steps.folder(step), args=held.pop())
    self._finish(step)

  def _finish(self, step: int) -> None:
    """In the background: waits for Orbax, then makes the step whole and forgets older ones."""
    folder = self.steps.folder(step)

    def hash_share():
      self.writer.wait_until_finished()
      files = manifest.sizes(folder)
      return files, manifest.hashes(folder, files, _share(), manifest.WRITE_THREADS)

    shares = _together("hash", hash_share)

    def complete():
      self.steps.complete(step, shares[0][0], [part for _, part in shares])
      self._forget()

    _first_does("complete", complete)

  def _forget(self) -> None:
    """Removes whole steps that are neither among the latest nor the best."""
    whole = self.steps.whole()
    best = self._scores(self._readable(whole), self.metric)[-1:]
    for step in whole[: max(0, len(whole) - self.keep)]:
      if step not in best:
        self.steps.remove(step)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as e:
      raise CheckpointError(
        f"could not write a checkpoint to {self.steps.directory} ({type(e).__name__}: {e}). "
        f"Those before are untouched, the latest is of step {self._latest()}: make room or mend "
        "the storage, and run the same command again"
      ) from e

  def wait(self) -> None:
    """Until everything is written, and whole. Raises CheckpointError where it could not be."""
    pending, self.pending = self.pending, None
    if pending is not None:
      with self._writing():
        pending.result()

  def close(self) -> None:
    try:
      self.wait()
    finally:
      if not self.read_only:
        self.pool.shutdown()
        self.writer.close()
      self.reader.close()

  # What there is.

  def latest(self) -> int | None:
    """The newest step that is whole on disk. All processes have to ask."""
    return _together("latest", self._latest)[0]

  def _latest(self) -> int | None:
    return max(self.steps.whole(), default=None)

  def best(self) -> int | None:
    """The step with the best metric; the latest one where none was evaluated. As `latest`."""

    def best():
      readable = self._readable(self.steps.whole())
      return self._choose_best(readable) if readable else None

    return _together("best", best)[0]

  def _readable(self, steps: Sequence[int]) -> list[int]:
    """Those steps whose metrics and meta are not damaged."""
    out = []
    for step in steps:
      with contextlib.suppress(manifest.DamageError):
        self.metrics(step), self.meta(step)
        out.append(step)
    return out

  def _choose_best(self, steps: Sequence[int]) -> int:
    """Raises DamageError where it cannot read what it chooses by."""
    metric = self.metric or self.meta(max(steps))["metric"]
    return (self._scores(steps, metric) or [max(steps)])[-1]

  def _scores(self, steps: Sequence[int], metric: str) -> list[int]:
    """Those steps that have this metric, the best last; of equals the newest."""
    scores = {s: m[metric] for s in steps if (m := self.metrics(s)) and metric in m}
    return sorted(scores, key=lambda s: (scores[s], s))

  def metrics(self, step: int) -> dict[str, float] | None:
    return self.steps.json(step, "metrics/metrics")

  def meta(self, step: int) -> dict[str, Any]:
    return self.steps.json(step, "meta/metadata")

  # Reading.

  def restore(self, step: int, want: train_state.TrainState) -> train_state.TrainState:
    """want: ShapeDtypeStructs with shardings, of any mesh, not only the one it was saved on."""
    return self._proven(step, lambda folder: self._read_state(folder, want))

  def restore_latest(
    self, want: train_state.TrainState, check: Check = lambda step, meta: None
  ) -> tuple[int, Mapping[str, Any], train_state.TrainState] | None:
    """(step, meta, state) of the newest step that is intact; None where nothing was ever whole.

    check(step, meta) comes before the arrays are read, and may raise.
    """
    return self._first_intact(max, check, lambda folder: self._read_state(folder, want))

  def restore_best(
    self, want: Mapping[str, Any] | None = None, check: Check = lambda step, meta: None
  ) -> tuple[int, Mapping[str, Any], dict[str, Any]] | None:
    """(step, meta, model) of the best step that is intact, as `restore_latest`.

    want: {"params": ..., "stats": ...} of ShapeDtypeStructs with shardings; None: host arrays.
    """
    read = lambda folder: self._read_model(folder, want)
    return self._first_intact(self._choose_best, check, read)

  def _read_state(self, folder: epath.Path, want: train_state.TrainState) -> train_state.TrainState:
    args = ocp.args.Composite(
      model=ocp.args.StandardRestore({"params": want.params, "stats": want.stats}),
      train=ocp.args.StandardRestore({"step": want.step, "opt_state": want.opt_state}),
    )
    out = self.reader.restore(folder, args=args)
    return train_state.TrainState(
      out["train"]["step"],
      out["model"]["params"],
      out["model"].get("stats") or {},
      out["train"]["opt_state"],
    )

  def _read_model(self, folder: epath.Path, want: Mapping[str, Any] | None) -> dict[str, Any]:
    if want is None:
      return load_model(folder)
    args = ocp.args.Composite(model=ocp.args.StandardRestore(dict(want)))
    return self.reader.restore(folder, args=args)["model"]

  def _proven(self, step: int, read: Callable[[epath.Path], Any]) -> Any:
    """read(folder of the step), while all its bytes are checked. Raises DamageError."""
    folder = self.steps.folder(step)
    if self.steps.unproven:
      return read(folder)
    try:
      files, problems = self.steps.files(step), []
    except manifest.DamageError as e:
      files, problems = {}, e.problems
    first = {n: f for n, f in files.items() if f[0] < _PLANS or jax.process_count() > 1}
    # One process that alone fails to read would leave the others waiting for it: where there are
    # several, each checks its share of all bytes and they agree before any of them reads.
    if files:
      problems = manifest.listing_problems(folder, files)
      problems += manifest.content_problems(folder, first, _share())
    if problems := _united("check", problems):
      raise manifest.DamageError(folder, step, problems)
    rest = {n: f for n, f in files.items() if n not in first}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      checking = pool.submit(manifest.content_problems, folder, rest)
      try:
        out, error = read(folder), None
      except Exception as e:  # of whatever a flipped bit led Orbax to
        out, error = None, e
      problems = checking.result()
    if problems:
      raise manifest.DamageError(folder, step, problems) from error
    if error is not None:
      raise error
    return out

  def _first_intact(self, choose: Callable, check: Check, read: Callable) -> tuple | None:
    """(step, meta, what was read), of the first choice that proves intact."""
    self.wait()
    lost: dict[int, list[str]] = {}
    while steps := [s for s in self.steps.listed() if s not in lost]:
      step, problems, meta = None, [], None
      try:
        step = choose(steps)
        meta = self.meta(step)
      except manifest.DamageError as e:
        step, problems = e.step, e.problems
      # All processes go the same way, also where only one of them has trouble with a file.
      views = _together("choose", lambda: (step, problems))
      step = next((s for s, p in views if p), views[0][0])
      problems = sorted({line for s, p in views if s == step for line in p})
      if not problems:
        check(step, meta)
        try:
          return step, meta, self._proven(step, read)
        except manifest.DamageError as e:
          problems = e.problems
      lost[step] = problems
      _first_does("lost", lambda: self.steps.set_aside(step, problems))
    if not lost and not self.steps.once_whole():
      return None
    lines = [f"step {s}: {manifest.listed(p)}" for s, p in lost.items()]
    if aside := self.steps.aside():
      lines.append(f"set aside: {', '.join(aside)}")
    text = "\n  ".join(lines or ["there is no step"])
    raise CheckpointError(
      f"no intact checkpoint is left in {self.steps.directory}:\n  {text}\n"
      "Put back a copy of a step's folder, with its manifest and named by the step alone. To begin "
      "anew, take another --workdir, or remove this folder"
    )


def _room_for(state: Any) -> bool:
  """Whether every device holds a copy of its part of the state beside a step's temporaries, also
  where the copy takes the place in which they were before. False where nothing is known (CPU)."""
  leaves = jax.tree.leaves(state)
  part = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

  def fits(device: jax.Device) -> bool:
    stats = device.memory_stats() or {}
    if not {"bytes_limit", "bytes_in_use", "peak_bytes_in_use"} <= stats.keys():
      return False
    peak = stats["peak_bytes_in_use"]
    return stats["bytes_limit"] - peak > part + peak - stats["bytes_in_use"]

  return all(map(fits, leaves[0].sharding.device_set))


def _absolute(path: epath.PathLike) -> epath.Path:
  # Orbax takes absolute paths only.
  path = epath.Path(path)
  return path if "://" in str(path) else path.absolute()


def _handler() -> ocp.CompositeCheckpointHandler:
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  handler = ocp.handlers.JsonCheckpointHandler(filename="metrics")
  registry.add("metrics", ocp.args.JsonSave, handler)
  return ocp.CompositeCheckpointHandler(handler_registry=registry)


def _share() -> manifest.Share:
  return jax.process_index(), jax.process_count()


def _together(name: str, do: Callable[[], Any]) -> list[Any]:
  """What `do` gives on every process, by their order; an error of one is raised on all of them.

  No device takes part: any thread may call it, in the same order of calls of a name everywhere.
  """
  if jax.process_count() == 1:
    return [do()]
  try:
    out, error = do(), None
  except Exception as e:
    out, error = None, e
  said = None if error is None else f"{type(error).__name__}: {error}"
  views = processes.all_gather(f"checkpoint: {name}", [out, said], _TIMEOUT)
  if error is not None:
    raise error
  for i, (_, said) in enumerate(views):
    if said is not None:
      raise CheckpointError(f"process {i} of {len(views)}: {said}")
  return [out for out, _ in views]


def _first_does(name: str, do: Callable[[], None]) -> None:
  """The first process does it, the others wait until it is done."""
  _together(name, do if jax.process_index() == 0 else lambda: None)


def _united(name: str, problems: Sequence[str]) -> list[str]:
  """Problems of all processes."""
  return sorted({line for part in _together(name, lambda: problems) for line in part})


def abstract_state(shapes: Any, shardings: Any) -> Any:
  """ShapeDtypeStructs with shardings: what `restore` wants."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def save_model(
  path: epath.PathLike, params: Mapping[str, Any], stats: Mapping[str, Any], meta: Mapping
) -> None:
  """Writes a converted directory: item `model` and meta.json. Arrays keep their dtypes.

  Orbax by default copies all host arrays and compresses them before it writes, which took 3.7 times
  the size of CLIP's RN50 in memory; like this it takes 2.0 times.
  """
  path = epath.Path(path)
  handlers = [
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    (jax.Array, ocp.type_handlers.ArrayHandler()),
  ]
  handler = ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(*handlers),
    use_compression=False,  # trained weights hardly shrink
  )
  with ocp.Checkpointer(handler) as writer:
    tree = {"params": dict(params), "stats": dict(stats)}
    writer.save(path.absolute() / "model", args=ocp.args.PyTreeSave(tree))
  (path / "meta.json").write_text(json.dumps(dict(meta), indent=1))


def load_model(path: epath.PathLike) -> dict[str, Any]:
  """The item `model` of a converted directory as numpy arrays in the stored dtypes.

  Arrays come in groups, large ones first, while little else is held: all at once, Orbax was seen to
  need 2.5 times the file for CLIP's ViT-B/32.
  """
  path = epath.Path(path).absolute() / "model"
  group, size = 1 << 25, lambda x: math.prod(x.shape) * np.dtype(x.dtype).itemsize
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    leaves, tree = jax.tree.flatten(reader.metadata(path).item_metadata.tree)
    arrays, todo = [None] * len(leaves), sorted(range(len(leaves)), key=lambda i: size(leaves[i]))
    args = tree.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves))
    while todo:
      now, n = {todo.pop()}, 0
      while todo and (n := n + size(leaves[todo[-1]])) <= group:
        now.add(todo.pop())
      want = tree.unflatten([x if i in now else ocp.PLACEHOLDER for i, x in enumerate(leaves)])
      request = ocp.args.PyTreeRestore(item=want, restore_args=args)
      got = jax.tree.leaves(reader.restore(path, args=request))
      arrays = [got[i] if i in now else a for i, a in enumerate(arrays)]
  return tree.unflatten(arrays)
