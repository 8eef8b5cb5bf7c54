"""The sweep on Ray: Tune packs the trials, actors evaluate what they make. Ray is imported in here."""
