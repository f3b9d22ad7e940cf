"""Write numbers and times as JSON text at a memory address.

Source of the shortest decimal of a float: Raffaello Giulietti, "The Schubfach way to render doubles" (2021). This
module has the variant for 32-bit floats, for which 64-bit approximations of the powers of ten are enough.
"""

from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
from numba import njit

from shoal.engine.kernels.compiling import kernel
from shoal.engine.kernels.memory import leading_zeros, store_i64, store_u8, store_u16

MAX_NUMBER = 24
"""The maximum size of a number in bytes, including a comma."""
MAX_TIME = 32
"""The maximum size of a time in bytes, including quotes and a comma."""

_QUOTE, _MINUS, _POINT, _ZERO, _PLUS, _COLON, _E, _T, _Z = b'"-.0+:eTZ'

_TENS = np.array([10**exponent for exponent in range(20)], np.uint64)
_ZEROS = np.uint64(int.from_bytes(b"00000000", "little"))
_ZERO_POINT_ZEROS = int.from_bytes(b"0.000000", "little")
_PAIRS = np.frombuffer("".join(f"{number:02}" for number in range(100)).encode(), np.uint16)
"""The two digits of each number below 100."""

_LEAST_POWER, _GREATEST_POWER = -31, 45


def _power_of_ten(exponent: int) -> int:
    """Return 10^exponent, scaled to a 64-bit number with the highest bit set and rounded up."""
    power = Fraction(10) ** exponent
    # Two shifts are possible. Only the scaled power shows which of them sets the highest bit.
    shift = 64 - power.numerator.bit_length() + power.denominator.bit_length()
    scaled = ceil(power * Fraction(2) ** shift)
    return scaled if scaled < 1 << 64 else ceil(power * Fraction(2) ** (shift - 1))


_POWERS = np.array([_power_of_ten(exponent) for exponent in range(_LEAST_POWER, _GREATEST_POWER + 1)], np.uint64)

_LOW = np.uint64(0xFFFFFFFF)
_ONE = np.uint64(1)
_TWO = np.uint64(2)
_FOUR = np.uint64(4)
_TEN = np.uint64(10)
_FORTY = np.uint64(40)
_HUNDRED = np.uint64(100)
_THIRTY_TWO = np.uint64(32)
_SIXTY = np.uint64(60)
_THOUSAND = np.uint64(1_000)
_MILLION = np.uint64(1_000_000)
_DAY = np.uint64(86_400)
_ERA = np.uint64(146_097)
_EPOCH_SINCE_0000 = 719_468 * 86_400 * 1_000_000
_TEN_UNITS = np.uint64(10 << 60)
_HALF_UNIT = np.uint64(1 << 59)
_ERROR = np.uint64(1 << 25)
_LOG10_OF_2 = 1_262_611
_LOG10_OF_4_THIRDS = 524_031
_LOG2_OF_10 = 1_741_647
_FRACTION_BITS = 23
_FRACTION = np.uint64((1 << _FRACTION_BITS) - 1)
_HIDDEN = np.uint64(1 << _FRACTION_BITS)
_BIAS = 150


@njit(inline="always")
def _round_to_odd(power: Any, value: Any) -> Any:
    """Return the upper 32 of the 96 bits of a product, rounded to odd.

    The lowest bit of the result is also set if any lower bit of the product is set. The very last bit of the product
    does not count, because it is noise.
    """
    upper = (power >> _THIRTY_TWO) * value + (((power & _LOW) * value) >> _THIRTY_TWO)
    return (upper >> _THIRTY_TWO) | np.uint64((upper & _LOW) > _ONE)


@njit(inline="always")
def _shortest(bits: Any) -> Any:
    """Return the shortest decimal of a positive float32: its digits, which may end in zeros, and its power of ten.

    If several shortest decimals read back as the same float, return the closest of them. For most numbers, one product
    is exact enough to find this decimal. If a number is so close to a point where the result changes that the product
    is not exact enough, `_shortest_exactly` finds the decimal.
    """
    fraction = bits & _FRACTION
    exponent = np.int64(bits >> np.uint64(_FRACTION_BITS))
    significand = _HIDDEN | fraction
    power_of_two = exponent - _BIAS
    power = (power_of_two * _LOG10_OF_2) >> 22
    shift = np.uint64(power_of_two + ((-power * _LOG2_OF_10) >> 19) + 1)
    scale = _POWERS[-power - _LEAST_POWER]
    # In units of 10^power, the value is whole + rest / 2^64, and half the distance to its neighbours is half / 2^60.
    shifted = significand << shift
    low = (scale & _LOW) * shifted
    high = (scale >> _THIRTY_TWO) * shifted + (low >> _THIRTY_TWO)
    whole = high >> _THIRTY_TWO
    rest = high << _THIRTY_TWO | low & _LOW
    half = scale >> (np.uint64(5) - shift)
    last = whole % _TEN
    beyond_tens = last << _SIXTY | rest >> _FOUR
    until_tens = _TEN_UNITS - beyond_tens
    is_close = _is_close(beyond_tens, half) | _is_close(until_tens, half) | _is_close(rest >> _FOUR, _HALF_UNIT)
    if is_close or fraction == 0 or exponent == 0:
        return _shortest_exactly(bits)
    # The CPU cannot predict this choice, so the code has no branch here.
    up = until_tens < half
    tens = whole - last + np.uint64(up) * _TEN
    return tens if (beyond_tens < half) | up else whole + (rest >> np.uint64(63)), power


@njit(inline="always")
def _is_close(one: Any, other: Any) -> Any:
    """Return whether the order of two numbers, in units of 2^-60, is uncertain: each number has an error of less than
    2^25."""
    return one - other + _ERROR <= _ERROR + _ERROR


@kernel
def _shortest_exactly(bits: Any) -> Any:
    """Do the same as `_shortest` for every positive float32, even if the product in `_shortest` is not exact enough."""
    fraction = bits & _FRACTION
    exponent = np.int64(bits >> np.uint64(_FRACTION_BITS))
    significand, power_of_two = (_HIDDEN | fraction, exponent - _BIAS) if exponent else (fraction, 1 - _BIAS)
    if -_FRACTION_BITS <= power_of_two <= 0:
        whole = significand >> np.uint64(-power_of_two)
        if whole << np.uint64(-power_of_two) == significand:
            return whole, 0
    odd = significand & _ONE
    narrow = fraction == 0 and exponent > 1
    middle = _FOUR * significand
    power = (power_of_two * _LOG10_OF_2 - (_LOG10_OF_4_THIRDS if narrow else 0)) >> 22
    shift = np.uint64(power_of_two + ((-power * _LOG2_OF_10) >> 19) + 1)
    scale = _POWERS[-power - _LEAST_POWER]
    lower = _round_to_odd(scale, (middle - _TWO + np.uint64(narrow)) << shift) + odd
    value = _round_to_odd(scale, middle << shift)
    upper = _round_to_odd(scale, (middle + _TWO) << shift) - odd
    digits = value // _FOUR
    if digits >= _TEN:
        shorter = digits // _TEN
        below = lower <= _FORTY * shorter
        above = _FORTY * shorter + _FORTY <= upper
        if below != above:
            return shorter + np.uint64(above), power + 1
    below = lower <= _FOUR * digits
    above = _FOUR * digits + _FOUR <= upper
    if below != above:
        return digits + np.uint64(above), power
    tie = _FOUR * digits + _TWO
    round_up = value > tie or (value == tie and digits & _ONE != 0)
    return digits + np.uint64(round_up), power


@njit(inline="always")
def _length(value: Any) -> Any:
    """Return the number of digits of an unsigned number from 1 to 10^10."""
    # 1233 / 4096 is a little more than log10(2).
    estimate = ((np.int64(64) - leading_zeros(value)) * 1233) >> 12
    return estimate + (value >= _TENS[estimate])


@njit(inline="always")
def _eight_digits(value: Any) -> Any:
    """Return the digits of an unsigned number below 10^8 as eight bytes, with the first digit in the lowest byte.

    The number is split into groups of four digits, then of two, then of one.
    """
    upper = value // _TENS[4]
    fours = upper | (value - upper * _TENS[4]) << _THIRTY_TWO
    upper = (fours * np.uint64(10_486)) >> np.uint64(20) & np.uint64(0x0000007F_0000007F)
    twos = upper | (fours - upper * _HUNDRED) << np.uint64(16)
    upper = (twos * np.uint64(103)) >> np.uint64(10) & np.uint64(0x000F000F_000F000F)
    return upper | (twos - upper * _TEN) << np.uint64(8)


@njit(inline="always")
def _write_digits(to: int, value: Any, length: int) -> Any:
    """Write an unsigned number in `length` digits, with leading zeros; return the end address."""
    position = to + length
    while position - 2 >= to:
        rest = value // _HUNDRED
        position -= 2
        store_u16(position, np.int64(_PAIRS[value - rest * _HUNDRED]))
        value = rest
    if position > to:
        store_u8(to, _ZERO + np.int64(value % _TEN))
    return to + length


@njit(inline="always")
def write_integer(to: int, value: int) -> Any:
    """Write an int64; return the end address."""
    magnitude = np.uint64(value)
    if value < 0:
        store_u8(to, _MINUS)
        to += 1
        magnitude = np.uint64(0) - magnitude
    length = 1
    while length < 20 and magnitude >= _TENS[length]:
        length += 1
    return _write_digits(to, magnitude, length)


@njit(inline="always")
def write_float32(to: int, bits: int) -> Any:
    """Write a finite float32, given as its 32 bits, and return the end address. The text reads back as the same float.

    Up to 8 bytes after the end are overwritten.
    """
    if bits & 0x80000000:
        store_u8(to, _MINUS)
        to += 1
    magnitude = np.uint64(bits & 0x7FFFFFFF)
    if magnitude == 0:
        store_i64(to, _ZERO_POINT_ZEROS)
        return to + 3
    digits, exponent = _shortest(magnitude)
    length = _length(digits)
    point = length + exponent
    # The nine digits that start with the first digit of the number. Zeros at the end are not significant.
    nine = digits * _TENS[9 - length]
    leading = nine // _TENS[8]
    others = _eight_digits(nine - leading * _TENS[8])
    significant = 9 - (leading_zeros(others) >> 3)
    first = _ZERO + np.int64(leading)
    text = others | _ZEROS
    if 0 < point <= 16:
        store_u8(to, first)
        store_i64(to + 1, np.int64(text))
        if point < significant:
            store_i64(to + point + 1, np.int64(text >> np.uint64(8 * (point - 1))))
            store_u8(to + point, _POINT)
            return to + significant + 1
        store_i64(to + 9, np.int64(_ZEROS))
        store_u16(to + point, _POINT | _ZERO << 8)
        return to + point + 2
    if -5 < point <= 0:
        store_i64(to, _ZERO_POINT_ZEROS)
        to += 2 - point
        store_u8(to, first)
        store_i64(to + 1, np.int64(text))
        return to + significant
    store_u8(to, first)
    store_u8(to + 1, _POINT)
    store_i64(to + 2, np.int64(text))
    to += significant + 1 if significant > 1 else 1
    store_u8(to, _E)
    scientific = point - 1
    store_u8(to + 1, _MINUS if scientific < 0 else _PLUS)
    return write_integer(to + 2, abs(scientific))


@njit(inline="always")
def write_time(to: int, microseconds: int) -> Any:
    """Write a time, in microseconds since 1970, as a quoted RFC 3339 text in UTC; return the end address.

    A fraction of a second is written in three or six digits, or not at all if it is zero. The time must be in the
    range of `shoal.engine.base.times`.

    Source of the calendar: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    """
    # Times are counted from the first of March of the year 0, so all numbers are unsigned and fast to divide.
    time = np.uint64(microseconds + _EPOCH_SINCE_0000)
    seconds = time // _MILLION
    fraction = time - seconds * _MILLION
    days = seconds // _DAY
    rest = seconds - days * _DAY
    era = days // _ERA
    day_of_era = days - era * _ERA
    year_of_era = (
        day_of_era - day_of_era // np.uint64(1_460) + day_of_era // np.uint64(36_524) - day_of_era // np.uint64(146_096)
    ) // np.uint64(365)
    day_of_year = day_of_era - (np.uint64(365) * year_of_era + year_of_era // _FOUR - year_of_era // _HUNDRED)
    shifted_month = (np.uint64(5) * day_of_year + _TWO) // np.uint64(153)
    day = day_of_year - (np.uint64(153) * shifted_month + _TWO) // np.uint64(5) + _ONE
    month = shifted_month + np.uint64(3) if shifted_month < _TEN else shifted_month - np.uint64(9)
    year = year_of_era + era * np.uint64(400) + np.uint64(month <= _TWO)
    minutes = rest // _SIXTY
    hours = minutes // _SIXTY
    store_u8(to, _QUOTE)
    to = _write_part(to + 1, year, 4, _MINUS)
    to = _write_part(to, month, 2, _MINUS)
    to = _write_part(to, day, 2, _T)
    to = _write_part(to, hours, 2, _COLON)
    to = _write_part(to, minutes - hours * _SIXTY, 2, _COLON)
    to = _write_part(to, rest - minutes * _SIXTY, 2, _POINT)
    milliseconds = fraction // _THOUSAND
    if fraction == 0:
        store_u8(to - 1, _Z)
    elif fraction == milliseconds * _THOUSAND:
        to = _write_part(to, milliseconds, 3, _Z)
    else:
        to = _write_part(to, fraction, 6, _Z)
    store_u8(to, _QUOTE)
    return to + 1


@njit(inline="always")
def _write_part(to: int, value: Any, length: int, end: int) -> Any:
    to = _write_digits(to, value, length)
    store_u8(to, end)
    return to + 1
