"""``scheduler: local``: the jobs of a launch one after the other on this machine, through submitit.

`ddsweep.launch.start` starts it as a separate process; the record of the launch has its number. SIGTERM
(`ddsweep cancel`) drains the running job and ends the launch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from ddsweep.launch.folder import Job, Launch, LaunchFolder, read_json
from ddsweep.launch.jobs import FinishJob, stages
from ddsweep.launch.submit import executor
from ddsweep.results.lock import process_start

__all__ = ["run_local"]


def run_local(folder: LaunchFolder) -> None:
    """Run the jobs of the launch in ``folder`` to their end."""
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)

    signal.signal(signal.SIGTERM, stop)
    launch = Launch.read(folder)
    own = Job(str(os.getpid()), "local", started=process_start(os.getpid()), host=socket.gethostname())
    replace(launch, jobs=(own,)).write(folder)
    site, shares = launch.site_spec, (read_json(folder.shares) or {}).get("trials", [])
    submitit_executor = executor(site, folder, launch.sweep)
    for stage in stages(folder, launch.mode, site, len(shares)):
        for call in stage.calls:
            if told and not isinstance(call, FinishJob):
                continue
            job = submitit_executor.submit(call)
            print(f"{call.kind} {call.index}: process {job.job_id}", flush=True)
            while not job.done():
                if told:  # by the file: submitit's controller does not pass on every signal
                    folder.stop_file.touch()
                time.sleep(0.2)


if __name__ == "__main__":
    run_local(LaunchFolder(Path(sys.argv[1])))
