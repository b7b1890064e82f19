"""One file per layout in which photos are published: from ``data.*`` to a list of ``Entry``."""
