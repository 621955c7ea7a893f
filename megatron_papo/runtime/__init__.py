"""Ranks as processes: they are started, watched and ended here, and the failure that explains a run is found."""
