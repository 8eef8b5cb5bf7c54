"""What the gradients of many networks have in common, and what is noise: by all, and by spatial frequency.

Run from the repository: ``python bench/noise.py results/NAME/artifacts/ID/distilled.safetensors``. See
bench/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from baseline import positive, prepare_device, print_json
from torch import Tensor

from ddsweep.core.execution import choose_plan
from ddsweep.core.images import LabelledImages, cosine_basis
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import build_network
from ddsweep.core.recipe import held_out_loop
from ddsweep.core.unroll import outer_gradient
from ddsweep.data.files import data_root
from ddsweep.data.load import load_splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import UserError
from ddsweep.seeds import derive_seed

AT_ONCE = 16


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", maxsplit=1)[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("distilled", help="a distilled set: the gradient is that at its images and rates")
    add("--networks", type=positive, default=192, help="random networks, in steps of 16")
    add("--real-batch", type=positive, default=64, help="real images, others for each network")
    add("--clip", type=float, default=0.5, help="gradients no longer than this many times their median")
    add("--data-root", help="folder with the data (default: DDSWEEP_DATA)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one")
    add("--threads", type=positive, default=1, help="CPU threads")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args(argv)


def _gradients(distilled: DistilledSet, o: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Of each network: by images ``[K, S, n, c, h, w]`` and by raw rates ``[K, T]``."""
    spec, device = distilled.spec, prepare_device(o.device)
    if spec.init != "random" or spec.objective != "classification" or spec.window is not None:
        raise UserError(
            f"{o.distilled}: this looks at sets that were made for random networks, by the whole gradient of "
            f"classification; that of this one has init: {spec.init}, objective: {spec.objective}, window: "
            f"{spec.window}"
        )
    splits = load_splits(
        spec.dataset,
        data_root(o.data_root),
        validation_fraction=spec.validation_fraction,
        split_seed=spec.split_seed,
        whitening=spec.whitening,
    )
    network = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes)
    plan = choose_plan(device, o.threads, network)
    raw = distilled.rates + torch.log(-torch.expm1(-distilled.rates))
    images, rates = [], []
    for first in range(0, o.networks, AT_ONCE):
        seeds = [derive_seed("outer", spec.trial_id, -1, first + k) for k in range(AT_ONCE)]
        generator = torch.Generator().manual_seed(first)
        picks = torch.randint(len(splits.train_labels), (AT_ONCE, o.real_batch), generator=generator)
        batch = splits.train.take(picks).to(device)
        found = outer_gradient(
            network,
            draw_networks(network, spec.init_law, spec.init_param, seeds, device=device, dtype=torch.float32),
            LabelledImages(distilled.images.to(device), distilled.labels.to(device)),
            raw.to(device),
            LabelledImages(batch.normalised(torch.float32), batch.labels),
            plan,
            loop=held_out_loop(distilled.recipe, spec, "selection", range(AT_ONCE), spec.steps),
        )
        images.append(found.images.cpu())
        rates.append(found.raw_rates.cpu())
    return torch.cat(images), torch.cat(rates)


def _parts(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Of gradients ``[K, ...]``, elementwise: (square of what they have in common, variance of the rest).

    The square is estimated without bias as the product of the means over two halves of the networks.
    """
    return gradients[0::2].mean(0) * gradients[1::2].mean(0), gradients.var(0)


def _row(what: str, signal: Tensor, noise: Tensor) -> dict[str, Any]:
    s, n = float(signal.sum()), float(noise.sum())
    print(f"{what:12} {signal.numel():7d} values   common² {s:9.2e}   noise² {n:9.2e}   ratio {s / n:8.5f}")
    return {"what": what, "values": signal.numel(), "common": s, "noise": n}


def main(argv: Sequence[str] | None = None) -> int:
    o = _options(argv)
    torch.set_num_threads(o.threads)
    try:
        distilled = DistilledSet.load(o.distilled)
        images, rates = _gradients(distilled, o)
    except UserError as error:
        print(f"noise: {error}", file=sys.stderr)
        return 1
    norms = torch.cat([images.flatten(1), rates], 1).norm(dim=1)
    images, rates = images[torch.isfinite(norms)], rates[torch.isfinite(norms)]
    norms = norms[torch.isfinite(norms)]
    print(
        f"{len(norms)} finite gradients of {o.networks}, norm: median {norms.median():.3g}, "
        f"largest {norms.max():.3g}; then none longer than {o.clip:g} times the median"
    )
    scale = (o.clip * norms.median() / norms).clamp_max(1.0)
    rows = [_row("rates", *_parts(rates * scale[:, None]))]
    high, wide = (cosine_basis(side).float() for side in images.shape[-2:])
    signal, noise = _parts(high @ (images * scale.view(-1, 1, 1, 1, 1, 1)) @ wide.T)
    rows.append(_row("images", signal, noise))
    down, across = (torch.arange(side) for side in images.shape[-2:])
    frequency = (down[:, None] ** 2 + across**2).sqrt()
    edges = [0.0, 3.0, 5.0, 7.0, 10.0, 14.0, 20.0, 100.0]
    for low, high_edge in itertools.pairwise(edges):
        band = (frequency >= low) & (frequency < high_edge)
        if band.any():
            rows.append(_row(f"  {low:g} to {high_edge:g}", signal[..., band], noise[..., band]))
    if o.json:
        print_json(
            prepare_device(o.device),
            {"trial": distilled.spec.trial_id, "networks": len(norms), "clip": o.clip, "rows": rows},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
