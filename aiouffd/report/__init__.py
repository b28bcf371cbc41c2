"""What is told of a run: figures, what they mean, and a page that shows them.

Layout, the lowest first: `words` (figures as people write them), `timeline` (counts by time, in bounded memory), `run`
(the figures of a run, and their file), `advice` (what they mean), `charts` (pictures), `heat` (the
picture of a recording), `page` (HTML), `output` (how they are written: at once or not at all).
"""
