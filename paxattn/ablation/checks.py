"""What every value of a sweep is asked first: is it a number, and one that a run can have?"""

from typing import Any

MOST_COUNT, MOST_NUMBER = 2**31 - 1, 3e38
"""Of int32 and float32, which the device counts and reckons in."""


def check_count(name: str, value: Any, *, least: int = 1, most: int = MOST_COUNT) -> None:
    """Refuses what is no integer in [least, most]; True is none."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, must be an integer in [{least}, {most}].")


def check_number(name: str, value: Any, *, most: float = MOST_NUMBER) -> None:
    """Refuses what is no number in [0, most]; neither NaN nor True is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{name} is {value!r}, must be a number in [0, {most:g}].")
