"""How good the images are: distances, fidelity, texture, attributes; the tables, plots and report of a run.

``observe`` keeps what is needed of every image, ``measure`` makes the numbers, ``table.ResultsTable`` lays them out,
``report.write_page`` makes the page that a person opens; ``command`` is ``evaluate.py``.
"""
