"""Arrays in a file, not yet read: a storage is a range of bytes, a TensorRef a view of it."""

import math
import mmap
import os
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from xmodal_jax.errors import UserError

# torch's storage class (without "Storage") or dtype name -> numpy dtype.
_INTS = {
  "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64",
  "Half": "float16", "Float": "float32", "Double": "float64", "Bool": "bool",
  "ComplexFloat": "complex64", "ComplexDouble": "complex128", "Untyped": "uint8",
}  # fmt: skip
STORAGE_DTYPES = {name: np.dtype(dtype) for name, dtype in _INTS.items()}
STORAGE_DTYPES["BFloat16"] = np.dtype(ml_dtypes.bfloat16)
DTYPES = {d.name: d for d in STORAGE_DTYPES.values()}
DTYPES |= {name: np.dtype(name) for name in ("uint16", "uint32", "uint64")}
_FLOAT8 = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")
DTYPES |= {f"float8_{x}": np.dtype(getattr(ml_dtypes, f"float8_{x}")) for x in _FLOAT8}
DTYPES |= {"half": DTYPES["float16"], "float": DTYPES["float32"], "double": DTYPES["float64"]}
DTYPES |= {"long": DTYPES["int64"], "int": DTYPES["int32"], "short": DTYPES["int16"]}

# A view may repeat elements (stride 0), but an array larger than this must not exceed its file.
_FREE_BYTES = 1 << 24
_MAX_SIZE = 1 << 56  # elements; NumPy counts bytes in 63 bits
_MAX_NDIM = 32


class FileFormatError(UserError):
  """The file is damaged, truncated, or of an unsupported format."""


class UnsafeFileError(FileFormatError):
  """The file refers to a global that is not data, `name`. No code was run."""

  def __init__(self, name: str):
    super().__init__(
      f"refused: the pickle refers to {name!r}, which is code; nothing was executed. If you trust "
      "the file, load it with torch where it was made, and save model.state_dict() alone"
    )
    self.name = name


class Source:
  """A file opened for reading: positioned reads, and a memory map made on first use."""

  def __init__(self, path: str | os.PathLike):
    self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    self.size = os.fstat(self.fd).st_size
    self._map = None

  def __del__(self):
    if hasattr(self, "fd"):
      os.close(self.fd)

  def map(self) -> mmap.mmap | bytes:
    if self._map is None:
      self._map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ) if self.size else b""
    return self._map

  def read_into(self, buffer: memoryview, offset: int) -> None:
    """Fills `buffer` from `offset`. Unlike a map, keeps no page of the file in this process."""
    done = 0
    while done < len(buffer):
      n = os.preadv(self.fd, [buffer[done:]], offset + done)
      if n == 0:
        raise FileFormatError(f"file ends inside the {len(buffer)} bytes at {offset}")
      done += n

  def read(self, offset: int, size: int) -> bytes:
    if offset < 0 or size < 0 or offset + size > self.size:
      raise FileFormatError(f"{size} bytes at {offset} are outside the file of {self.size} bytes")
    buffer = bytearray(size)
    self.read_into(memoryview(buffer), offset)
    return bytes(buffer)


class Storage:
  """`nbytes` bytes at `offset` of a source or of bytes. Legacy files give the place later."""

  __slots__ = ("limit", "nbytes", "offset", "source")

  def __init__(self, source: Source | bytes | None, offset: int, nbytes: int):
    self.limit = max(_FREE_BYTES, source.size if isinstance(source, Source) else nbytes)
    self.source, self.offset, self.nbytes = source, offset, nbytes

  def place(self, source: Source, offset: int) -> None:
    if type(offset) is not int or type(self.nbytes) is not int:
      raise FileFormatError("a storage whose place is not a natural number")
    if offset < 0 or self.nbytes < 0 or offset + self.nbytes > source.size:
      raise FileFormatError(
        f"storage of {self.nbytes} bytes at {offset} ends beyond the end of the file"
      )
    self.source, self.offset = source, offset


class TensorRef:
  """A strided array in a file; offset and stride count elements of `dtype`, as in torch.

  `view()` maps it without a copy, `read()` copies it to memory; `np.asarray(ref)` is the view.
  """

  __slots__ = ("conj", "dtype", "neg", "offset", "shape", "storage", "stride")

  def __init__(
    self,
    storage: Storage | None,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: np.dtype,
    *,
    conj: bool = False,
    neg: bool = False,
  ):
    """conj, neg: the values are the conjugate, the negative of the stored ones (torch.conj)."""
    check_shape(shape)
    self.storage, self.offset, self.dtype = storage, offset, dtype
    self.shape, self.stride = tuple(shape), tuple(stride)
    self.conj, self.neg = conj, neg
    if storage is not None:
      self._check()

  def _check(self):
    if len(self.shape) != len(self.stride):
      raise FileFormatError(f"tensor of {len(self.shape)} sizes and {len(self.stride)} strides")
    if not all(map(_natural, (self.offset, *self.stride))):
      raise FileFormatError("tensor with an offset or stride that is not a natural number")
    if (self.offset + self._span()) * self.dtype.itemsize > self.storage.nbytes:
      raise FileFormatError(
        f"tensor of shape {self.shape}, stride {self.stride}, offset {self.offset} ends beyond "
        f"its storage of {self.storage.nbytes} bytes"
      )
    if self.nbytes > self.storage.limit:
      raise FileFormatError(f"tensor of shape {self.shape} is larger than the whole file")

  def _span(self) -> int:
    """Number of elements from the first to the last one of the view."""
    if 0 in self.shape:
      return 0
    return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

  @property
  def size(self) -> int:
    n = 1
    for d in self.shape:
      n *= d
    return n

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def __repr__(self):
    return f"TensorRef({self.dtype.name}{list(self.shape)})"

  def _place(self) -> int:
    if self.storage is None or self.storage.source is None or self.dtype.hasobject:
      raise FileFormatError(f"array of {self.dtype} has no bytes in the file")
    return self.storage.offset + self.offset * self.dtype.itemsize

  def _strided(self, buffer, offset: int) -> np.ndarray:
    strides = tuple(
      s * self.dtype.itemsize if n > 1 else 0 for n, s in zip(self.shape, self.stride, strict=True)
    )
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    return np.ndarray(self.shape, self.dtype, buffer, offset, strides)

  def view(self) -> np.ndarray:
    """The array as a read-only map of the file; a copy where conj or neg is set."""
    offset, source = self._place(), self.storage.source
    if self.conj or self.neg:
      out = self.read()
      out.flags.writeable = False
      return out
    return self._strided(source if isinstance(source, bytes) else source.map(), offset)

  def read(self, out: np.ndarray | None = None) -> np.ndarray:
    """A copy in memory. out: array to read into, C-contiguous, of this shape and dtype."""
    if out is None:
      out = np.empty(self.shape, self.dtype)
    elif out.shape != self.shape or out.dtype != self.dtype or not out.flags.c_contiguous:
      raise ValueError(f"out is {out.dtype}{out.shape}, the tensor {self.dtype}{self.shape}")
    offset, source = self._place(), self.storage.source
    if out.size == 0:
      return out
    if isinstance(source, bytes):
      out[...] = self._strided(source, offset)
    elif self.stride == contiguous(self.shape) or self._span() == self.size == 1:
      source.read_into(memoryview(out.reshape(-1).view(np.uint8)), offset)
    else:
      span = np.empty(self._span() * self.dtype.itemsize, np.uint8)
      source.read_into(memoryview(span), offset)
      out[...] = self._strided(span, 0)
    if self.conj:
      np.conjugate(out, out=out)
    if self.neg:
      np.negative(out, out=out)
    return out

  def __array__(self, dtype=None, copy=None):
    if copy:
      return self.read().astype(dtype or self.dtype, copy=False)
    return np.asarray(self.view(), dtype=dtype)


def _natural(n) -> bool:
  return type(n) is int and 0 <= n < _MAX_SIZE


def check_shape(shape: Sequence[int]) -> None:
  """Raises FileFormatError unless it is the shape of an array that NumPy can describe."""
  if type(shape) not in (tuple, list) or len(shape) > _MAX_NDIM or not all(map(_natural, shape)):
    raise FileFormatError("tensor whose shape is not a short list of natural numbers")
  if math.prod(max(d, 1) for d in shape) >= _MAX_SIZE:
    raise FileFormatError(f"tensor of shape {tuple(shape)}, which is larger than any memory")


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Strides, in elements, of a row-major array."""
  strides, n = [], 1
  for d in reversed(shape):
    strides.append(n)
    n *= max(d, 1)
  return tuple(reversed(strides))
