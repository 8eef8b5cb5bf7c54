"""The test pass of small convolutional networks on the CPU, compiled from ``convolutions.cpp``.

torch's convolutions of 6 and 16 channels leave most of a vector unit idle, and written as products
(`ddsweep.core.layers`) they take windows and outputs through memory that nothing needs once they are pooled.
Here a block of images goes through convolution, max-pool, bias and ReLU in registers. The mathematics is the
same, the order of sums is not.

The code is compiled once, in a second or so, for the processor at hand, and kept in a private folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.core.layers import BiasReLU, Conv, Layer, MaxPool, Params, Tape
from ddsweep.core.own_network import written_out
from ddsweep.errors import UserError

__all__ = ["COMPILERS", "NativeLogits", "find_compiler", "native_logits", "private_folder"]

COMPILERS = ("c++", "g++", "clang++")

_SOURCE = Path(__file__).with_name("convolutions.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-fast-math", "-ffp-contract=fast", "-shared", "-fPIC")
"""Some compilers use inexact arithmetic by default, and would lose NaN, so it is switched off. Contraction is
switched on after that, because clang would switch it off as well."""

_SIZE = 5
"""The size of the compiled convolutions, in pixels."""

_TIMEOUT = 120
"""The time limit of the compiler in seconds; it needs one."""

_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


# ------------------------------------------------------------------------------------- compiling it


def find_compiler() -> str | None:
    """The path of a C++ compiler: that of ``CXX``, or the first existing one of `COMPILERS`."""
    own = os.environ.get("CXX")
    return next((path for name in ([own] if own else COMPILERS) if (path := shutil.which(name))), None)


def private_folder() -> Path:
    """The folder of compiled code: ``ddsweep/compiled`` in the user's cache, closed to others. Raises
    `UserError` for a folder that others may write to, because code in it is run."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UserError(
            "resources.compile: there is no home folder to keep compiled code in; set XDG_CACHE_HOME to a "
            "folder of your own, or compile: off"
        ) from error
    folder = base / "ddsweep" / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise UserError(
            f"resources.compile: {folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder "
            "of your own, or compile: off"
        ) from error
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError(
            f"resources.compile: {folder} is open to others, and what lies there is run; `chmod 700` it, set "
            "XDG_CACHE_HOME to a folder of your own, or compile: off"
        )
    return folder


def _processor() -> str:
    """Identifies this processor and compiler: compiled code is for these alone, and many nodes see one home
    folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} said: {' '.join(done.stderr.split())[:200]}")
    return done.stdout


def _compiled(compiler: str) -> Path:
    what = (_SOURCE.read_text(), *_FLAGS, compiler, _run(compiler, "--version"), _processor())
    key = hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]
    path = private_folder() / f"convolutions-{key}.so"
    if not path.exists():
        # Compiled to another name first: other processes may compile the same code at the same time, and any
        # of them may be killed.
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            begun = Path(place) / path.name
            _run(compiler, *_FLAGS, str(_SOURCE), "-o", str(begun))
            with begun.open("rb") as file:
                os.fsync(file.fileno())
            begun.replace(path)
    return path


def _library() -> ctypes.CDLL | None:
    """The compiled code; None without a compiler and, with a warning, if ``CXX`` is not a compiler, or if
    compiling or loading fails."""
    with _one_at_a_time:
        return _loaded()


@cache
def _loaded() -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        if os.environ.get("CXX"):
            _log.warning("test passes are not compiled: CXX, %r, is not there", os.environ["CXX"])
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError, UserError) as error:
        _log.warning("test passes are not compiled: %s", error)
        return None
    library.lanes.restype = ctypes.c_long
    whole, pointer = ctypes.c_long, ctypes.c_void_p
    library.forward.argtypes = [pointer, *[whole] * 5, pointer, pointer, whole, pointer]
    library.forward.restype = None
    return library


# ------------------------------------------------------------------------------------- using it


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_long) for name in ("outputs", "channels", "high", "wide")),
    ]


def _pooled(side: int) -> int:
    return (side - _SIZE + 1) // 2


def _fused_layers(network: nn.Module) -> int:
    """The number of convolutions at the start of ``network`` with a max-pool, bias and ReLU after them and,
    except for the first one, without padding. They are compiled if they have 5x5 pixels."""
    layers = written_out(network) or ()
    count = 0
    while True:
        match layers[3 * count : 3 * count + 3]:
            case [Conv(bias=False, padding=padding), MaxPool(), BiasReLU()] if padding == 0 or count == 0:
                count += 1
            case _:
                return count


def native_logits(network: nn.Module) -> NativeLogits | None:
    """Compiled code for the logits of ``network``; None for a network or a machine without it."""
    count = _fused_layers(network)
    sizes = {value.shape[-1] for value in network.parameters() if value.dim() == 4}
    library = _library() if count and sizes == {_SIZE} else None
    return None if library is None else NativeLogits(library, written_out(network) or (), count)


@dataclass(frozen=True)
class NativeLogits:
    """The first ``count`` times three ``layers`` are compiled; the others are torch's."""

    library: ctypes.CDLL
    layers: Sequence[Layer]
    count: int

    @torch.no_grad()
    def logits(self, params: Params, images: Tensor) -> Tensor:
        """``[K, n, classes]`` of ``images [n, c, h, w]``, all in float32 on the CPU."""
        x = self._convolved(params, images)
        for layer in self.layers[3 * self.count :]:
            x = layer.forward(params, x, Tape())
        return x[..., : len(images)].transpose(1, 2)

    def _convolved(self, params: Params, images: Tensor) -> Tensor:
        """``[K, channels, h, w, N]``, N a multiple of the images in a vector; images beyond n are blank."""
        convolutions = [layer for layer in self.layers[: 3 * self.count] if isinstance(layer, Conv)]
        lanes, n, padding = self.library.lanes(), len(images), convolutions[0].padding
        blocks = -(-n // lanes)
        x = F.pad(images, (padding,) * 4 + (0, 0) + (0, blocks * lanes - n))
        _, channels, high, wide = x.shape
        x = x.view(blocks, lanes, channels, high, wide).permute(0, 2, 3, 4, 1).contiguous()
        described, weights, sizes = [], [], []
        for layer in convolutions:
            weight, bias = (params[f"{layer.name}.{kind}"].contiguous() for kind in ("weight", "bias"))
            networks, outputs, inputs, *size = weight.shape
            types = {weight.dtype, bias.dtype, x.dtype}
            if (inputs, size, types) != (channels, [_SIZE] * 2, {torch.float32}):
                raise ValueError(f"{layer.name}: no {tuple(weight.shape)} of {weight.dtype} is compiled")
            weights += [weight, bias]  # kept alive during the call
            described.append(_Layer(weight.data_ptr(), bias.data_ptr(), outputs, channels, high, wide))
            channels, high, wide = outputs, _pooled(high), _pooled(wide)
            sizes.append(channels * high * wide)
        y = x.new_empty(networks, channels, high, wide, blocks * lanes)

        def compute(begin: int, end: int) -> None:
            between = x.new_empty(2 * max(sizes) * lanes)
            self.library.forward(
                *(x.data_ptr(), blocks, begin, end, networks, self.count, (_Layer * self.count)(*described)),
                *(between.data_ptr(), max(sizes), y.data_ptr()),
            )

        threads = max(1, min(torch.get_num_threads(), blocks))
        if threads == 1:
            compute(0, blocks)
        else:
            ends = [blocks * i // threads for i in range(threads + 1)]
            list(_workers(threads).map(compute, ends[:-1], ends[1:]))
        return y


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "native")
