"""The rating study for people: ``create`` a study from pictures, ``serve`` it, ``report`` its votes.

``plan`` decides who sees what, ``store`` keeps it (SQLite), ``app`` serves the page in ``pages/``, ``exclude`` applies
the rules that were fixed at creation, ``report`` counts.
"""
