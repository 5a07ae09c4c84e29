"""Training checkpoints: Orbax, and a check of every byte it wrote.

A training checkpoint is the folder `checkpoints/<step>/` with the items `model` (params and stats),
`train` (step and optimizer state), `meta` (json), and `metrics` (json) if it was evaluated. A
converted directory has the item `model` and a `meta.json`, so parameters are read in the same way
from both.

After Orbax has committed a step, a background thread hashes its files and writes the manifest
(`manifest.py`), which makes the step complete. A restore compares all bytes with the manifest. The
folder of a damaged step is renamed to `<step>.damaged`, and the step before it is used.
"""

import concurrent.futures
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from xmodal_jax.checkpoints import manifest, model_files
from xmodal_jax.distributed import processes
from xmodal_jax.optim import train_state, transforms

CheckpointError = manifest.CheckpointError

# Smaller files (bytes), among them Orbax's metadata, are checked before Orbax reads them; larger
# ones at the same time.
_CHECK_FIRST = 1 << 20
_TIMEOUT = 1800.0  # seconds to wait for another process, which may be writing or hashing its share

Check = Callable[[int, Mapping[str, Any]], None]  # (step, meta); raises to refuse a checkpoint


def _accept(step: int, meta: Mapping[str, Any]) -> None:
  del step, meta


class Checkpoints:
  """The checkpoints of one workdir: the latest `keep`, and the best by `metric` (higher is better).

  keep: 0 or less keeps all of them.
  A reader may pass an empty `metric`: the one that the run stored is used. With read_only nothing
  is renamed or removed, and damaged steps are skipped.

  Saves are asynchronous, including the manifest. A failure is raised by the next `save`, `wait` or
  `close`. Opening for writing removes what interrupted saves left behind.

    checkpoints = Checkpoints(workdir, keep=2, metric="rsum")
    checkpoints.save(step, state, meta, metrics)
    checkpoints.wait()
    step, meta, state = checkpoints.restore_latest(abstract_state(shapes, shardings))
  """

  def __init__(self, workdir: epath.PathLike, *, keep: int, metric: str, read_only: bool = False):
    self.folders = manifest.StepFolders(_absolute(workdir) / "checkpoints", read_only=read_only)
    self.keep, self.metric, self.read_only = keep, metric, read_only
    self.reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    self.pending: concurrent.futures.Future | None = None
    if read_only and self.folders.without_manifests:
      logging.warning(
        "the checkpoints in %s have no manifests, because an earlier version wrote them: damage "
        "cannot be detected",
        self.folders.directory,
      )
    if not read_only:
      self.writer = ocp.AsyncCheckpointer(_handler())
      self.pool = concurrent.futures.ThreadPoolExecutor(1)
      _on_first_process("open", self.folders.clean_up)
      self.folders.without_manifests = False

  def save(
    self,
    step: int,
    state: train_state.TrainState,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts writing `state`. metrics: of an evaluation of this state.

    Blocks while the state is copied: on the devices if they have room for it beside the next steps,
    which takes milliseconds, otherwise to the host.
    """
    self.wait()
    folder = self.folders.path(step)
    if _on_all_processes("save", folder.exists)[0]:
      if not metrics:
        return
      # Its evaluation was interrupted and is now done. Orbax writes a checkpoint once, so it is
      # written again with the metrics.
      _on_first_process("save", lambda: self.folders.make_room(step))
    _on_first_process("save", lambda: self.folders.begin(step))
    # Orbax's barriers are collectives on the devices. From a background thread they could run in
    # another order relative to the next train step on each process.
    on_devices = jax.process_count() == 1 and _room_for_copy(state)
    if on_devices:  # the next step donates the original
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
    """In the background: Orbax's copy to the host. `held` has the only reference to the copy on the
    devices, which is freed afterwards."""
    self.writer.save(self.folders.path(step), args=held.pop())
    self._finish(step)

  def _finish(self, step: int) -> None:
    """In the background: waits for Orbax, writes the manifest, and removes older steps."""
    folder = self.folders.path(step)

    def hash_share():
      self.writer.wait_until_finished()
      files = manifest.sizes(folder)
      return files, manifest.hashes(folder, files, _share(), manifest.WRITE_THREADS)

    shares = _on_all_processes("hash", hash_share)

    def complete():
      self.folders.complete(step, shares[0][0], [part for _, part in shares])
      self._remove_old()

    _on_first_process("complete", complete)

  def _remove_old(self) -> None:
    """Removes complete steps that are neither among the latest `keep` nor the best."""
    if self.keep < 1:
      return
    complete = self.folders.complete_steps()
    best = self._by_metric(self._readable(complete), self.metric)[-1:]
    for step in complete[: max(0, len(complete) - self.keep)]:
      if step not in best:
        self.folders.remove(step)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as e:
      raise CheckpointError(
        f"could not write a checkpoint to {self.folders.directory} ({type(e).__name__}: {e}). "
        f"Earlier ones are intact, the latest is of step {self._latest()}: free space or repair "
        "the storage, and run the same command again"
      ) from e

  def wait(self) -> None:
    """Blocks until the last save is complete. Raises CheckpointError if it failed."""
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

  def latest(self) -> int | None:
    """The newest complete step. All processes must call it."""
    return _on_all_processes("latest", self._latest)[0]

  def _latest(self) -> int | None:
    return max(self.folders.complete_steps(), default=None)

  def best(self) -> int | None:
    """The step with the best metric; the latest if none was evaluated. All processes must call
    it."""

    def best():
      readable = self._readable(self.folders.complete_steps())
      return self._choose_best(readable) if readable else None

    return _on_all_processes("best", best)[0]

  def _readable(self, steps: Sequence[int]) -> list[int]:
    """The steps whose metrics and meta are not damaged."""
    out = []
    for step in steps:
      with contextlib.suppress(manifest.DamageError):
        self.metrics(step), self.meta(step)
        out.append(step)
    return out

  def _choose_best(self, steps: Sequence[int]) -> int:
    """The step with the best metric, or the newest. Raises DamageError if a file it needs is
    damaged."""
    metric = self.metric or self.meta(max(steps))["metric"]
    return (self._by_metric(steps, metric) or [max(steps)])[-1]

  def _by_metric(self, steps: Sequence[int], metric: str) -> list[int]:
    """The steps that have this metric, in ascending order of it; of equal ones the newest last."""
    scores = {s: m[metric] for s in steps if (m := self.metrics(s)) and metric in m}
    return sorted(scores, key=lambda s: (scores[s], s))

  def metrics(self, step: int) -> dict[str, float] | None:
    """The metrics saved with a step, None if it was not evaluated. Raises DamageError."""
    return self.folders.json(step, "metrics/metrics")

  def meta(self, step: int) -> dict[str, Any]:
    """The meta saved with a step. Raises DamageError."""
    return self.folders.json(step, "meta/metadata")

  def restore(self, step: int, want: train_state.TrainState) -> train_state.TrainState:
    """The state of one step. want: see `abstract_state`; its mesh may differ from the saved one's.

    Raises DamageError.
    """
    return self._read_verified(step, lambda folder: self._read_state(folder, want))

  def restore_latest(
    self, want: train_state.TrainState, check: Check = _accept
  ) -> tuple[int, Mapping[str, Any], train_state.TrainState] | None:
    """(step, meta, state) of the newest intact step; None if no step was ever complete.

    check(step, meta) is called before the arrays are read, and may raise. Raises CheckpointError if
    steps exist but none is intact.
    """
    return self._first_intact(max, check, lambda folder: self._read_state(folder, want))

  def restore_best(
    self, want: Mapping[str, Any] | None = None, check: Check = _accept
  ) -> tuple[int, Mapping[str, Any], dict[str, Any]] | None:
    """(step, meta, model) of the best intact step, as `restore_latest`.

    want: {"params": ..., "stats": ...} of ShapeDtypeStructs with shardings; None: host arrays.
    """
    read = lambda folder: self._read_model(folder, want)
    return self._first_intact(self._choose_best, check, read)

  def _read_state(self, folder: epath.Path, want: train_state.TrainState) -> train_state.TrainState:
    saved = ocp.PyTreeCheckpointHandler().metadata(folder / "train").tree["opt_state"]
    opt_state = want.opt_state
    if earlier := transforms.has_average(opt_state) and _has_earlier_average(saved):
      opt_state = transforms.as_saved_before(opt_state)
    placed = _in_saved_places(saved, opt_state)
    args = ocp.args.Composite(
      model=ocp.args.StandardRestore({"params": want.params, "stats": want.stats}),
      train=ocp.args.StandardRestore({"step": want.step, "opt_state": placed}),
    )
    try:
      out = self.reader.restore(folder, args=args)
    except ValueError as e:  # of other shapes or another tree
      raise CheckpointError(
        f"{folder} does not fit the config, which makes other parameters or another optimizer: {e}"
      ) from e
    model, train = out["model"], out["train"]
    stats, leaves = model.get("stats") or {}, jax.tree.leaves(train["opt_state"])
    opt_state = jax.tree.unflatten(jax.tree.structure(opt_state), leaves)
    if earlier:
      logging.warning(
        "an earlier version saved %s: its average is of the parameters alone and has a constant "
        "decay, which this run keeps",
        folder,
      )
      opt_state = transforms.from_saved_before(want.opt_state, opt_state, stats)
    return train_state.TrainState(train["step"], model["params"], stats, opt_state)

  def _read_model(self, folder: epath.Path, want: Mapping[str, Any] | None) -> dict[str, Any]:
    if want is None:
      return model_files.load_model(folder)
    args = ocp.args.Composite(model=ocp.args.StandardRestore(dict(want)))
    return self.reader.restore(folder, args=args)["model"]

  def _read_verified(self, step: int, read: Callable[[epath.Path], Any]) -> Any:
    """read(folder of the step), with a check of all its bytes. Raises DamageError."""
    folder = self.folders.path(step)
    if self.folders.without_manifests:
      return read(folder)
    try:
      files, problems = self.folders.files(step), []
    except manifest.DamageError as e:
      files, problems = {}, e.problems
    first = {n: f for n, f in files.items() if f[0] < _CHECK_FIRST or jax.process_count() > 1}
    # If one of several processes failed to read, the others would wait for it. So each checks its
    # share of all bytes, and they agree on the result before any of them reads.
    if files:
      problems = manifest.listing_problems(folder, files)
      problems += manifest.content_problems(folder, first, _share())
    if problems := _gather_problems("check", problems):
      raise manifest.DamageError(folder, step, problems)
    rest = {n: f for n, f in files.items() if n not in first}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      checking = pool.submit(manifest.content_problems, folder, rest)
      try:
        out, error = read(folder), None
      except Exception as e:  # damaged files make Orbax raise anything
        out, error = None, e
      problems = checking.result()
    if problems:
      raise manifest.DamageError(folder, step, problems) from error
    if error is not None:
      raise error
    return out

  def _first_intact(self, choose: Callable, check: Check, read: Callable) -> tuple | None:
    """(step, meta, read(folder)) of the first intact step. choose: remaining steps -> next step."""
    self.wait()
    damaged: dict[int, list[str]] = {}
    while steps := [s for s in self.folders.all_steps() if s not in damaged]:
      step, problems, meta = None, [], None
      try:
        step = choose(steps)
        meta = self.meta(step)
      except manifest.DamageError as e:
        step, problems = e.step, e.problems
      # All processes agree, even if only one of them cannot read a file.
      views = _on_all_processes("choose", lambda: (step, problems))
      step = next((s for s, p in views if p), views[0][0])
      problems = sorted({line for s, p in views if s == step for line in p})
      if not problems:
        check(step, meta)
        try:
          return step, meta, self._read_verified(step, read)
        except manifest.DamageError as e:
          problems = e.problems
      damaged[step] = problems
      _on_first_process("damaged", lambda: self.folders.set_aside(step, problems))
    if not damaged and not self.folders.ever_complete():
      return None
    lines = [f"step {s}: {manifest.summarize(p)}" for s, p in damaged.items()]
    if aside := self.folders.damaged():
      lines.append(f"set aside: {', '.join(aside)}")
    text = "\n  ".join(lines or ["there is no checkpoint"])
    raise CheckpointError(
      f"no intact checkpoint is left in {self.folders.directory}:\n  {text}\n"
      "Put back a copy of a step's folder, with its manifest, under the name of the step. To start "
      "again from step 0, use another --workdir or remove this folder"
    )


def _in_saved_places(saved: Any, want: Any) -> Any:
  """An optimizer state `want`, with its parts at the places that they have in a saved one.

  Parts without arrays, such as clipping, may differ between two runs. Where more than that differs,
  `want` is returned as it is.
  """
  if type(want) is not tuple or not isinstance(saved, list):  # not a chain
    return want
  has_arrays = [bool(jax.tree.leaves(part)) for part in saved]
  parts = [part for part in want if jax.tree.leaves(part)]
  if len(parts) != sum(has_arrays):
    return want
  parts = iter(parts)
  return tuple(next(parts) if has else None for has in has_arrays)


def _room_for_copy(state: Any) -> bool:
  """Whether every device has room for a copy of its part of the state beside a train step's
  temporaries, even if the copy is put where they were before. False if the device does not report
  its memory (CPU)."""
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


def _has_earlier_average(saved: Any) -> bool:
  """Whether a saved optimizer state holds an average as `transforms.as_saved_before`."""
  return any("average" in x and "count" not in x for x in saved if isinstance(x, Mapping))


def _share() -> manifest.Share:
  return jax.process_index(), jax.process_count()


def _on_all_processes(name: str, function: Callable[[], Any]) -> list[Any]:
  """Calls `function` on every process and returns all results, in the order of the processes.

  An exception in one process is raised in all of them. No device is involved, so any thread may
  call this; calls with the same name must come in the same order everywhere.
  """
  if jax.process_count() == 1:
    return [function()]
  try:
    result, error = function(), None
  except Exception as e:
    result, error = None, e
  message = None if error is None else f"{type(error).__name__}: {error}"
  gathered = processes.all_gather(f"checkpoint: {name}", [result, message], _TIMEOUT)
  if error is not None:
    raise error
  for i, (_, message) in enumerate(gathered):
    if message is not None:
      raise CheckpointError(f"process {i} of {len(gathered)}: {message}")
  return [result for result, _ in gathered]


def _on_first_process(name: str, function: Callable[[], None]) -> None:
  """Calls `function` on process 0, while the others wait for it."""
  _on_all_processes(name, function if jax.process_index() == 0 else lambda: None)


def _gather_problems(name: str, problems: Sequence[str]) -> list[str]:
  """The problems that any process found."""
  return sorted({line for part in _on_all_processes(name, lambda: problems) for line in part})


def abstract_state(shapes: Any, shardings: Any) -> Any:
  """ShapeDtypeStructs with shardings, from a tree of shapes and one of shardings.

  shardings = built.state_shardings(tx)
  want = abstract_state(jax.eval_shape(new_state), shardings)
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
