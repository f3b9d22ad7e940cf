"""Loads, stores, copies and prefetches at raw addresses, for kernels that read the memory map.

A kernel gets addresses in the map, because one request reads many LMDB values (chunks of several segments). The number
and the types of these values differ from store to store, but one compiled kernel serves all stores. All accesses also
work at unaligned addresses, because LMDB only guarantees even addresses.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

ADDRESS = types.int64


def _loader(numba_type: Any, bits: int, signed: bool) -> Any:
    @intrinsic
    def load(_typing_context: Any, _address: Any) -> tuple[Signature, Any]:
        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            value = builder.load(pointer)
            value.align = 1
            if bits == 64:
                return value
            extend = builder.sext if signed else builder.zext
            return extend(value, ir.IntType(64))

        return numba_type(ADDRESS), codegen

    return load


def _storer(bits: int) -> Any:
    @intrinsic
    def store(_typing_context: Any, _address: Any, _value: Any) -> tuple[Signature, Any]:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = args[1] if bits == 64 else builder.trunc(args[1], ir.IntType(bits))
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            builder.store(value, pointer).align = 1
            return context.get_dummy_value()

        return types.none(ADDRESS, types.int64), codegen

    return store


load_i64 = _loader(types.int64, 64, True)
load_u64 = _loader(types.uint64, 64, False)
load_i32 = _loader(types.int64, 32, True)
load_u32 = _loader(types.int64, 32, False)
load_u8 = _loader(types.int64, 8, False)
store_i64 = _storer(64)
store_i32 = _storer(32)
store_u16 = _storer(16)
store_u8 = _storer(8)


@intrinsic
def _copy_bytes(_typing_context: Any, _destination: Any, _source: Any, _size: Any) -> tuple[Signature, Any]:
    """Call memcpy(destination, source, size); the ranges must not overlap."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte_pointer = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(  # type: ignore[no-untyped-call]
            builder,
            builder.inttoptr(args[0], byte_pointer),
            builder.inttoptr(args[1], byte_pointer),
            args[2],
            1,
        )
        return context.get_dummy_value()

    return types.none(ADDRESS, ADDRESS, types.int64), codegen


@intrinsic
def _prefetch(_typing_context: Any, _address: Any) -> tuple[Signature, Any]:
    """Prefetch the cache line at an address for a read that follows soon; any address is safe."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte_pointer = ir.IntType(8).as_pointer()
        int32 = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32])
        function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, function_type, "llvm.prefetch.p0"
        )
        read = int32(0)
        keep_in_all_levels = int32(3)
        data_cache = int32(1)
        builder.call(function, [builder.inttoptr(args[0], byte_pointer), read, keep_in_all_levels, data_cache])
        return context.get_dummy_value()

    return types.none(ADDRESS), codegen


# Typed as Any: otherwise the type checker would require callers to pass the typing context.
copy_bytes: Any = _copy_bytes
prefetch: Any = _prefetch


def _bits_of(from_type: Any, to_type: Any, llvm_type: Any) -> Any:
    @intrinsic
    def reinterpret(_typing_context: Any, _value: Any) -> tuple[Signature, Any]:
        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], llvm_type)

        return to_type(from_type), codegen

    return reinterpret


float64_bits = _bits_of(types.float64, types.int64, ir.IntType(64))
float64_from_bits = _bits_of(types.int64, types.float64, ir.DoubleType())
_float32_from_bits = _bits_of(types.int32, types.float32, ir.FloatType())


@intrinsic
def _leading_zeros(_typing_context: Any, _value: Any) -> tuple[Signature, Any]:
    """Return the number of leading zeros in the 64 bits of an unsigned number; 64 for 0."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.IntType(1)(0))

    return types.int64(types.uint64), codegen


leading_zeros: Any = _leading_zeros


@njit(inline="always")
def data_of(array: Any) -> Any:
    """Return, in a kernel, the address of an array's first element. The address is signed, since Numba adds signed and
    unsigned numbers as floats."""
    return np.int64(array.ctypes.data)


@njit(inline="always")
def load_f32(address: int) -> Any:
    """Return the float32 at an address."""
    return _float32_from_bits(np.int32(load_i32(address)))


def address_of(array: "np.ndarray[Any, Any]") -> int:
    """Return the address of an array's first element."""
    return int(array.ctypes.data)
