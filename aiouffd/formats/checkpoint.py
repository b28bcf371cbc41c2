"""What `torch.save` writes: a zip file with a pickle, and the bytes of each storage.

The pickle is not trusted. It may name the few things that tensors and plain containers need, and none of them is
called as the file says: tensors become `ArrayEntry` values here. So no code of the file runs, and torch is needed for
`load` and `tensor` only.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs

from aiouffd.errors import UffdError
from aiouffd.formats.arrays import ArrayEntry
from aiouffd.formats.dtypes import BITS
from aiouffd.formats.header import shown
from aiouffd.formats.stored_zip import ZippedArrays

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.kernel.region import Region

__all__ = ["Checkpoint"]

_MOST: Final = 64 << 20  # bytes of the pickle
_DEEPEST: Final = 64  # containers in containers
_TYPES: Final = (
    "Bool=bool Byte=uint8 Char=int8 Short=int16 Int=int32 Long=int64 Half=float16 BFloat16=bfloat16"
    " Float=float32 Double=float64 ComplexFloat=complex64 ComplexDouble=complex128 Untyped=uint8"
)
_STORAGES: Final = {f"{word}Storage": dtype for word, dtype in (pair.split("=") for pair in _TYPES.split())}


# Without __setstate__: by that a pickle could change what was checked.
@attrs.frozen(getstate_setstate=False)
class _Storage:
    member: str
    length: int
    dtype: str


@attrs.frozen(eq=False, getstate_setstate=False)
class _Leaf:
    """A tensor in what was pickled; the offset of its entry counts from the beginning of its storage."""

    member: str
    entry: ArrayEntry
    requires_grad: bool = False
    is_parameter: bool = False


class Checkpoint(ZippedArrays):
    """The tensors of a file of `torch.save`, in the zip format that is its default since torch 1.6.

    A tensor is named by its way through dicts and lists: that of a state dict by its key, another one as
    `optimizer.state.0.exp_avg`. Tensors that share a storage share memory. Files with other objects than tensors, plain
    containers, numbers and texts are refused, as by `torch.load(weights_only=True)`; so is TorchScript.
    """

    _no_zip: ClassVar[str] = (
        "it is no zip file, as torch.save writes since torch 1.6; torch.load(region.as_file()) copies an older file"
    )

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        pickles = [name for name in self._infos if name.endswith("/data.pkl")]
        if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in self._infos):
            raise self._header.wrong(
                0, f"it has {len(pickles)} members data.pkl: no file of torch.save, or TorchScript"
            )
        self._folder = pickles[0].removesuffix("data.pkl")
        order = self._folder + "byteorder"
        if order in self._infos and self._bytes_of(order) != b"little":
            raise self._header.wrong(0, "its bytes are in big-endian order")
        self._leaves: dict[str, _Leaf] = {}
        data = self._bytes_of(pickles[0])
        try:
            _check_places(data)
            self._content = _Unpickler(data, self._storage_of, self._tensor_of).load()
            walk(self._content, self._name)
        except UffdError:
            raise
        except Exception as error:  # a pickle can raise anything
            at = self._infos[pickles[0]].header_offset
            raise self._header.wrong(at, f"data.pkl: {type(error).__name__}: {error!s:.300}") from error

    def load(self) -> Any:
        """Return what `torch.load` would: the same containers, with tensors on the region, without a copy.

        Blocks until the places of all tensors are known; no byte of a tensor is touched.
        """
        self._look_up(self)
        built: dict[int, Any] = {}  # a tensor that occurs twice is one

        def tensor(thing: Any, _: tuple[str, ...]) -> Any:
            if not isinstance(thing, _Leaf):
                return thing
            if id(thing) not in built:
                built[id(thing)] = self._built(thing)
            return built[id(thing)]

        return walk(self._content, tensor)

    def _built(self, leaf: _Leaf) -> Any:
        tensor = self._tensor(self._placed(leaf, self._find(leaf.member)[0]))
        if not leaf.is_parameter:
            return tensor.requires_grad_(leaf.requires_grad)
        import torch  # noqa: PLC0415 - an extra

        return torch.nn.Parameter(tensor, requires_grad=leaf.requires_grad)

    def _read(self, name: str, start: int, end: int) -> ArrayEntry:
        return self._placed(self._leaves[name], start)

    @staticmethod
    def _placed(leaf: _Leaf, start: int) -> ArrayEntry:
        return attrs.evolve(leaf.entry, start=start + leaf.entry.start)

    # What the pickle asks for

    def _bytes_of(self, member: str) -> bytes:
        start, end = self._find(member)
        if end - start > _MOST:
            raise self._header.wrong(start, f"{member!r:.80} has {end - start} bytes; {_MOST} are the most")
        return self._header.take(start, end - start, member)

    def _storage_of(self, said: Any) -> _Storage:
        word, dtype, key, _, count = said
        if word != "storage" or not isinstance(dtype, _Word) or type(key) is not str or type(count) is not int:
            raise ValueError(f"no storage: {shown(said)}")
        member = f"{self._folder}data/{key}"
        length = self._infos[member].file_size
        if count * BITS[dtype] // 8 != length:
            raise ValueError(f"{member!r:.80} has {length} bytes, and should have {count} elements of {dtype}")
        return _Storage(member, length, dtype)

    def _tensor_of(self, storage: Any, first: Any, shape: Any, strides: Any, *more: Any) -> _Leaf:
        """Check what `torch._utils._rebuild_tensor_v2` or `_v3` is called with."""
        dtype = more[2] if len(more) > 2 and isinstance(more[2], _Word) else storage.dtype
        size = BITS[dtype] // 8
        self._header.size_of(0, shape, 8 * size, "a tensor")
        if len(strides) != len(shape) or any(
            type(step) is not int or not 0 <= step < 1 << 48 for step in (first, *strides)
        ):
            raise ValueError(
                f"a tensor of the shape {shown(shape)} with the strides {shown(strides)}, from {shown(first)}"
            )
        reach = sum(step * (number - 1) for step, number in zip(strides, shape, strict=True)) + 1
        if 0 in shape:
            first = reach = 0
        if (first + reach) * size > storage.length:
            raise ValueError(f"a tensor of the shape {shape!r:.80} is not within its storage of {storage.length} bytes")
        entry = ArrayEntry(
            "", str(dtype), str(dtype), tuple(shape), first * size, reach * size, tuple(strides) if reach else None
        )
        return _Leaf(storage.member, entry, bool(more and more[0]))

    def _name(self, leaf: Any, path: tuple[str, ...]) -> Any:
        if isinstance(leaf, _Leaf):
            name = ".".join(path)
            if name in self._leaves:
                raise ValueError(f"two tensors are named {name!r:.80}")
            self._leaves[name] = attrs.evolve(leaf, entry=attrs.evolve(leaf.entry, name=name))
            self._members[name] = leaf.member
        return leaf


def _check_places(data: bytes) -> None:
    """Raise ValueError if a pickle names a place for what it repeats that no pickle needs: all below take memory."""
    for code, place, _ in pickletools.genops(data):
        if code.name.endswith("PUT") and (place or 0) > len(data):
            raise ValueError(f"a place {place} for what is repeated, in {len(data)} bytes")


def walk(thing: Any, leaf: Callable[[Any, tuple[str, ...]], Any]) -> Any:
    """Return a copy of containers, with `leaf(what, the way to it)` in place of each thing in them.

    A container that occurs twice is made once.

    Raises:
        ValueError: they are too deep, or contain themselves; or a key is neither text nor a number.
    """
    made: dict[int, Any] = {}

    def copy(thing: Any, path: tuple[str, ...]) -> Any:
        if id(thing) in made:
            return made[id(thing)]
        if len(path) > _DEEPEST:
            raise ValueError(f"containers in containers, more than {_DEEPEST} deep")
        if isinstance(thing, dict):
            if not all(type(key) in (str, int) for key in thing):
                raise ValueError("a key of a dict is neither text nor a number")
            result: Any = type(thing)((key, copy(value, (*path, str(key)))) for key, value in thing.items())
            if isinstance(thing, OrderedDict):
                vars(result).update(vars(thing))  # a state dict has its versions there
        elif isinstance(thing, list | tuple):
            result = type(thing)(copy(value, (*path, str(number))) for number, value in enumerate(thing))
        else:
            return leaf(thing, path)
        made[id(thing)] = result
        return result

    return copy(thing, ())


class _Word(str):
    """The name of an element type that a pickle may hold. It cannot be changed."""

    __slots__ = ()


class _Unpickler(pickle.Unpickler):
    """Makes plain containers and tensors, and nothing else.

    Args:
        data: the pickle.
        storage_of: makes a storage of what `torch.save` has written for it.
        tensor_of: makes a tensor.
    """

    def __init__(self, data: bytes, storage_of: Callable[[Any], Any], tensor_of: Callable[..., _Leaf]) -> None:
        super().__init__(io.BytesIO(data))
        self._storage_of, self._tensor_of = storage_of, tensor_of

    def persistent_load(self, pid: Any) -> Any:
        """Return a storage."""
        return self._storage_of(pid)

    def find_class(self, module: str, name: str, /) -> Any:
        """Return what stands for a name. A pickle can set attributes of functions: these are new ones each time."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return lambda *arguments: self._tensor_of(*arguments)  # noqa: PLW0108 - a method would be changed for all
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda leaf, requires_grad, *_: attrs.evolve(
                leaf, requires_grad=bool(requires_grad), is_parameter=True
            )
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Word(_STORAGES[name])
        if module == "torch" and name in BITS:
            return _Word(name)
        if (module, name) == ("torch", "Size"):
            return tuple
        raise ValueError(
            f"it has an object {module}.{name}: only tensors, plain containers, numbers and texts are mapped."
            " torch.load(region.as_file()) copies it, and runs what the file says unless weights_only=True"
        )
