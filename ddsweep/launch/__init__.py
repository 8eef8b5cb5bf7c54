"""From a login node to many machines: site files, submission, and the code inside of jobs."""
