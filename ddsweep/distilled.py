"""The distilled set: images, labels, rates, and all that is needed to apply them, in one value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import TrialSpec
from ddsweep.core.distill import known_seed
from ddsweep.core.init import draw_network
from ddsweep.core.networks import Params, build_network
from ddsweep.core.order import rate_index
from ddsweep.errors import CheckpointError
from ddsweep.results.artifacts import load_tensors, tensor_sha256
from ddsweep.seeds import derive_seed

__all__ = ["DistilledSet", "apply"]


@dataclass(frozen=True)
class DistilledSet:
    """``images [S, n, c, h, w]`` float32 in normalised pixel space, ``labels [S, n]`` int64, ``rates [T]``.

    Step t of T = S*E is one plain gradient step (no momentum, no weight decay) on batch t mod S, the
    batches in order, with rate ``rates[t]`` and mean cross-entropy. Real images go into the same
    space by ``(pixels / 255 - mean) / std`` per channel. ``spec`` says which networks it was made for.
    """

    images: Tensor
    labels: Tensor
    rates: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    spec: TrialSpec
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DistilledSet:
        """Read ``distilled.safetensors``. Raises `CheckpointError` if it is missing, torn, altered, or
        another kind of file."""
        tensors, header = load_tensors(path)
        if header.get("kind") != "distilled":
            raise CheckpointError(f"{path}: holds a {header.get('kind', 'file')}, not a distilled set")
        return cls.from_tensors(tensors, header)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> DistilledSet:
        return cls(
            images=tensors["images"],
            labels=tensors["labels"],
            rates=tensors["rates"],
            mean=tuple(header["mean"]),
            std=tuple(header["std"]),
            class_names=tuple(header["class_names"]),
            spec=TrialSpec.from_dict(header["spec"]),
            provenance=header.get("provenance", {}),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"images": self.images, "labels": self.labels, "rates": self.rates}

    @property
    def sha256(self) -> str:
        """Hash of images, labels and rates alone: equal wherever and whenever they were computed."""
        return tensor_sha256(self.tensors())

    def header(self) -> dict[str, Any]:
        """What the file says of itself, for a reader without ddsweep: plain JSON types only."""
        return {
            "kind": "distilled",
            "trial_id": self.spec.trial_id,
            "mean": list(self.mean),
            "std": list(self.std),
            "class_names": list(self.class_names),
            "order": "batches 0..S-1 in order, S*E steps, rates[t] at step t",
            "optimiser": "gradient descent on mean cross-entropy",
            "spec": self.spec.to_dict(),
            "provenance": dict(self.provenance),
        }

    def network(self, index: int = 0) -> nn.Module:
        """A network as the set was made for, at its initial weights.

        For a ``random`` set held-out network ``index``; a ``fixed`` set has one known network.
        """
        spec = self.spec
        module = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes)
        module = module.to_empty(device="cpu")
        module.load_state_dict(self.initial_weights(module, index))
        return module

    def initial_weights(self, module: nn.Module, index: int = 0) -> Params:
        """Initial weights for ``module``, drawn by the law that the set was made for."""
        spec = self.spec
        seed = derive_seed("heldout", spec.network, spec.init_law, spec.init_param, index)
        if spec.init == "fixed":
            seed = known_seed(spec)
        return draw_network(module, spec.init_law, spec.init_param, seed)


@torch.enable_grad()
def apply(distilled: DistilledSet, model: nn.Module, steps: int | None = None) -> nn.Module:
    """Train ``model`` in place on the distilled set, exactly as evaluation does, and return it.

    ``model`` takes normalised images ``[N, c, h, w]`` and gives logits ``[N, classes]``; its weights are
    where training starts, so they should be drawn as `DistilledSet.spec` says (``model.load_state_dict(
    distilled.initial_weights(model))`` does that for a network of any kind). ``steps`` other than T
    stops early, or goes on with the rates of the last epoch. Raises ``ValueError`` if the model does
    not give one logit per class.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no parameters to train")
    device, dtype = parameters[0].device, parameters[0].dtype
    images, labels = distilled.images.to(device, dtype), distilled.labels.to(device)
    rates, inner_steps = distilled.rates.tolist(), labels.shape[0]
    for t in range(len(rates) if steps is None else steps):
        s = t % inner_steps
        logits = model(images[s])
        if logits.shape != (labels.shape[1], len(distilled.class_names)):
            raise ValueError(
                f"the model gives logits of shape {tuple(logits.shape)} for {labels.shape[1]} images; "
                f"the set has {len(distilled.class_names)} classes"
            )
        gradient = torch.autograd.grad(F.cross_entropy(logits, labels[s]), parameters)
        with torch.no_grad():
            for parameter, g in zip(parameters, gradient, strict=True):
                parameter.sub_(rates[rate_index(t, inner_steps, len(rates))] * g)
    return model
