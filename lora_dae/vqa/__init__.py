"""Questions about pictures to multimodal models: a bank of questions, judges, and what their answers add up to.

``bank`` makes questions from attributes or a caption, ``ask`` puts them to judges (``endpoint``, ``local``,
``classifier``) through the ``cache``, ``parse`` reads the answers, ``score`` and ``pairwise`` count them.
"""
