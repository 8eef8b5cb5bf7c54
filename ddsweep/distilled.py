"""The distilled set: images, labels, rates, and all that is needed to apply them, in one value."""

from __future__ import annotations

import base64
import copy
import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.core.images import LabelledImages, class_labels, normalise
from ddsweep.core.init import draw_network, draw_state
from ddsweep.core.memory import is_out_of_memory
from ddsweep.core.networks import Params, build_network
from ddsweep.core.own_network import draws_of, traits_of
from ddsweep.core.recipe import Recipe, held_out_loop
from ddsweep.core.task import known_seed
from ddsweep.core.training import Batches, rate_at
from ddsweep.errors import CheckpointError, SettingError
from ddsweep.paths import user_path
from ddsweep.results.artifacts import load_tensors, save_tensors, tensor_sha256
from ddsweep.results.files import writing
from ddsweep.results.grid import grid_png
from ddsweep.seeds import derive_seed
from ddsweep.start_set import is_unsorted

__all__ = ["DistilledSet", "apply"]


_ORDERS = {
    "fixed": "batches 0..S-1 in order, S*E steps, rates[t] at step t",
    "shuffled": "S*E steps; in epoch e the S batches in random order, batch s with rates[e*S + s]",
    "sampled": "S*E steps; step t takes m random images of each class, with rates[t]",
}
_OPTIMIZERS = {
    "gd": "gradient descent on mean cross-entropy",
    "momentum": "heavy-ball momentum {mu:g} on mean cross-entropy: u = {mu:g} u + g, w -= rate u",
    "adam": "Adam (0.9, 0.999) on mean cross-entropy, epsilon 1e-8 (squared, inside the root)",
}


@dataclass(frozen=True)
class DistilledSet:
    """``images [S, n, c, h, w]`` float32 in normalised pixel space, ``labels [S, n]`` int64 (or, if learned,
    probabilities ``[S, n, classes]`` float32), ``rates [T]``.

    ``recipe`` says how networks are trained on it: by default step t of T = S*E is one of plain gradient
    descent on mean cross-entropy with rate ``rates[t]``, on batch t mod S. With its order shuffled or sampled
    every network goes through the batches in an order of its own (`ddsweep.core.order`). A set whose method
    learns no rates has ``tuned`` as well: the rate and the number of epochs that were best on validation
    images, where ``recipe`` has the best rate for the epochs of its trial.

    Real images go into the same space by ``(pixels / 255 - mean) / std`` per channel, and, with
    ``spec.whitening``, by that of their training part (``load_splits`` with ``whitening`` gives them so).
    ``spec`` says which networks it was made for. ``imported`` says which file of others it is from, or began
    with (`ddsweep.imported`): then nobody knows which training images have made it.
    """

    images: Tensor
    labels: Tensor
    rates: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    spec: TrialSpec
    recipe: Recipe
    tuned: Recipe | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    imported: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"DistilledSet({spec.trial_id}: {spec.dataset.name}, {spec.dataset.classes} classes, "
            f"images_per_class={spec.images_per_class}, inner_steps={spec.inner_steps}, "
            f"inner_epochs={spec.inner_epochs}, init={spec.init}, network={spec.network})"
        )

    @property
    def classes(self) -> Tensor:
        """int64 ``[S, n]``: the class of each image; of learned labels, that with the largest number."""
        return self.labels.argmax(-1) if self.labels.is_floating_point() else self.labels

    def _repr_html_(self) -> str:
        """In a notebook: a description, and the images, unless they are whitened: the set cannot bring those
        back."""
        text = f"<div>{html.escape(repr(self))}</div>"
        if self.spec.whitening != "none":
            return text
        picture = grid_png(self.images, self.mean, self.std, self.classes, self.class_names)
        return f'{text}<img src="data:image/png;base64,{base64.b64encode(picture).decode()}">'

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DistilledSet:
        """Read ``distilled.safetensors``. Raises `CheckpointError` if it is missing, torn, altered, or
        another kind of file, `UnreadableError` if the system cannot read it, and `SettingError` if this
        version does not have a setting of it."""
        tensors, header = load_tensors(path)
        if header.get("kind") != "distilled":
            raise CheckpointError(f"{path}: holds a {header.get('kind', 'file')}, not a distilled set")
        try:
            return cls.from_tensors(tensors, header)
        except SettingError as error:
            raise SettingError(f"{path}: {error}") from None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> DistilledSet:
        spec = TrialSpec.from_dict(header["spec"])
        return cls(
            images=tensors["images"],
            labels=tensors["labels"],
            rates=tensors["rates"],
            mean=tuple(header["mean"]),
            std=tuple(header["std"]),
            class_names=tuple(header["class_names"]),
            spec=spec,
            recipe=Recipe.from_dict(header["recipe"]) if "recipe" in header else Recipe.of(spec),
            tuned=Recipe.from_dict(header["tuned"]) if header.get("tuned") else None,
            provenance=header.get("provenance", {}),
            imported=header.get("imported"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set as `load` reads it, one file of safetensors; an old file is replaced. Raises
        `UserError` if it cannot be written."""
        file = user_path(path)
        with writing(file):
            save_tensors(file, self.tensors(), self.header(), file.parent)

    def batches(self, recipe: Recipe) -> LabelledImages:
        """Images ``[S, n, c, h, w]`` with the labels that ``recipe`` asks for: the learned ones, or the
        classes for which the images stand, by their places or, in an import that could not be sorted, by the
        largest numbers of its labels."""
        if recipe.labels == "hard" and self.labels.is_floating_point():
            spec = self.spec
            sizes = (spec.inner_steps, spec.dataset.classes, spec.images_per_class_per_step)
            by_place = not is_unsorted(self.imported)
            return LabelledImages(self.images, class_labels(*sizes) if by_place else self.classes)
        return LabelledImages(self.images, self.labels)

    def tensors(self) -> dict[str, Tensor]:
        return {"images": self.images, "labels": self.labels, "rates": self.rates}

    @property
    def sha256(self) -> str:
        """Hash of images, labels and rates alone: equal wherever and whenever they were computed."""
        return tensor_sha256(self.tensors())

    def header(self) -> dict[str, Any]:
        """The header of the file, for a reader without ddsweep: plain JSON types only. Where weights lay on
        this machine is not in it."""
        pool = self.spec.pool and replace(self.spec.pool, weights="")
        return {
            "kind": "distilled",
            "trial_id": self.spec.trial_id,
            "mean": list(self.mean),
            "std": list(self.std),
            "whitening": self.spec.whitening,
            "class_names": list(self.class_names),
            "order": _ORDERS[self.recipe.order],
            "optimizer": _OPTIMIZERS[self.recipe.optimizer].format(mu=self.recipe.momentum),
            "recipe": self.recipe.to_dict(),
            "tuned": None if self.tuned is None else self.tuned.to_dict(),
            "spec": replace(self.spec, pool=pool).to_dict(),
            "provenance": dict(self.provenance),
            **({} if self.imported is None else {"imported": dict(self.imported)}),
        }

    def network(self, index: int = 0) -> nn.Module:
        """A network as the set was made for, at its initial weights.

        For a ``random`` set held-out network ``index``; a ``fixed`` set has one known network. Raises
        `UserError`, and runs nothing, for a set made for a network of a user's own whose code this process
        has not loaded (`ddsweep.own_code`).
        """
        spec = self.spec
        module = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes)
        if traits_of(module) is None:
            module = module.to_empty(device="cpu")
            module.load_state_dict(self.initial_weights(module, index))
            return module
        module = copy.deepcopy(module).train()  # the process uses the built one elsewhere
        state = draw_state(module, spec.init_law, spec.init_param, self._network_seed(index))
        with torch.no_grad():
            for name, value in (*module.named_parameters(), *module.named_buffers()):
                value.copy_(state[name])
        return module

    def _network_seed(self, index: int) -> int:
        spec = self.spec
        if spec.init == "fixed":
            return known_seed(spec)
        return derive_seed("heldout", spec.network, spec.init_law, spec.init_param, index)

    def initial_weights(self, module: nn.Module, index: int = 0) -> dict[str, Tensor]:
        """Initial weights for ``module``, drawn by the law that the set was made for: an argument for its
        ``load_state_dict``, on the CPU.

        They are those of held-out network ``index``, or of the known network of a ``fixed`` set. The law
        fills the ``weight`` and ``bias`` of layers (`ddsweep.core.init.draw_network`); other parameters stay
        as ``module`` has them. So do buffers, except running statistics, which start anew. Raises
        ``ValueError`` for a set that was made for networks of a pool: those are files.
        """
        spec = self.spec
        if spec.pool is not None:
            raise ValueError(
                f"the set was made for trained networks, of pool {spec.pool.name}: load one of "
                f"results/pools/{spec.pool.name}/networks with safetensors.torch.load_file"
            )
        drawn = draw_network(module, spec.init_law, spec.init_param, self._network_seed(index))
        return drawn | _rest_of_state(module, drawn)

    def normalise(self, images: Any) -> Tensor:
        """Raw images in the space of the set, ``[..., c, h, w]``: a network that `apply` has trained takes
        these.

        ``images`` is a tensor or an array ``[..., c, h, w]`` with the set's shape: bytes from 0 to 255, or
        floats from 0 to 1. They become ``(x - mean) / std`` per channel, on their device, in float32 (a
        tensor of floats keeps its type). Raises ``ValueError`` for another shape, for values outside the
        range, and for a set with ``whitening``: whitening needs the training data, which the set does not
        hold.
        """
        if self.spec.whitening != "none":
            raise ValueError(
                f"the set was made for whitened images (whitening: {self.spec.whitening}), and only the "
                "data set tells how: ddsweep.data.load.load_splits with that whitening gives them"
            )
        pixels = torch.as_tensor(images)
        if not isinstance(images, Tensor) and pixels.is_floating_point():
            pixels = pixels.float()  # numpy's floats are double unless one says otherwise
        elif not pixels.is_floating_point() and pixels.dtype != torch.uint8:
            pixels = pixels.long()  # torch finds no extremes of uint16
        self._check_shape(pixels)
        top = 1 if pixels.is_floating_point() else 255
        low, high = (float(value) for value in torch.aminmax(pixels)) if pixels.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= top):
            raise ValueError(
                f"images go from {low:.4g} to {high:.4g}; give floats from 0 to 1, or whole numbers from 0 "
                "to 255 (images that are normalised already need no more)"
            )
        if pixels.is_floating_point():
            shift, scale = (pixels.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
            return (pixels - shift) / scale
        return normalise(pixels.byte(), self.mean, self.std, torch.float32)

    def _check_shape(self, images: Tensor) -> None:
        c, h, w = shape = self.spec.dataset.shape
        found = tuple(images.shape)
        if found[-3:] == shape:
            return
        hint = ""
        if found[-3:] == (h, w, c):
            hint = "; channels go before height and width: images.movedim(-1, -3)"
        elif c == 1 and found[-2:] == (h, w) and found[-3:-2] != (3,):
            hint = "; they lack the axis of channels: images[..., None, :, :]"
        elif len(found) >= 3 and found[-2:] == (h, w):
            hint = f"; they have {found[-3]} channels, and the set has {c}"
        raise ValueError(f"images of shape {list(found)}; the set takes [..., {c}, {h}, {w}]{hint}")


def _rest_of_state(module: nn.Module, drawn: Params) -> dict[str, Tensor]:
    """The rest of the state of ``module``: second names of shared parameters, and buffers."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    shared = {
        name: drawn[first[id(parameter)]]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name not in drawn
    }
    buffers = {
        name: value.detach().to("cpu", copy=True)
        for name, value in module.state_dict().items()
        if name not in drawn and name not in shared and isinstance(value, Tensor)
    }
    for home, layer in module.named_modules():
        if isinstance(getattr(layer, "running_mean", None), Tensor):  # of batch or instance norm
            prefix = f"{home}." if home else ""
            for name, start in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
                if prefix + name in buffers:
                    buffers[prefix + name] = torch.full_like(buffers[prefix + name], start, device="cpu")
    return shared | buffers


@torch.enable_grad()
def apply(
    distilled: DistilledSet,
    model: nn.Module,
    steps: int | None = None,
    index: int | None = None,
    *,
    recipe: Recipe | None = None,
) -> nn.Module:
    """Train ``model`` in place on the distilled set, exactly as evaluation does, and return it.

    ``model`` takes normalised images ``[N, c, h, w]`` (`DistilledSet.normalise`) and gives logits ``[N,
    classes]``; training starts from its weights, so they should be drawn as `DistilledSet.spec` says
    (``model.load_state_dict(distilled.initial_weights(model))`` does that for a network of any kind).
    ``recipe`` is the set's own, or a change of it, such as ``replace(distilled.recipe, rate=0.1)``. ``steps``
    other than those of its epochs stops early, or goes on with the rates of the last epoch. A random order is
    that of held-out network ``index``: by default 0, or the known network of a ``fixed`` set.

    ``model`` stays in its mode, and a user's own network (`DistilledSet.network`, in training mode) draws
    what held-out network ``index`` draws in evaluation. T steps are too few for the running statistics of
    batch norm: a model with it is better evaluated in training mode too, by the statistics of the batch.
    A parameter that the model does not use gets a gradient of zero. Raises ``ValueError`` if the model does
    not take the set's images, or does not give one logit per class, for a negative number of steps, for an
    imported set without a rate in ``recipe``, and under ``torch.inference_mode()``, in which nothing can be
    trained.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("apply: nothing can be trained under torch.inference_mode(); call it outside")
    parameters: Params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no parameters to train")
    first, spec = next(iter(parameters.values())), distilled.spec
    if steps is not None and steps < 0:
        raise ValueError(f"steps={steps} must be 0 or more")
    recipe = distilled.recipe if recipe is None else recipe
    if spec.method == "given" and recipe.rate is None:
        raise ValueError(
            "the set was imported, and has no rates: give a recipe with one, such as "
            "replace(distilled.recipe, rate=0.01, epochs=100)"
        )
    batches = distilled.batches(recipe)
    inner_steps, batch = batches.labels.shape[:2]
    labels = batches.labels.to(first.device)
    if labels.is_floating_point():
        labels = labels.to(first.dtype)
    rates = recipe.rates(distilled.rates.tolist())
    total = recipe.steps_per_epoch(spec) * recipe.epochs if steps is None else steps
    if index is None:
        index = spec.seed if spec.init == "fixed" else 0
    loop = held_out_loop(recipe, spec, "heldout", [index], total)
    used = LabelledImages(batches.images.to(first.device, first.dtype), labels)
    picked = Batches(used, loop, loop.order(inner_steps, batch, total))
    slots, seed = loop.optimizer.start(parameters), distilled._network_seed(index)
    for t in range(total):
        x, y = picked.at(t)
        x, y = x.flatten(0, -4), y.flatten(0, -2) if y.is_floating_point() else y.flatten()
        with draws_of(model, seed, t):
            logits = _forward(model, x) if t == 0 else model(x)
        if not isinstance(logits, Tensor):
            raise ValueError(f"the model gives a {type(logits).__name__}, and no logits [N, classes]")
        if logits.shape != (len(x), len(distilled.class_names)):
            raise ValueError(
                f"the model gives logits of shape {tuple(logits.shape)} for {counted(len(x), 'image')}; "
                f"the set has {len(distilled.class_names)} classes"
            )
        loss = F.cross_entropy(logits, y)
        gradient = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        with torch.no_grad():
            found = dict(zip(parameters, gradient, strict=True))
            rate = rate_at(rates, inner_steps, t, loop, first)
            after, slots = loop.optimizer.update(parameters, slots, found, rate, t)
            for name, parameter in parameters.items():
                parameter.copy_(after[name])
    return model


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    """The first pass, in which a model for other images fails. Raises ``ValueError`` with torch's message."""
    try:
        logits: Tensor = model(images)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        shape = list(images.shape[1:])
        raise ValueError(f"the model does not take the set's images, {shape} each: {said}") from error
    return logits
