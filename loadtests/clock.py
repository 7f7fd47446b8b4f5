"""Waiting for a point in time, to a tenth of a millisecond. Runs under gevent."""

import ctypes
import os
import sys
import time

import gevent

# libev's epoll waits whole milliseconds, rounded up: a request would leave 0.7 ms late on
# average. A timerfd wakes the same loop at the nanosecond that it was set to.
_CLOCK_MONOTONIC, _ABSTIME = 1, 1
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Timerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """Wakes one greenlet at times of time.perf_counter_ns. Close it after use."""

    def __init__(self) -> None:
        self._fd = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _FLAGS)
        if self._fd >= 0:
            self._watcher = gevent.get_hub().loop.io(self._fd, 1)

    def wait_until(self, time_ns: int) -> None:
        """Returns at `time_ns`, or at once if it is past; other greenlets run meanwhile."""
        left = time_ns - time.perf_counter_ns()
        if left <= 0:
            gevent.sleep(0)
        elif self._fd < 0:
            gevent.sleep(left / 1e9)
        else:
            at = _Timerspec(_Timespec(0, 0), _Timespec(*divmod(time_ns, 10**9)))
            self._libc.timerfd_settime(self._fd, _ABSTIME, ctypes.byref(at), None)
            gevent.get_hub().wait(self._watcher)
            os.read(self._fd, 8)

    def close(self) -> None:
        """Frees the timer."""
        if self._fd >= 0:
            self._watcher.close()
            os.close(self._fd)
            self._fd = -1
