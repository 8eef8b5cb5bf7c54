"""From a sweep to its trials: points, grid, samples and seeds crossed, each a frozen `TrialSpec`."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from ddsweep.catalog import DEFAULT_METHOD, METHODS, DatasetSpec, PoolSpec, TrialSpec, find_method
from ddsweep.catalog.numbers import counted
from ddsweep.errors import DataError, SettingError
from ddsweep.spec.model import SweepSpec
from ddsweep.spec.protocols import check_evaluation
from ddsweep.spec.values import MOST_TRIALS, SIZES

_LISTED = 5
"""The number of impossible combinations that a message lists."""


Proposed = Mapping[str, Sequence[Mapping[str, Any]]]
"""The samples of guided searches that are written down, in order, by the key of the search."""


@dataclass(frozen=True)
class Sample:
    """One sample of a guided search: a value for each setting in its space, and the ids of its trials, one
    for each seed. Impossible trials are not among them; those of an earlier sample are."""

    values: Mapping[str, Any]
    trial_ids: tuple[str, ...]


@dataclass(frozen=True)
class Search:
    """A guided search: of one combination of points and grid, with all ``settings`` outside the space.

    ``key`` names it, and ``left`` is how many samples are still to be proposed. ``written`` is what its file
    of proposals holds.
    """

    key: str
    settings: Mapping[str, Any]
    samples: tuple[Sample, ...]
    left: int
    written: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Plan:
    """The trials of a sweep, and the (combination, reason) pairs that ``skip_invalid`` dropped.

    ``repeated`` are combinations that make the same trial as an earlier sample; they are left out as well.
    ``unjudged`` are (protocol and combination, reason) pairs of evaluations that ``skip_invalid`` leaves out.
    ``assumed`` says which sizes are 1 because the file leaves them out. ``to_propose`` is the number of
    trials that ``searches`` are still to propose; they are not among ``trials``.
    """

    trials: tuple[TrialSpec, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    repeated: tuple[str, ...] = ()
    unjudged: tuple[tuple[str, str], ...] = ()
    assumed: tuple[str, ...] = ()
    searches: tuple[Search, ...] = ()
    to_propose: int = 0


@dataclass
class _Begun:
    """A guided search while its trials are made: the ids of those of each sample."""

    settings: Mapping[str, Any]
    samples: list[dict[str, Any]]
    seeds: int
    ids: list[dict[str, None]] = field(default_factory=list)
    written: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class _Combination:
    text: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    sample: int
    varied: frozenset[str] = frozenset()
    search: _Begun | None = None


@dataclass(frozen=True)
class _Made:
    """A trial and its combination."""

    text: str
    sample: int
    trial: TrialSpec


def no_pools(value: str | dict[str, Any]) -> PoolSpec:
    """Used without a folder of pools."""
    raise DataError(f"pool: {value!r}: its training data enter the trial ids, and the pool is not here")


def expand(
    sweep: SweepSpec,
    resolve: Callable[[str | dict[str, Any]], DatasetSpec],
    resolve_pool: Callable[[str | dict[str, Any]], PoolSpec] = no_pools,
    proposed: Proposed | None = None,
    suits: Callable[[TrialSpec], None] | None = None,
) -> Plan:
    """Every trial of ``sweep``: points (outermost), then the grid in file order, samples, then seeds.

    A point overrides the grid (an axis that it gives itself is not crossed with it). The grid and samples
    override the base. Of samples that make the same trial the first counts. ``resolve`` turns the name or
    inline mapping of a data set into its spec, ``resolve_pool`` that of a pool; both are called once for each
    value. ``proposed`` are the samples of guided searches that are written down. ``suits`` raises
    `SettingError` for a trial that is impossible by what lies on disk.

    Raises `SettingError` for combinations that are impossible (unless ``skip_invalid``), for two that make
    the same trial, if no trial is left, for a scheduler that could stop no trial, and for an evaluation that
    is impossible (see `check_evaluation`).
    """
    if (count := _size(sweep)) > MOST_TRIALS:
        raise SettingError(f"sweep {sweep.name}: {count} trials are more than {MOST_TRIALS}; split it up")
    datasets: dict[str, DatasetSpec] = {}
    pools: dict[str, PoolSpec] = {}
    trials: dict[str, _Made] = {}
    dropped: list[tuple[str, str]] = []
    repeated: list[str] = []
    invalid: dict[str, str] = {}
    assumed: dict[str, None] = {}
    methods = _methods(sweep)
    searches: dict[str, _Begun] = {}
    for combination in _combinations(sweep, proposed or {}, searches):
        settings = dict(combination.settings)
        dataset = _resolved(sweep, datasets, settings.pop("dataset"), resolve)
        if settings.get("pool") is not None:
            settings["pool"] = _resolved(sweep, pools, settings["pool"], resolve_pool)
        if one := _assumed(sweep, combination):
            settings[one[0]] = 1
            assumed.setdefault("{}: 1, because only {} of the three sizes is given".format(*one))
        for seed in combination.seeds:
            text = combination.text + (f" seed={seed}" if len(combination.seeds) > 1 else "")
            try:
                own, lacked = _of_method(sweep, _sizes(settings), methods)
                trial = TrialSpec(dataset, **{**own, "seed": seed})
                if suits is not None:
                    suits(trial)
            except SettingError as error:
                dropped.append((text, str(error)))
                invalid.setdefault(combination.text, str(error))
                continue
            if combination.search:
                combination.search.ids[combination.sample][trial.trial_id] = None
            if lacked & combination.varied and trial.trial_id in trials:
                continue  # it differs from that one in settings that its method lacks
            made = _Made(text, combination.sample, trial)
            if not _add(sweep, trials, made):
                repeated.append(text)
            sweep.resources.for_trial(trial)
            _enough_heldout(sweep, trial)
            _can_be_compiled(sweep, trial)
    if invalid and (not sweep.skip_invalid or not trials):
        raise SettingError(_impossible(sweep, invalid, len(dropped), len(trials) + len(dropped)))
    found = tuple(made.trial for made in trials.values())
    if sweep.scheduler and not any(map(sweep.scheduler.rungs, found)):
        most = max(trial.outer_steps for trial in found)
        raise SettingError(
            f"sweep {sweep.name}: scheduler.grace: {sweep.scheduler.grace} is not below the outer_steps of "
            f"any trial (at most {most}), so none could be stopped; give fewer, or leave `scheduler` out"
        )
    _names_differ(sweep, [trial.dataset for trial in found])
    _refuse_unused(sweep, found)
    named = [(made.text, made.trial) for made in trials.values()]
    unjudged = check_evaluation(sweep.name, sweep.evaluate.spec(), named, skip_invalid=sweep.skip_invalid)
    guided = tuple(_search(sweep, key, begun) for key, begun in searches.items())
    to_propose = sum(search.left * searches[search.key].seeds for search in guided)
    return Plan(found, tuple(dropped), tuple(repeated), unjudged, tuple(assumed), guided, to_propose)


def _search(sweep: SweepSpec, key: str, begun: _Begun) -> Search:
    assert sweep.search is not None
    samples = tuple(Sample(values, tuple(ids)) for values, ids in zip(begun.samples, begun.ids, strict=True))
    different = {repr(values) for values in begun.samples}
    over = sweep.search.no_more_marker in begun.written or len(different) >= sweep.search.size
    left = 0 if over else sweep.search.samples - len(samples)
    return Search(key, begun.settings, samples, left, begun.written)


def _resolved(sweep: SweepSpec, known: dict[str, Any], given: Any, resolve: Callable[[Any], Any]) -> Any:
    """The value for ``given``, looked up once."""
    key = repr(given)
    if key not in known:
        try:
            known[key] = resolve(given)
        except SettingError as error:
            raise SettingError(f"sweep {sweep.name}: {error}") from None
    return known[key]


def _names_differ(sweep: SweepSpec, datasets: Iterable[DatasetSpec]) -> None:
    """Refuses two data sets of one name: no table could tell them apart."""
    known: dict[str, DatasetSpec] = {}
    for spec in datasets:
        before = known.setdefault(spec.name, spec)
        if before.identity() != spec.identity():
            raise SettingError(
                f"sweep {sweep.name}: dataset: two different data sets are called {spec.name}; give each "
                "a name of its own, with the key `name`"
            )


def _can_be_compiled(sweep: SweepSpec, trial: TrialSpec) -> None:
    if sweep.resources.compile == "on" and trial.network_spec.code is not None:
        raise SettingError(
            f"sweep {sweep.name}: resources.compile: on: {trial.network} is code of your own, which is not "
            "compiled; auto leaves it out"
        )


def _enough_heldout(sweep: SweepSpec, trial: TrialSpec) -> None:
    """Whether the pool of a trial has the held-out networks that it is judged on. One of a known network is
    judged on that, and on others only under `on_random`."""
    pool, evaluation = trial.pool, sweep.evaluate.spec()
    judged = trial.init != "fixed" or "on_random" in evaluation.protocols
    if pool is not None and not pool.known and judged and evaluation.networks > pool.heldout:
        raise SettingError(
            f"sweep {sweep.name}: evaluate.networks: {evaluation.networks} are more than the {pool.heldout} "
            f"held-out networks of pool {pool.name}; give at most so many, or let `heldout` of the pool grow"
        )


def _size(sweep: SweepSpec) -> int:
    """The greatest number of trials, without making them."""
    axes = {key: len(values) for key, values in sweep.grid.items()}
    points = sweep.points or ({},)
    crossed = (math.prod(axes[key] for key in axes if key not in point) for point in points)
    return len(sweep.seeds) * (sweep.search.samples if sweep.search else 1) * sum(crossed)


def _combinations(
    sweep: SweepSpec, proposed: Proposed | None = None, searches: dict[str, _Begun] | None = None
) -> Iterable[_Combination]:
    """All combinations; guided searches are added to ``searches`` by their key."""
    search, begun = sweep.search, {} if searches is None else searches
    samples = [{}] if search is None else [] if search.guided else search.known()
    for point in sweep.points or ({},):
        axes = {key: values for key, values in sweep.grid.items() if key not in point}
        for values in itertools.product(*axes.values()):
            outside = {**point, **dict(zip(axes, values, strict=True))}
            mine = None
            if search is not None and search.guided:
                mine = _begun(sweep, {**sweep.base, **outside}, proposed or {}, begun)
                samples = mine.samples
            for number, sample in enumerate(samples):
                varied = {**outside, **sample}
                settings = {**sweep.base, **varied}
                seeds = (settings.pop("seed"),) if "seed" in settings else sweep.seeds
                text = " ".join(f"{key}={_value_text(value)}" for key, value in varied.items())
                yield _Combination(text or "base", settings, seeds, number, frozenset(varied), mine)


def _begun(
    sweep: SweepSpec, settings: dict[str, Any], proposed: Proposed, searches: dict[str, _Begun]
) -> _Begun:
    """The guided search with these ``settings`` outside its space. Combinations that differ only in what
    their method lacks share one. Raises `SettingError` for a space in which ``images_per_class`` varies, or
    what trials ask of a machine."""
    assert sweep.search is not None
    space = sweep.search.space.keys()
    for name in SIZES:
        if name in space and "images_per_class" not in settings:
            raise SettingError(
                f"sweep {sweep.name}: search.space.{name}: with it images_per_class varies, and tpe compares "
                "samples by val_score, so that it would only learn that more images are better; give "
                "images_per_class under base, grid or points"
            )
    for key in ("cpus", "gpus"):
        amount = getattr(sweep.resources, key)
        if isinstance(amount, dict) and amount["by"] in space:
            raise SettingError(
                f"sweep {sweep.name}: resources.{key}: by {amount['by']}: the places of a guided search are "
                "all alike, and are there before samples with other values are proposed; give one number"
            )
    lacks = frozenset() if "method" in space else find_method(settings.get("method", DEFAULT_METHOD)).lacks
    kept = {name: value for name, value in settings.items() if name not in space | lacks}
    key = _key({name: value for name, value in kept.items() if value != _DEFAULTS.get(name)})
    if key not in searches:
        # Earlier versions took the settings as the file gives them.
        written = proposed.get(key) or proposed.get(_key(kept), ())
        samples = sweep.search.known(written)
        seeds = 1 if "seed" in kept else len(sweep.seeds)
        searches[key] = _Begun(kept, samples, seeds, [{} for _ in samples], tuple(written))
    return searches[key]


_DEFAULTS = {
    item.name: item.default
    for item in fields(TrialSpec)
    # A size says something about the others, and a seed how many trials a sample has.
    if item.default is not MISSING and item.name not in (*SIZES, "seed")
}


def _key(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _methods(sweep: SweepSpec) -> frozenset[str]:
    """The methods of the sweep's trials."""
    searched = sweep.search.space if sweep.search else {}
    if not any("method" in named for named in (sweep.base, sweep.grid, searched, *sweep.points)):
        return frozenset({DEFAULT_METHOD})
    found = frozenset(c.settings.get("method", DEFAULT_METHOD) for c in _combinations(sweep))
    return found | frozenset(searched.get("method", {}).get("choice", ()))


_USED: dict[str, tuple[str, Callable[[TrialSpec], bool]]] = {
    "outer_decay_steps": ("outer_schedule: step", lambda trial: trial.outer_schedule == "step"),
    "outer_decay_factor": ("outer_schedule: step", lambda trial: trial.outer_schedule == "step"),
    "rate_limit": ("max_rollbacks", lambda trial: trial.max_rollbacks > 0),
    "outer_lr_rates": ("learned rates", lambda trial: trial.inner_lr_mode != "fixed"),
    "outer_lr_labels": ("labels: soft", lambda trial: trial.labels == "soft"),
    "init_param": ("another init_law than default", lambda trial: trial.init_law != "default"),
}
"""Settings that have an effect only beside others: what they need, and whether a trial has it."""


def _refuse_unused(sweep: SweepSpec, trials: Sequence[TrialSpec]) -> None:
    """Raises `SettingError` for a setting that trials differ in and none of them uses: they would differ in
    their random draws alone, and a report would show that as its effect."""
    for name, (needs, used) in _USED.items():
        having = [trial for trial in trials if name not in trial.lacks]
        values = {getattr(trial, name) for trial in having}
        if len(values) > 1 and not any(map(used, having)):
            given = ", ".join(sorted(map(str, values)))
            raise SettingError(
                f"sweep {sweep.name}: {name}: {given}: it has no effect without {needs}, which no trial has, "
                "so these trials would differ in nothing but chance; give one value"
            )


def _of_method(
    sweep: SweepSpec, settings: dict[str, Any], methods: frozenset[str]
) -> tuple[dict[str, Any], frozenset[str]]:
    """``settings`` without those that their method lacks, and the names of these. Raises `SettingError` for a
    setting that no method of the sweep has: no trial would use it."""
    lacks = find_method(settings.get("method", DEFAULT_METHOD)).lacks & settings.keys()
    for name in sorted(lacks):
        if all(name in find_method(method).lacks for method in methods):
            having = [method.name for method in METHODS.values() if name not in method.lacks]
            others = f"{' and '.join(having)} {'have' if len(having) > 1 else 'has'}"
            raise SettingError(
                f"{name}: {', '.join(sorted(methods))} has no such setting ({others}); leave it out"
            )
    return {name: value for name, value in settings.items() if name not in lacks}, lacks


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        return ":".join(str(value[key]) for key in ("source", "path") if key in value) or str(value)
    return str(value)


def _assumed(sweep: SweepSpec, combination: _Combination) -> tuple[str, str] | None:
    """(the size that is 1, the only given size) if a combination gives one of the three.

    The size that is 1 is ``inner_steps``, or ``images_per_class_per_step`` if ``inner_steps`` is given.
    Raises `SettingError` if all three are given: that is a mistake in the file, and not a combination to
    drop.
    """
    given = [name for name in SIZES if name in combination.settings]
    if len(given) == len(SIZES):
        values = ", ".join(f"{name}={combination.settings[name]}" for name in given)
        raise SettingError(
            f"sweep {sweep.name}: {combination.text}: all three sizes are given ({values}); give one or two, "
            "because images_per_class = inner_steps x images_per_class_per_step"
        )
    if len(given) != 1:
        return None
    return ("images_per_class_per_step" if given == ["inner_steps"] else "inner_steps", given[0])


def _sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` in terms of images_per_class and inner_steps, as `TrialSpec` has them."""
    out = dict(settings)
    if "images_per_class_per_step" not in out:
        return out
    per_step = out.pop("images_per_class_per_step")
    if "inner_steps" in out:
        out["images_per_class"] = out["inner_steps"] * per_step
    elif out["images_per_class"] % per_step:
        raise SettingError(
            f"images_per_class: {out['images_per_class']} does not divide into images_per_class_per_step "
            f"{per_step}; images_per_class = inner_steps x images_per_class_per_step"
        )
    else:
        out["inner_steps"] = out["images_per_class"] // per_step
    return out


def _add(sweep: SweepSpec, trials: dict[str, _Made], made: _Made) -> bool:
    """Keep a trial; False if an earlier sample made the same one."""
    trial, before = made.trial, trials.setdefault(made.trial.trial_id, made)
    if before is made:
        return True
    both = f"sweep {sweep.name}: `{before.text}` and `{made.text}`"
    same = replace(trial, dataset=before.trial.dataset) == before.trial
    if not same or trial.dataset.identity() != before.trial.dataset.identity():
        raise SettingError(
            f"{both} are different trials with one id, {trial.trial_id}; leave one of them out"
        )
    if made.sample != before.sample:
        return False
    hint = trial.init == "fixed" and before.text != made.text
    why = " (a fixed trial has models_per_step 1)" if hint else ""
    raise SettingError(f"{both} are the same trial, {trial.trial_id}{why}; leave one of them out")


def _impossible(sweep: SweepSpec, invalid: dict[str, str], count: int, total: int) -> str:
    be = "is" if count == 1 else "are"
    lines = [f"sweep {sweep.name}: {count} of {counted(total, 'trial')} {be} impossible:"]
    lines += [f"  {text}: {reason}" for text, reason in itertools.islice(invalid.items(), _LISTED)]
    if len(invalid) > _LISTED:
        lines.append(f"  ... and {len(invalid) - _LISTED} more")
    if count < total:
        lines.append("Change them, or set `skip_invalid: true` to leave them out.")
    return "\n".join(lines)
