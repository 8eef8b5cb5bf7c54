#!/usr/bin/env python3
"""A stand-in for sacct, for a lab without slurmdbd.

It answers the one call that submitit makes (``-o JobID,State,NodeList --parsable2 -j ID ...``) out
of ``scontrol show job``, which knows a job until MinJobAge is over.
"""

import subprocess
import sys
from itertools import pairwise


def asked(arguments: list[str]) -> list[str]:
    """The job ids of the command line, each once."""
    values = [value for flag, value in pairwise(arguments) if flag in ("-j", "--jobs")]
    return list(dict.fromkeys(job for value in values for job in value.split(",")))


print("JobID|State|NodeList")
for job in asked(sys.argv[1:]):
    shown = subprocess.run(
        ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False
    ).stdout
    for line in shown.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "JobId" not in fields:
            continue
        name = fields["JobId"]
        if "ArrayJobId" in fields:
            task = fields["ArrayTaskId"]
            name = f"{fields['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"
        print(f"{name}|{fields['JobState']}|{fields.get('NodeList', '')}")
