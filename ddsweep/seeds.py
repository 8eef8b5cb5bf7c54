"""Seeds by hashing: every random draw in ddsweep has a role, and its seed is a pure function of it.

No generator state is ever stored. The role and the indices determine the numbers. So a killed trial goes on
bit for bit, and a held-out network is the same for every trial.

Roles in use
------------
``heldout``      (network, law, param, i)  initial weights of held-out network i: final evaluation only
``own``          (seed of a network,)      what a network of a user's own draws when it is built
``selection``    (network, law, param, i)  networks for validation scores and the search for rates
``known``        (network, law, param, i)  the known initial network of a trial with ``init: fixed``
``outer``        (trial, step, k)          fresh network k of one outer step
``real_batch``   (trial, step)             which real images an outer step sees
``order``        (trial, step, k)          the order of batches for network k of one outer step
``heldout_order``  (trial, role, i)        the same for held-out and selection network i
``heldout_order``  (seed of those, epoch)  the order of all images in one epoch of minibatches
``heldout_augment``  (trial, role, i, t)   the augmentation of step t of held-out network i
``window``       (trial, step)             where the window of one outer step lies
``augment``      (trial, which, step)      the augmentation of one outer step
``image_init``   (trial,)                  the synthetic images before the first outer step
``split``        (dataset, split_seed)     the validation split
``baseline``     (source, dataset, i)      the draw of real images for held-out network i
``baseline_selection``  (source, dataset, i)  the same for selection network i
``pool``         (recipe, role, i)         initial weights of network i of a pool, role train or heldout
``pool_order``   (recipe, role, i, epoch)  the order of real images in its training
``pool_draw``    (trial, step)             which networks of its pool an outer step takes
``baseline_candidate``  (source, dataset, i)  candidate i of which the best is ``optimized_random``
``dropout``      (trial, step, k)          the draws of network k of one outer step
``dropout``      (seed of a network, t)    those of a network in inner step t
``search``       (search seed, i, setting) the value of a setting in sample i of a random search
``proposal``     (search seed, search, i, attempt)  the sampler that proposes sample i of a guided search
"""

from __future__ import annotations

import hashlib
import json

__all__ = ["ROLES", "derive_seed"]

ROLES = frozenset(
    {
        "heldout",
        "own",
        "selection",
        "known",
        "outer",
        "real_batch",
        "order",
        "heldout_order",
        "heldout_augment",
        "window",
        "augment",
        "image_init",
        "split",
        "baseline",
        "baseline_selection",
        "pool",
        "pool_order",
        "pool_draw",
        "baseline_candidate",
        "dropout",
        "search",
        "proposal",
    }
)


def derive_seed(role: str, *parts: str | int | float) -> int:
    """A 63-bit seed, a pure function of ``role`` and ``parts`` (the same on every machine).

    Raises ``ValueError`` for a role that is not in ``ROLES``: a misspelt role would silently be a
    stream of its own.
    """
    if role not in ROLES:
        raise ValueError(f"unknown seed role {role!r}; roles are {', '.join(sorted(ROLES))}")
    text = json.dumps([role, *parts], separators=(",", ":"), allow_nan=False)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
