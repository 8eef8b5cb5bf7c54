"""One module for each question that a report answers, in the order of `ddsweep.report.page.write`."""
