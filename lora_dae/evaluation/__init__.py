"""How good the images are: distances, fidelity, texture, attributes; the tables, plots and report of a run.

``measure.evaluate_images`` computes every number that applies, ``table.ResultsTable`` lays them out,
``report.write_report`` makes the page that a person opens.
"""
