"""Trackers: the curves, settings, final rows and pictures of a sweep, sent to TensorBoard, MLflow or W&B.

All is read from the files of the sweep, so it works beside a driver, for arrays, and after the fact.
"""
