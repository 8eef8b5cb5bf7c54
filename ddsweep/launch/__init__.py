"""From a login node to many machines: site files, submission, and what runs inside of the jobs."""
