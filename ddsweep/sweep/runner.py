"""`run_sweep`: what is missing of a sweep, distilled by Ray Tune and evaluated by the shards meanwhile.

Tune packs, retries and watches; which trials there are and which are done is read off the files. A
trial's function returns as soon as the stop file is there, so draining is the same for all causes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.data.load import Splits
from ddsweep.errors import UserError
from ddsweep.evaluation import forget_stop, settled, take_over_all, trial_is_stopped
from ddsweep.pools.imagenet import ready_pool
from ddsweep.pools.judged import note_networks
from ddsweep.pools.store import open_pool
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import SweepSpec, is_smoke
from ddsweep.sweep.amounts import with_measured_resources
from ddsweep.sweep.distilling import Distilling
from ddsweep.sweep.drain import Drain
from ddsweep.sweep.full_disk import FullDisk
from ddsweep.sweep.guide import Guide
from ddsweep.sweep.join import check_nodes
from ddsweep.sweep.metrics import exported
from ddsweep.sweep.observe import Board
from ddsweep.sweep.placement import check_placement, largest_request, side_by_side
from ddsweep.sweep.prepare import load_all_splits, repeats, splits_key
from ddsweep.sweep.retry import SPREAD_S
from ddsweep.sweep.session import RaySession, ray_session
from ddsweep.sweep.shards import EvalShards, Listener, put_splits
from ddsweep.trial import is_distilled

__all__ = ["Outcome", "SweepRequest", "run_sweep"]


@dataclass(frozen=True)
class Outcome:
    """The numbers of trials that are done, failed, left for the next run by a drain (with those still to be
    proposed), stopped by the scheduler, and left alone by an evaluation because they are not distilled."""

    done: int
    failed: int
    left: int
    stopped: int = 0
    undistilled: int = 0

    @property
    def exit_code(self) -> int:
        """0 all done, stopped or left alone, 2 some failed, 75 drained before the end."""
        if self.left:
            return 75
        return 2 if self.failed else 0


@dataclass(frozen=True)
class SweepRequest:
    """What is asked for: ``trials`` of ``sweep``, with results in ``directory``.

    ``seconds`` is the estimated time of each trial, ``labels`` its name for people. ``address`` is that of a
    Ray to join; none: one is started. ``only_evaluate`` leaves alone what is not distilled yet. A ``guide``
    proposes further trials; ``announce`` makes them known to the board and others before they begin, and
    returns their estimated seconds.
    """

    sweep: SweepSpec
    trials: Sequence[TrialSpec]
    directory: SweepDirectory
    data_root: Path | None
    seconds: Mapping[str, float]
    labels: Mapping[str, str]
    address: str | None = None
    only_evaluate: bool = False
    guide: Guide | None = None
    announce: Callable[[Sequence[TrialSpec]], Mapping[str, float]] = lambda trials: {}


@dataclass
class _Missing:
    """What is missing of a sweep: ``to_distil``, and ``distilled`` trials that lack evaluations. ``evals``
    are the parts that each has, ``known`` what is known of parts. ``undistilled`` trials are left alone by an
    evaluation."""

    to_distil: list[TrialSpec]
    distilled: list[TrialSpec]
    known: KnownParts
    evals: dict[str, list[Path]]
    splits: dict[str, Splits] = field(default_factory=dict)
    undistilled: int = 0

    @property
    def trials(self) -> list[TrialSpec]:
        return [*self.distilled, *self.to_distil]

    def join(self, others: _Missing) -> None:
        self.to_distil += others.to_distil
        self.distilled += others.distilled
        self.evals |= others.evals


def run_sweep(
    request: SweepRequest,
    board: Board,
    drain: Drain,
    *,
    on_ready: Callable[[], None] = lambda: None,
    spread_s: float = SPREAD_S,
) -> Outcome:
    """Distil and evaluate what is missing of the trials; the caller holds the sweep's lock.

    ``on_ready`` is called once all that could be refused has been checked. Attempts on what dies are spread
    over ``spread_s`` seconds. Raises `UserError` before any work for data that is not there and resources
    that do not fit, `Drained` if it is told to end before the work begins.
    """
    directory = SweepDirectory(request.directory.root.resolve())  # workers may run in another folder
    request = replace(request, directory=directory)
    with drain.interruptible():
        missing = _missing(request, board)
    directory.stop_file.unlink(missing_ok=True)
    with drain.interruptible():
        _make_ready(request, missing, board)
        while request.guide and not missing.to_distil and (proposed := request.guide.propose()):
            request = replace(
                request,
                trials=[*request.trials, *proposed],
                seconds={**request.seconds, **request.announce(proposed)},
            )
            missing.join(_ready(replace(request, trials=proposed), missing.splits, board))
    left = 0
    if missing.trials:
        left = _work(request, missing, board, drain, on_ready, spread_s)
    else:
        on_ready()
    missing.known.save(directory)
    return _outcome(board, left, missing.undistilled)


def _missing(request: SweepRequest, board: Board) -> _Missing:
    """Those of the trials that are neither done nor stopped for good. Raises `UserError` if only what is
    distilled is to be evaluated, and nothing is."""
    sweep, directory = request.sweep, request.directory
    evaluation = sweep.evaluate.spec()
    missing = _Missing([], [], KnownParts.load(directory), directory.evals_by_trial())
    for trial in request.trials:
        parts = missing.evals.get(trial.trial_id, [])
        if settled(trial, evaluation, directory, sweep.name, missing.known, parts):
            board.found(trial.trial_id, "done")
        elif sweep.scheduler and trial_is_stopped(trial, directory, missing.known):
            board.found(trial.trial_id, "stopped")
        elif is_distilled(trial, directory):
            missing.distilled.append(trial)
        elif request.only_evaluate:
            missing.undistilled += 1
        else:
            missing.to_distil.append(trial)
    missing.known.save(directory)
    if request.only_evaluate and not missing.distilled and not board.counts()["done"]:
        raise UserError(f"{directory.root}: no trial is distilled yet; run the sweep first")
    return missing


def _ready(request: SweepRequest, splits: dict[str, Splits], board: Board) -> _Missing:
    """What is missing of further trials, as `_missing` and `_make_ready` say; ``splits`` gets their data."""
    found = replace(_missing(request, board), splits=splits)
    _make_ready(request, found, board)
    return found


def _make_ready(request: SweepRequest, missing: _Missing, board: Board) -> None:
    """Forget failures of what is missing, load its data, and take over what other sweeps have finished."""
    for trial in missing.trials:
        request.directory.failure_part(trial.trial_id).unlink(missing_ok=True)
    if missing.trials:
        _load(request, missing, board)
        _take_over(request, missing, board)


def _load(request: SweepRequest, missing: _Missing, board: Board) -> None:
    """Data and pools of what is missing. Raises `UserError` for what is not there."""
    for own in dict.fromkeys(trial.pool for trial in missing.trials if trial.pool is not None):
        ready_pool(own, request.directory.pools, request.data_root)
        note_networks(open_pool(own, request.directory.pools), request.directory)
    stand_in = is_smoke(request.sweep.name)
    lacking = [trial for trial in missing.trials if splits_key(trial) not in missing.splits]
    loaded = load_all_splits(lacking, request.data_root, stand_in=stand_in)
    missing.splits |= loaded
    for name in dict.fromkeys(found.name for found in loaded.values() if found.stand_in):
        board.say(f"{name} is missing: small stand-in data replace it, and the numbers mean nothing")
    for line in repeats(lacking, loaded):
        board.say(line)


def _take_over(request: SweepRequest, missing: _Missing, board: Board) -> None:
    """Take over what other sweeps have finished of the same trials."""
    sweep, directory = request.sweep, request.directory
    prints = {trial.trial_id: missing.splits[splits_key(trial)].fingerprint for trial in missing.to_distil}
    taken = take_over_all(missing.to_distil, prints, directory)
    for name, count in Counter(item.source.root.name for item in taken.values()).items():
        board.say(f"{counted(count, 'trial')} taken over from sweep {name}, which has finished the same")
    missing.evals |= {trial_id: list(item.evals) for trial_id, item in taken.items()}
    for trial in [trial for trial in missing.to_distil if trial.trial_id in taken]:
        missing.to_distil.remove(trial)
        parts = missing.evals[trial.trial_id]
        if settled(trial, sweep.evaluate.spec(), directory, sweep.name, missing.known, parts):
            board.found(trial.trial_id, "done")
        else:
            missing.distilled.append(trial)


def _work(
    request: SweepRequest,
    missing: _Missing,
    board: Board,
    drain: Drain,
    on_ready: Callable[[], None],
    spread_s: float,
) -> int:
    """Distil and evaluate on a Ray. Returns how many trials a drain has left to be proposed."""
    sweep, directory = request.sweep, request.directory
    costs = {trial.trial_id: request.seconds[trial.trial_id] for trial in missing.to_distil}
    board.say("starting Ray" if request.address is None else f"joining the Ray at {request.address}")
    board.expect(costs, {trial.trial_id for trial in missing.distilled}, at_most=sweep.scheduler is not None)
    if request.guide is not None:
        board.expect_more({}, (), request.guide.to_propose)
    with ray_session(
        drain,
        job=f"{'evaluate' if request.only_evaluate else 'sweep'} {sweep.name}",
        address=request.address,
        cpus=sweep.resources.total_cpus,
        gpus=sweep.resources.total_gpus,
        dashboard=sweep.resources.dashboard,
        data_bytes=sum(found.nbytes for found in missing.splits.values()),
    ) as session:
        with drain.interruptible():
            if request.address is not None:
                check_nodes({node.name: node.host for node in session.nodes}, directory.temporary)
            networks = None
            if sweep.resources.to_be_measured:
                further = request.guide.to_propose if request.guide else 0
                sweep, networks = with_measured_resources(
                    sweep, missing.to_distil, session, directory, board, request.seconds, further
                )
            elif idle := sweep.resources.idle_gpus(missing.to_distil, session.gpus):
                board.say(idle)
            placement = check_placement(sweep, missing.trials, session)
            if request.guide is not None and (alike := (*missing.to_distil, *request.guide.open_trials)):
                largest_request(sweep, alike, session)
        on_ready()
        if session.dashboard:
            board.say(_dashboard_line(session))
        draining = threading.Event()

        def begin(cause: str) -> None:
            draining.set()
            shards.begin_drain()
            with suppress(OSError):  # no space, say: what runs then ends by itself, and nothing else begins
                directory.stop_file.touch()
            board.say(f"{cause}: draining; trials checkpoint and stop (again to stop at once)")

        disk = FullDisk(
            board.say, lambda: drain.tell("full disk"), side_by_side(sweep, missing.trials, session)
        )
        with drain.interruptible():
            shared = {key: put_splits(value) for key, value in missing.splits.items()}
            shards = EvalShards(
                sweep,
                placement,
                shared,
                directory,
                Listener(board.set_state, disk.met, board.say),
                earlier={trial.trial_id: missing.evals.get(trial.trial_id, []) for trial in missing.trials},
                known=missing.known,
                spread_s=spread_s,
            )
            shards.start()

        def make_ready(proposed: Sequence[TrialSpec]) -> Sequence[TrialSpec]:
            costs = request.announce(proposed)
            found = _ready(replace(request, trials=proposed), missing.splits, board)
            shared.update({key: put_splits(missing.splits[key]) for key in missing.splits.keys() - shared})
            shards.expect({trial.trial_id: found.evals.get(trial.trial_id, []) for trial in found.trials})
            expected = {trial.trial_id: costs[trial.trial_id] for trial in found.to_distil}
            further = request.guide.to_propose if request.guide else 0
            board.expect_more(expected, [trial.trial_id for trial in found.distilled], further)
            for trial in found.distilled:
                shards.submit(trial)
            for trial in found.to_distil:
                forget_stop(trial, directory)
            return found.to_distil

        distilling = Distilling(
            *(sweep, session, board, shards, disk, directory, shared, request.seconds, request.labels),
            draining=draining.is_set,
            spread_s=spread_s,
            networks=networks,
            guide=request.guide,
            make_ready=make_ready,
        )
        try:
            with (
                exported(sweep.name, board, shards.load, directory),
                drain.leftover(lambda: directory.stop_file.unlink(missing_ok=True)),
                drain.at_work(begin, directory.stop_file),
            ):
                for trial in missing.distilled:
                    shards.submit(trial)
                for trial in missing.to_distil:
                    forget_stop(trial, directory)  # there is no scheduler any more: it goes on
                error = distilling.run(missing.to_distil, request.trials) if missing.to_distil else None
                shards.close()
                if error is not None:
                    raise error
                if request.guide is not None and (short := request.guide.ended_early):
                    board.say(short)
        finally:
            directory.stop_file.unlink(missing_ok=True)
        return request.guide.to_propose if request.guide and draining.is_set() else 0


def _outcome(board: Board, to_propose: int, undistilled: int) -> Outcome:
    counts = board.counts()
    done, failed, stopped = counts["done"], counts["failed"], counts["stopped"]
    left = counts.total() - done - failed - stopped - undistilled + to_propose
    return Outcome(done, failed, left, stopped, undistilled)


def _dashboard_line(session: RaySession) -> str:
    where = f"Ray dashboard: {session.dashboard}"
    return f"{where} (log in with the token in {session.token})" if session.token else where
