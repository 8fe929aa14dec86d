"""Thread-local attributes, for objects that several threads use at different steps of a run.

```python
class Counter:
    number = PerThread(0)                        # each thread counts from 0

    def __init__(self) -> None:
        self._thread_state = ThreadState()       # holds the values
```
"""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ThreadState(threading.local):
    """Values of the `PerThread` attributes of one object; copying or pickling it empties it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class PerThread(Generic[T]):
    """A thread-local attribute.

    Its owner must have an attribute `_thread_state`, a `ThreadState`.

    Args:
        default: value in threads that have not set the attribute.
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, _: type | None = None) -> T:
        value: T = getattr(owner._thread_state, self._name, self._default)
        return value

    def __set__(self, owner: Any, value: T) -> None:
        setattr(owner._thread_state, self._name, value)
