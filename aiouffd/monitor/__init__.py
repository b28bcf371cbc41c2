"""The face for memory of this process: `Monitor` serves a region, `open` makes one for a source and serves it."""
