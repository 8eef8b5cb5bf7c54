"""Pools of trained networks: their file (`file`), what is on disk (`store`), and making one (`train`).

``file`` imports neither torch nor ray: ``plan`` reads pools by it.
"""
