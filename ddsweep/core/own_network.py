"""Networks of a user's own: built, examined once, and called as functions of all that they hold.

A small one that is a chain of common layers is computed by these, as networks that ship are
(`ddsweep.core.chains`). The rest of this text is of all others.

The mapping of such a network (``name -> [K, ...]``) has more than weights: its buffers, parameters that are
not trained, and under `DRAWS`, if it draws random numbers in training, the seed of each network's. So all its
values travel with its weights, and derivatives are by the weights alone.

A pass is of one of three kinds. ``train``: an inner step, in the module's training mode: batch norm takes the
statistics of the batch and moves its running ones, dropout draws. ``judge``: the outer loss on real images:
as in tests, but norms take the statistics of the batch, for running ones are a few steps old, and so that
the loss depends on nothing but weights and images. ``test``: evaluation mode, by running statistics.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ddsweep.catalog import CodeRef
from ddsweep.core.chains import chain_of
from ddsweep.core.explicit import Explicit
from ddsweep.core.layers import Layer, Params
from ddsweep.core.objective import losses_per_network
from ddsweep.errors import UserError
from ddsweep.own_code import loaded_code, place_and_error
from ddsweep.seeds import derive_seed

__all__ = [
    "DRAWS",
    "Kind",
    "Traits",
    "draws_of",
    "forward_own",
    "initial_rest",
    "is_built_alike",
    "one_pass",
    "own_network",
    "parts",
    "rest_after",
    "rest_at",
    "traits_of",
    "written_out",
]

DRAWS = "<draws>"
"""int64 ``[K]`` in the mapping of networks that draw: the seed of each."""

Kind = Literal["train", "judge", "test"]

_SMALL = 2_000_000
"""Operations of an image in one pass: up to these, layers that are written out are faster than autograd on a
CPU (docs/log/2026-11-29-own-networks.md)."""

_HOME = "_ddsweep_traits"


@dataclass(frozen=True)
class Traits:
    """The properties of a network, observed when it was built.

    ``trained`` and ``rest`` name its parameters, and its buffers and frozen parameters. In training it
    ``moves`` buffers, and ``draws`` random numbers; ``mixes`` says that its logits for one image depend on
    the others of a batch in a ``judge`` pass; ``head`` is the linear layer that gives the logits, if any, and
    ``layers`` are the same network with derivatives written out, if it is a chain of such layers and small.
    ``make(seed)`` builds it again. Each network needs that if ``differs``: if building draws buffers, or
    parameters that no law fills.
    """

    make: Callable[[int], nn.Module]
    trained: tuple[str, ...]
    rest: tuple[str, ...]
    moves: bool
    draws: bool
    mixes: bool
    differs: bool
    head: str | None
    layers: tuple[Layer, ...] | None


def written_out(network: nn.Module) -> Sequence[Layer] | None:
    """The layers of ``network`` with their derivatives written out; None if autograd takes them."""
    traits = traits_of(network)
    if traits is not None:
        return traits.layers
    layers: Sequence[Layer] | None = getattr(network, "layers", None)
    return layers


def traits_of(network: nn.Module) -> Traits | None:
    """None for a network that comes with ddsweep, and for a plain module."""
    return getattr(network, _HOME, None)


# ---------------------------------------------------------------------------------------- building


@lru_cache(maxsize=8)
def own_network(ref: CodeRef, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The module of ``ref`` for images of ``shape`` (c, h, w), on the CPU, with its observed properties; one
    for all in a process.

    It is called with its options, and by name with those of ``shape``, ``channels``, ``in_channels``,
    ``side``, ``image_size``, ``classes`` and ``num_classes`` that it takes. Raises `UserError` if its code
    was not loaded, for a call that fails, and for a module that does not make ``[N, classes]`` from images.
    """
    # Faster kernels of attention have no second derivative.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    factory = loaded_code(ref)
    with _told(f"network: {ref}", ref):
        given = _given(factory, shape, classes, set(ref.arguments))

    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("own", seed))  # weights have seed itself
            module = factory(**{**given, **ref.arguments})  # lists anew: the factory may change them
        return module  # type: ignore[no-any-return]

    called = (
        f"{ref.name}({', '.join(f'{key}={value!r}' for key, value in {**given, **ref.arguments}.items())})"
    )
    with _told(f"network: {ref}: {called}", ref):
        module, other = make(0), make(1)
    if not isinstance(module, nn.Module):
        raise UserError(f"network: {ref}: {called} gives a {type(module).__name__}, not a torch.nn.Module")
    for layer in module.modules():  # autograd may need values that would be overwritten
        if getattr(layer, "inplace", None) is True:
            layer.inplace = False  # type: ignore[assignment]
    trained = tuple(name for name, value in module.named_parameters() if value.requires_grad)
    frozen = [name for name, value in module.named_parameters() if not value.requires_grad]
    if not trained:
        raise UserError(f"network: {ref}: {called} has no parameters to train")
    rest = (*frozen, *(name for name, _ in module.named_buffers()))
    free = (name for name in trained if not _has_law(module, name))
    with _told(f"network: {ref}: {called}: for images of {'x'.join(map(str, shape))}", ref):
        differs = not _same_values(module, other, (*rest, *free))
        seen = _look_at(module, trained, rest, shape, classes)
    setattr(module, _HOME, Traits(make, trained, rest, differs=differs, **seen))
    return module


@contextmanager
def _told(what: str, ref: CodeRef) -> Iterator[None]:
    """Any error of a user's code, as one message with its place."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        raise UserError(f"{what}: {place_and_error(error, ref)}") from error


def _given(factory: Any, shape: tuple[int, int, int], classes: int, options: set[str]) -> dict[str, Any]:
    """The arguments of ``factory`` about the data, but for ``options`` of the user's. A factory that passes
    others on (``**kwargs``, as torchvision's do) gets ``num_classes``."""
    try:
        takes = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    known = {
        **{"shape": shape, "channels": shape[0], "in_channels": shape[0]},
        **{"in_chans": shape[0], "side": shape[1], "image_size": shape[1], "img_size": shape[1]},
        **{"classes": classes, "num_classes": classes},
    }
    given = {name: value for name, value in known.items() if name in takes and name not in options}
    if shape[1] != shape[2] and (one := given.keys() & {"side", "image_size", "img_size"}):
        raise UserError(
            f"it takes {' and '.join(sorted(one))}, and the images are {shape[1]} x {shape[2]} pixels; take "
            "shape, which is (channels, height, width)"
        )
    passes_on = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in takes.values())
    if passes_on and not {"classes", "num_classes"} & (given.keys() | options):
        given["num_classes"] = classes
    return given


def _member(module: nn.Module, name: str) -> Tensor:
    home, _, own = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(home), own)
    return value.detach()


def _same_values(module: nn.Module, other: nn.Module, names: Iterable[str]) -> bool:
    """Whether two networks have the same parameters or buffers of these names."""
    return all(torch.equal(_member(module, name), _member(other, name)) for name in names)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in (*module.named_parameters(), *module.named_buffers())}


def is_built_alike(network: nn.Module, times: int, shape: tuple[int, int, int]) -> bool:
    """Whether a seed decides what the user's own ``network`` for images of ``shape`` is, but for weights that
    a law fills: it is built so often. Other generators than torch's go on from one time to the next, also
    those whose numbers end up in no tensor."""
    traits = traits_of(network)
    assert traits is not None
    first = traits.make(0)
    free = [name for name in traits.trained if not _has_law(first, name)]
    for _ in range(times - 1):
        other = traits.make(0)
        if _shapes(first) != _shapes(other) or not _same_values(first, other, (*traits.rest, *free)):
            return False
        if not _same_answers(first, other, shape):
            return False
    return True


def _same_answers(first: nn.Module, other: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether ``other`` says the same to an image as ``first`` if it has its weights. True for what cannot be
    compared: one that does not run, or does not say the same twice, is refused for that."""
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))

    def answer(module: nn.Module) -> Tensor:
        torch.manual_seed(0)
        found: Tensor = module.eval()(images)
        return found

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            other.load_state_dict(first.state_dict())
            said, again, theirs = answer(first), answer(first), answer(other)
        except Exception:
            return True
    return not torch.equal(said, again) or torch.equal(said, theirs)


def _has_law(module: nn.Module, name: str) -> bool:
    """Whether a law of initial weights fills it (`ddsweep.core.init`)."""
    home, _, kind = name.rpartition(".")
    layer = module.get_submodule(home)
    return (
        kind in ("weight", "bias")
        and getattr(layer, "weight", None) is not None
        and not isinstance(layer, nn.PReLU)
    )


def _look_at(
    module: nn.Module,
    trained: Sequence[str],
    rest: Sequence[str],
    shape: tuple[int, int, int],
    classes: int,
) -> dict[str, Any]:
    """Three passes over two images: their output, and what changes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *shape, generator=generator)
    values = {name: _member(module, name) for name in (*trained, *rest)}
    last: list[tuple[str, Tensor]] = []

    def remember(name: str) -> Callable[..., None]:
        return lambda layer, given, output: last.append((name, output))

    hooks = [
        layer.register_forward_hook(remember(name))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            drawing = _Drawing(0)
            logits, after = one_pass(module, values, rest, images, "train", drawing)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise UserError(f"it makes a {kind}; forward must return the logits alone, a tensor")
    if tuple(logits.shape) != (2, classes):
        raise UserError(
            f"it makes {list(logits.shape)} of 2 images, not [2, {classes}], a logit for each class; it is "
            "told of the data by those of the arguments shape, channels, in_channels, in_chans, side, "
            "image_size, img_size, classes and num_classes that it has"
        )
    moves = any(not torch.equal(values[name], after[name]) for name in rest)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            both, _ = one_pass(module, values, rest, images, "judge")
        try:
            alone, _ = one_pass(module, values, rest, images[:1], "judge")
            mixes = not torch.allclose(both[:1], alone, rtol=1e-3, atol=1e-5)
        except ValueError:  # batch norm of one value has no spread
            mixes = True
    head = last[-1][0] if last and torch.equal(last[-1][1], logits) else None
    seen: dict[str, Any] = {"moves": moves, "draws": drawing.count > 0, "mixes": mixes, "head": head}
    large = counter.get_total_flops() > _SMALL * len(images)
    layers = None if large or rest or mixes or drawing.count else chain_of(module)
    if layers is not None and not _computes_the_same(Explicit(layers), module, values, images):
        layers = None
    return {**seen, "layers": layers}


def _computes_the_same(written: Explicit, module: nn.Module, values: Params, images: Tensor) -> bool:
    """Whether ``written`` has the losses and gradients of ``module`` with random weights, in every kind of
    pass; in float64, where rounding is small."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(len(images))
    leaves, stacked = {}, {}
    for name, value in values.items():
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        drawn /= math.sqrt(max(1, value[0].numel()))  # so that values keep their size from layer to layer
        leaves[name], stacked[name] = drawn.requires_grad_(), drawn.detach()[None]
    try:
        loss, gradient = written.loss_and_gradient(stacked, images.double(), targets)
        for kind in ("train", "judge", "test"):
            logits, _ = one_pass(module, leaves, (), images.double(), kind)
            expected = losses_per_network(logits[None], targets)
            of_module = torch.autograd.grad(expected.sum(), list(leaves.values()))
            pairs = [(loss, expected.detach()), *zip(gradient.values(), of_module, strict=True)]
            if not all(_close(ours.reshape(its.shape), its) for ours, its in pairs):
                return False
    except (KeyError, ValueError, RuntimeError):  # weights of other names or shapes; no float64
        return False
    return True


def _close(ours: Tensor, its: Tensor) -> bool:
    return bool((ours - its).abs().max() <= 1e-9 * (1 + its.abs().max()))


# ------------------------------------------------------------------------------------ what it holds


def initial_rest(network: nn.Module, seed: int) -> tuple[nn.Module, Params]:
    """The module with the initial values of network ``seed``, and all that it holds besides its weights:
    ``name -> [...]``, and `DRAWS`."""
    traits = traits_of(network)
    assert traits is not None
    source = traits.make(seed) if traits.differs else network
    rest = {name: _member(source, name).clone() for name in traits.rest}
    if traits.draws:
        rest[DRAWS] = torch.tensor(seed, dtype=torch.int64)
    return source, rest


def parts(network: nn.Module, params: Params) -> tuple[Params, Params]:
    """The weights in the mapping of some networks, and the rest."""
    if traits_of(network) is None:
        return params, {}
    names = set(traits_of(network).trained)  # type: ignore[union-attr]
    weights = {name: value for name, value in params.items() if name in names}
    return weights, {name: value for name, value in params.items() if name not in names}


def rest_at(rest: Params, step: int) -> Params:
    """``rest`` for inner step ``step``, with that step's own draws."""
    if DRAWS not in rest:
        return rest
    seeds = [derive_seed("dropout", seed, step) for seed in rest[DRAWS].tolist()]
    return {**rest, DRAWS: torch.tensor(seeds, dtype=torch.int64, device=rest[DRAWS].device)}


def rest_after(network: nn.Module, weights: Params, rest: Params, images: Tensor, step: int) -> Params:
    """``rest`` after a ``train`` pass of step ``step`` with these weights. Buffers carry no derivative."""
    traits = traits_of(network)
    if traits is None or not traits.moves:
        return rest
    with torch.no_grad():
        _, after = forward_own(network, {**weights, **rest_at(rest, step)}, images, "train")
    return {**after, **{name: value for name, value in rest.items() if name == DRAWS}}


def draws_of(network: nn.Module, seed: int, step: int) -> AbstractContextManager[object]:
    """Within it ``network`` draws what the network of this ``seed`` draws in inner step ``step``."""
    traits = traits_of(network)
    if traits is None or not traits.draws:
        return nullcontext()
    return _Drawing(derive_seed("dropout", seed, step))


# ------------------------------------------------------------------------------------------ passes


def forward_own(network: nn.Module, params: Params, images: Tensor, kind: Kind) -> tuple[Tensor, Params]:
    """Logits ``[K, N, classes]``, one network after another, and their ``rest`` afterwards."""
    traits = traits_of(network)
    assert traits is not None
    own = images.dim() == 5
    seeds = params[DRAWS].tolist() if DRAWS in params else None
    unbound = {name: value.unbind(0) for name, value in params.items() if name != DRAWS}
    logits, afters = [], []
    for k in range(len(next(iter(params.values())))):
        values = {name: value[k] for name, value in unbound.items()}
        drawing = _Drawing(seeds[k]) if kind == "train" and seeds is not None else None
        found, after = one_pass(network, values, traits.rest, images[k] if own else images, kind, drawing)
        logits.append(found)
        afters.append(after)
    rest = {name: torch.stack([after[name] for after in afters]) for name in traits.rest}
    return torch.stack(logits), rest


def one_pass(
    module: nn.Module,
    values: Params,
    rest: Sequence[str],
    images: Tensor,
    kind: Kind,
    drawing: _Drawing | None = None,
) -> tuple[Tensor, Params]:
    """Logits of one network, and its ``rest`` afterwards."""
    module.train(kind == "train")
    if kind == "judge":
        for layer in module.modules():
            if isinstance(layer, _NormBase):
                layer.training = True
    # A module writes to copies; a value that it puts in the place of a buffer is in `held` afterwards.
    held = {**values, **{name: values[name].clone() for name in rest}}
    held |= {name: held[first] for name, first in _aliases(module) if first in held}
    with drawing or nullcontext():
        # Not tied by torch, which leaves a layer with two names with the tensors of the call.
        logits: Tensor = functional_call(module, held, (images,), tie_weights=False)
    return logits, {name: held[name].detach() for name in rest}


def _aliases(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(another name, first name) of each tensor that several layers share."""
    first: dict[int, str] = {}
    for home, layer in module.named_modules():
        for own, value in (*layer._parameters.items(), *layer._buffers.items()):
            name = f"{home}.{own}" if home else own
            if value is not None and first.setdefault(id(value), name) != name:
                yield name, first[id(value)]


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it all random numbers come from a separate generator on the CPU. So a network draws the same on
    every device, and independently of other draws of the process."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.count += 1
        if func is torch.ops.aten.native_dropout.default:
            return self._dropout(*args, **kwargs)
        func = _with_generator(func)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        device = torch.device(kwargs.get("device") or (first.device if first is not None else "cpu"))
        if device.type == "cpu":
            return func(*args, **{**kwargs, "generator": self.generator})
        here = {**kwargs, "generator": self.generator, **({"device": "cpu"} if "device" in kwargs else {})}
        drawn = func(*((first.cpu(), *args[1:]) if first is not None else args), **here)
        return first.copy_(drawn) if first is not None and func._schema.is_mutable else drawn.to(device)

    def _dropout(self, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        """aten's dropout of a GPU, which takes no generator."""
        if train is False or p == 0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        keep = torch.rand(x.shape, generator=self.generator, dtype=torch.float32) >= p
        keep = keep.to(x.device)
        return x * keep * (1 / (1 - p) if p < 1 else 0.0), keep


def _with_generator(func: Any) -> Any:
    """The overload of a torch operation that takes a generator."""
    names = {"default": "generator", "low": "low_generator"}
    other = getattr(func.overloadpacket, names.get(func._overloadname, ""), None)
    for found in (func, other):
        if found is not None and any(item.name == "generator" for item in found._schema.arguments):
            return found
    raise UserError(
        f"it draws random numbers by {func}, which no seed of a trial reaches; use torch.nn.Dropout, "
        "torch.nn.functional.dropout, or torch.rand and its like"
    )
