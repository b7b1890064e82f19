"""How good the images are: distances, fidelity, texture, attributes; the tables, plots and report of a run.

``command`` is ``evaluate.py``; ``run``, ``folder_run`` and ``compare_runs`` are its three ways. ``metrics`` makes the
numbers, ``statistics`` says what can be told apart, ``report`` lays them out; ``attributes`` is the classifier.
"""
